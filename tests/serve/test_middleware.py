"""What every request passes: paths, headers, ids, log lines, and who may call."""

from __future__ import annotations

import base64
import json
import logging
import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from clip_ray import keys
from clip_ray.config.serving import AppSettings
from clip_ray.errors import ConfigError
from clip_ray.registry import ServedModel
from serve import middleware
from serve.routes import create_app
from tests.serve.models import picture
from tests.serve.support import Answer, Site, data_uri, form, running

URIS = [data_uri(picture(seed)) for seed in range(4)]
IMAGE = picture(3)
EMBED = "/v1/embeddings"


# Paths and headers


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nothing", 404, "not_found"),
        ("GET", "/v1", 404, "not_found"),
        ("GET", "/v1/embeddings/", 404, "not_found"),
        ("GET", "/static/../../serve/api.py", 404, "not_found"),
        ("GET", "/v1/embeddings", 405, "method_not_allowed"),
        ("POST", "/v1/classifiers/x", 405, "method_not_allowed"),
        ("BREW", "/health", 405, "method_not_allowed"),
    ],
)
def test_other_paths(site: Site, method: str, path: str, status: int, code: str) -> None:
    answer = site.call(method, path)
    assert (answer.status, answer.error["code"]) == (status, code)
    assert (status == 405) == ("allow" in answer.headers)


def test_pages_and_their_own_headers(site: Site) -> None:
    for path in ("/", "/docs", "/gallery.json", "/gallery/0", "/static/app.js", "/openapi.json"):
        answer = site.call("GET", path)
        assert answer.status == 200, path
    docs = site.call("GET", "/docs").headers
    assert docs["cache-control"] == "no-cache"  # a page's own stays
    assert docs["x-frame-options"] == "DENY"


def test_security_headers_are_on_all_answers_and_no_cors(site: Site) -> None:
    origin = {"origin": "https://elsewhere.example"}
    for answer in (
        site.call("GET", "/health", headers=origin),
        site.call("GET", "/", headers=origin),
        site.post(EMBED, {"input": "a"}, headers=origin),
        site.post(EMBED, {"input": []}, headers=origin),
        site.call("GET", "/nothing", headers=origin),
        site.call("OPTIONS", EMBED, headers={**origin, "access-control-request-method": "POST"}),
    ):
        assert {name.decode() for name, _ in middleware._SECURITY} <= set(answer.headers)
        assert not [name for name in answer.headers if name.startswith("access-control")]
    assert site.post(EMBED, {"input": "a"}).headers["cache-control"] == "no-store"


def test_a_prefix_of_the_route(site: Site) -> None:
    """Behind `route_prefix: /clip` Serve passes the whole path and the prefix as root_path."""
    for path, status in (("/clip/ready", 200), ("/clip/v1/models", 200), ("/clip", 404)):
        assert site.call("GET", path, root_path="/clip").status == status


# Request ids, errors of ours, the log


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("abc-1.2_3:/+=@", "abc-1.2_3:/+=@"),
        ('a b "#<script>\\', 'a b "#<script>\\'),  # as Serve's own header has it
        ("~" * 128, "~" * 128),
        ("a b\r\nset-cookie: x", "abset-cookie:x"),
        ("x" * 300, "x" * 128),
        ("<aé>", "a"),
    ],
)
def test_request_ids_of_the_client(site: Site, given: str, kept: str) -> None:
    answer = site.post(EMBED, {"input": []}, headers={"x-request-id": given})
    assert answer.headers["x-request-id"] == answer.error["request_id"] == kept


@pytest.mark.parametrize("given", [None, "", "äöü  "])
def test_request_ids_of_ours(site: Site, given: str | None) -> None:
    headers = {} if given is None else {"x-request-id": given}
    ids = {site.post(EMBED, {"input": []}, headers=headers).error["request_id"] for _ in range(3)}
    assert len(ids) == 3 and all(re.fullmatch("[0-9a-f]{32}", one) for one in ids)


