"""What runs in each Ray Train worker: set up one attempt, run the loop, commit.

An attempt begins with a decision of rank 0 (its number, the commit to start from) that all ranks
share. Errors that a retry cannot mend are returned, so that the driver can raise them; everything
else is raised here and makes Ray Train start the group again.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from clip_ray.config import Config
from clip_ray.config.load import dump_config
from clip_ray.data.blocks import Layout
from clip_ray.errors import CheckpointError, ConfigError, RegistryError, TrainingError
from clip_ray.runtime import preemption
from clip_ray.runtime.cluster import Share
from clip_ray.runtime.data import BatchStream
from clip_ray.runtime.pulse import HANG_S, Heart
from clip_ray.runtime.recorder import Reporter
from clip_ray.storage import open_store
from clip_ray.tokenizer import Tokenizer
from clip_ray.train.checkpoint import Checkpoints, Commit
from clip_ray.train.committer import COMMIT_TIMEOUT_S, HOLD_S, Committer
from clip_ray.train.hooks import Outcome, Word
from clip_ray.train.initial import initial_weights
from clip_ray.train.journal import Row, last_row
from clip_ray.train.loop import train
from clip_ray.train.state import Progress, broadcast, build_state, restore, snapshot

JOURNAL_TIMEOUT_S = 60.0
FINAL_PAUSE_S = 2.0  # before the last commit is tried again


@dataclass(frozen=True)
class Job:
    """All that a worker needs to know; sent once, when the run starts.

    Attributes:
        config: resolved; its model has the tokenizer's vocabulary size.
        run_uri: the run's directory.
        total_steps: the run's length.
        samples_per_pass: training samples of the data.
        plan_digest: what a commit's position must refer to.
        layout: how blocks are dealt to this number of workers.
        reader: a BlockReader in the object store, in a list: Ray would fetch a bare reference.
        recorder: the recorder actor.
        share: CPUs and GPUs.
        tokenizer: serialised, saved with each commit.
        driver: unique to the job; enters the attempts' records.
        group: unique to the group of workers.
    """

    config: Config
    run_uri: str
    total_steps: int
    samples_per_pass: int
    plan_digest: str
    layout: Layout
    reader: list[ray.ObjectRef]
    recorder: Any
    share: Share
    tokenizer: bytes
    driver: str
    group: str


@dataclass
class Result:
    """What a worker hands to the driver.

    Attributes:
        outcome: how the loop ended; none where the attempt could not begin.
        error: the message of an error that a retry cannot mend, and its class's name.
    """

    outcome: Outcome | None = None
    error: tuple[str, str] | None = None


def run_worker(settings: dict[str, Job]) -> Result:
    """Run attempts until the run ends; called by Ray Train in every worker, with {"job": Job}."""
    job = settings["job"]
    context = ray.train.get_context()
    rank = context.get_world_rank()
    torch.set_num_threads(job.share.threads)
    device = torch.device("cuda", context.get_local_rank()) if job.share.worker_gpus else None
    if device is not None:
        device = ray.train.torch.get_device()
        torch.cuda.set_device(device)
    device = device or torch.device("cpu")
    reporter = Reporter(job.recorder)
    heart = Heart(job.recorder, job.group, rank, context.get_world_size())
    try:
        return _run_attempts(job, rank, device, reporter, heart)
    finally:
        heart.end()


def _run_attempts(
    job: Job, rank: int, device: torch.device, reporter: Reporter, heart: Heart
) -> Result:
    last_rollback: int | None = None
    while True:
        attempt = _begin(job, rank, device, reporter, heart)
        if isinstance(attempt, tuple):
            return Result(error=attempt)
        outcome = attempt.run()
        if outcome.reason != "nonfinite":
            return Result(outcome=outcome)
        step = outcome.progress.step
        if last_rollback is not None and step <= last_rollback:
            return Result(outcome=outcome)
        # Once: a hardware fault does not come back, bad data or a bad learning rate does.
        last_rollback = step
        attempt.event("rollback", step=step, reason="loss or gradient not finite")


@dataclass(frozen=True)
class _Start:
    """Rank 0's decision, shared with all."""

    attempt: int
    progress: Progress
    commit: Commit | None
    error: tuple[str, str] | None = None


