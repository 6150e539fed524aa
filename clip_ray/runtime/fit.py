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
from clip_ray.runtime.cluster import (
    Share,
    deal_streams,
    is_local,
    usable_nodes,
    wait_for_share,
    worker_bundles,
)
from clip_ray.runtime.progress import ProgressLine
from clip_ray.runtime.pulse import STRAGGLES, Hang, Health, Pulse, Stragglers, end_process
from clip_ray.runtime.recorder import send_event
from clip_ray.runtime.room import Room
from clip_ray.runtime.worker import Job, Result, run_worker
from clip_ray.tracking import Tracker
from clip_ray.train.checkpoint import Checkpoints
from clip_ray.train.committer import COMMIT_TIMEOUT_S
from clip_ray.train.hooks import Outcome
from clip_ray.train.journal import Row, read_journal
from clip_ray.train.requests import Inbox
from clip_ray.train.rundir import Run
from clip_ray.train.state import Progress

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
    """Train with one group of workers after the other until the run ends.

    A group ends early where it loses a worker, or yields: to a cluster that has room for more of
    them, or that takes a node away. The next one begins from the last commit, with as many workers
    as there is room for.

    Raises:
        TrainingError: groups fail without a new commit, or the user would not wait for the last.
        ClusterError: a lost worker was not replaced in time.
    """
    line = ProgressLine(run, start_step, sys.stderr)
    inbox = Inbox(run.store)
    watch = _Watch(run, recorder, tracker, line, inbox)
    driver, fruitless = uuid.uuid4().hex, 0
    stop.deferred = True
    try:
        while True:
            commit = _newest_commit(run)
            ended = _Group(run, share, recorder, driver, watch, stop).follow()
            if isinstance(ended, Result):
                if ended.outcome is None or ended.outcome.reason != "yielded":
                    return ended
            elif _newest_commit(run) == commit:
                fruitless += 1
                if fruitless >= run.config.cluster.max_fruitless_attempts:
                    raise TrainingError(
                        f"{fruitless} attempts in a row ended without a new commit; the last: "
                        f"{_cause(run, ended)} (all in {run.store.uri}/events.jsonl)"
                    ) from ended
            else:
                fruitless = 0
            try:
                share = _next_share(run, share, watch, stop)
            except _StoppedError:
                return Result(Outcome("stopped", Progress(0, run.plan.digest)))
    finally:
        stop.deferred = False
        inbox.close()
        line.close()
        recorder.training_ended.remote()


class _StoppedError(Exception):
    """The run was asked to end while there was no group of workers."""


def _cause(run: Run, ended: BaseException) -> str:
    """Say why a group ended: what its workers raised, else what Ray Train says."""
    failed = [e for e in read_journal(run.store, "events") if e["event"] == "attempt_failed"]
    causes = failed[-1]["causes"] if failed else {}
    said = "; ".join(f"rank {rank}: {cause}" for rank, cause in causes.items())
    return said or f"{type(ended).__name__}: {str(ended).strip().splitlines()[-1]}"


def _newest_commit(run: Run) -> str:
    commits = Checkpoints(run.store).commits()
    return commits[-1].name if commits else ""


def _next_share(run: Run, share: Share, watch: _Watch, stop: Signals) -> Share:
    """Wait, bounded, until the cluster has room for the next group of workers."""
    cluster = run.config.cluster

    def check() -> None:
        stop.check(run.store.uri)
        if stop.received or watch.asked_to_end():
            raise _StoppedError

    check()
    if is_local(cluster):
        return share
    gpu = bool(share.worker_gpus)
    found = wait_for_share(cluster, gpu, cluster.rejoin_timeout_s, watch.note, check)
    found = deal_streams(found, cluster, usable_nodes())
    if found.num_workers != share.num_workers:
        watch.note(f"{found.num_workers} workers in the place of {share.num_workers}")
    return found


