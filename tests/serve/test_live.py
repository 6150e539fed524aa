"""A real Serve with two replicas: what only processes, proxies and kills can show."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from clip_ray import keys
from clip_ray.errors import RegistryError
from clip_ray.registry import ServedModel, aliased, move_alias, register
from clip_ray.storage import LocalStore
from clip_ray.tracking import mlflow_client
from tests.runtime import serving_driver as driver
from tests.serve.live import Deployed, client, deployed, features_of, until
from tests.serve.models import picture
from tests.serve.support import data_uri, offline

pytestmark = pytest.mark.ray

LABELS = {"labels": ["red", "green", "blue"], "templates": ["a {c} thing"]}


@pytest.fixture(scope="module")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("keys") / "keys.json"


@pytest.fixture(scope="module")
def two_keys(key_file: Path) -> list[str]:
    return [
        keys.create(str(key_file), name, ("infer", "classifiers"), None, None)[0]
        for name in ("one", "two")
    ]


@pytest.fixture(scope="module")
def live(
    tmp_path_factory: pytest.TempPathFactory,
    served: ServedModel,
    key_file: Path,
    two_keys: list[str],
) -> Iterator[Deployed]:
    """Two replicas of a registered model whose MLflow has gone since it was deployed."""
    folder = tmp_path_factory.mktemp("live")
    registry = folder / "registry"
    tracking_uri = f"sqlite:///{registry}/mlflow.db"
    register_champion(served, registry, tracking_uri)
    flags = ["--serve.min_replicas", "2", "--serve.max_replicas", "2", "--serve.cpus", "0.5"]
    flags += ["--serve.auth", "keys", "--serve.keys_file", str(key_file)]
    flags += ["--model", "models:/clip@champion", "--tracking_uri", tracking_uri]
    # Nothing is traced but what a caller asks for.
    flags += ["--serve.tracing.enabled", "true", "--serve.tracing.sampling_ratio", "0"]
    # Nobody answers there, whoever should ask the environment.
    env = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}
    with deployed(folder, served, *flags, env=env) as running:
        shutil.rmtree(registry)
        with pytest.raises(RegistryError):
            aliased("clip", tracking_uri=tracking_uri)
        yield running


def register_champion(model: ServedModel, folder: Path, tracking_uri: str) -> None:
    """Register a model's export as clip, and make it champion; all of it lies in `folder`."""
    folder.mkdir()
    tracking = mlflow_client(tracking_uri)
    experiment = tracking.create_experiment("e", artifact_location=str(folder / "artifacts"))
    run_id = tracking.create_run(experiment).info.run_id
    version = register(LocalStore(Path(model.uri)), "clip", run_id, {}, tracking_uri)
    move_alias("clip", version, model.digest, tracking_uri)


def test_answers_are_the_encoders_and_name_the_model(live, served, two_keys):
    own = offline(served).encode_images([picture(3)])
    with client(live, two_keys[0]) as http:
        body = {"input": {"image": data_uri(picture(3))}}
        answer = http.post("/v1/embeddings", json=body)
        assert answer.status_code == 200, answer.text
        assert features_of(answer.json())[0] @ own[0] > 0.99999
        assert answer.json()["clip"]["digest"] == served.digest == answer.headers["x-clip-digest"]
        assert len(answer.headers.get_list("x-request-id")) == 1
        assert http.get("/ready").json()["status"] == "ready"
        assert "text/html" in http.get("/").headers["content-type"]