def test_an_error_of_ours_is_opaque_and_logged(
    site: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(*args: object) -> None:
        raise RuntimeError("CUDA secret")

    monkeypatch.setattr(site.engine, "embed_texts", fail)
    answer = site.post(EMBED, {"input": "a"}, headers={"x-request-id": "r-500"})
    assert answer.status == 500
    assert (answer.error["code"], answer.error["type"]) == ("internal_error", "server_error")
    assert b"secret" not in answer.body and answer.error["request_id"] == "r-500"
    record = next(r for r in caplog.records if "r-500" in r.getMessage() and r.exc_info)
    assert record.exc_info and str(record.exc_info[1]) == "CUDA secret"


def lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    return [json.loads(r.getMessage()) for r in caplog.records if r.name == "clip_ray.access"]


def test_the_access_log(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "clip_ray.access")
    site.post(EMBED, {"input": ["a", {"image": URIS[0]}]}, headers={"x-request-id": "one"})
    site.call("GET", "/v1/classifiers/some-secret-name")
    site.call("GET", "/v1/models/clip/7")
    site.call("GET", "/nothing/secret")
    site.post(EMBED, {"input": []})
    found = lines(caplog)
    assert [line["route"] for line in found] == [
        EMBED, "/v1/classifiers/{id}", "/v1/models/{id}", "unknown", EMBED,
    ]  # fmt: skip
    assert [line["status"] for line in found] == [200, 404, 200, 404, 400]
    first = found[0]
    assert set(first) == {
        "time",
        "id",
        "key",
        "method",
        "route",
        "status",
        "items",
        "version",
        "ms",
    }
    assert (first["id"], first["key"], first["items"], first["version"]) == (
        "one",
        None,
        2,
        "clip/7",
    )
    assert first["ms"] > 0 and datetime.fromisoformat(first["time"]).tzinfo is not None
    assert found[4]["version"] is None and found[4]["items"] == 0
    assert "secret" not in caplog.text


def test_requests_are_counted(site: Site) -> None:
    before = dict(site.metrics.counts)
    site.post(EMBED, {"input": "a"})
    site.post(EMBED, {"input": []})
    counts = site.metrics.counts

    def more(*name: str) -> int:
        return counts[name] - before.get(name, 0)

    assert more("request", EMBED, "200") == more("request", EMBED, "400") == 1
    assert more("reject", "empty") == 1


def test_the_id_is_left_to_serve_where_it_adds_its_own(site: Site) -> None:
    from tests.serve.support import call

    app = create_app(
        site.engine,
        site.settings,
        site.classifiers,
        None,
        site.fetcher,
        site.metrics,
        echo_id=False,
    )
    answer = site.run(call(app, "GET", "/v1/nothing", headers={"x-request-id": "mine"}))
    assert "x-request-id" not in answer.headers and answer.error["request_id"] == "mine"


# Keys


class Keyed:
    """A replica with keys, and the keys."""

    def __init__(self, folder: Path, model: ServedModel) -> None:
        self.file = str(folder / "keys.json")
        soon = datetime.now(UTC) + timedelta(seconds=1)
        self.infer, _ = keys.create(self.file, "reader")
        self.full, self.full_key = keys.create(self.file, "owner", keys.SCOPES)
        self.other, _ = keys.create(self.file, "other", keys.SCOPES)
        self.slow, _ = keys.create(self.file, "slow", rate=0.01)
        self.writer, _ = keys.create(self.file, "writer", ("classifiers",))
        self.expired, _ = keys.create(self.file, "expired", expires=soon)
        later = soon + timedelta(seconds=1)
        self.ring = keys.KeyRing(self.file, now=lambda: later)
        settings = {"auth": "keys", "keys_file": self.file}
        self.site = Site(folder, model, settings, keys=self.ring)

    def ask(
        self, key: str | None, method: str = "POST", path: str = EMBED, body: Any = None
    ) -> Answer:
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        if body is None and method == "POST":
            body = {"input": "a"}
        return self.site.call(method, path, body, headers=headers)


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory, served: ServedModel) -> Iterator[Keyed]:
    keyed = Keyed(tmp_path_factory.mktemp("keyed"), served)
    with running(keyed.site):
        yield keyed


def test_auth_off_takes_any_key(site: Site) -> None:
    for headers in ({"authorization": "Bearer sk-anything"}, {"authorization": "Basic x"}):
        assert site.post(EMBED, {"input": "a"}, headers=headers).status == 200


def test_a_key_lets_in(keyed: Keyed) -> None:
    assert keyed.ask(keyed.infer).status == 200
    for headers in ({"x-api-key": keyed.infer}, {"authorization": f"bearer  {keyed.infer} "}):
        assert keyed.site.post(EMBED, {"input": "a"}, headers=headers).status == 200


@pytest.mark.parametrize("path", ["/", "/docs", "/openapi.json", "/static/app.js", "/gallery.json",
                                  "/gallery/0", "/health", "/ready"])  # fmt: skip
def test_open_routes_need_no_key(keyed: Keyed, path: str) -> None:
    assert keyed.ask(None, "GET", path).status == 200


def test_all_other_paths_need_a_key(keyed: Keyed) -> None:
    documented = keyed.ask(None, "GET", "/openapi.json").json()["paths"]
    paths = [path.replace("{id}", "x") for path in documented if path.startswith("/v1/")]
    for path in [
        *paths,
        "/v1",
        "/v1/",
        "/unknown",
        "//v1/models",
        "/metrics",
        "/static",
        "/Health",
    ]:
        for method in ("GET", "POST", "PUT", "DELETE", "OPTIONS"):
            answer = keyed.ask(None, method, path)
            assert (answer.status, answer.error["code"]) == (401, "missing_key"), path
            assert answer.headers["www-authenticate"] == "Bearer"
            assert answer.error["type"] == "authentication_error"


