"""The sink: MLflow's series equals the journal after every kind of outage, and nobody waits."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from clip_ray.config import Config, TrackingConfig, TrainConfig
from clip_ray.config.load import flatten
from clip_ray.errors import ConfigError, RegistryError
from clip_ray.storage import open_store
from clip_ray.tracking import (
    RUN_KEY,
    STATE,
    TrackedRun,
    Tracker,
    default_tracking_uri,
    mask,
    mlflow_client,
    patient_timeouts,
    redact,
    require_tracking_uri,
    set_quick_timeouts,
    source_version,
)

ROOT = Path(__file__).parents[1]
QUICK = TrackingConfig(flush_s=0.02)
CANARY = "hunter2-canary"


class Journal:
    """The run's metrics.jsonl, as the recorder writes it and reads it back."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, records: list[dict]) -> list[dict]:
        with open(self.path, "a") as file:
            for record in records:
                file.write(json.dumps(record) + "\n")
        return records

    def replay(self, from_step: int):
        with open(self.path) as file:
            for line in file:
                record = json.loads(line)
                if record["step"] >= from_step:
                    yield record

    def series(self, name: str) -> list[tuple[int, float]]:
        """What MLflow has to hold: the first record of each step."""
        first: dict[int, float] = {}
        for record in self.replay(0):
            first.setdefault(record["step"], record[name])
        return sorted(first.items())


