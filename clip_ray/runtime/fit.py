"""Handing a run to Ray Train, and following it until it ends.

`fit()` runs on a thread, so that this process's main thread owns SIGINT and SIGTERM.
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
from collections.abc import Iterator
from typing import Any

import ray
import ray.train
import ray.train.torch

from clip_ray.errors import CheckpointError, TrainingError
from clip_ray.runtime.cluster import Share
from clip_ray.runtime.progress import ProgressLine
from clip_ray.runtime.recorder import CauseOfRestart
from clip_ray.runtime.worker import Job, Result, run_worker
from clip_ray.tracking import Tracker
from clip_ray.train.journal import Row, read_journal
from clip_ray.train.rundir import Run

POLL_S = 0.5
STOP_TIMEOUT_S = 900.0  # a commit in the making and the last step


def fit_run(
    run: Run,
    share: Share,
    recorder: Any,
    tracker: Tracker,
    stop: Signals,
    start_step: int,
) -> Result:
    """Run the training on a thread; report its progress and pass on signals until it ends.

    Raises:
        TrainingError: Ray Train gave up, or the user would not wait for the last commit.
    """
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
    watch = _Watch(run, recorder, tracker, line)
    stop.deferred = True
    try:
        thread.start()
        deadline = float("inf")
        while thread.is_alive():
            thread.join(timeout=POLL_S)
            watch.poll()
            if stop.received and deadline == float("inf"):
                deadline = time.monotonic() + STOP_TIMEOUT_S
                line.note(f"{stop.name}: committing, then stopping (again: stop at once)")
            if stop.received:
                recorder.request_stop.remote()  # each time: a restarted recorder has forgotten
            if stop.lease_lost.is_set():
                raise CheckpointError(
                    f"run {run.store.uri} was taken over by another job while this one did not run"
                )
            if stop.count > 1 or time.monotonic() > deadline:
                raise TrainingError(f"stopped by {stop.name} before the commit was written")
        watch.poll()
    finally:
        stop.deferred = False
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

    def __init__(self, run: Run, recorder: Any, tracker: Tracker, line: ProgressLine) -> None:
        self._run, self._recorder, self._tracker, self._line = run, recorder, tracker, line
        self._incarnation, self._cursor = "", 0

    def poll(self) -> None:
        """Take what is new. A recorder that is restarting is asked again the next time."""
        try:
            call = self._recorder.log_since.remote(self._incarnation, self._cursor)
            incarnation, self._cursor, rows = ray.get(call, timeout=30)
        except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
            return
        if self._incarnation and incarnation != self._incarnation:
            # What the last one took and had not yet told: the journal has it.
            self._tracker.offer(read_journal(self._run.store, "metrics"))
        self._incarnation = incarnation
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


class Signals:
    """What may end a run from outside, as facts to look at: signals, and the loss of the lease."""

    def __init__(self) -> None:
        self.received: int | None = None
        self.count = 0
        self.deferred = False
        self.lease_lost = threading.Event()

    @property
    def name(self) -> str:
        """Name of the last signal received, such as SIGTERM."""
        return signal.Signals(self.received).name if self.received else ""

    def own(self) -> None:
        """Make SIGINT and SIGTERM come here; only the main thread can."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, self.take)

    def take(self, number: int, frame: Any) -> None:
        """Note a signal, or end the process where nobody looks; installed as its handler."""
        self.received = number
        self.count += 1
        if not self.deferred:
            raise SystemExit(128 + number)


@contextlib.contextmanager
def owned_signals() -> Iterator[Signals]:
    """Take SIGINT and SIGTERM while the block runs, and give them back."""
    signals = Signals()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signals.own()
    try:
        yield signals
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)
