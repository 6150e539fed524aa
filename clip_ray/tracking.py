"""The MLflow sink: the run's journal is the truth, and this ships it, whenever MLflow is there.

Training hands records over and goes on; one thread with one bounded queue sends them. An outage
of any kind costs memory of a fixed size and nothing else: what does not fit is read back from the
journal later. MLflow then holds exactly the journal's steps, each once.

How "each once" is reached. A request that failed may have been applied all the same, so after any
failure (and at every start) the sink asks MLflow for the last step of each metric and sends only
what lies beyond. Should a request that was given up arrive still later, it carries the same
timestamps (the records' own `time`), and MLflow's SQL stores keep one of two equal points.
A step that is computed again after a restart is not sent again: its first record stands, and by
the platform's first promise the later one is the same step.

Left out: system metrics, model bytes (clip_ray.registry), and reading MLflow for display.
"""

from __future__ import annotations

import contextlib
import fcntl
import getpass
import hashlib
import json
import logging
import math
import os
import re
import subprocess
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clip_ray.config import TrackingConfig
from clip_ray.config.load import flatten
from clip_ray.errors import ConfigError, RegistryError
from clip_ray.storage import Store

STATE = "tracking.json"
RUN_KEY = "clip_ray.run_key"
RUN_DIR = "clip_ray.run_dir"

MAX_METRICS = 1000  # of one log_batch; MLflow's limit
MAX_PARAMS = 100  # likewise, and of tags
PARAM_CHARS = 6000  # above it MLflow cuts silently
TAG_CHARS = 8000
DATASET_DIGEST_CHARS = 36
QUEUE_RECORDS = 4096  # about 4 MB; more is read back from the journal
OUTBOX_ACTIONS = 4096
MAX_PAUSE_S = 30.0

# Fields of a record that are no curves.
_NOT_METRICS = frozenset({"step", "attempt", "time", "samples_digest"})
_BAD_KEY_CHARS = re.compile(r"[^\w\-. /:]")
_SECRET = re.compile(r"key|secret|passw|token|credential", re.IGNORECASE)
_CREDENTIALS = re.compile(r"://[^/@\s]+@")
_SIGNED = re.compile(r"([?&][^=&\s]*(?:key|secret|token|signature|passw)[^=&\s]*=)[^&\s]+", re.I)
# What MLflow answers to a request that it will never accept, however often it is sent.
_REFUSALS = frozenset({"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_ALREADY_EXISTS"})

Record = Mapping[str, Any]


@dataclass(frozen=True)
class TrackedRun:
    """What MLflow needs to know of a run.

    Attributes:
        name: run.name, shown in the UI.
        key: names this run and no other (storage URI, name, digest of the config); the MLflow run
            is found again by it.
        storage: run.storage, absolute path or s3://: where the default database and artifacts are.
    """

    name: str
    key: str
    storage: str


@dataclass(frozen=True)
class Lag:
    """How far MLflow is behind.

    Attributes:
        steps: steps offered and not acknowledged.
        actions: parameters, tags, figures, ... not acknowledged.
        replaying: the queue overflowed or the run resumed: the journal is being read back.
        acked_step: the last step that MLflow has acknowledged, -1 for none.
        failures: failed attempts in a row; 0 means that MLflow answers.
        refused: records and actions that MLflow will never accept, dropped.
        error: the last failure, None when MLflow answers.
    """

    steps: int
    actions: int
    replaying: bool
    acked_step: int
    failures: int
    refused: int
    error: str | None


@dataclass(frozen=True)
class _Action:
    """Something to send that is not in the journal; sending it twice must do no harm."""

    name: str
    send: Callable[[], None]


