"""From a fault to training again: five of each kind, one run a kind; medians and worst.

.venv/bin/python -m pytest -m bench -s tests/benchmarks/recovery

A step is made to last a quarter of a second, so that what is measured is the recovery.
"""

from __future__ import annotations

import contextlib
import os
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from clip_ray.storage import LocalStore
from clip_ray.train.journal import read_journal
from tests.chaos.support import (
    BACK_S,
    DEATH_S,
    INJECT,
    assert_little_lost,
    assert_whole,
    back_after,
    events,
    numbers,
    paced,
    workers,
)
from tests.runtime.support import Head, Jobs, ray_head, ray_node, wait_for

pytestmark = [pytest.mark.ray, pytest.mark.bench]
TIMES = 5
PACE_MS, EVERY = 250, 7
# Two workers that do not fit on the head together; one CPU reads.
FLAGS = ("--train.steps", "200", "--checkpoint.every_steps", str(EVERY))
FLAGS += ("--cluster.cpus_per_worker", "2", "--tracking.uri", "http://127.0.0.1:1")


@dataclass(frozen=True)
class Measured:
    """Of one kind of fault: seconds until found, seconds until trained on, steps done again."""

    kind: str
    found_s: list[float]
    back_s: list[float]
    lost: list[int]

    def as_row(self) -> str:
        parts = [
            f"{statistics.median(values):.{digits}f} (at most {max(values):.{digits}f})"
            for values, digits in ((self.found_s, 1), (self.back_s, 1), (self.lost, 0))
        ]
        return f"| {self.kind} | {' | '.join(parts)} |"


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    folder = tmp_path_factory.mktemp("head")
    faults = {"PYTHONPATH": str(INJECT), "CHAOS_FAULTS": str(folder)}
    with ray_head(folder, cpus=5, with_dashboard=False, **faults) as running:
        yield running


def test_medians_of_five(head: Head, tmp_path: Path) -> None:
    jobs = Jobs(head, tmp_path)
    try:
        found = [
            measure(jobs, "a worker is killed", kill_worker),
            measure(jobs, "a worker is stopped", stop_worker),
        ]
    finally:
        jobs.close()
    print("\n| fault | found after, s | trained on after, s | steps done again |")
    print("\n".join(one.as_row() for one in found))
    for one in found:
        assert statistics.median(one.found_s) <= DEATH_S
        assert statistics.median(one.back_s) <= BACK_S


def test_medians_of_five_nodes(tmp_path: Path) -> None:
    """Killed with a worker on them; another stands by."""
    faults = {"PYTHONPATH": str(INJECT), "CHAOS_FAULTS": str(tmp_path)}
    with (
        ray_head(tmp_path, cpus=3, with_dashboard=False, **faults) as head,
        contextlib.ExitStack() as nodes,
    ):
        jobs = Jobs(head, tmp_path)
        here: list[int] = []

        def another() -> None:
            here.append(nodes.enter_context(ray_node(head, tmp_path, cpus=2)).pid)

        def kill_node(head: Head, run: LocalStore) -> None:
            used = {parent.pid for worker in workers(head) for parent in worker.parents()}
            node = next(pid for pid in here if pid in used)
            here.remove(node)
            os.killpg(node, signal.SIGKILL)

        another()
        another()
        found = measure(jobs, "a node is killed, another stands by", kill_node, another)
        jobs.close()
    print(f"\n{found.as_row()}")
    assert statistics.median(found.found_s) <= DEATH_S
    assert statistics.median(found.back_s) <= BACK_S


def kill_worker(head: Head, run: LocalStore) -> None:
    second_worker(head, run).kill()


def stop_worker(head: Head, run: LocalStore) -> None:
    second_worker(head, run).suspend()


def second_worker(head: Head, run: LocalStore) -> psutil.Process:
    """Return rank 1's process; rank 0 waits for it."""
    first = numbers(run, "pid")[-1]
    return next(worker for worker in workers(head) if worker.pid != first)


def _goes_on(run: LocalStore) -> bool:
    """Tell whether the newest attempt has done a step: the one before may have done it, too."""
    newest = numbers(run, "attempt")[-1]
    return any(row["attempt"] == newest for row in read_journal(run, "metrics"))


def measure(
    jobs: Jobs,
    kind: str,
    fault: Callable[[Head, LocalStore], None],
    after: Callable[[], None] = lambda: None,
) -> Measured:
    """Train a run of two workers that has a fault five times; each time it trains on first."""
    name = kind.split(",")[0].replace(" ", "-")
    run = LocalStore(jobs.run_dir(name))
    found, back = [], []
    with paced(jobs.head, name, PACE_MS):
        job = jobs.start(name, *FLAGS)
        for number in range(1, TIMES + 1):
            here = len(list(read_journal(run, "metrics")))
            wait_for(
                lambda here=here: len(list(read_journal(run, "metrics"))) > here + 2 * EVERY,
                300,
                f"steps to fault {number} of {TIMES}",
            )
            fault(jobs.head, run)
            happened = time.time()
            wait_for(lambda n=number: len(numbers(run, "pid")) == n + 1, 300, "another group")
            after()
            wait_for(lambda: _goes_on(run), 300, "a step of its own")
            seen = [
                e["time"]
                for kind in ("attempt_failed", "hang")
                for e in events(run, kind)
                if e["time"] >= happened
            ]
            found.append(min(seen) - happened)
            back.append(back_after(run, happened))
    jobs.finish(job)
    assert_whole(run)
    assert_little_lost(run, EVERY)
    return Measured(kind, found, back, numbers(run, "recomputes")[1:])
