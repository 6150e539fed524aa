"""What the tests of faults share: doing harm to a run, and what must hold after it."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest

from clip_ray.storage import Store
from clip_ray.train.journal import Row, lineage, read_journal
from clip_ray.train.verify import verify
from tests.runtime.support import Head, wait_for

INJECT = Path(__file__).parent / "inject"
EVERY = 7  # steps between two commits
STEPS = ("--train.steps", "120", "--checkpoint.every_steps", str(EVERY))
# Detected, and trained on: what is promised. What is waited for is asserted to be sooner.
DEATH_S, BACK_S, WAIT_S = 10.0, 60.0, 240.0


def inject(head: Head, run: str, fault: str, number: int = 0) -> None:
    """Have something befall a run; see inject/sitecustomize.py."""
    injected(head, run, fault).write_text(str(number))


def injected(head: Head, run: str, fault: str) -> Path:
    """Return the file of a fault, or of what it has left."""
    return Path(head.env["CHAOS_FAULTS"]) / f"{run}.{fault}"


@contextlib.contextmanager
def paced(head: Head, run: str, ms: int = 250) -> Iterator[None]:
    """Make a run's steps slow while the block runs: its faults come in its middle."""
    inject(head, run, "pace", ms)
    try:
        yield
    finally:
        injected(head, run, "pace").unlink()


def assert_same_end(run: Store, expected: Sequence[Row]) -> None:
    """Each sample once a pass in the lineage of the weights, and the loss of the other run."""
    assert_whole(run)
    found = lineage(read_journal(run, "metrics"))
    assert [r["samples_digest"] for r in found] == [r["samples_digest"] for r in expected]
    assert found[-1]["loss"] == pytest.approx(expected[-1]["loss"], rel=1e-4)


def assert_whole(run: Store) -> None:
    """Each sample once a pass in the lineage of the weights."""
    proof = verify(run)
    assert proof.holds, proof.as_text()


def events(run: Store, name: str) -> list[Row]:
    return [row for row in read_journal(run, "events") if row["event"] == name]


def numbers(run: Store, name: str) -> list[int]:
    """One number of each attempt so far."""
    return [row[name] for row in events(run, "attempt")]


def assert_little_lost(run: Store, every_steps: int = EVERY) -> None:
    """No attempt repeats more than an interval, and what was made while its commit was written."""
    metrics, commits = list(read_journal(run, "metrics")), events(run, "commit")
    for attempt in events(run, "attempt"):
        if not attempt["recomputes"]:
            continue
        before = [r for r in metrics if r["attempt"] < attempt["attempt"]]
        # The newest commit was not there yet, for as long as the slowest one took to be written.
        slowest = max((c["write_s"] for c in commits), default=0.0)
        last = before[-1]["time"]
        while_written = sum(r["time"] > last - slowest for r in before)
        assert attempt["recomputes"] <= every_steps + while_written, attempt


def back_after(run: Store, happened: float) -> float:
    """Return the seconds from a fault to the first step of the next attempt."""
    (begun, *_) = [e["attempt"] for e in events(run, "attempt") if e["time"] > happened]
    first = next(r for r in read_journal(run, "metrics") if r["attempt"] == begun)
    return float(first["time"] - happened)


def detected_after(run: Store, event: str, happened: float) -> float:
    """Return the seconds from a fault to the first such event."""
    return float(next(e["time"] for e in events(run, event) if e["time"] > happened) - happened)


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """Mount a file system of 24 MB; without the right to, the test is skipped."""
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)])
    if done.returncode != 0:
        pytest.skip("no right to mount a file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill_disk(filler: Path) -> None:
    """Fill a file system with a file, but for what journals take: they tell what comes of it."""
    # Again and again: what is deleted of old commits makes room.
    with open(filler, "ab", buffering=0) as file:
        with contextlib.suppress(OSError):
            while True:
                file.write(bytes(65536))
        file.truncate(max(file.tell() - 300_000, 0))


def processes(head: Head, title: str) -> list[psutil.Process]:
    """Return the processes of this head's Ray with such a title."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if " ".join(process.info["cmdline"] or []).startswith(title):
            with contextlib.suppress(psutil.Error):
                parents = [" ".join(parent.cmdline()) for parent in process.parents()]
                if any(head.env["RAY_TMPDIR"] in line for line in parents):
                    found.append(process)
    return found


def workers(head: Head) -> list[psutil.Process]:
    """Return the processes that train."""
    return processes(head, "ray::RayTrainWorker")


def wait_for_end(pid: int, timeout_s: float) -> None:
    """Wait until a process is no more, or is dead and not yet waited for."""

    def ended() -> bool:
        try:
            return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    wait_for(ended, timeout_s, f"the end of process {pid}")
