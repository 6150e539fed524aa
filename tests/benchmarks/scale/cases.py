"""What a run does for each rank, step and shard, without GPUs and without Ray: driven and timed.

CPU time, the least of several tries: what other processes take is no part of it. Where a storage is
waited for, it is a local one that answers late, and the time is the clock's.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clip_ray.config import ClusterConfig, DataConfig, S3Options, SourceConfig, TrackingConfig
from clip_ray.data import manifest as manifests
from clip_ray.data.blocks import Layout
from clip_ray.data.details import Lists
from clip_ray.data.indexing import Entry, Job, Outcome, Scope
from clip_ray.data.manifest import Manifest, build_manifest
from clip_ray.data.manifest_file import load_manifest, save_manifest
from clip_ray.data.plan import Plan
from clip_ray.runtime.cluster import deal_streams, share_of
from clip_ray.runtime.pulse import Health, Pulse
from clip_ray.runtime.recorder import Recorder
from clip_ray.storage import FileInfo, LocalStore
from clip_ray.tracking import TrackedRun, Tracker
from clip_ray.train.checkpoint import Checkpoints, Commit

SAMPLES = 10_000  # of a shard
ROWS = 32  # of a rank, in each step
WINDOW, SLOT = 8, 64
GPUS = 8  # of a node
ROW_BYTES = 3 * 224 * 224 + 4 * 77
ANSWER_S = 0.005  # of the storage that answers late


def least(work: Callable[[], Any], times: int = 5, clock: Callable[[], float] | None = None):
    """Return the least seconds that the work took, and its last result."""
    clock = clock or time.process_time
    found = float("inf")
    for _ in range(times):
        begun = clock()
        result = work()
        found = min(found, clock() - begun)
    return found, result


# ---------------------------------------------------------------------- data


def make_manifest(shards: int, folder: Path) -> Manifest:
    """Write and return the manifest that an index makes of so many shards."""
    rng = np.random.default_rng(0)
    none = np.zeros(0, np.int64)
    held = np.flatnonzero(rng.random(SAMPLES) < 0.01)
    one = Lists(np.cumsum(rng.integers(320, 960, SAMPLES // 8 + 1)), held, held, none)
    packed = (len(one.offsets), len(one.held), len(one.holdout), one.digest(), one.pack())
    path = "s3://bucket/laion/*.tar"
    jobs = [
        Job(n, 0, FileInfo(f"s3://bucket/laion/{n:06d}.tar", 300_000_000 + n, f"{n:032x}"))
        for n in range(shards)
    ]

    def found(function: Any, todo: list[Job]) -> Iterator[Outcome]:
        marks, held, holdout, digest, record = packed
        for job in todo:
            file = job.file
            entry = Entry(
                *(file.path, "tar", file.size, file.version, SAMPLES, job.number),
                *(marks, held, holdout, digest, record),
                content=job.number,
                sidecar="",
            )
            yield Outcome(job.number, entry)

    with pytest.MonkeyPatch.context() as patched:
        scopes = (Scope(SourceConfig(path=path), None, None, "0" * 64),)
        patched.setattr(manifests, "find_jobs", lambda data, apart: (jobs, scopes, {}))
        manifest = build_manifest(DataConfig(sources=(SourceConfig(path=path),)), found)
    return save_manifest(manifest, LocalStore(folder), "manifest.parquet")


def load_s(folder: Path) -> float:
    """Return the seconds of loading a manifest."""
    return least(lambda: load_manifest(LocalStore(folder), "manifest.parquet"), 3)[0]


def plan_of(manifest: Manifest, world_size: int) -> Plan:
    """Return the plan of a run in which each rank has ROWS rows of a step."""
    return Plan(
        manifest.train_counts,
        manifest.source.astype(np.int64),
        weights=None,
        seed=0,
        global_batch=ROWS * world_size,
        slot=SLOT,
        window=WINDOW,
        manifest_digest=manifest.digest,
    )


def rank_rows(plan: Plan, layout: Layout, window: int, rank: int) -> list[tuple[Any, Any]]:
    """Return (shard, place) of a rank's rows of a window, block by block, as `BlockReader` does."""
    found = []
    for chunk in range(layout.chunks):
        span = layout.span(rank, chunk)
        share = plan.slot // plan.window
        first, last = span.start // share, -(-span.stop // share)
        rows = plan.window_rows(window, first, last)
        found.append((rows.shard, rows.place))
    return found


