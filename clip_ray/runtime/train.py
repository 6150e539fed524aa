"""The training job's driver: prepare the run, let Ray Train run it, tell the user, finish it.

Ray Train supplies processes, placement and restarts. Its checkpoint machinery is not used: what a
run has reached is what its directory says (`train.checkpoint`). `fit()` runs on a thread, so that
this process's main thread owns SIGINT and SIGTERM.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from clip_ray import errors
from clip_ray.config import Config, S3Options
from clip_ray.config.load import flatten
from clip_ray.data.bundled import PREFIX, unbundle
from clip_ray.data.manifest import Manifest
from clip_ray.data.quarantine import BadSample, summarise
from clip_ray.errors import ClipRayError, DataError, TrainingError
from clip_ray.runtime.cluster import Share, absolute, check_storage, connected, wants_gpu
from clip_ray.runtime.finish import evaluate_model, export_model, summarize
from clip_ray.runtime.index import index_data
from clip_ray.runtime.progress import ProgressLine, start_block, summary_table
from clip_ray.runtime.recorder import CauseOfRestart, Recorder
from clip_ray.runtime.worker import Job, Result, run_worker
from clip_ray.storage import Store, open_store
from clip_ray.tracking import TrackedRun, Tracker, source_version
from clip_ray.train.checkpoint import Checkpoints
from clip_ray.train.journal import Row, read_journal
from clip_ray.train.lease import held_lease
from clip_ray.train.rundir import Run, claim, prepare, read_summary, run_store

POLL_S = 0.5
STOP_TIMEOUT_S = 900.0  # a commit in the making and the last step
TRACKING_TIMEOUT_S = 60.0

Say = Callable[[str], None]


@dataclass(frozen=True)
class Ended:
    """How a job ended: the run's summary, and the signal that stopped it, if one did."""

    summary: Row
    signal: int | None = None


def resolve(config: Config) -> Config:
    """Return the config with its paths absolute and bundled data copied into the storage."""
    storage = absolute(config.run.storage)
    store = open_store(storage, config.run.s3)

    def place(path: str) -> str:
        return absolute(unbundle(path, store))

    sources = tuple(
        s.model_copy(update={"path": place(s.path), "select": s.select and place(s.select)})
        for s in config.data.sources
    )
    # A bundled set is copied to where the run is: it is reached as the run is.
    bundled = any(s.path.startswith(PREFIX) for s in config.data.sources)
    s3 = config.run.s3 if bundled and config.data.s3 == S3Options() else config.data.s3
    data = config.data.model_copy(
        update={
            "s3": s3,
            "sources": sources,
            "exclude": config.data.exclude and place(config.data.exclude),
        }
    )
    vocab = config.tokenizer.vocab
    return config.model_copy(
        update={
            "run": config.run.model_copy(update={"storage": storage}),
            "data": data,
            "eval": config.eval.model_copy(
                update={"datasets": tuple(place(path) for path in config.eval.datasets)}
            ),
            "tokenizer": config.tokenizer.model_copy(
                update={"vocab": vocab if vocab == "clip" else place(vocab)}
            ),
        }
    )


def pretrain(config: Config, command: list[str], say: Say = print) -> Ended:
    """Run a pre-training job: start or resume the run, train, export, evaluate, register.

    Args:
        config: the run's configuration; relative paths are resolved here.
        command: the command line, shown as the way to resume.
        say: prints a line for the user.

    Raises:
        ClipRayError: what kept the run from starting or from ending.
    """
    config = resolve(config)
    store = run_store(config)
    with _owned_signals() as stop, held_lease(store):
        if claim(store, config):
            say(f"run {config.run.name} exists in {store.uri}")
        done = _finished(store, config, say)
        if done is not None:
            return Ended(done)
        gpu = wants_gpu(config)
        token_dir = Path(store.uri) if not store.uri.startswith("s3://") else Path.home()
        say("starting Ray" if config.cluster.address is None else "connecting to Ray")
        with connected(config, gpu, token_dir) as share:
            check_storage(config, config.run.storage, config.tracking.uri)
            run = prepare(store, config, lambda: index_data(config.data, say), say)
            return _run_job(run, share, command, stop, say)


def _finished(store: Store, config: Config, say: Say) -> Row | None:
    """Return the summary of a run that has nothing left to do."""
    summary = read_summary(store)
    if summary is None or not store.exists("manifest.parquet"):
        return None
    run = prepare(store, config, _no_manifest, say)
    if summary.get("status") != "finished" or summary["steps"] < run.total_steps:
        return None
    say(f"run {config.run.name} is finished; add steps with --run.extend N\n")
    say(summary_table(summary, run))
    return summary


def _no_manifest() -> Manifest:
    raise AssertionError("the caller has checked that the manifest is there")


