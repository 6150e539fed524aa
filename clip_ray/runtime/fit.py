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
from typing import Any

import ray
import ray.train
import ray.train.torch

from clip_ray.errors import ClusterError, StorageError, TrainingError
from clip_ray.runtime.cluster import (
    Share,
    deal_streams,
    is_local,
    job_actors,
    usable_nodes,
    wait_for_share,
    worker_bundles,
)
from clip_ray.runtime.preemption import WorkersConfig
from clip_ray.runtime.progress import ProgressLine
from clip_ray.runtime.pulse import Health, Overdue, Pulse, Stragglers, signal_process
from clip_ray.runtime.recorder import send_event
from clip_ray.runtime.room import Room
from clip_ray.runtime.signals import Signals
from clip_ray.runtime.watch import Watch
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
PAUSE_S = 10.0  # before a storage that did not answer is asked again; doubled each time
GIVEN_BACK_S = 5.0  # what a group and its reading tasks held is free again by then
END_S = 30.0  # for Ray Train to say that a controller that was killed is dead
STOP_TIMEOUT_S = 900.0  # a commit in the making and the last step


def fit_run(
    run: Run,
    share: Share,
    recorder: Any,
    tracker: Tracker,
    stop: Signals,
    start_step: int,
    inbox: Inbox,
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
    watch = Watch(run, recorder, tracker, line, inbox)
    driver, fruitless = uuid.uuid4().hex, 0
    most = run.config.cluster.max_fruitless_attempts
    stop.deferred = True
    try:
        while True:
            ended, fruitful = _one_group(run, share, recorder, driver, watch, stop)
            if isinstance(ended, Result):
                if ended.outcome is None or ended.outcome.reason != "yielded":
                    return ended
            elif fruitful and _is_whole(run):
                return Result(Outcome("finished", Progress(run.total_steps, run.plan.digest)))
            else:
                fruitless = 0 if fruitful else fruitless + 1
                if fruitless >= most:
                    raise TrainingError(
                        f"{fruitless} attempts in a row ended without a new commit; the last: "
                        f"{_cause(run, ended)} (all in {run.store.uri}/events.jsonl)"
                    ) from ended
            try:
                if isinstance(ended, StorageError):
                    pause_s = PAUSE_S * 2 ** (fruitless - 1)
                    watch.note(
                        f"the storage does not answer ({ended}); again in {pause_s:g} s, attempt "
                        f"{fruitless + 1} of {most}"
                    )
                    _pause(pause_s, run, watch, stop)
                share = _next_share(run, share, watch, stop)
            except _StoppedError:
                return Result(Outcome("stopped", Progress(0, run.plan.digest)))
    finally:
        stop.deferred = False
        watch.close()
        line.close()
        recorder.training_ended.remote()


def _one_group(
    run: Run, share: Share, recorder: Any, driver: str, watch: Watch, stop: Signals
) -> tuple[Result | BaseException, bool]:
    """Run one group of workers; return how it ended, and whether there is a new commit."""
    try:
        before = _newest_commit(run)
        ended = _Group(run, share, recorder, driver, watch, stop).follow()
        return ended, isinstance(ended, Result) or _newest_commit(run) != before
    except StorageError as error:
        return error, False


class _StoppedError(Exception):
    """The run was asked to end while there was no group of workers."""


def _cause(run: Run, ended: BaseException) -> str:
    """Say why a group ended: what its workers raised, else what Ray Train says."""
    failed: list[Row] = []
    with contextlib.suppress(StorageError):
        failed = [e for e in read_journal(run.store, "events") if e["event"] == "attempt_failed"]
    causes = failed[-1]["causes"] if failed and not isinstance(ended, StorageError) else {}
    said = "; ".join(f"rank {rank}: {cause}" for rank, cause in causes.items())
    return said or f"{type(ended).__name__}: {str(ended).strip().splitlines()[-1]}"


def _newest_commit(run: Run) -> str:
    commits = Checkpoints(run.store).commits()
    return commits[-1].name if commits else ""


def _is_whole(run: Run) -> bool:
    """Tell whether the last step is committed, whatever ended the group after it."""
    with contextlib.suppress(StorageError):
        return any(c.step >= run.total_steps for c in Checkpoints(run.store).commits())
    return False


def _check(run: Run, watch: Watch, stop: Signals) -> None:
    """Raise where the run is to end while there is no group of workers."""
    stop.check(run.store.uri)
    if stop.received or watch.asked_to_end():
        raise _StoppedError


def _pause(seconds: float, run: Run, watch: Watch, stop: Signals) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        _check(run, watch, stop)
        time.sleep(POLL_S)


def _next_share(run: Run, share: Share, watch: Watch, stop: Signals) -> Share:
    """Wait, bounded, until the cluster has room for the next group of workers."""
    cluster = run.config.cluster
    _check(run, watch, stop)
    if is_local(cluster):
        return share
    gpu = bool(share.worker_gpus)
    try:
        found = wait_for_share(
            cluster,
            gpu,
            cluster.rejoin_timeout_s,
            GIVEN_BACK_S,
            watch.note,
            lambda: _check(run, watch, stop),
        )
    except ClusterError as error:
        raise ClusterError(
            f"the workers that were lost were not replaced: {error}. Bring the nodes back and "
            "start the run again, raise cluster.rejoin_timeout_s, or allow fewer with "
            "cluster.num_workers [MIN, MAX]"
        ) from error
    found = deal_streams(found, cluster, usable_nodes())
    if found.num_workers != share.num_workers:
        watch.note(f"{found.num_workers} workers in the place of {share.num_workers}")
    return found


class _Group:
    """One group of workers: Ray Train's `fit()` on a thread, and all that is watched meanwhile."""

    def __init__(
        self, run: Run, share: Share, recorder: Any, driver: str, watch: Watch, stop: Signals
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
        self._begun, self._overdue = time.time(), Overdue()
        self._asked = self._hung = self._trained = False

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
                rows = self._watch.poll()
                self._health.took(rows)
                pulses = self._watch.pulses(self._name)
                self._trained = self._trained or bool(rows) or any(p.steps for p in pulses)
                ender = self._stop.name or self._watch.asked_to_end()
                if ender and not self._trained:
                    self._watch.note(f"{ender}: no step was done yet; stopping")
                    return Result(Outcome("stopped", Progress(0, self._run.plan.digest)))
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
                self._watch_workers(pulses)
                late = self._overdue.why(pulses)
                if late:
                    self._end_controller(late)
                    thread.join(timeout=END_S)
                    ended.append(TrainingError(f"Ray Train's controller did not answer: {late}"))
                    break
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
            torch_config=WorkersConfig(
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

    def _end_controller(self, why: str) -> None:
        """Kill the process of Ray Train's that does not answer; its workers end with it."""
        for node, pid in job_actors("TrainController", self._begun):
            how = signal_process(node, pid, signal.SIGKILL)
            self._watch.note(f"Ray Train's controller (process {pid}) hangs: {why}; {how}")
            self._watch.event("controller_hang", pid=pid, node=node, why=why, ended=how)

    def _watch_workers(self, pulses: list[Pulse]) -> None:
        """End a worker that hangs; ask the group to yield where the cluster changes."""
        hang = None if self._hung else self._health.judge(pulses)
        if hang is not None:
            self._hung = True  # the group ends: what was last heard of it says nothing more
            self._watch.end_hung(hang)
        times = self._stragglers.compare(pulses)
        if times is not None:
            self._watch.compared(times)
        slow = self._health.slow(pulses)
        if slow is not None:
            self._watch.slow(slow, self._job.layout)
        why = self._room.why_yield({pulse.node for pulse in pulses})
        end = self._room.driver_goes()
        if end:
            self._watch.note(f"{end}: committing now; what comes after it is lost with the node")
            self._watch.event("driver_leaves", why=end)
            self._watch.hurry(self._room.left_s)
            self._watch.wish_for_commit()
        if why and not self._asked:
            self._watch.note(f"{why}: committing, then going on with other workers")
            self._watch.event("yield", why=why)
            self._watch.hurry(self._room.left_s)
            self._asked = True
        if self._asked:
            self._recorder.ask.remote("yield")


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