def test_wrong_keys(keyed: Keyed) -> None:
    wrong = ["cr-" + "0" * 32, keyed.infer[:-1], keyed.infer.upper(), "x" * 100_000, keyed.expired]
    for key in wrong:
        answer = keyed.ask(key)
        assert (answer.status, answer.error["code"]) == (401, "invalid_key")
        assert key not in answer.body.decode()
    for value in ("Bearer", "Bearer ", f"Basic {keyed.infer}", keyed.infer, "Bearer \xff\xfe"):
        answer = keyed.site.post(EMBED, {"input": "a"}, headers={"authorization": value})
        assert answer.status == 401


def test_a_long_key_is_not_even_looked_for(keyed: Keyed, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[str] = []
    monkeypatch.setattr(keyed.ring, "find", looked.append)
    assert keyed.ask("x" * 257).status == 401 and looked == []
    assert keyed.ask("x" * 256).status == 401 and len(looked) == 1


def test_scopes(keyed: Keyed, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "clip_ray.access")
    path, body = "/v1/classifiers/scoped", {"labels": ["a", "b"]}
    for method in ("PUT", "DELETE"):
        answer = keyed.ask(keyed.infer, method, path, body if method == "PUT" else None)
        assert (answer.status, answer.error["code"]) == (403, "missing_scope")
        assert answer.error["type"] == "permission_error"
    assert keyed.ask(keyed.infer, "GET", "/v1/classifiers").status == 200
    assert keyed.ask(keyed.writer).status == 403
    assert lines(caplog)[-1]["key"] == "writer"  # who was refused is known
    assert keyed.ask(keyed.writer, "PUT", path, body).status == 200


def test_classifiers_belong_to_their_key(keyed: Keyed) -> None:
    path, body = "/v1/classifiers/mine", {"labels": ["a", "b"]}
    assert keyed.ask(keyed.full, "PUT", path, body).status == 200
    assert keyed.ask(keyed.full, "GET", path).status == 200
    for key in (keyed.other, keyed.infer):
        assert keyed.ask(key, "GET", path).status == 404
        assert keyed.ask(key, "GET", "/v1/classifiers").json()["data"] == []
        used = keyed.ask(key, body={"input": URIS[0], "classifier": "mine"}, path="/v1/classify")
        assert used.status == 404
    assert keyed.ask(keyed.other, "DELETE", path).status == 404
    used = keyed.ask(keyed.full, body={"input": URIS[0], "classifier": "mine"}, path="/v1/classify")
    assert used.status == 200


def test_a_keys_rate(keyed: Keyed) -> None:
    assert keyed.ask(keyed.slow).status == 200
    answer = keyed.ask(keyed.slow)
    assert (answer.status, answer.error["code"]) == (429, "rate_limited")
    assert answer.error["type"] == "rate_limit_error"
    assert 90 <= int(answer.headers["retry-after"]) <= 100
    assert keyed.ask(keyed.infer).status == 200


def test_a_revoked_key(keyed: Keyed, monkeypatch: pytest.MonkeyPatch) -> None:
    key, _ = keys.create(keyed.file, "short-lived")
    monkeypatch.setattr(keyed.ring, "_reread_s", 0.0)
    assert keyed.ask(key).status == 200
    keys.revoke(keyed.file, "short-lived")
    assert keyed.ask(key).status == 401


def test_neither_image_nor_text_nor_key_is_ever_logged(
    keyed: Keyed, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    text = "canary text 5f1c"
    image = base64.b64encode(IMAGE).decode()
    wrong = "cr-" + "c" * 32
    for body in (
        {"input": [text, {"image": image}]},
        {"input": [text, {"image": image + "!"}]},
        {"input": [text], text: 1},
        {"input": text, "model": text},
        {"input": text * 1000},
    ):
        keyed.ask(keyed.full, body=body)
    keyed.ask(keyed.full, path="/v1/classify", body={"input": image, "labels": [text]})
    keyed.ask(keyed.full, "PUT", "/v1/classifiers/canary", {"labels": [text], "templates": [text]})
    data, headers = form(("text", text), ("image", IMAGE, text))
    headers["authorization"] = f"Bearer {keyed.full}"
    assert keyed.site.post(EMBED, data, headers=headers).status == 200
    keyed.site.post(EMBED, data[:-30], headers=headers)
    keyed.ask(wrong)
    found = lines(caplog)
    assert len(found) == 10
    assert {line["key"] for line in found} == {"owner", None}
    for secret in (text, image[:40], image[-40:], keyed.full, wrong):
        assert secret not in caplog.text


def test_auth_by_keys_without_keys_does_not_start(site: Site) -> None:
    settings = AppSettings.model_validate({"auth": "keys", "keys_file": "x.json"})
    with pytest.raises(ConfigError, match="keys_file"):
        create_app(site.engine, settings, site.classifiers, None, site.fetcher, site.metrics)
