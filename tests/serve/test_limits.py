"""Every limit: what is just over it is refused in time, and nothing stays behind."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from clip_ray.registry import ServedModel
from serve import middleware
from serve.errors import ApiError
from tests.serve.models import picture
from tests.serve.support import JSON, Answer, Client, Site, call, data_uri, running

EMBED = "/v1/embeddings"
TEXT = json.dumps({"input": "a"}).encode()
LIMITS = {
    "body_mb": 0.1,
    "items": 3,
    "image_mb": 0.02,
    "image_mpx": 0.01,
    "text_chars": 30,
    "prompts": 6,
    "stored_prompts": 8,
    "predictions": 16,
    "stored_classifiers": 2,
    "memory_mb": 0.8,  # a quarter of it for bodies
    "queue_s": 0.15,
    "ongoing": 2,
    "queued": 2,
}


@pytest.fixture(scope="module")
def tight(tmp_path_factory: pytest.TempPathFactory, served: ServedModel) -> Iterator[Site]:
    """A replica that allows little; after each test it must be as idle as before."""
    with running(Site(tmp_path_factory.mktemp("tight"), served, {"limits": LIMITS})) as site:
        yield site


@pytest.fixture
def hurried(tight: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short deadlines, for the tests of them: others wait as long as the machine needs."""
    gate = tight.gate()
    limits = gate.limits.model_copy(update={"request_s": 1.0, "body_s": 0.5})
    monkeypatch.setattr(gate, "limits", limits)


@pytest.fixture(autouse=True)
def nothing_stays_behind(tight: Site) -> Iterator[None]:
    yield
    gate = tight.gate()
    assert gate.in_flight == 0 and gate._turns._value == LIMITS["ongoing"]
    assert tight.engine.budget.in_use == tight.engine.budget.waiting == 0
    assert tight.post(EMBED, {"input": "a"}).status == 200