def _begin(
    job: Job, rank: int, device: torch.device, reporter: Reporter, heart: Heart
) -> _Attempt | tuple[str, str]:
    """Build model and optimizer, and load the commit that rank 0 chose, on every rank."""
    model, optimizer = build_state(job.config, device)
    decision: list[Any] = [None]
    if rank == 0:
        try:
            decision = [_decide(job, model, optimizer, reporter)]
        except (CheckpointError, ConfigError, RegistryError, TrainingError) as error:
            failed = _Start(0, Progress(0, ""), None, (type(error).__name__, str(error)))
            decision = [failed]
    world_size = ray.train.get_context().get_world_size()
    if world_size > 1:
        dist.broadcast_object_list(decision, src=0)
    start: _Start = decision[0]
    if start.error is not None:
        return start.error
    if world_size > 1:
        broadcast(model, optimizer, start.commit is not None)
    return _Attempt(job, rank, world_size, device, model, optimizer, start, reporter, heart)


def _decide(
    job: Job, model: torch.nn.Module, optimizer: torch.optim.Optimizer, reporter: Reporter
) -> _Start:
    run = open_store(job.run_uri, job.config.run.s3)
    checkpoints = Checkpoints(run)
    number = checkpoints.begin_attempt({"driver": job.driver})
    events: list[Row] = []

    def rejected(commit: Commit, why: str) -> None:
        events.append({"event": "commit_rejected", "commit": commit.name, "why": why})

    found = checkpoints.start_from_newest(number, rejected)
    progress, commit = Progress(0, job.plan_digest), None
    if found is None and job.config.init.weights is not None:
        weights, digest = initial_weights(job.config, Tokenizer.load(job.tokenizer), run)
        # Not strict: scale and bias of another loss begin as the config says.
        model.load_state_dict(weights, strict=False)
        events.append({"event": "initial_weights", "digest": digest})
    if found is not None:
        commit, files = found
        progress = Progress.from_bytes(files["state.json"])
        if progress.plan_digest != job.plan_digest:
            raise CheckpointError(
                f"{checkpoints.uri(commit)} belongs to plan {progress.plan_digest[:12]}, the run's "
                f"is {job.plan_digest[:12]}: data, seed, batch or window sizes have changed; give "
                "the run another name (--run.name)"
            )
        restore(model, optimizer, files)
    checkpoints.prune(
        job.config.checkpoint.keep_last, job.config.checkpoint.keep_every, pinned=commit
    )
    context = ray.train.get_context()
    reached = last_row(run, "metrics")
    events.append(
        {
            "event": "attempt",
            "from_step": progress.step,
            "recomputes": max(reached["step"] - progress.step, 0) if reached else 0,
            "commit": commit.name if commit else None,
            "world_size": context.get_world_size(),
            "pid": os.getpid(),
            "node": ray.get_runtime_context().get_node_id(),
        }
    )
    stamped = [{"time": time.time(), "attempt": number, **event} for event in events]
    reporter.add("events", stamped)
    return _Start(number, progress, commit)