class Tracker:
    """Ships a run's journal to MLflow from a background thread. Never raises, never blocks.

    Every method but `wait_run_id` and `finish` returns at once, whatever MLflow does.

    Args:
        run: the run's names.
        config: address, experiment, interval.
        state: the run's directory; `tracking.json` in it holds what is acknowledged.
        replay: returns the journal's records from a step on, in the journal's order. A record
            must be in the journal before it is offered.
        tags: tags of the run at creation, such as `source_version`'s.
        on_event: called from the thread with ("tracking_outage" | "tracking_recovered", details);
            none = these are logged.
        client: makes the MlflowClient; for tests.
        logger: where refused records are told.
        queue_records: records held in memory.
    """

    def __init__(
        self,
        run: TrackedRun,
        config: TrackingConfig,
        state: Store,
        replay: Callable[[int], Iterator[dict[str, Any]]],
        *,
        tags: Mapping[str, str] | None = None,
        on_event: Callable[[str, dict[str, Any]], None] | None = None,
        client: Callable[[], Any] | None = None,
        logger: logging.Logger | None = None,
        queue_records: int = QUEUE_RECORDS,
    ) -> None:
        self.uri = default_tracking_uri(config.uri, run.storage)
        set_quick_timeouts()
        self._run = run
        self._config = config
        self._state = state
        self._replay = replay
        self._tags = dict(tags or {})
        self._on_event = on_event
        self._make_client = client or (lambda: mlflow_client(self.uri))
        self._logger = logger or logging.getLogger(__name__)
        self._max_records = queue_records

        # Shared with the callers, under the lock, which is never held during I/O.
        self._lock = threading.Lock()
        self._queue: deque[Record] = deque()
        self._outbox: deque[_Action] = deque()
        self._behind = True  # a journal of an earlier attempt may hold what was never sent
        self._replaying = False
        self._offered_step = -1
        self._acked: tuple[int, int] = (0, -1)  # attempt, step
        self._failures = 0
        self._refused = 0
        self._error: str | None = None
        self._run_id: str | None = None
        self._status: str | None = None  # set by finish
        self._known = threading.Event()
        self._wake = threading.Event()
        self._closed = threading.Event()  # finish was called: hurry, then end
        self._done = threading.Event()

        # The thread's own.
        self._client: Any = None
        self._experiment_id: str | None = None
        self._last: dict[str, int] | None = None  # last step per metric in MLflow; None = unsure
        self._saved: dict[str, Any] | None = None
        self._flagged: set[str] = set()
        self._thread = threading.Thread(target=self._loop, name="mlflow-sink", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------------ callers' side

    @property
    def run_id(self) -> str | None:
        """The MLflow run, None until MLflow has answered."""
        return self._run_id

    def wait_run_id(self, timeout_s: float) -> str | None:
        """Return the MLflow run, waiting for it at most `timeout_s` seconds."""
        self._known.wait(timeout_s)
        return self._run_id

    def offer(self, records: Iterable[Record]) -> None:
        """Queue records that the journal already holds; at once, whatever MLflow does."""
        with self._lock:
            for record in records:
                self._offered_step = max(self._offered_step, record["step"])
                if self._behind:
                    continue  # the journal will be read back, and holds this one too
                if len(self._queue) >= self._max_records:
                    self._behind = True
                    continue
                self._queue.append(record)

    def log_params(self, params: Mapping[str, Any], attempt: int = 0) -> None:
        """Log a config, nested or flat, as parameters; secrets are left out (`redact`).

        MLflow's parameters are immutable: what a resumed run has changed becomes a tag
        `attempt.<attempt>.<name>`.
        """
        flat = {_key(k): _text(v, PARAM_CHARS) for k, v in redact(flatten(params)).items()}
        self._queue_action(f"params ({len(flat)})", lambda: self._send_params(flat, attempt))

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Set tags; a later value of a name replaces the earlier."""
        flat = {_key(k): _text(v, TAG_CHARS) for k, v in tags.items()}
        self._queue_action(f"tags ({len(flat)})", lambda: self._send_tags(flat))

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Log values that are not in the journal, such as an evaluation's, once per step."""
        now = time.time()
        record = {**metrics, "step": step, "time": now}
        self._queue_action(f"metrics at step {step}", lambda: self._send_metrics([record]))

    def log_figure(self, figure: bytes | Path, name: str) -> None:
        """Log a picture as the artifact `name` (such as figures/loss.png)."""
        data = figure if isinstance(figure, bytes) else figure.read_bytes()
        self._queue_action(f"figure {name}", lambda: self._send_file(data, name))

    def log_artifact_dir(self, path: Path, name: str) -> None:
        """Log the files of a local directory, which must stay until they are sent."""

        def send() -> None:
            self._client.log_artifacts(self._run_id, str(path), name)

        self._queue_action(f"directory {name}", send)

    def log_checkpoint(self, step: int, uri: str, digest: str) -> None:
        """Log a commit by reference: its place and digest, not its bytes."""
        tags = {
            "checkpoint.step": str(step),
            "checkpoint.uri": _text(uri, TAG_CHARS),
            "checkpoint.digest": digest,
        }
        self._queue_action(f"checkpoint {step}", lambda: self._send_tags(tags))

    def log_dataset(self, name: str, source: str, digest: str) -> None:
        """Log the data manifest as the run's input.

        Args:
            name: shown in MLflow's Dataset column.
            source: where the manifest lies.
            digest: hex; MLflow takes 36 characters, the tag clip_ray.manifest_digest has all.
        """

        def send() -> None:
            from mlflow.entities import Dataset, DatasetInput, InputTag

            dataset = Dataset(
                name=name,
                digest=digest[:DATASET_DIGEST_CHARS],
                source_type="local" if source.startswith("/") else "s3",
                source=json.dumps({"uri": _text(source, TAG_CHARS)}),
            )
            context = InputTag("mlflow.data.context", "training")
            self._client.log_inputs(self._run_id, datasets=[DatasetInput(dataset, [context])])
            self._send_tags({"clip_ray.manifest_digest": digest})

        self._queue_action(f"dataset {name}", send)

    def finish(self, status: str, timeout_s: float) -> bool:
        """Send what is left, set the run's status, and end the thread.

        Args:
            status: FINISHED, FAILED or KILLED.
            timeout_s: seconds after which the rest stays in the journal; the next Tracker of this
                run sends it.

        Returns:
            Whether MLflow has everything.
        """
        with self._lock:
            self._status = status
        self._closed.set()
        self._wake.set()
        whole = self._done.wait(timeout_s)
        # The thread may sit in a request; it is a daemon, and nothing of value is in it.
        self._done.set()
        self._wake.set()
        return whole

    def lag(self) -> Lag:
        """Return how far MLflow is behind."""
        with self._lock:
            acked = self._acked[1]
            return Lag(
                steps=max(0, self._offered_step - acked),
                actions=len(self._outbox),
                replaying=self._behind or self._replaying,
                acked_step=acked,
                failures=self._failures,
                refused=self._refused,
                error=self._error,
            )

    def _queue_action(self, name: str, send: Callable[[], None]) -> None:
        with self._lock:
            if len(self._outbox) < OUTBOX_ACTIONS:
                self._outbox.append(_Action(name, send))
            else:
                self._refused += 1

    # ------------------------------------------------------------------ the thread

    def _loop(self) -> None:
        pause = 0.0
        while not self._done.is_set():
            try:
                self._pass()
            except Exception as error:  # noqa: BLE001 - the edge that keeps MLflow out of training
                self._failed(error)
                pause = min(MAX_PAUSE_S, 0.5 * 2 ** min(self._failures - 1, 10))
                if self._closed.is_set():
                    pause = min(pause, 1.0)  # somebody waits in finish()
            else:
                self._recovered()
                pause = self._config.flush_s
                if self._closed.is_set() and self._terminate():
                    self._done.set()
                    return
                if self._closed.is_set():
                    pause = 0.1
            self._wake.wait(pause)
            self._wake.clear()

    def _pass(self) -> None:
        """Send all there is. Raises when MLflow does not take it; what is not acked stays."""
        if self._run_id is None or self._client is None:
            self._connect()
        if self._last is None:
            self._ask()
        self._send_actions()
        with self._lock:
            behind, self._behind = self._behind, False
            self._replaying = behind
        # Cleared before reading: what is offered from here on is queued, and what was not queued
        # before is in the journal already. Nothing falls between.
        if behind:
            try:
                self._send_records(self._replay(self._acked[1] + 1))
            except FileNotFoundError:
                pass  # no journal yet: nothing was offered either
            except BaseException:
                with self._lock:
                    self._behind = True
                raise
            finally:
                self._replaying = False
        self._send_queue()

    def _send_queue(self) -> None:
        while True:
            with self._lock:
                # Copied, and removed only once acknowledged: a failure must not lose them.
                records = [self._queue[i] for i in range(min(len(self._queue), 100))]
            if not records:
                return
            self._send_records(records)
            with self._lock:
                for _ in records:
                    self._queue.popleft()

    def _send_records(self, records: Iterable[Record]) -> None:
        """Send records beyond the acknowledged step, in batches within MLflow's limit."""
        batch: list[Record] = []
        size = 0
        reached = self._acked[1]
        for record in records:
            if record["step"] <= reached:
                continue
            reached = record["step"]
            if batch and size + len(record) > MAX_METRICS:
                self._send_batch(batch)
                batch, size = [], 0
            batch.append(record)
            size += len(record)
            if self._done.is_set():
                return
        if batch:
            self._send_batch(batch)

    def _send_batch(self, batch: list[Record]) -> None:
        try:
            self._send_metrics(batch)
        except Exception as error:
            if not _is_refusal(error):
                raise
            self._last = None  # a part of the batch may have been taken
            if len(batch) > 1:  # find the record that MLflow does not accept
                for record in batch:
                    self._send_batch([record])
                return
            self._refuse(f"step {batch[0]['step']}", error)
        newest = batch[-1]
        with self._lock:
            self._acked = (int(newest.get("attempt", 0)), int(newest["step"]))
        self._save()

    def _send_metrics(self, records: Iterable[Record]) -> None:
        """Send the finite numbers of some records that MLflow does not have yet."""
        from mlflow.entities import Metric

        if self._last is None:
            self._ask()
        assert self._last is not None
        metrics = []
        flags: dict[str, str] = {}
        reached = dict(self._last)
        for record in records:
            step = int(record["step"])
            stamp = int(1000 * record.get("time", time.time()))
            for name, value in record.items():
                if name in _NOT_METRICS or isinstance(value, bool):
                    continue
                if not isinstance(value, int | float):
                    continue
                key = _key(name)
                if step <= reached.get(key, -1):
                    continue
                if not math.isfinite(value):
                    # MLflow stores infinity as 1.8e308, which ruins every chart.
                    flags.setdefault(f"nonfinite.{key}", f"{value} at step {step}")
                    continue
                metrics.append(Metric(key, float(value), stamp, step))
                reached[key] = step
        # First, because a failure after the metrics would have the flags taken for sent.
        new = {name: text for name, text in flags.items() if name not in self._flagged}
        self._send_tags(new)
        self._flagged.update(new)
        for start in range(0, len(metrics), MAX_METRICS):
            self._client.log_batch(self._run_id, metrics=metrics[start : start + MAX_METRICS])
        self._last = reached

    def _send_actions(self) -> None:
        while True:
            with self._lock:
                action = self._outbox[0] if self._outbox else None
            if action is None:
                return
            try:
                action.send()
            except Exception as error:
                if not _is_refusal(error) and not isinstance(error, FileNotFoundError | TypeError):
                    raise
                self._refuse(action.name, error)
            with self._lock:
                self._outbox.popleft()

    def _send_params(self, params: dict[str, str], attempt: int) -> None:
        from mlflow.entities import Param

        known = self._client.get_run(self._run_id).data.params
        new = [Param(k, v) for k, v in params.items() if k not in known]
        changed = {f"attempt.{attempt}.{k}": v for k, v in params.items() if known.get(k, v) != v}
        for start in range(0, len(new), MAX_PARAMS):
            self._client.log_batch(self._run_id, params=new[start : start + MAX_PARAMS])
        self._send_tags(changed)

    def _send_tags(self, tags: dict[str, str]) -> None:
        from mlflow.entities import RunTag

        every = [RunTag(k, v) for k, v in tags.items()]
        for start in range(0, len(every), MAX_PARAMS):
            self._client.log_batch(self._run_id, tags=every[start : start + MAX_PARAMS])

    def _send_file(self, data: bytes, name: str) -> None:
        folder, _, file = name.rpartition("/")
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / file
            path.write_bytes(data)
            self._client.log_artifact(self._run_id, str(path), folder or None)

    # ------------------------------------------------------------------ the MLflow run

    def _connect(self) -> None:
        """Find this run in MLflow, or create it."""
        if self._client is None:
            self._client = self._make_client()
        if self._experiment_id is None:
            self._experiment_id = self._experiment()
        saved = self._load()
        run_id = self._alive(saved.get("run_id")) or self._by_tag() or self._create()
        if run_id == saved.get("run_id"):
            attempt, step = saved.get("acked", (0, -1))
            with self._lock:
                self._acked = (int(attempt), int(step))
        # Another server, a deleted run, a database restored from a backup: then MLflow has less
        # than the file says, and the journal is sent from where MLflow is.
        self._run_id = run_id
        self._ask()
        assert self._last is not None
        newest = max(self._last.values(), default=-1)
        with self._lock:
            if newest < self._acked[1]:
                self._acked = (self._acked[0], newest)
        self._save()
        self._known.set()

    def _experiment(self) -> str:
        from mlflow.exceptions import MlflowException

        name = self._config.experiment
        found = self._client.get_experiment_by_name(name)
        if found is None:
            try:
                return str(self._client.create_experiment(name, self._artifact_location()))
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                found = self._client.get_experiment_by_name(name)  # another run was first
        if found is None or found.lifecycle_stage != "active":
            raise ConfigError(
                f"MLflow experiment {name!r} was deleted; restore it, or set tracking.experiment"
            )
        return str(found.experiment_id)

    def _artifact_location(self) -> str | None:
        # A server places artifacts itself; without one, MLflow's default is relative to the
        # current directory.
        if self.uri.startswith(("http://", "https://")):
            return None
        return f"{self._run.storage.rstrip('/')}/mlartifacts"

    def _alive(self, run_id: str | None) -> str | None:
        from mlflow.exceptions import MlflowException

        if run_id is None:
            return None
        try:
            run = self._client.get_run(run_id)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise
        if run.info.lifecycle_stage != "active":
            return None
        if run.info.status != "RUNNING":
            self._client.update_run(run_id, status="RUNNING")
        return run_id

    def _by_tag(self) -> str | None:
        key = self._run.key.replace("'", "")
        found = self._client.search_runs(
            [self._experiment_id],
            filter_string=f"tags.`{RUN_KEY}` = '{key}'",
            order_by=["attributes.start_time ASC"],
            max_results=1,
        )
        return self._alive(found[0].info.run_id) if found else None

    def _create(self) -> str:
        tags = {
            **{_key(k): _text(v, TAG_CHARS) for k, v in self._tags.items()},
            RUN_KEY: self._run.key.replace("'", ""),
            "mlflow.source.type": "JOB",
            "mlflow.source.name": "clip_ray",
            "mlflow.user": user(),
        }
        if "clip_ray.source.commit" in tags:
            tags["mlflow.source.git.commit"] = tags["clip_ray.source.commit"]
        run = self._client.create_run(self._experiment_id, tags=tags, run_name=self._run.name)
        return str(run.info.run_id)

    def _ask(self) -> None:
        """Learn the last step of each metric from MLflow: one small request, not the history."""
        run = self._client.get_run(self._run_id)
        self._last = {metric.key: metric.step for metric in run.data.to_proto().metrics}

    def _terminate(self) -> bool:
        """Set the final status when nothing is left; tell whether the thread may end."""
        with self._lock:
            if self._queue or self._outbox or self._behind:
                return False
            status = self._status
        try:
            self._client.set_terminated(self._run_id, status)
        except Exception as error:  # noqa: BLE001 - as in _loop
            self._failed(error)
            return False
        return True

    # ------------------------------------------------------------------ bookkeeping

    def _load(self) -> dict[str, Any]:
        try:
            saved = json.loads(self._state.read(STATE))
        except FileNotFoundError:
            return {}
        except ValueError:  # damaged: MLflow's own answer and the tag are enough
            return {}
        return saved if isinstance(saved, dict) else {}

    def _save(self) -> None:
        state = {
            "run_id": self._run_id,
            "experiment_id": self._experiment_id,
            "acked": list(self._acked),
        }
        if state == self._saved:
            return
        try:
            self._state.write(STATE, json.dumps(state).encode())
        except Exception as error:  # noqa: BLE001 - MLflow has the metrics; it is asked at a restart
            self._logger.warning("%s/%s not written: %s", self._state.uri, STATE, error)
            return
        self._saved = state

    def _failed(self, error: Exception) -> None:
        self._last = None  # whatever was under way may have been applied
        text = mask(f"{type(error).__name__}: {error}".splitlines()[0])[:500]
        with self._lock:
            self._failures += 1
            first = self._failures == 1
            self._error = text
        if first:
            self._tell("tracking_outage", {"uri": mask(self.uri), "error": text})

    def _recovered(self) -> None:
        with self._lock:
            failures, self._failures, self._error = self._failures, 0, None
        if failures:
            self._tell("tracking_recovered", {"failures": failures, "acked_step": self._acked[1]})

    def _refuse(self, what: str, error: Exception) -> None:
        with self._lock:
            self._refused += 1
            count = self._refused
        if count in (1, 10, 100, 1000, 10_000):  # a deleted run refuses every step
            self._logger.warning(
                "MLflow refused %s (%d refused so far): %s", what, count, mask(str(error))[:500]
            )

    def _tell(self, event: str, details: dict[str, Any]) -> None:
        if self._on_event is None:
            self._logger.warning("%s: %s", event, details)
            return
        try:
            self._on_event(event, details)
        except Exception:  # noqa: BLE001 - the caller's hook must not end the sink
            self._logger.exception("on_event failed")


# ---------------------------------------------------------------------- MLflow's address


def default_tracking_uri(uri: str | None, storage: str) -> str:
    """Return the tracking URI of a run: the given one, MLFLOW_TRACKING_URI, or a database.

    Args:
        uri: tracking.uri.
        storage: run.storage; the database is mlflow.db in it.

    Raises:
        ConfigError: none is given and the storage cannot hold a database.
    """
    chosen = uri or os.environ.get("MLFLOW_TRACKING_URI")
    if chosen:
        return chosen
    if "://" in storage:
        raise ConfigError(
            f"tracking.uri is not set, and run.storage {storage} cannot hold MLflow's database; "
            "set tracking.uri to an MLflow server (or MLFLOW_TRACKING_URI)"
        )
    return f"sqlite:///{Path(storage).absolute()}/mlflow.db"


def require_tracking_uri(uri: str | None = None) -> str:
    """Return the address of an MLflow that exists; none = MLFLOW_TRACKING_URI, runs/mlflow.db.

    Raises:
        RegistryError: the database is not there: opening it would make an empty one.
    """
    chosen = default_tracking_uri(uri, "runs")
    path = _sqlite_path(chosen)
    if path is not None and not path.is_file():
        raise RegistryError(
            f"MLflow at {chosen}: {path} does not exist; give the address of the run's MLflow, "
            "such as --tracking_uri http://host:5000 or sqlite:////<run.storage>/mlflow.db"
        )
    return chosen


def mlflow_client(uri: str) -> Any:
    """Return an MlflowClient of an address; MLflow is imported here (1.3 s), not before."""
    for name, value in {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "MLFLOW_PRINT_MODEL_URLS_ON_CREATION": "false",
        # MLflow's own 7 retries take 4 minutes to say that nobody listens.
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
    }.items():
        os.environ.setdefault(name, value)
    path = _sqlite_path(uri)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
    from mlflow import MlflowClient

    if path is None:
        return MlflowClient(tracking_uri=uri, registry_uri=uri)
    # One line for each of 40 schema migrations, on the terminal, at the first run.
    for name in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(name).setLevel(logging.WARNING)
    with _one_at_a_time(path):
        client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        client.search_experiments(max_results=1)  # makes the tables where there are none
    return client


@contextlib.contextmanager
def _one_at_a_time(database: Path) -> Iterator[None]:
    """Hold a lock beside a database: two processes that make its tables at once break both."""
    try:
        lock = open(database.with_name(f"{database.name}.lock"), "ab")
    except PermissionError:  # somebody else's storage, read only: its tables are there
        yield
        return
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


_QUICK = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "3",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_JITTER": "0",
}