def test_other_machines_do_not_reach_it(live):
    """Bound to loopback: the machine's own other address is refused, and that address exists."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # no packet is sent
        except OSError:
            pytest.skip("this machine has no address but loopback")
        address = probe.getsockname()[0]
    port = live.running.port
    with socket.create_server((address, 0)) as open_door:  # the control: that address does answer
        socket.create_connection((address, open_door.getsockname()[1]), timeout=5).close()
    with pytest.raises(OSError):
        socket.create_connection((address, port), timeout=5).close()
    socket.create_connection(("127.0.0.1", port), timeout=5).close()


def test_a_callers_trace_goes_through_proxy_and_replica_down_to_the_model(live, two_keys):
    number, caller = f"{time.time_ns():032x}", "00f067aa0ba902b7"
    body = {"input": {"image": data_uri(picture(2))}}
    with client(live, two_keys[0]) as http:
        headers = {"traceparent": f"00-{number}-{caller}-01"}
        answer = http.post("/v1/embeddings", json=body, headers=headers)
        assert answer.status_code == 200 and answer.headers["x-trace-id"] == number
        # Without the caller's word, and where it says no, nothing is recorded.
        for more in ({}, {"traceparent": f"00-{number[::-1]}-{caller}-00"}):
            other = http.post("/v1/embeddings", json=body, headers=more)
            assert other.status_code == 200 and "x-trace-id" not in other.headers

    def mine() -> dict[str, dict[str, Any]]:
        return {
            span["context"]["span_id"]: span | {"file": file}
            for file, spans in live.ask(driver.spans).items()
            for span in spans
        }

    # Proxy, the replica's own, decode, encode, and the pass; how Serve splits its own is its.
    until(lambda: len(mine()) >= 5, 20, "the spans were not written")
    found = mine()
    assert {span["context"]["trace_id"] for span in found.values()} == {f"0x{number}"}
    (model,) = (span for span in found.values() if span["name"] == "model")
    assert model["attributes"] == {"clip.kind": "image", "clip.items": 1, "clip.batch_size": 1}
    path, at = [], model
    while at["parent_id"] in found:
        path.append((at["name"].split()[0], at["file"].split("_")[0]))
        at = found[at["parent_id"]]
    path.append((at["name"].split()[0], at["file"].split("_")[0]))
    assert at["parent_id"] == f"0x{caller}"
    assert path[:2] == [("model", "replica"), ("encode", "replica")]
    assert ("replica_handle_request", "replica") in path and path[-1][1] == "proxy"
    assert "decode" in {span["name"] for span in found.values()}


def test_keys_are_asked_for_and_classifiers_are_each_keys_own(live, two_keys):
    with client(live) as http:
        assert http.post("/v1/embeddings", json={"input": "x"}).status_code == 401
    with client(live, two_keys[0]) as one, client(live, two_keys[1]) as two:
        assert one.put("/v1/classifiers/mine", json=LABELS).status_code == 200
        assert two.get("/v1/classifiers/mine").status_code == 404
        assert one.delete("/v1/classifiers/mine").status_code == 200


def test_a_killed_replica_costs_its_own_requests_and_no_classifier(live, two_keys):
    with client(live, two_keys[0]) as http:
        started = time.monotonic()
        assert http.put("/v1/classifiers/colours", json=LABELS).status_code == 200
        # Both replicas have it within 5 s: enough requests that none can have been missed.
        seen = [http.get("/v1/classifiers/colours").status_code for _ in range(12)]
        assert seen == [200] * 12 and time.monotonic() - started < 5
        body = {"input": {"image": data_uri(picture(1))}, "classifier": "colours"}
        before = http.post("/v1/classify", json=body).json()
        pids = live.ask(driver.confirmed)
        assert len(pids) == 2
        victim = sorted(pids.values())[0]
        os.kill(victim, signal.SIGKILL)
        failed = 0
        for _ in range(20):
            try:
                failed += http.get("/v1/classifiers/colours").status_code != 200
            except httpx.TransportError:
                failed += 1
        assert failed <= 2  # those that were sent before the death was noticed

        def restored() -> bool:
            alive = live.ask(driver.confirmed).values()
            return len(alive) == 2 and victim not in alive

        took = until(restored, 30, "the killed replica's place was not filled in 30 s")
        print(f"two replicas again after {took:.1f} s")
        for _ in range(12):  # the new one has read the classifier from the state directory
            again = http.post("/v1/classify", json=body).json()
            assert labels_of(again) == labels_of(before)


def test_a_new_replica_needs_no_mlflow(live, served, two_keys):
    """It loads the promoted bytes from the model store, and answers as the encoder does."""
    before = live.ask(driver.confirmed)
    old = set(before.values())
    for pid in old:  # both: whoever answers below has started without MLflow
        os.kill(pid, signal.SIGKILL)

    def replaced() -> bool:
        alive = set(live.ask(driver.confirmed).values())
        return len(alive) == 2 and not alive & old

    until(replaced, 60, "the killed replicas' places were not filled")
    target = live.ask(driver.target)
    assert target.digest == served.digest and target.uri.endswith(f"models/{served.digest}")
    own = offline(served).encode_texts(["a red circle"])
    with client(live, two_keys[0]) as http:
        answer = http.post("/v1/embeddings", json={"input": "a red circle"})
        assert answer.status_code == 200, answer.text
        assert answer.json()["clip"]["digest"] == served.digest
        assert answer.json()["model"] == "clip/1"  # as the registry called it
        assert features_of(answer.json())[0] @ own[0] > 0.99999


def labels_of(answer: dict[str, Any]) -> list[tuple[str, Any]]:
    return [
        (p["label"], pytest.approx(p["score"], abs=1e-4)) for p in answer["data"][0]["predictions"]
    ]


def test_the_agent_exports_what_was_counted(live, two_keys):
    with client(live, two_keys[0]) as http:
        for _ in range(7):
            assert http.post("/v1/rank", json={"queries": ["a"], "documents": ["b"]}).is_success
        refused = http.post("/v1/rank", json={"queries": []})
        assert refused.status_code == 400

    def counted() -> bool:
        found = scrape(live)
        ok = total(found, "ray_clip_requests_total", route="/v1/rank", status="200")
        bad = total(found, "ray_clip_requests_total", route="/v1/rank", status="400")
        return (ok, bad) == (7, 1)

    until(counted, 40, "Ray's agent did not export the requests")
    found = scrape(live)
    assert total(found, "ray_clip_request_ms_count", route="/v1/rank") == 8
    assert total(found, "ray_clip_rejects_total", reason=refused.json()["error"]["code"]) == 1
    for name in ("ray_clip_batch_size_count", "ray_clip_stage_ms_count"):
        assert total(found, name) > 0
    assert total(found, "ray_clip_cache_lookups_total", cache="text") > 0
    waiting = [(tags["place"], v) for n, tags, v in found if n == "ray_clip_waiting_requests"]
    assert set(waiting) == {(place, 0) for place in ("turn", "body", "input", "decode")}


def scrape(live: Deployed) -> list[tuple[str, dict[str, str], float]]:
    """Return the samples that Ray's agents export, as Prometheus would see them."""
    samples = []
    for url in live.ask(driver.metrics_urls):
        text = httpx.get(url, trust_env=False).text
        for line in text.splitlines():
            match = re.match(r"(\w+)(?:\{(.*)\})? ([0-9.e+-]+)$", line)
            if match:
                tags = dict(re.findall(r'(\w+)="([^"]*)"', match[2] or ""))
                samples.append((match[1], tags, float(match[3])))
    return samples


def total(samples: list[tuple[str, dict[str, str], float]], name: str, **tags: str) -> float:
    return sum(v for n, t, v in samples if n == name and tags.items() <= t.items())


def test_sigterm_ends_it_and_nothing_listens_any_more(live):
    """Last in the file: it ends what the others use."""
    os.kill(live.process.pid, signal.SIGTERM)
    assert live.process.wait(60) == 128 + signal.SIGTERM
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", live.running.port), timeout=5).close()
    for pid in live.running.children:
        assert not Path(f"/proc/{pid}").exists(), pid
    assert "ended" in live.log.read_text()