class _Group:
    """One group of workers: Ray Train's `fit()` on a thread, and all that is watched meanwhile."""

    def __init__(
        self, run: Run, share: Share, recorder: Any, driver: str, watch: _Watch, stop: Signals
    ) -> None:
        self._run, self._share, self._recorder = run, share, recorder
        self._watch, self._stop = watch, stop
        config = run.config
        self._name = uuid.uuid4().hex
        self._job = Job(
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
            driver=driver,
            group=self._name,
        )
        self._health = Health(
            config.cluster.hang_timeout_s,
            slow_s=config.cluster.collective_timeout_s,
            ending_s=1.1 * COMMIT_TIMEOUT_S,
        )
        self._room = Room(config.cluster, share)
        self._stragglers = Stragglers()
        self._asked = self._hung = False

    def follow(self) -> Result | BaseException:
        """Return how the group ended, or what ended it."""
        scratch = tempfile.mkdtemp(prefix="clip-ray-train-")
        trainer = self._trainer(scratch)
        ended: list[Any] = []

        def fit() -> None:
            try:
                ended.append(trainer.fit().return_value)
            except BaseException as error:
                ended.append(error)

        thread = threading.Thread(target=fit, name="fit", daemon=True)
        self._recorder.forget.remote("yield")
        try:
            thread.start()
            deadline = float("inf")
            while thread.is_alive():
                thread.join(timeout=POLL_S)
                self._health.took(self._watch.poll())
                ender = self._stop.name or self._watch.asked_to_end()
                if ender and deadline == float("inf"):
                    deadline = time.monotonic() + STOP_TIMEOUT_S
                    again = "again" if self._stop.received else "Ctrl-C twice"
                    self._watch.note(f"{ender}: committing, then stopping ({again}: stop at once)")
                if ender:
                    self._recorder.ask.remote("stop")  # each time: a restarted one has forgotten
                self._watch.relay_wish_for_commit()
                self._stop.check(self._run.store.uri)
                if time.monotonic() > deadline:
                    raise TrainingError(
                        f"{ender}: no commit within {STOP_TIMEOUT_S:g} s; stopped without"
                    )
                self._watch_workers()
            self._watch.poll()
        finally:
            self._room.close()
            shutil.rmtree(scratch, ignore_errors=True)
        how: Result | BaseException = ended[0]
        return how

    def _trainer(self, scratch: str) -> Any:
        config, share = self._run.config, self._share
        (resources, *_) = worker_bundles(1, share.worker_cpus, bool(share.worker_gpus))
        api: Any = ray.train  # its static types are those of Train V1
        return api.torch.TorchTrainer(
            run_worker,
            train_loop_config={"job": self._job},
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
                name=f"{config.run.name}-{self._name[:8]}",
                storage_path=scratch,
                # The next group is ours to begin: with as many workers as there is room for then.
                failure_config=api.FailureConfig(
                    max_failures=0, controller_failure_limit=0, max_preemption_failures=0
                ),
                callbacks=[CauseOfRestart(self._recorder)],
            ),
        )

    def _watch_workers(self) -> None:
        """End a worker that hangs; ask the group to yield where the cluster changes."""
        pulses = self._watch.pulses(self._name)
        hang = None if self._hung else self._health.judge(pulses)
        if hang is not None:
            self._hung = True  # the group ends: what was last heard of it says nothing more
            self._watch.hang(hang, end_process(hang.pulse))
        times = self._stragglers.compare(pulses)
        if times is not None:
            self._watch.compared(times)
        slow = self._health.slow(pulses)
        if slow is not None:
            self._watch.slow(slow)
        why = self._room.why_yield({pulse.node for pulse in pulses})
        if why and not self._asked:
            self._watch.note(f"{why}: committing, then going on with other workers")
            self._watch.event("yield", why=why)
            self._asked = True
        if self._asked:
            self._recorder.ask.remote("yield")