def rank_window_s(plan: Plan, world_size: int) -> float:
    """Return the seconds that a rank's share of a window's plan takes, the mean of 8 ranks."""
    layout = Layout.fit(plan, world_size, ROW_BYTES)
    ranks = np.linspace(0, world_size - 1, 8).astype(int).tolist()
    windows = iter(range(1000, 2000))

    def work() -> None:
        window = next(windows)
        for rank in ranks:
            rank_rows(plan, layout, window, rank)

    return least(work, 20)[0] / len(ranks)


def ranks_make_the_step(plan: Plan, world_size: int, window: int) -> bool:
    """Tell whether the ranks' rows of a window are its steps' rows, each once."""
    layout = Layout.fit(plan, world_size, ROW_BYTES)
    parts = [part for rank in range(world_size) for part in rank_rows(plan, layout, window, rank)]
    shard, place = (np.concatenate([part[i].ravel() for part in parts]) for i in (0, 1))
    mine = np.sort(shard * SAMPLES + place)
    steps = [plan.step_rows(window * WINDOW + k) for k in range(WINDOW)]
    whole = np.concatenate([rows.shard * SAMPLES + rows.place for rows in steps])
    return len(mine) == ROWS * world_size * WINDOW and bool((mine == np.sort(whole)).all())


# ---------------------------------------------------------------------- checkpoints


class Late(LocalStore):
    """A local store whose answers take ANSWER_S, and that counts them.

    Attributes:
        asked: answers so far, of all that share the counter.
        together: the most that were waited for at one time.
    """

    asked, together, waiting = 0, 0, 0
    lock = threading.Lock()

    @classmethod
    def answer(cls) -> None:
        """Wait as a caller does."""
        with cls.lock:
            cls.asked += 1
            cls.waiting += 1
            cls.together = max(cls.together, cls.waiting)
        time.sleep(ANSWER_S)
        with cls.lock:
            cls.waiting -= 1

    def child(self, name: str) -> Late:
        """Return a sub-directory, as late as this one."""
        return Late(Path(self.uri) / name)

    def read(self, name: str, *which: Any) -> bytes:
        """Read a file, late."""
        self.answer()
        return super().read(name, *which)

    def exists(self, name: str) -> bool:
        """Look for a file, late."""
        self.answer()
        return super().exists(name)


def commit_s(folder: Path, writers: int) -> tuple[float, int]:
    """Return the seconds from the last part to COMMIT, and the files that it then lists."""
    run = Checkpoints(Late(folder))
    attempt = run.begin_attempt({})
    plain = Checkpoints(LocalStore(folder))
    seconds = float("inf")
    for step in range(1, 4):
        commit = Commit(step, attempt)
        for part in range(1, writers):
            plain.write_part(commit, part, {f"weights-{part:05d}": b"x"})
        begun = time.monotonic()
        run.write(commit, {"weights-00000": b"x"}, parts=writers, timeout_s=60)
        seconds = min(seconds, time.monotonic() - begun)
    return seconds, len(plain.verify(commit))


def look_s(folder: Path, commits: int) -> float:
    """Return the seconds of finding the newest of so many commits."""
    plain = Checkpoints(LocalStore(folder))
    attempt = plain.begin_attempt({})
    for step in range(1, commits + 1):
        plain.write(Commit(step, attempt), {"weights": b"x"})
    late = Checkpoints(Late(folder))
    seconds, found = least(lambda: late.newest(lambda commit, why: None), 3, time.monotonic)
    assert found is not None and found[0].step == commits
    return seconds


# ---------------------------------------------------------------------- the driver's side


def pulse_of(rank: int, step: int) -> Pulse:
    return Pulse(rank, 1000 + rank, "n", "h", step, "forward", 0.1, 0.0, step, 1.0, 0.1)