def _run_job(run: Run, share: Share, command: list[str], stop: _Signals, say: Say) -> Ended:
    store = run.store
    recorder = _start_recorder(run)
    tracker = _start_tracker(run, recorder)
    status = "FAILED"
    try:
        begun = time.time()
        start_step = max((c.step for c in Checkpoints(store).commits()), default=0)
        say(start_block(run, share, start_step, tracker.uri, command))
        if start_step < run.total_steps:
            result = _fit(run, share, recorder, tracker, stop, start_step, say)
            _raise_failure(result, run, store)
            assert result.outcome is not None
            if result.outcome.reason == "stopped":
                status = "KILLED"
                return Ended(
                    _stopped(run, tracker, result.outcome.progress.step, command, say),
                    stop.received,
                )
        summary = _finish(run, share, tracker, begun, say)
        status = "FINISHED"
        return Ended(summary)
    except ClipRayError as error:
        resumable = Checkpoints(store).commits()
        last = f"last commit: {resumable[-1].name}" if resumable else "nothing is committed yet"
        raise type(error)(f"{error}\n{last}; to resume: {' '.join(command)}") from error
    finally:
        with contextlib.suppress(ray.exceptions.RayError, ray.exceptions.GetTimeoutError):
            ray.get(recorder.close.remote(), timeout=60)
        if not tracker.finish(status, TRACKING_TIMEOUT_S):
            say(
                f"MLflow at {tracker.uri} did not take everything ({tracker.lag().error}); the "
                "journal in the run's directory has it, and starting the run again sends it"
            )


def _start_recorder(run: Run) -> Any:
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor: Any = ray.remote(Recorder)
    options = {"num_cpus": 0, "max_restarts": -1, "scheduling_strategy": here}
    return actor.options(**options).remote(run.store.uri, run.config.run.s3)


def _start_tracker(run: Run, recorder: Any) -> Tracker:
    config = run.config

    def replay(step: int) -> Iterator[Row]:
        ray.get(recorder.append.remote([], durable=True), timeout=60)
        return (row for row in read_journal(run.store, "metrics") if row["step"] >= step)

    def event(name: str, details: dict[str, Any]) -> None:
        row = {"time": time.time(), "event": name, **details}
        recorder.append.remote([("events", row)])

    version = source_version(Path(__file__).parents[2])
    tracker = Tracker(
        TrackedRun(config.run.name, f"{run.store.uri}#{run.plan.digest[:12]}", config.run.storage),
        config.tracking,
        run.store,
        replay,
        tags={f"clip_ray.source.{key}": str(value) for key, value in version.items()},
        on_event=event,
    )
    tracker.log_params(flatten(config.model_dump(mode="json")))
    tracker.set_tags({"clip_ray.plan_digest": run.plan.digest, "clip_ray.run_dir": run.store.uri})
    tracker.log_dataset(config.run.name, f"{run.store.uri}/manifest.parquet", run.manifest.digest)
    return tracker


def _fit(
    run: Run,
    share: Share,
    recorder: Any,
    tracker: Tracker,
    stop: _Signals,
    start_step: int,
    say: Say,
) -> Result:
    """Run the training on a thread; report its progress and pass on signals until it ends."""
    config = run.config
    job = Job(
        config=config,
        run_uri=run.store.uri,
        total_steps=run.total_steps,
        samples_per_pass=run.manifest.total,
        plan_digest=run.plan.digest,
        layout=run.layout(share.num_workers),
        reader=[ray.put(run.reader(share.num_workers))],
        recorder=recorder,
        share=share,
        tokenizer=run.tokenizer.to_bytes(),
        driver=uuid.uuid4().hex,
    )
    resources = {"CPU": share.worker_cpus} | ({"GPU": 1} if share.worker_gpus else {})
    scratch = tempfile.mkdtemp(prefix="clip-ray-train-")
    api: Any = ray.train  # its static types are those of Train V1
    trainer = api.torch.TorchTrainer(
        run_worker,
        train_loop_config={"job": job},
        torch_config=api.torch.TorchConfig(
            backend="cpu:gloo,cuda:nccl" if share.worker_gpus else "gloo",
            timeout_s=config.cluster.collective_timeout_s,
        ),
        scaling_config=api.ScalingConfig(
            num_workers=share.num_workers,
            use_gpu=bool(share.worker_gpus),
            resources_per_worker=resources,
        ),
        run_config=api.RunConfig(
            name=f"{config.run.name}-{job.driver[:8]}",
            storage_path=scratch,
            failure_config=api.FailureConfig(max_failures=-1, controller_failure_limit=3),
            callbacks=[CauseOfRestart(recorder)],
        ),
    )
    ended: list[Any] = []

    def fit() -> None:
        try:
            ended.append(trainer.fit().return_value)
        except BaseException as error:
            ended.append(error)

    thread = threading.Thread(target=fit, name="fit", daemon=True)
    line = ProgressLine(run, start_step, sys.stderr)
    watch = _Watch(recorder, tracker, line, say)
    try:
        thread.start()
        deadline = float("inf")
        while thread.is_alive():
            thread.join(timeout=POLL_S)
            watch.poll()
            if stop.received and deadline == float("inf"):
                deadline = time.monotonic() + STOP_TIMEOUT_S
                line.note(f"{stop.name}: committing, then stopping (again: stop at once)")
                recorder.request_stop.remote()
            if stop.count > 1 or time.monotonic() > deadline:
                raise TrainingError(f"stopped by {stop.name} before the commit was written")
        watch.poll()
    finally:
        line.close()
        shutil.rmtree(scratch, ignore_errors=True)
    if isinstance(ended[0], BaseException):
        raise TrainingError(f"Ray Train gave up: {type(ended[0]).__name__}: {ended[0]}") from ended[
            0
        ]
    result: Result = ended[0]
    return result