class _Watch:
    """Follows the recorder: rows to MLflow and the progress line, events to the user."""

    def __init__(
        self, run: Run, recorder: Any, tracker: Tracker, line: ProgressLine, inbox: Inbox
    ) -> None:
        self._run, self._recorder, self._tracker, self._line = run, recorder, tracker, line
        self._inbox = inbox
        self._incarnation, self._cursor = "", 0
        self._slow, self._straggler = "", -1
        self.note = line.note

    def poll(self) -> list[Row]:
        """Take what is new, and return the steps. A recorder that restarts is asked again."""
        try:
            call = self._recorder.log_since.remote(self._incarnation, self._cursor)
            incarnation, self._cursor, rows = ray.get(call, timeout=30)
        except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
            return []
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
        self._inbox.saw(rows)
        return metrics

    def asked_to_end(self) -> str:
        """Take what was asked through the storage; return who asked for the end, if anybody."""
        for request in self._inbox.take():
            self.event("asked", wish=request.wish, by=request.by)
            if request.wish == "commit":
                self.note(f"{request.by} asks for a commit")
        return self._inbox.stop_by and f"asked by {self._inbox.stop_by}"

    def relay_wish_for_commit(self) -> None:
        """Tell the ranks, through the recorder, whether a commit is asked for."""
        call = self._recorder.ask if self._inbox.wants_commit else self._recorder.forget
        call.remote("commit")

    def pulses(self, group: str) -> list[Pulse]:
        """Return the last sign of life of each worker."""
        try:
            found: list[Pulse] = ray.get(self._recorder.pulses.remote(group), timeout=30)
        except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
            return []
        return found

    def event(self, name: str, **fields: Any) -> None:
        """Journal an event of the driver's."""
        send_event(self._recorder, {"time": time.time(), "event": name, **fields})

    def hang(self, hang: Hang, how: str) -> None:
        """Say which worker hung, and where."""
        pulse = hang.pulse
        self.note(f"{pulse.who} hangs: {hang.why}; {how}")
        self.event(
            "hang",
            rank=pulse.rank,
            host=pulse.host,
            pid=pulse.pid,
            step=pulse.step,
            phase=pulse.phase,
            why=hang.why,
            ended=how,
            stack=pulse.stack,
        )

    def compared(self, times: Row) -> None:
        """Journal the ranks' times, and name one that is far slower than the others."""
        self.event("ranks", **times)
        usual, most = times["compute_p50_s"], times["compute_max_s"]
        if most > STRAGGLES * usual and self._straggler != times["slowest_rank"]:
            self._straggler = times["slowest_rank"]
            self.note(
                f"rank {times['slowest_rank']} on {times['slowest_host']} holds the others up: "
                f"{1000 * most:.0f} ms of its own work a step, the median is {1000 * usual:.0f}"
            )

    def slow(self, pulse: Pulse) -> None:
        """Say, once for each rank and phase, what all wait for."""
        text = f"all wait for {pulse.who}, in {pulse.phase}"
        if text != self._slow:
            self._slow = text
            self.note(f"{text} for {pulse.still_s:.0f} s")
            self.event("slow", rank=pulse.rank, host=pulse.host, phase=pulse.phase)

    def _event(self, row: Row) -> None:
        kind = row["event"]
        if kind == "commit":
            self._line.committed(row["step"])
            self._tracker.log_checkpoint(row["step"], row["uri"], row["digest"])
        elif kind == "commit_failed":
            self.note(f"NO COMMIT of step {row['step']}: {row['why']}; the next one is tried")
        elif kind == "commit_deferred":
            self.note(
                f"the commit due before step {row['step']} waits: the one before it is still being "
                f"written, for {row['waited_s']:.0f} s now (a slow or silent storage); steps go on"
            )
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


class CauseOfRestart(ray.train.UserCallback):
    """Tells the recorder why a worker group ended; runs in Ray Train's controller."""

    def __init__(self, recorder: Any) -> None:
        self._recorder = recorder

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Journal the first line of each rank's exception."""
        causes = {
            str(rank): f"{type(e).__name__}: {str(e).strip().splitlines()[-1][:300]}"
            for rank, e in worker_exceptions.items()
            if str(e).strip()
        }
        row = {"time": time.time(), "event": "attempt_failed", "causes": causes}
        send_event(self._recorder, row)


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

    def check(self, run_uri: str) -> None:
        """Raise where nothing more is to be waited for.

        Raises:
            TrainingError: a second signal came.
            CheckpointError: another job has the run's lease.
        """
        if self.lease_lost.is_set():
            raise CheckpointError(
                f"run {run_uri} was taken over by another job while this one did not run"
            )
        if self.count > 1:
            raise TrainingError(f"stopped by {self.name} before the commit was written")

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