class Slow:
    """Stands in for the encoding of texts: waits to be let go, and notes who was cancelled."""

    def __init__(self, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun = self.ended = self.cancelled = 0
        self.go = asyncio.Event()
        self._embed = site.engine.embed_texts
        monkeypatch.setattr(site.engine, "embed_texts", self)

    async def __call__(self, *args: Any) -> Any:
        self.begun += 1
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        self.ended += 1
        return await self._embed(*args)


@pytest.fixture
def slow(tight: Site, monkeypatch: pytest.MonkeyPatch) -> Iterator[Slow]:
    yield Slow(tight, monkeypatch)
    monkeypatch.undo()  # before nothing_stays_behind asks


def refused(answer: Answer, status: int, code: str, param: str | None = None) -> None:
    error = answer.error
    assert (answer.status, error["code"], error["param"]) == (status, code, param), error
    assert ("retry-after" in answer.headers) == (status == 429)


# Sizes and numbers, as the README's table lists them

URI = data_uri(picture(0))
LABELS7 = ["a"] * 7
OVER: list[tuple[str, str, str, Any, int, str, str | None]] = [
    ("items", "POST", EMBED, {"input": ["a"] * 4}, 413, "too_many_items", "input"),
    ("items", "POST", "/v1/rank", {"query": "a", "documents": ["a"] * 3}, 413, "too_many_items",
     "documents"),
    ("image_mb", "POST", EMBED, {"input": {"image": data_uri(b"\xff\xd8\xff" + b"0" * 20_000)}},
     413, "image_too_large", "input"),
    ("image_mpx", "POST", EMBED, {"input": ["a", {"image": data_uri(picture(0, size=(101, 100)))}]},
     413, "too_many_pixels", "input[1]"),
    ("image_mpx", "POST", EMBED, {"input": {"image": data_uri(picture(0, "JPEG", (101, 100)))}},
     413, "too_many_pixels", "input"),
    ("formats", "POST", EMBED, {"input": {"image": data_uri(picture(0, "BMP"))}}, 422,
     "unsupported_image", "input"),
    ("text_chars", "POST", EMBED, {"input": ["a" * 31]}, 413, "text_too_long", "input[0]"),
    ("prompts", "POST", "/v1/classify", {"input": URI, "labels": LABELS7}, 413, "too_many_prompts",
     "labels"),
    ("text_chars", "POST", "/v1/classify",
     {"input": URI, "labels": ["abc"], "templates": ["{}", "{}" * 11]}, 413, "text_too_long",
     "templates[1]"),
    ("text_chars", "PUT", "/v1/classifiers/x", {"labels": ["abc"], "templates": ["{}" * 11]}, 413,
     "text_too_long", "templates[0]"),
    ("predictions", "POST", "/v1/classify", {"input": [URI] * 3, "labels": ["a"] * 6, "top_k": 6},
     413, "too_many_predictions", "top_k"),
    ("stored_prompts", "PUT", "/v1/classifiers/x", {"labels": ["a"] * 9}, 413, "too_many_prompts",
     "labels"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code", "param"), [row[1:] for row in OVER]
)
def test_over_a_limit(
    tight: Site, method: str, path: str, body: Any, status: int, code: str, param: str | None
) -> None:
    refused(tight.call(method, path, body), status, code, param)


def test_just_within_the_limits(tight: Site) -> None:
    fine = {"image": data_uri(picture(0, size=(100, 100)))}
    assert tight.post(EMBED, {"input": ["a" * 30, fine, "b"]}).status == 200
    body = {"input": URI, "labels": ["a"] * 6, "templates": ["{}"]}
    assert tight.post("/v1/classify", body).status == 200


def test_stored_classifiers_of_a_key(tight: Site) -> None:
    paths = [f"/v1/classifiers/{name}" for name in "abc"]
    body = {"labels": ["a"] * 8, "templates": ["{}"]}
    assert [tight.call("PUT", path, body).status for path in paths[:2]] == [200, 200]
    refused(tight.call("PUT", paths[2], body), 409, "too_many_classifiers")
    assert tight.call("PUT", paths[1], body).status == 200  # replacing is no new one
    assert [tight.call("DELETE", path).status for path in paths] == [200, 200, 404]


# Bodies


def ask(site: Site, client: Client, headers: dict[str, str] | None = None) -> Answer:
    return site.run(call(site.app, "POST", EMBED, headers=headers or JSON, client=client))


def test_a_body_that_says_it_is_too_large_is_not_read(tight: Site) -> None:
    client = Client([b"x" * 100_001])
    refused(ask(tight, client, {**JSON, "content-length": "100001"}), 413, "body_too_large")
    assert client.read == 0
    huge = {**JSON, "content-length": "9" * 18}
    refused(ask(tight, Client([TEXT]), huge), 413, "body_too_large")


@pytest.mark.parametrize("length", [None, "10", "0", "-5", "1e9", "9" * 30, "²"])
def test_bytes_are_counted_whatever_the_length_says(tight: Site, length: str | None) -> None:
    chunks = [b"[" + b" " * 9_999] * 1000
    client = Client(chunks)
    headers = JSON if length is None else {**JSON, "content-length": length}
    headers = {name: value.encode().decode("latin-1") for name, value in headers.items()}
    refused(ask(tight, client, headers), 413, "body_too_large")
    assert client.read <= 110_000


def test_a_body_in_many_chunks(tight: Site) -> None:
    chunks = [TEXT[i : i + 1] for i in range(len(TEXT))]
    assert ask(tight, Client(chunks)).status == 200
    assert ask(tight, Client([b"", *chunks, b""])).status == 200


@pytest.mark.usefixtures("hurried")
def test_a_slow_body(tight: Site) -> None:
    answer = ask(tight, Client([TEXT[:5], 5.0, TEXT[5:]]))
    refused(answer, 408, "body_timeout")
    assert answer.headers["connection"] == "close"
    drops = [part for byte in TEXT for part in (bytes([byte]), 0.1)]
    refused(ask(tight, Client([*drops, b""])), 408, "body_timeout")
    assert ask(tight, Client([TEXT[:5], 0.02, TEXT[5:]])).status == 200


def test_a_client_that_leaves_while_it_sends(tight: Site, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "clip_ray.access")

    class Leaves(Client):
        async def receive(self) -> dict[str, Any]:
            if self.read:
                return {"type": "http.disconnect"}
            return {**await super().receive(), "more_body": True}

    assert ask(tight, Leaves([TEXT])).status == 0
    assert '"status": 499' in caplog.text


# Memory


def test_bodies_wait_for_memory_and_are_refused_in_time(
    tight: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tight.gate(), "_most", 10)
    body = TEXT.ljust(90_000)
    headers = {**JSON, "content-length": str(len(body))}

    async def crowd() -> list[int]:
        go = asyncio.Event()
        statuses: list[int] = []

        async def one() -> None:
            client = Client([body[:10], go, body[10:]])
            answer = await call(tight.app, "POST", EMBED, headers=headers, client=client)
            statuses.append(answer.status)
            if answer.status == 429:
                refused(answer, 429, "overloaded")
            if statuses.count(429) == 2:
                go.set()

        await asyncio.gather(*(one() for _ in range(4)))
        return statuses

    # Two fit into 200,000 bytes; the others wait 0.15 s and are told, the two go on.
    assert tight.run(crowd()) == [429, 429, 200, 200]
    assert tight.engine.budget.peak <= 200_000


def test_idle_connections_that_promise_large_bodies_keep_nobody_out(
    tight: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tight.gate(), "_most", 10)
    monkeypatch.setattr(middleware, "_GROWTH", 10_000)
    body = TEXT.ljust(90_000)
    headers = {**JSON, "content-length": str(len(body))}

    async def run() -> list[int]:
        go = asyncio.Event()
        idle = [
            asyncio.create_task(
                call(tight.app, "POST", EMBED, headers=headers, client=Client([body[:9], go, b""]))
            )
            for _ in range(4)
        ]
        await asyncio.sleep(0.02)
        reserved = tight.engine.budget.in_use
        # Announced or not: what comes is taken in steps.
        answer = await call(tight.app, "POST", EMBED, [body[:50_000], body[50_000:]], headers)
        go.set()
        return [reserved, answer.status, *(one.status for one in await asyncio.gather(*idle))]

    assert tight.run(run()) == [40_000, 200, 400, 400, 400, 400]


def test_memory_is_reserved_as_a_body_of_unknown_length_grows(tight: Site) -> None:
    seen: list[int] = []

    class Watched(Client):
        async def receive(self) -> dict[str, Any]:
            seen.append(tight.engine.budget.in_use)
            return await super().receive()

    body = TEXT.ljust(60_000)
    assert ask(tight, Watched([body[:100], body[100:]])).status == 200
    assert seen[0] == 0 and seen[1] == 100_000  # in steps of 1 MB, but never above the limit


# Work


@pytest.mark.usefixtures("hurried")
def test_the_deadline_of_a_request(tight: Site, slow: Slow) -> None:
    refused(tight.post(EMBED, {"input": "a"}), 408, "request_timeout")
    assert (slow.begun, slow.cancelled) == (1, 1)


@pytest.mark.usefixtures("hurried")
def test_the_deadline_covers_texts_and_images_alike(tight: Site, slow: Slow) -> None:
    body = {"input": ["a", {"image": URI}]}
    refused(tight.post(EMBED, body), 408, "request_timeout")
    assert (slow.begun, slow.cancelled) == (1, 1)
    # A bad image ends the texts that were asked for beside it.
    body = {"input": ["a", {"image": data_uri(picture(0)[:80])}]}
    refused(tight.post(EMBED, body), 422, "undecodable_image", "input[1]")
    assert slow.begun == slow.cancelled


def test_a_client_that_leaves_ends_its_work(
    tight: Site, slow: Slow, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "clip_ray.access")
    assert ask(tight, Client([TEXT], stays=0.05)).status == 0
    assert (slow.begun, slow.cancelled) == (1, 1)
    line = json.loads(caplog.records[-1].getMessage())
    assert (line["status"], line["items"], line["version"]) == (499, 1, "clip/7")


def test_a_request_cancelled_from_outside(tight: Site, slow: Slow) -> None:
    """As Serve does when its proxy sees the client leave."""

    async def cancelled() -> None:
        task = asyncio.create_task(call(tight.app, "POST", EMBED, [TEXT], JSON))
        while not slow.begun:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    tight.run(cancelled())
    assert slow.cancelled == 1


async def crowd_of(site: Site, count: int, slow: Slow, until: int) -> list[Answer]:
    """Ask `count` times at once; work goes on when `until` have their answer."""
    answers: list[Answer] = []

    async def one() -> None:
        # With its length said, a body takes no more memory than it has.
        headers = {**JSON, "content-length": str(len(TEXT))}
        answers.append(await call(site.app, "POST", EMBED, [TEXT], headers))
        if len(answers) == until:
            # Routes without a key are not limited.
            assert (await call(site.app, "GET", "/health")).status == 200
            slow.go.set()

    await asyncio.gather(*(one() for _ in range(count)))
    return answers


def test_our_limiter_answers_when_the_replica_is_full(tight: Site, slow: Slow) -> None:
    answers = tight.run(crowd_of(tight, 6, slow, until=2))
    # Two at once and two that wait; the other two are told before anybody is answered.
    assert [answer.status for answer in answers] == [429, 429, 200, 200, 200, 200]
    for answer in answers[:2]:
        refused(answer, 429, "overloaded")
        assert answer.error["type"] == "rate_limit_error"
    assert slow.ended == 4


def test_who_waits_too_long_for_a_turn_is_told(
    tight: Site, slow: Slow, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[tuple[str, int]] = []
    monkeypatch.setattr(tight.metrics, "waits", lambda *told: waits.append(told))
    answers = tight.run(crowd_of(tight, 4, slow, until=2))
    assert [answer.status for answer in answers] == [429, 429, 200, 200]
    assert slow.begun == slow.ended == 2
    assert all("no turn within" in answer.error["message"] for answer in answers[:2])
    assert waits == [("turn", 1)] * 2 + [("turn", -1)] * 2


def test_an_error_after_the_answer_began_breaks_the_connection(tight: Site) -> None:
    """Nothing can be taken back, so the client must see that the answer is not whole."""
    gate = tight.gate()
    inner = gate.app

    async def half(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise ApiError(400, "late", "too late")

    gate.app = half
    try:
        with pytest.raises(ApiError):
            ask(tight, Client([TEXT]))
    finally:
        gate.app = inner


# Over a socket


@pytest.fixture(scope="module")
def url(tight: Site) -> str:
    return tight.listen()


def test_a_client_gets_the_413_of_a_body_it_is_still_sending(url: str) -> None:
    with httpx.Client(base_url=url) as client:
        answer = client.post(EMBED, content=b"x" * 3_000_000, headers=JSON)
        assert answer.status_code == 413
        assert answer.json()["error"]["code"] == "body_too_large"

        def chunks() -> Iterator[bytes]:
            for _ in range(300):
                yield b"x" * 10_000

        assert client.post(EMBED, content=chunks(), headers=JSON).status_code == 413
        assert client.post(EMBED, json={"input": "a"}).status_code == 200


def connect(url: str) -> socket.socket:
    host, _, port = url.removeprefix("http://").partition(":")
    return socket.create_connection((host, int(port)), timeout=5)


HEAD = f"POST {EMBED} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n".encode()


@pytest.mark.usefixtures("hurried")
def test_a_slow_client_is_answered_and_let_go(url: str) -> None:
    with connect(url) as slow:
        slow.sendall(HEAD + b"Content-Length: 1000\r\n\r\n{")
        answer = b""
        while chunk := slow.recv(4096):  # until the server closes
            answer += chunk
        assert b" 408 " in answer.partition(b"\r\n")[0] and b"body_timeout" in answer


def test_a_client_that_hangs_up_ends_its_work(
    tight: Site, url: str, slow: Slow, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "clip_ray.access")
    with connect(url) as client:
        client.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(TEXT) + TEXT)
        while not slow.begun:
            time.sleep(0.01)
    while not caplog.records:
        time.sleep(0.01)
    assert slow.cancelled == 1
    assert json.loads(caplog.records[-1].getMessage())["status"] == 499  # 408 is the deadline's


def test_a_kept_connection_serves_many_requests(url: str) -> None:
    """A watcher for the client's leaving must not eat its next request."""
    image = base64.b64encode(picture(1)).decode()
    with httpx.Client(base_url=url) as client:
        for _ in range(20):
            body = {"input": image, "modality": "image"}
            assert client.post(EMBED, json=body).status_code == 200
            assert client.post(EMBED, json={"input": []}).status_code == 400