class _Watch:
    """Follows the recorder: rows to MLflow and the progress line, events to the user."""

    def __init__(self, recorder: Any, tracker: Tracker, line: ProgressLine, say: Say) -> None:
        self._recorder, self._tracker, self._line, self._say = recorder, tracker, line, say
        self._cursor = 0

    def poll(self) -> None:
        """Take what is new. A recorder that is restarting is asked again the next time."""
        try:
            cursor, rows = ray.get(self._recorder.log_since.remote(self._cursor), timeout=30)
        except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
            return
        # A restarted recorder counts from 0 again.
        self._cursor = cursor
        metrics = [row for journal, row in rows if journal == "metrics"]
        self._tracker.offer(metrics)
        for journal, row in rows:
            if journal == "events":
                self._event(row)
            elif journal == "quarantine":
                self._line.bad(row)
        self._line.steps(metrics, self._tracker.lag())

    def _event(self, row: Row) -> None:
        kind = row["event"]
        if kind == "commit":
            self._line.committed(row["step"])
            self._tracker.log_checkpoint(row["step"], row["uri"], row["digest"])
        elif kind == "attempt_failed":
            causes = "; ".join(f"rank {r}: {c}" for r, c in row["causes"].items())
            self._line.note(f"the workers stopped ({causes or 'process died'}); starting again")
        elif kind == "attempt" and row["attempt"] > 1:
            start = row["commit"] or "the beginning"
            self._line.note(f"attempt {row['attempt']} goes on from {start}")
        elif kind == "commit_rejected":
            self._line.note(f"COMMIT {row['commit']} IS DAMAGED and not used: {row['why']}")
        elif kind == "rollback":
            self._line.note(f"step {row['step']}: {row['reason']}; back to the last commit, once")
        elif kind == "tracking_outage":
            self._line.note(f"MLflow does not answer ({row.get('error')}); the journal keeps all")
        elif kind == "tracking_recovered":
            self._line.note("MLflow answers again")


def _raise_failure(result: Result, run: Run, store: Store) -> None:
    """Raise what ended the training for good; a retry cannot mend it."""
    if result.error is not None:
        kind, message = result.error
        raise getattr(errors, kind, TrainingError)(message)
    assert result.outcome is not None
    progress = result.outcome.progress
    if result.outcome.reason == "bad-data":
        rows = list(read_journal(store, "quarantine"))
        bad = [BadSample(r["key"], r["reason"]) for r in rows]
        seen = progress.step * run.config.train.global_batch
        raise DataError(
            f"{progress.bad} of {seen} samples are undecodable, more than data.max_bad_fraction "
            f"{run.config.data.max_bad_fraction:g} allows: {summarise(bad)}; all of them are in "
            f"{store.uri}/quarantine.jsonl. Mend the data, or raise the limit"
        )
    if result.outcome.reason == "nonfinite":
        last = progress.step - 1
        rows_of_step = run.plan.step_rows(last)
        shards = sorted({run.manifest.shard(int(s)).path for s in set(rows_of_step.shard)})[:3]
        raise TrainingError(
            f"loss or gradient not finite for {run.config.train.max_nonfinite} steps up to step "
            f"{last}, again after a roll-back: lower optim.lr, or look at the samples of these "
            f"steps (python jobs/verify_run.py --run {store.uri} --step {last}; shards "
            f"{', '.join(shards)})"
        )


def _stopped(run: Run, tracker: Tracker, step: int, command: list[str], say: Say) -> Row:
    commits = Checkpoints(run.store).commits()
    say(
        f"stopped at step {step} of {run.total_steps}; committed: {commits[-1].name}\n"
        f"to resume: {' '.join(command)}"
    )
    return {"status": "stopped", "steps": step, "run_id": tracker.run_id}


def _finish(run: Run, share: Share, tracker: Tracker, begun: float, say: Say) -> Row:
    """Export, evaluate, register and sum up a run that has reached its last step."""
    digest = export_model(run, tracker.wait_run_id(10))
    say(f"exported: {run.store.uri}/export (digest {digest[:12]})")
    results, figures = evaluate_model(run, share, say)
    summary = summarize(run, tracker, results, figures, digest, begun, say)
    say("\n" + summary_table(summary, run))
    return summary


class _Signals:
    """SIGINT and SIGTERM as facts to look at."""

    def __init__(self) -> None:
        self.received: int | None = None
        self.count = 0

    @property
    def name(self) -> str:
        return signal.Signals(self.received).name if self.received else ""

    def take(self, number: int, frame: Any) -> None:
        self.received = number
        self.count += 1


@contextlib.contextmanager
def _owned_signals() -> Iterator[_Signals]:
    """Take SIGINT and SIGTERM while the block runs; the second one is passed on."""
    signals = _Signals()
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    before = {n: signal.signal(n, signals.take) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