def beat_s(folder: Path, world_size: int) -> tuple[float, float]:
    """Return the seconds of taking a rank's pulse, and of judging all ranks, a rank."""
    recorder, health = Recorder(str(folder), S3Options()), Health(None, 600, 600)
    pulses = [pulse_of(rank, 5) for rank in range(world_size)]

    def beat() -> None:
        for pulse in pulses:
            recorder.beat("g", pulse)

    # As many beats and looks for every size: what is timed is never too short for the clock.
    rounds = max(2048 // world_size, 1)
    beats = least(lambda: [beat() for _ in range(rounds)])[0] / rounds / world_size
    looks = least(lambda: [health.judge(recorder.pulses("g")) for _ in range(rounds)])[0]
    recorder.close()
    return beats, looks / rounds / world_size


def step_row(step: int) -> dict[str, Any]:
    """Return a journal row as rank 0 writes it."""
    row: dict[str, Any] = {"step": step, "attempt": 1, "time": 1.7e9 + step, "loss": 2.0}
    row |= {"logit_scale": 14.0, "lr": 1e-4, "grad_norm": 1.0, "world_size": 8, "step_s": 1.0}
    row |= {"samples_per_s": 32768.0, "data_wait": 0.1, "samples_digest": "0" * 16}
    return row | {f"time_{name}": 0.1 for name in ("copy", "forward", "loss", "backward", "optim")}


def record_s(folder: Path, steps: int) -> list[float]:
    """Return the seconds a step of journalling the first and the last tenth of so many steps."""
    recorder, cursor, incarnation = Recorder(str(folder), S3Options()), 0, ""
    tenths = []
    for tenth in range(10):
        begun = time.process_time()
        for step in range(tenth * steps // 10, (tenth + 1) * steps // 10):
            recorder.append("rank 0", step, [("metrics", step_row(step + 1))])
            if step % 10 == 0:
                incarnation, cursor, _ = recorder.log_since(incarnation, cursor)
        tenths.append((time.process_time() - begun) / (steps / 10))
    recorder.close()
    return [tenths[0], tenths[-1]]


def reopen_s(folder: Path) -> float:
    """Return the seconds in which a run's next attempt opens the journals."""

    def work() -> None:
        Recorder(str(folder), S3Options()).close()

    return least(work, 3)[0]


class Sink:
    """Stands in for MLflow: takes batches, and remembers how many values it got."""

    def __init__(self) -> None:
        self.values, self.calls = 0, 0

    def log_batch(self, run_id: str, metrics: Any = (), **more: Any) -> None:
        """Take a batch."""
        self.values += len(metrics)
        self.calls += 1


class ToSink(Tracker):
    """A Tracker whose run is there already: what is timed is what it does for each step."""

    def _connect(self) -> None:
        self._client, self._run_id, self._last = self._make_client(), "0" * 32, {}
        self._known.set()


def track_s(folder: Path, steps: int) -> tuple[list[float], int]:
    """Return the seconds a step in which the first and the last tenth are sent, and the values."""
    sink = Sink()
    run = TrackedRun("scale", f"{folder}/scale#1", str(folder))
    store = LocalStore(folder)
    config = TrackingConfig(uri="http://127.0.0.1:9", flush_s=0.01)
    tracker = ToSink(run, config, store, lambda step: iter(()), client=lambda: sink)
    tenths = []
    tracker.wait_run_id(60)
    while tracker.lag().replaying:
        time.sleep(0.001)
    try:
        for tenth in range(10):
            begun = time.process_time()
            for step in range(tenth * steps // 10, (tenth + 1) * steps // 10):
                # Never full: a full queue is read back from the journal, which is not here.
                while 2 * len(tracker._queue) > tracker._max_records:
                    time.sleep(0.001)
                tracker.offer([step_row(step + 1)])
            deadline = time.monotonic() + 120
            while tracker.lag().acked_step < (tenth + 1) * steps // 10:
                assert time.monotonic() < deadline, tracker.lag()
                time.sleep(0.001)
            tenths.append((time.process_time() - begun) / (steps / 10))
    finally:
        tracker._done.set()
        tracker._wake.set()
    return [tenths[0], tenths[-1]], sink.values


# ---------------------------------------------------------------------- sharing out


@dataclass(frozen=True)
class Dealt:
    """What a cluster was shared out to, and how long that took."""

    seconds: float
    workers: int
    streams: int


def deal(world_size: int) -> Dealt:
    """Share out a cluster of GPU nodes, a decode node for each, to a range of workers."""
    nodes = []
    for n in range(world_size // GPUS):
        for name, extra in ((f"g{n:04d}", {"GPU": float(GPUS)}), (f"d{n:04d}", {})):
            resources = {"CPU": 64.0, "memory": 1e12, "object_store_memory": 1e11} | extra
            nodes.append({"NodeID": name, "Alive": True, "Resources": resources, "Labels": {}})
    free = {"CPU": 64.0 * len(nodes), "GPU": float(world_size)}
    config = ClusterConfig(num_workers=(world_size // 2, world_size), cpus_per_worker=4)

    def work() -> Any:
        share, problem = share_of(free, nodes, config, wants_gpu=True)
        assert share is not None, problem
        return deal_streams(share, config, nodes)

    seconds, share = least(work)
    return Dealt(seconds, share.num_workers, share.streams)
