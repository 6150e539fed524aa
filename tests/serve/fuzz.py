"""Requests that nobody should send: mutations of valid ones, and plain garbage, from a seed."""

from __future__ import annotations

import base64
import copy
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tests.serve.models import picture
from tests.serve.support import data_uri, form

IMAGES = [picture(n, kind) for n, kind in enumerate(("PNG", "JPEG", "WEBP", "GIF", "JPEG"))]
URI = data_uri(IMAGES[1], "jpeg")
BARE = base64.b64encode(IMAGES[0]).decode()
RAW = "@@RAW%d@@"
# What json.dumps would not write.
RAWS = [
    "NaN", "-Infinity", "1e999", "9" * 5000, "[" * 3000, '{"a":' * 2000, "tru", '"\\ud83d"',
    '"\x01"', '{"text":"a","text":"b"}', "", "]", "1 2", "\ufeff1", '"\\x"',
]  # fmt: skip
VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 7, 1.5, -0.0, 10**30, "", " ", "\0", "\ud800", "a", "a" * 2001,
    "é" * 50, "🐱" * 600, "&#" + "9" * 2000 + ";", [], {}, [[]], [1, 2], [[1, 2], [3]], ["a", 1],
    {"text": {}}, {"image": 5}, {"image": ""}, {"image": "AAAA"}, {"image": URI[:200]},
    {"image": "https://127.0.0.1/a"}, {"image": "http://x"}, {"image": URI}, {"text": "a", "x": 1},
    {"type": "image_url", "image_url": {"url": URI}}, {"type": [], "text": "a"}, URI, BARE,
    "clip", "clip/7", "clip/8", "clip@champion", "../..", "float", "base64", "image", "text",
    "softmax", "sigmoid", "{c}", "{}", "{", "fuzzed", "x" * 65, ["a"] * 65, list(range(100)),
    ["b"] * 40, {"a": {"b": {"c": []}}}, 2**31, 2**63, 1e308, "cat\r\nset-cookie: a=b",
]  # fmt: skip
PATHS = [
    "/v1/embeddings", "/v1/classify", "/v1/rank", "/v1/classifiers", "/v1/classifiers/fuzzed",
    "/v1/classifiers/..", "/v1/classifiers/%00", "/v1/classifiers/" + "a" * 500, "/v1/models",
    "/v1/models/clip/7", "/v1/models/", "/v1/models/" + "/" * 50, "/v1/embeddings/", "//v1/rank",
    "/v1/embeddings?encoding_format=base64", "/v1/embeddings?a=%ff&a", "/v1/\udcff", "/", "/docs",
    "/gallery/0", "/gallery/-1", "/gallery/9999", "/gallery/²", "/static/../app.py", "/static/",
    "/static/app.js", "/openapi.json", "/health", "/ready", "/nothing", "*", "",
]  # fmt: skip
METHODS = ["GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "BREW", "get"]
TYPES = [
    "", "text/plain", "application/json; charset=utf-16", "application/json;charset=\"utf-8\"",
    "APPLICATION/JSON", "application/x-www-form-urlencoded", "multipart/form-data",
    "multipart/form-data; boundary=", "multipart/form-data; boundary=x", "image/jpeg", "image/png",
    "image/bmp", "image/*", ";;;", "application/json" * 50,
    "multipart/form-data; boundary=" + "b" * 300,
]  # fmt: skip


@dataclass
class Fuzzed:
    """A request; `is_mutated_body` where key and route are right and the body nearly is."""

    method: str
    path: str
    body: bytes
    headers: dict[str, str]
    is_mutated_body: bool
    chunks: list[bytes] = field(default_factory=list)


class Fuzzer:
    """Makes requests, the same for the same seed.

    Args:
        seed: of all choices.
        key: a valid key with all scopes.
    """

    def __init__(self, seed: int, key: str) -> None:
        self.rng = random.Random(seed)
        self.key = key

    def next(self) -> Fuzzed:
        """Return the next request."""
        kinds: list[tuple[Callable[[], Fuzzed], int]] = [
            (self._tree, 35), (self._bytes, 25), (self._image, 15), (self._frame, 15),
            (self._junk, 10),
        ]  # fmt: skip
        make = self.rng.choices([k for k, _ in kinds], [w for _, w in kinds])[0]
        made = make()
        cuts = sorted(
            self.rng.randrange(len(made.body) + 1) for _ in range(self.rng.choice([0, 0, 3]))
        )
        edges = [0, *cuts, len(made.body)]
        made.chunks = [made.body[a:b] for a, b in zip(edges, edges[1:], strict=False)]
        return made

    def _headers(self, content_type: str) -> dict[str, str]:
        headers = {"authorization": f"Bearer {self.key}", "content-type": content_type}
        if self.rng.random() < 0.1:
            headers["accept"] = "application/octet-stream"
        return headers

    def _document(self) -> tuple[str, str, dict[str, Any]]:
        """Return method, path and a valid JSON body."""
        image = {"image": data_uri(self.rng.choice(IMAGES))}
        word = f"word {self.rng.randrange(50)}"
        labels = ["a cat", "a dog", word]
        return self.rng.choice([
            ("POST", "/v1/embeddings", {"input": word, "encoding_format": "base64", "user": "me"}),
            ("POST", "/v1/embeddings", {"input": [word, image, {"text": "a"}], "model": "clip"}),
            ("POST", "/v1/embeddings",
             {"input": [BARE, URI], "modality": "image", "dimensions": 16}),
            ("POST", "/v1/embeddings",
             {"input": [{"type": "image_url", "image_url": {"url": URI}}], "normalize": True}),
            ("POST", "/v1/classify",
             {"input": image, "labels": labels, "templates": ["a {c}", "{}"], "top_k": 2}),
            ("POST", "/v1/classify",
             {"input": [URI], "classifier": "fuzzed", "scoring": "sigmoid"}),
            ("POST", "/v1/rank", {"query": word, "documents": ["a", image], "top_n": 1}),
            ("POST", "/v1/rank",
             {"queries": [word, image], "documents": ["a", "b"], "return_documents": True}),
            ("PUT", "/v1/classifiers/fuzzed", {"labels": labels, "scoring": "softmax"}),
        ])  # fmt: skip

    def _form(self) -> tuple[bytes, dict[str, str], str]:
        image, other = self.rng.sample(IMAGES, 2)
        if self.rng.random() < 0.5:
            parts: list[Any] = [
                ("image", image, "a"),
                ("text", "a"),
                ("model", "clip"),
                ("b", other, "b"),
            ]
            path = "/v1/embeddings"
        else:
            parts = [
                ("image", image, "a"),
                ("labels", '["a", "b"]'),
                ("labels", "c"),
                ("top_k", "1"),
            ]
            path = "/v1/classify"
        body, headers = form(*parts)
        return body, self._headers(headers["content-type"]), path

    def _tree(self) -> Fuzzed:
        """Put something else in a place or two of a JSON document."""
        method, path, document = self._document()
        document = copy.deepcopy(document)
        raws: list[str] = []
        for _ in range(self.rng.choice([1, 1, 2, 3])):
            document = self._mutated(document, raws)
        body = json.dumps(document)
        for number, raw in enumerate(raws):
            body = body.replace(json.dumps(RAW % number), raw)
        data = body.encode("utf-8", "surrogatepass")
        return Fuzzed(method, path, data, self._headers("application/json"), True)

    def _mutated(self, node: Any, raws: list[str]) -> Any:
        rng = self.rng
        if not isinstance(node, (dict, list)) or not node or rng.random() < 0.15:
            if rng.random() < 0.2:
                raws.append(rng.choice(RAWS))
                return RAW % (len(raws) - 1)
            return copy.deepcopy(rng.choice(VALUES))
        if isinstance(node, list):
            place = rng.randrange(len(node))
            deed = rng.random()
            if deed < 0.6:
                node[place] = self._mutated(node[place], raws)
            elif deed < 0.8:
                node.insert(place, copy.deepcopy(rng.choice(VALUES)))
            else:
                node *= rng.choice([0, 2, 30, 100])
            return node
        name = rng.choice(list(node))
        deed = rng.random()
        if deed < 0.7:
            node[name] = self._mutated(node[name], raws)
        elif deed < 0.8:
            node[rng.choice(["modle", name + "s", "", "\ud800", "x" * 5000, "labels", "input"])] = (
                copy.deepcopy(rng.choice(VALUES))
            )
        elif deed < 0.9:
            del node[name]
        else:
            node[name.upper()] = node.pop(name)
        return node

    def _bytes(self) -> Fuzzed:
        """Damage the bytes of a valid body."""
        if self.rng.random() < 0.6:
            method, path, document = self._document()
            body, headers = json.dumps(document).encode(), self._headers("application/json")
        else:
            body, headers, path = self._form()
            method = "POST"
        return Fuzzed(method, path, self._damaged(body), headers, True)

    def _damaged(self, data: bytes) -> bytes:
        rng = self.rng
        damaged = bytearray(data)
        for _ in range(rng.choice([1, 1, 2, 8])):
            place = rng.randrange(len(damaged) + 1)
            deed = rng.randrange(5)
            if deed == 0:
                damaged[place : place + 1] = rng.randbytes(1)
            elif deed == 1:
                damaged[place:place] = rng.randbytes(rng.choice([1, 4, 100]))
            elif deed == 2:
                del damaged[place : place + rng.choice([1, 5, 500])]
            elif deed == 3:
                damaged[place:place] = damaged[place : place + rng.choice([10, 1000])]
            else:
                bits = [b'"', b"\\", b"{", b"]", b"\0", b"\xff", b"\r\n", b"--", b"\xed\xa0\x80"]
                damaged[place:place] = rng.choice(bits)
        if rng.random() < 0.1:
            del damaged[rng.randrange(len(damaged) + 1) :]
        return bytes(damaged)

    def _image(self) -> Fuzzed:
        """Damage an image inside a valid request, in one of the ways to send it."""
        rng = self.rng
        image = rng.choice(IMAGES)
        damaged = self._damaged(image)
        # Behind the first bytes, so that it is decoded and not just looked at.
        damaged = image[:16] + damaged[16:] if rng.random() < 0.8 else damaged
        way = rng.randrange(3)
        if way == 0:
            body, kind = damaged, "image/png"
        elif way == 1:
            body, headers = form(("text", "a"), ("image", damaged, "a.jpg"))
            kind = headers["content-type"]
        else:
            items = ["a", {"image": base64.b64encode(damaged).decode()}]
            body, kind = json.dumps({"input": items}).encode(), "application/json"
        return Fuzzed("POST", "/v1/embeddings", body, self._headers(kind), True)

    def _frame(self) -> Fuzzed:
        """Leave the body as it is; turn key, headers, method or path."""
        rng = self.rng
        method, path, document = self._document()
        headers = self._headers("application/json")
        for _ in range(rng.choice([1, 2])):
            deed = rng.randrange(6)
            if deed == 0:
                headers["authorization"] = rng.choice(
                    [
                        "",
                        "Bearer",
                        "Bearer " + "k" * 9000,
                        f"Basic {self.key}",
                        self.key,
                        "Bearer \xff",
                    ]
                )
            elif deed == 1:
                headers["content-type"] = rng.choice(TYPES)
            elif deed == 2:
                headers["content-length"] = rng.choice(
                    ["0", "-1", "5", "1e3", "9" * 15, "x", "10000"]
                )
            elif deed == 3:
                method = rng.choice(METHODS)
            elif deed == 4:
                path = rng.choice(PATHS)
            else:
                headers[
                    rng.choice(["x-request-id", "accept", "x-api-key", "transfer-encoding"])
                ] = rng.choice(
                    ["", "a b", "\xff" * 300, "<b>", "chunked", "application/octet-stream"]
                )
        return Fuzzed(method, path, json.dumps(document).encode(), headers, False)

    def _junk(self) -> Fuzzed:
        """Return bytes that were never meant to be a request."""
        rng = self.rng
        body = rng.choice([
            b"", rng.randbytes(rng.choice([1, 100, 5000])), b"[" * 5000, b"{}" * 100, b"null",
            b"\xff\xfe{\0",
            b"\xef\xbb\xbf{}", b'"' + b"a" * 3000, b"0" * 10_000, b'{"input":' + b"[1]," * 2000,
            b"--x\r\n" * 500, b"\xff\xd8\xff" + rng.randbytes(300),
            b"\x89PNG\r\n\x1a\n" + rng.randbytes(300),
            b"RIFF\0\0\0\0WEBP" + rng.randbytes(100), b"GIF89a" + rng.randbytes(100),
        ])  # fmt: skip
        kinds = ["application/json", "multipart/form-data; boundary=x", "image/png", "image/gif"]
        headers = self._headers(rng.choice([*kinds, *TYPES]))
        if rng.random() < 0.3:
            del headers["authorization"]
        return Fuzzed("POST", rng.choice(PATHS[:3]), body, headers, False)