def set_quick_timeouts() -> None:
    """Have MLflow give up a request of this process after seconds, unless the user set otherwise.

    MLflow's default is 8 tries of up to 120 s: 16 minutes in which the sink could neither stop nor
    tell anybody. MLflow reads these variables at each request and has no other way to set them.
    """
    for name, value in _QUICK.items():
        os.environ.setdefault(name, value)


@contextlib.contextmanager
def patient_timeouts() -> Iterator[None]:
    """Allow a minute for each request while the block runs, where ours would be 3 s.

    For uploads of weights, which a server may take long to answer. The sink's thread gets the same
    patience meanwhile, which costs nobody anything.
    """
    name = "MLFLOW_HTTP_REQUEST_TIMEOUT"
    before = os.environ.get(name)
    if before != _QUICK[name]:  # the user's own choice, or MLflow's 120 s
        yield
        return
    os.environ[name] = "60"
    try:
        yield
    finally:
        os.environ[name] = before


def _sqlite_path(uri: str) -> Path | None:
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


# ---------------------------------------------------------------------- what may be logged


def redact(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return a flat dict without secrets: named so (key, secret, password, token), or in URIs."""
    return {
        name: "<redacted>"
        if _SECRET.search(name.lower().replace("tokenizer", ""))
        else mask(value)
        if isinstance(value, str)
        else value
        for name, value in flat.items()
    }


def mask(text: str) -> str:
    """Return a text with the credentials in its URIs replaced by ***."""
    return _SIGNED.sub(r"\1***", _CREDENTIALS.sub("://***@", text))


def _key(name: str) -> str:
    return _BAD_KEY_CHARS.sub("_", str(name))[:250]


def _text(value: Any, limit: int) -> str:
    text = mask(value if isinstance(value, str) else str(value))
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _is_refusal(error: Exception) -> bool:
    return getattr(error, "error_code", None) in _REFUSALS


def user() -> str:
    """Return who runs this process."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a passwd entry
        return f"uid {os.getuid()}"


# ---------------------------------------------------------------------- the code's version

_SOURCE_SUFFIXES = frozenset({".py", ".yaml", ".yml"})
_NOT_SOURCE = frozenset({"__pycache__", "node_modules", "build", "dist", "runs", "mlruns", "venv"})


def source_version(root: Path) -> dict[str, Any]:
    """Return what code this is: {"commit", "dirty", "origin"}.

    The git commit of a checkout; else the first line of a file BUILD (an image writes it: commit,
    then optionally the word dirty); else, because Ray drops .git from an uploaded working
    directory, the sha256 over the .py and .yaml files. `origin` says which: git, BUILD or digest.

    Args:
        root: the checkout's top directory.
    """
    top = _git(root, "rev-parse", "--show-toplevel")
    # A package installed somewhere below a stranger's repository has not that one's commit.
    if top is not None and Path(top).resolve() == root.resolve():
        commit = _git(root, "rev-parse", "HEAD")
        if commit:
            changes = _git(root, "status", "--porcelain")
            return {"commit": commit, "dirty": changes != "", "origin": "git"}
    build = root / "BUILD"
    if build.is_file():
        words = build.read_text().split()
        if words:
            return {"commit": words[0], "dirty": "dirty" in words[1:], "origin": "BUILD"}
    digest = hashlib.sha256()
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f not in _NOT_SOURCE)
        for name in sorted(names):
            path = Path(folder) / name
            if path.suffix in _SOURCE_SUFFIXES:
                content = hashlib.sha256(path.read_bytes()).hexdigest()
                digest.update(f"{path.relative_to(root)}, {content}\n".encode())
    return {"commit": digest.hexdigest(), "dirty": False, "origin": "digest"}


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