class _Attempt:
    """One attempt on one rank; the loop's hooks."""

    def __init__(
        self,
        job: Job,
        rank: int,
        world_size: int,
        device: torch.device,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        start: _Start,
        reporter: Reporter,
        heart: Heart,
    ) -> None:
        self._job, self._rank, self._device = job, rank, device
        self._world_size = world_size
        self._start, self._reporter, self._heart = start, reporter, heart
        self._bare, self._optimizer = model, optimizer
        if job.config.train.compile:
            model.compile()
        self._model: torch.nn.Module = model
        if world_size > 1:
            self._model = DistributedDataParallel(
                model,
                device_ids=[device] if device.type == "cuda" else None,
                # Micro-batches: unequal forward counts would leave ranks waiting for each other.
                forward_sync_buffers=False,
                gradient_as_bucket_view=True,
            )
        self._committer = Committer(
            Checkpoints(open_store(job.run_uri, job.config.run.s3)),
            job.config.checkpoint,
            rank,
            self.event,
            lambda: reporter.drain(JOURNAL_TIMEOUT_S),
            hold_s=min(HOLD_S, 0.5 * (job.config.cluster.hang_timeout_s or HANG_S)),
        )
        self._profiler: Any = None
        self._committed_as_asked = False
        self._foreign_bytes: Callable[[], int] = lambda: 0
        self._came = 0  # of those bytes, until the last step
        self._phase_begun = 0.0
        self._notice, self._notice_told = preemption.installed(), False

    def run(self) -> Outcome:
        """Run the loop to its end, and wait for the last commit."""
        with self._notice.heeded():
            return self._run()

    def _run(self) -> Outcome:
        job = self._job
        stream = BatchStream(
            job.recorder,
            f"streams/{self._start.attempt}",
            job.reader[0],
            job.layout,
            self._rank,
            self._start.progress.step,
            job.total_steps,
            job.share,
        )
        self._heart.awaited = lambda: stream.awaited
        self._foreign_bytes = lambda: stream.foreign_bytes
        if self._rank == 0:
            self._profile(self._start.progress.step)
        try:
            outcome = train(
                self._model,
                self._optimizer,
                iter(stream),
                self._start.progress,
                config=job.config,
                total_steps=job.total_steps,
                samples_per_pass=job.samples_per_pass,
                device=self._device,
                attempt=self._start.attempt,
                hooks=self,
            )
        finally:
            stream.close()
        self._heart.moved(outcome.progress.step, "ending")
        self._committer.join(COMMIT_TIMEOUT_S)
        # The last one is not to be done without.
        while outcome.committed and self._committer.failing:
            time.sleep(FINAL_PAUSE_S)
            self.entered(outcome.progress.step, "ending")
            self._begin_commit(outcome.progress, parts=1)
            self._committer.join(COMMIT_TIMEOUT_S)
        self._reporter.drain(JOURNAL_TIMEOUT_S)
        return outcome

    def event(self, name: str, **fields: Any) -> None:
        """Journal an event, on rank 0."""
        if self._rank == 0:
            row = {"time": time.time(), "attempt": self._start.attempt, "event": name, **fields}
            self._reporter.add("events", [row])

    def record(self, row: Row) -> None:
        """See `train.hooks.Hooks`."""
        self._heart.moved(row["step"], "profile")
        self._profile(row["step"])
        came, self._came = self._came, self._foreign_bytes()
        per_s = (self._came - came) / row["step_s"]
        self._reporter.add("metrics", [row | {"foreign_bytes_per_s": per_s}])

    def quarantine(self, rows: list[Row]) -> None:
        """See `train.hooks.Hooks`."""
        self._reporter.add("quarantine", rows)

    def asked(self, due: bool) -> Set[Word]:
        """See `train.hooks.Hooks`."""
        self._reporter.advance()
        asked = self._reporter.asked
        if "commit" not in asked:
            self._committed_as_asked = False
        words = asked - {"commit"} if self._committed_as_asked else asked
        if self._notice.received:
            words = words | {"yield"}
            self._tell_of_notice()
        return words | {"busy"} if self._committer.busy(due) else words

    def _tell_of_notice(self) -> None:
        if not self._notice_told:
            self._notice_told = True
            row = {"event": "preempted", "rank": self._rank, "host": self._heart.host}
            row |= {"pid": os.getpid(), "time": time.time(), "attempt": self._start.attempt}
            self._reporter.add("events", [row])

    def entered(self, step: int, phase: str) -> None:
        """See `train.hooks.Hooks`."""
        self._heart.moved(step, phase)
        self._phase_begun = time.perf_counter()

    def timed(self, seconds: dict[str, float]) -> None:
        """See `train.hooks.Hooks`."""
        self._heart.worked(seconds)

    def commit(self, progress: Progress) -> None:
        """See `train.hooks.Hooks`: the writing ranks take a snapshot, a thread writes it."""
        self._committed_as_asked = True
        parts = min(self._job.config.checkpoint.writers, self._world_size)
        if self._rank < parts:
            self._begin_commit(progress, parts)

    def deferred(self, step: int) -> None:
        """See `train.hooks.Hooks`."""
        self._committer.deferred(step)

    def _begin_commit(self, progress: Progress, parts: int) -> None:
        files: dict[str, Any] = dict(snapshot(self._bare, self._optimizer, self._rank, parts))
        # With the comparison of the ranks' weights: since the optimizer's step.
        stall = time.perf_counter() - self._phase_begun
        if self._rank == 0:
            files |= {
                "state.json": progress.to_bytes(),
                "config.yaml": dump_config(self._job.config).encode(),
                "tokenizer.json": self._job.tokenizer,
            }
        self._committer.begin(Commit(progress.step, self._start.attempt), files, parts, stall)

    def _profile(self, step: int) -> None:
        """Record a torch trace of `train.profile_steps`, on rank 0."""
        wanted = self._job.config.train.profile_steps
        if wanted is None:
            return
        if step == wanted[0] - 1:
            self._profiler = torch.profiler.profile()
            self._profiler.start()
        elif step == wanted[1] and self._profiler is not None:
            self._profiler.stop()
            run = open_store(self._job.run_uri, self._job.config.run.s3)
            profiler, self._profiler = self._profiler, None

            def export(path: Path) -> None:
                profiler.export_chrome_trace(str(path))

            try:
                run.put(f"trace-{step:08d}.json", export)
            except OSError as error:  # a trace is not worth an attempt
                self.event("trace_failed", step=step, why=str(error))
                return
            self.event("trace", step=step, uri=f"{run.uri}/trace-{step:08d}.json")