def records(start: int, stop: int, attempt: int = 0) -> list[dict]:
    return [
        {"step": s, "attempt": attempt, "time": 1.7e9 + s + 1000 * attempt, "loss": 10 / (s + 1),
         "lr": 0.1 * s, "samples_digest": "ab"}
        for s in range(start, stop)
    ]  # fmt: skip


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory):
    # Making MLflow's schema takes seconds: once a session, then a copy a test.
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    mlflow_client(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def storage(tmp_path, empty_database, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for name in ("TIMEOUT", "MAX_RETRIES", "BACKOFF_FACTOR", "BACKOFF_JITTER"):
        monkeypatch.delenv(f"MLFLOW_HTTP_REQUEST_{name}", raising=False)
    folder = tmp_path / "runs"
    (folder / "r").mkdir(parents=True)
    shutil.copy(empty_database, folder / "mlflow.db")
    return folder


@pytest.fixture
def journal(storage):
    return Journal(storage / "r" / "metrics.jsonl")


class Faulty:
    """The real MlflowClient on sqlite, with faults in front of it and behind it."""

    def __init__(self, uri: str) -> None:
        self.real = mlflow_client(uri)
        self.mode = "up"
        self.calls: list[str] = []
        self.batches: list[int] = []
        self.modes: list[str] = []  # modes of the next log_batch calls, before `mode` counts

    def __getattr__(self, name):
        method = getattr(self.real, name)

        def call(*args, **kwargs):
            self.calls.append(name)
            mode = self.mode
            if name == "log_batch" and kwargs.get("metrics"):
                self.batches.append(len(kwargs["metrics"]))
                mode = self.modes.pop(0) if self.modes else mode
            if mode == "refused":
                raise ConnectionError("connection refused")
            result = method(*args, **kwargs)
            if mode == "applied-then-timeout":
                raise TimeoutError("read timed out")
            return result

        return call


def tracker(storage, journal, client=None, config=QUICK, **kwargs) -> Tracker:
    run = TrackedRun("r", f"{storage}/r#1", str(storage))
    make = None if client is None else (lambda: client)
    state = open_store(storage / "r")
    return Tracker(run, config, state, journal.replay, client=make, **kwargs)


def series(storage, run_id: str, name: str) -> list[tuple[int, float]]:
    """Every point that MLflow holds, duplicates included."""
    client = mlflow_client(f"sqlite:///{storage}/mlflow.db")
    return sorted((m.step, m.value) for m in client.get_metric_history(run_id, name))


def run_data(storage, run_id):
    return mlflow_client(f"sqlite:///{storage}/mlflow.db").get_run(run_id)


def until(condition, timeout_s: float = 20.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "not reached in time"
        time.sleep(0.01)


def test_series_equals_the_journal(storage, journal):
    sink = tracker(storage, journal)
    for start in range(0, 30, 10):
        sink.offer(journal.write(records(start, start + 10)))
    assert sink.finish("FINISHED", 30)
    assert series(storage, sink.run_id, "loss") == journal.series("loss")
    assert series(storage, sink.run_id, "lr") == journal.series("lr")
    assert sink.lag().steps == 0 and sink.lag().error is None
    run = run_data(storage, sink.run_id)
    assert run.info.status == "FINISHED"
    assert set(run.data.metrics) == {"loss", "lr"}
    assert run.info.artifact_uri.startswith(f"{storage}/mlartifacts/")
    state = json.loads((storage / "r" / STATE).read_text())
    assert state == {
        "run_id": sink.run_id, "experiment_id": run.info.experiment_id, "acked": [0, 29],
    }  # fmt: skip


def test_refused_connection_loses_and_doubles_nothing(storage, journal):
    client, events = Faulty(f"sqlite:///{storage}/mlflow.db"), []
    client.mode = "refused"
    sink = tracker(storage, journal, client, on_event=lambda *event: events.append(event))
    for step in range(50):
        sink.offer(journal.write(records(step, step + 1)))
    until(lambda: sink.lag().failures)
    assert sink.run_id is None and sink.wait_run_id(0.01) is None
    assert "refused" in sink.lag().error and sink.lag().steps == 50
    client.mode = "up"
    assert sink.finish("FINISHED", 30)
    assert series(storage, sink.run_id, "loss") == journal.series("loss")
    assert [name for name, _ in events] == ["tracking_outage", "tracking_recovered"]


def test_a_batch_applied_but_reported_failed_is_not_sent_again(storage, journal):
    client = Faulty(f"sqlite:///{storage}/mlflow.db")
    client.modes = ["up", "applied-then-timeout", "refused", "applied-then-timeout"]
    sink = tracker(storage, journal, client)
    for start in range(0, 400, 20):
        left = len(client.modes)
        # Without `time` the timestamps differ, so MLflow's own key cannot hide a duplicate.
        sink.offer(
            journal.write([{k: v for k, v in r.items() if k != "time"}
                           for r in records(start, start + 20)])
        )  # fmt: skip
        if left:  # rows that come faster than they are sent go in one batch
            until(lambda left=left: len(client.modes) < left)
    assert sink.finish("FINISHED", 30)
    assert not client.modes
    assert series(storage, sink.run_id, "loss") == journal.series("loss")


def test_control_resending_without_asking_doubles(storage, journal, monkeypatch):
    # The negative control: the test above sees duplicates where there are some.
    client = Faulty(f"sqlite:///{storage}/mlflow.db")
    client.modes = ["applied-then-timeout"]
    monkeypatch.setattr(Tracker, "_ask", lambda self: setattr(self, "_last", {}))
    journal.write([{"step": s, "loss": 1.0} for s in range(5)])
    sink = tracker(storage, journal, client)
    assert sink.finish("FINISHED", 30)
    assert len(series(storage, sink.run_id, "loss")) == 10


def test_what_does_not_fit_in_memory_comes_from_the_journal(storage, journal):
    client = Faulty(f"sqlite:///{storage}/mlflow.db")
    sink = tracker(storage, journal, client, queue_records=8)
    sink.offer(journal.write(records(0, 5)))
    until(lambda: sink.lag().acked_step == 4)
    client.mode = "refused"
    sink.offer(journal.write(records(5, 500)))
    assert len(sink._queue) <= 8 and sink.lag().replaying
    client.mode = "up"
    assert sink.finish("FINISHED", 30)
    assert series(storage, sink.run_id, "loss") == journal.series("loss")


def test_restart_continues_the_run_and_skips_recomputed_steps(storage, journal):
    client = Faulty(f"sqlite:///{storage}/mlflow.db")
    first = tracker(storage, journal, client)
    first.offer(journal.write(records(0, 10)))
    until(lambda: first.lag().acked_step == 9)
    client.mode = "refused"
    first.offer(journal.write(records(10, 14)))
    assert not first.finish("FAILED", 0.1)
    # Attempt 1 resumes from a commit at step 6 and computes 7 to 19.
    second = tracker(storage, journal)
    second.offer(journal.write(records(7, 20, attempt=1)))
    assert second.finish("FINISHED", 30)
    assert second.run_id == first.run_id
    assert [s for s, _ in journal.series("loss")] == list(range(20))
    assert series(storage, second.run_id, "loss") == journal.series("loss")
    assert json.loads((storage / "r" / STATE).read_text())["acked"] == [1, 19]


def test_killed_between_sending_and_writing_down(storage, journal):
    first = tracker(storage, journal)
    first.offer(journal.write(records(0, 10)))
    assert first.finish("KILLED", 30)
    state = json.loads((storage / "r" / STATE).read_text())
    (storage / "r" / STATE).write_text(json.dumps({**state, "acked": [0, 3]}))
    second = tracker(storage, journal)
    assert second.finish("FINISHED", 30)
    assert series(storage, second.run_id, "loss") == journal.series("loss")


@pytest.mark.parametrize("content", [None, "{", '{"run_id": "0123456789abcdef"}'])
def test_a_lost_state_file_finds_the_run_by_its_tag(storage, journal, content):
    first = tracker(storage, journal)
    first.offer(journal.write(records(0, 5)))
    assert first.finish("FAILED", 30)
    path = storage / "r" / STATE
    path.unlink() if content is None else path.write_text(content)
    second = tracker(storage, journal)
    assert second.finish("FINISHED", 30)
    assert second.run_id == first.run_id
    assert run_data(storage, first.run_id).data.tags[RUN_KEY] == f"{storage}/r#1"
    assert series(storage, second.run_id, "loss") == journal.series("loss")


def test_a_deleted_run_is_made_again_with_all_steps(storage, journal):
    first = tracker(storage, journal)
    first.offer(journal.write(records(0, 5)))
    assert first.finish("FAILED", 30)
    mlflow_client(f"sqlite:///{storage}/mlflow.db").delete_run(first.run_id)
    second = tracker(storage, journal)
    assert second.finish("FINISHED", 30)
    assert second.run_id != first.run_id
    assert series(storage, second.run_id, "loss") == journal.series("loss")


def test_non_finite_values_are_a_tag_and_no_point(storage, journal):
    some = records(0, 4)
    some[1]["loss"], some[2]["loss"] = float("nan"), float("inf")
    sink = tracker(storage, journal)
    sink.offer(journal.write(some))
    assert sink.finish("FINISHED", 30)
    assert [s for s, _ in series(storage, sink.run_id, "loss")] == [0, 3]
    assert [s for s, _ in series(storage, sink.run_id, "lr")] == [0, 1, 2, 3]
    assert run_data(storage, sink.run_id).data.tags["nonfinite.loss"] == "nan at step 1"


def test_batches_stay_within_the_limit(storage, journal):
    client = Faulty(f"sqlite:///{storage}/mlflow.db")
    wide = [{"step": s, "time": 1.0 * s, **{f"m{i}": i for i in range(300)}} for s in range(10)]
    journal.write(wide)
    sink = tracker(storage, journal, client)
    assert sink.finish("FINISHED", 30)
    assert sum(client.batches) == 3000 and max(client.batches) <= 1000
    assert len(series(storage, sink.run_id, "m299")) == 10


def test_a_record_that_mlflow_refuses_is_counted_and_the_rest_goes_on(storage, journal):
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE

    client = Faulty(f"sqlite:///{storage}/mlflow.db")
    send = client.real.log_batch

    def picky(run_id, metrics=(), **kwargs):
        if any(m.step == 3 for m in metrics):
            raise MlflowException("bad", INVALID_PARAMETER_VALUE)
        return send(run_id, metrics=metrics, **kwargs)

    client.real.log_batch = picky
    journal.write(records(0, 6))
    sink = tracker(storage, journal, client)
    assert sink.finish("FINISHED", 30)
    assert [s for s, _ in series(storage, sink.run_id, "loss")] == [0, 1, 2, 4, 5]
    assert sink.lag().refused == 1


def test_everything_else_survives_an_outage(storage, journal, tmp_path):
    client = Faulty(f"sqlite:///{storage}/mlflow.db")
    client.mode = "refused"
    folder = tmp_path / "d"
    folder.mkdir()
    (folder / "a.txt").write_text("a")
    sink = tracker(storage, journal, client, tags={"clip_ray.source.commit": "c0ffee"})
    sink.log_params({"run.seed": 1, "long": "x" * 7000})
    sink.set_tags({"hardware": "cpu"})
    sink.log_metrics({"zero_shot.top1": 0.5}, step=30)
    sink.log_figure(b"png", "figures/loss.png")
    sink.log_artifact_dir(folder, "config")
    sink.log_checkpoint(30, "/runs/r/checkpoints/step-30.a0", "d" * 64)
    sink.log_dataset("coco", "/runs/r/manifest.json", "e" * 64)
    until(lambda: sink.lag().failures)
    assert sink.lag().actions == 7
    client.mode = "up"
    assert sink.finish("FAILED", 30)
    run = run_data(storage, sink.run_id)
    assert run.data.params["run.seed"] == "1"
    assert run.data.params["long"] == "x" * 5997 + "..."
    assert run.data.tags["hardware"] == "cpu"
    assert run.data.tags["checkpoint.uri"] == "/runs/r/checkpoints/step-30.a0"
    assert run.data.tags["clip_ray.manifest_digest"] == "e" * 64
    assert run.data.tags["mlflow.source.git.commit"] == "c0ffee"
    assert run.data.metrics["zero_shot.top1"] == 0.5
    assert run.inputs.dataset_inputs[0].dataset.digest == "e" * 36
    assert (Path(run.info.artifact_uri) / "figures" / "loss.png").read_bytes() == b"png"
    assert (Path(run.info.artifact_uri) / "config" / "a.txt").is_file()
    assert run.info.status == "FAILED"


def test_changed_params_of_a_resumed_run_are_tags(storage, journal):
    first = tracker(storage, journal)
    first.log_params({"cluster.num_workers": 2, "run.seed": 1})
    assert first.finish("FAILED", 30)
    second = tracker(storage, journal)
    second.log_params({"cluster.num_workers": 4, "run.seed": 1, "new": None}, attempt=1)
    assert second.finish("FINISHED", 30)
    run = run_data(storage, second.run_id)
    assert run.data.params == {"cluster.num_workers": "2", "run.seed": "1", "new": "None"}
    assert run.data.tags["attempt.1.cluster.num_workers"] == "4"
    assert "attempt.1.run.seed" not in run.data.tags


def test_two_runs_share_one_experiment(storage, tmp_path):
    sinks = []
    for name in ("a", "b"):
        (storage / name).mkdir()
        journal = Journal(storage / name / "metrics.jsonl")
        journal.write(records(0, 3))
        run = TrackedRun(name, name, str(storage))
        sinks.append(Tracker(run, QUICK, open_store(storage / name), journal.replay))
    assert all(sink.finish("FINISHED", 30) for sink in sinks)
    runs = [run_data(storage, sink.run_id) for sink in sinks]
    assert runs[0].info.run_id != runs[1].info.run_id
    assert runs[0].info.experiment_id == runs[1].info.experiment_id


def black_hole() -> socket.socket:
    """Listen and never answer: the kernel accepts, nobody reads."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(64)
    return listener


class Answers:
    """A server that answers every request with 500, or with a body that takes hours."""

    def __init__(self, kind: str) -> None:
        self.kind, self.requests = kind, 0
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client):
        with client, contextlib.suppress(OSError):
            client.recv(65536)
            self.requests += 1
            if self.kind == "500":
                client.sendall(
                    b"HTTP/1.1 500 Oops\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
                )
                return
            client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
            while self.listener.fileno() >= 0:
                client.sendall(b" ")  # in time for each read, and never done
                time.sleep(0.1)


@pytest.mark.parametrize("kind", ["refused", "black hole", "500", "slow"])
def test_a_dead_server_makes_nobody_wait(storage, journal, monkeypatch, kind):
    import mlflow  # noqa: F401 - its import holds the interpreter; the recorder has its own

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    server = Answers(kind) if kind in ("500", "slow") else None
    listener = black_hole() if server is None else server.listener
    port = listener.getsockname()[1]
    if kind == "refused":
        listener.close()
    config = TrackingConfig(uri=f"http://127.0.0.1:{port}", flush_s=0.02)
    sink = tracker(storage, journal, config=config)
    waits = []
    for step in range(200):
        some = journal.write(records(step, step + 1))
        start = time.perf_counter()
        sink.offer(some)
        sink.set_tags({"progress": step})
        waits.append(time.perf_counter() - start)
        time.sleep(0.005)
    assert sorted(waits)[len(waits) * 95 // 100] < 0.005
    start = time.perf_counter()
    assert not sink.finish("FINISHED", 0.5)
    assert time.perf_counter() - start < 1.5
    assert server is None or server.requests > 0
    listener.close()
    # MLflow is back, elsewhere: the next start of the run catches up.
    late = tracker(storage, journal)
    assert late.finish("FINISHED", 30)
    assert series(storage, late.run_id, "loss") == journal.series("loss")


def test_canary_no_secret_reaches_mlflow(storage, journal):
    sink = tracker(storage, journal)
    nested = {
        "serve": {"api_key": CANARY, "keys": [CANARY], "note": "n"},
        "data": {"url": f"https://u:{CANARY}@host/x?a=1", "signed": f"s3://b?X-Signature={CANARY}"},
        "aws": {"secret_access_key": CANARY, "session_token": CANARY, "Password": CANARY},
        "tokenizer": {"vocab": "clip"},
    }
    nested["sources"] = ({"token": CANARY},)
    sink.log_params(nested)
    sink.set_tags({"source": f"http://u:{CANARY}@h"})
    sink.log_dataset("d", f"s3://u:{CANARY}@b/manifest", "ab")
    assert sink.finish("FINISHED", 30)
    run = run_data(storage, sink.run_id)
    assert run.data.params["tokenizer.vocab"] == "clip" and run.data.params["serve.note"] == "n"
    held = (storage / "mlflow.db").read_bytes() + json.dumps(run.to_dictionary()).encode()
    assert CANARY.encode() not in held


def test_nothing_of_the_config_is_redacted_by_mistake():
    flat = flatten(Config(train=TrainConfig(steps=1)).model_dump(mode="json"))
    assert redact(flat) == flat
    assert flat["tokenizer.vocab"] == "clip" and flat["data.sources"] == "[]"


def test_flatten_and_mask():
    assert flatten({"a": {"b": [{"c": 1}], "d": {}}, "e": None}) == {
        "a.b.0.c": 1, "a.d": "{}", "e": None,
    }  # fmt: skip
    assert mask("postgresql://u:p@h/d and s3://b/k?token=x&y=1") == (
        "postgresql://***@h/d and s3://b/k?token=***&y=1"
    )


def test_default_address(monkeypatch, tmp_path):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert default_tracking_uri(None, "/r") == "sqlite:////r/mlflow.db"
    assert default_tracking_uri("http://h", "/r") == "http://h"
    with pytest.raises(ConfigError, match="s3://b/runs cannot hold"):
        default_tracking_uri(None, "s3://b/runs")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RegistryError, match=r"runs/mlflow\.db does not exist"):
        require_tracking_uri()
    assert not (tmp_path / "runs").exists()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server")
    assert default_tracking_uri(None, "s3://b/runs") == "http://server"


def git(folder, *arguments):
    identity = ["-c", "user.name=n", "-c", "user.email=e@x"]
    subprocess.run(["git", "-C", folder, *identity, *arguments], check=True, capture_output=True)


def test_source_version(tmp_path):
    (tmp_path / "a.py").write_text("1")
    digest = source_version(tmp_path)
    assert digest["origin"] == "digest" and len(digest["commit"]) == 64
    (tmp_path / "a.py").write_text("2")
    assert source_version(tmp_path)["commit"] != digest["commit"]
    (tmp_path / "BUILD").write_text("c0ffee dirty\n")
    assert source_version(tmp_path) == {"commit": "c0ffee", "dirty": True, "origin": "BUILD"}
    git(tmp_path, "init")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "m")
    clean = source_version(tmp_path)
    assert clean["origin"] == "git" and clean["dirty"] is False and len(clean["commit"]) == 40
    (tmp_path / "a.py").write_text("3")
    assert source_version(tmp_path)["dirty"] is True
    (tmp_path / "sub").mkdir()
    assert source_version(tmp_path / "sub")["origin"] == "digest"


class Gate:
    """A TCP proxy in front of a server.

    Modes: pass, hole (no answer), cut (the answer is dropped), 500 (that is the answer), slow (a
    second passes before each piece of it).
    """

    def __init__(self, target: int) -> None:
        self.target, self.mode = target, "hole"
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            client, _ = self.listener.accept()
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client):
        server = socket.create_connection(("127.0.0.1", self.target))
        threading.Thread(target=self._pump, args=(client, server, "up"), daemon=True).start()
        self._pump(server, client, "down")

    def _pump(self, source, sink, direction):
        try:
            while data := source.recv(65536):
                if self.mode == "hole" or (self.mode == "cut" and direction == "down"):
                    continue
                if self.mode == "500" and direction == "up":
                    source.sendall(b"HTTP/1.1 500 Oops\r\nContent-Length: 0\r\n\r\n")
                    continue
                if self.mode == "slow" and direction == "down":
                    time.sleep(1)
                sink.sendall(data)
        except OSError:
            pass
        finally:
            source.close()
            sink.close()


@pytest.mark.slow
def test_a_real_server_behind_a_bad_network(tmp_path, storage, journal, monkeypatch):

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    server = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1",
         "--backend-store-uri", f"sqlite:///{storage}/mlflow.db",
         "--artifacts-destination", str(tmp_path / "artifacts")],
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    try:
        until(lambda: _listens(port), 180)
        gate = Gate(port)
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
        config = TrackingConfig(uri=f"http://127.0.0.1:{gate.port}", flush_s=0.2)
        sink = tracker(storage, journal, config=config)
        sink.log_figure(b"png", "figures/x.png")
        for turn, mode in enumerate(
            ["hole", "pass", "cut", "pass", "500", "pass", "slow", "hole", "pass"]
        ):
            gate.mode = mode
            sink.offer(journal.write(records(20 * turn, 20 * turn + 20)))
            time.sleep(6)
        assert sink.finish("FINISHED", 60)
        assert series(storage, sink.run_id, "loss") == journal.series("loss")
        assert run_data(storage, sink.run_id).info.status == "FINISHED"
        assert list((tmp_path / "artifacts").rglob("x.png"))
    finally:
        os.killpg(server.pid, 15)
        server.wait(30)


def _listens(port: int) -> bool:
    import urllib.request

    try:
        return urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).status == 200
    except OSError:
        return False


def test_processes_that_start_together_make_one_database(tmp_path):
    code = (
        "import sys; from clip_ray.tracking import mlflow_client; "
        "print(len(mlflow_client(sys.argv[1]).search_experiments()))"
    )
    command = [sys.executable, "-c", code, f"sqlite:///{tmp_path}/new/mlflow.db"]
    both = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
        for _ in range(2)
    ]
    for process in both:
        out, err = process.communicate(timeout=120)
        assert (process.returncode, out) == (0, b"1\n"), err
        assert err == b""  # nothing on a user's terminal


def test_uploads_get_more_time_than_the_sink(monkeypatch):
    name = "MLFLOW_HTTP_REQUEST_TIMEOUT"
    monkeypatch.delenv(name, raising=False)
    set_quick_timeouts()
    with patient_timeouts():
        assert os.environ[name] == "60"
    assert os.environ[name] == "3"
    monkeypatch.setenv(name, "7")  # the user's own
    set_quick_timeouts()
    with patient_timeouts():
        assert os.environ[name] == "7"
