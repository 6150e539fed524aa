"""Commits in the background, to a storage that hangs, fails and comes back."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from clip_ray.config import CheckpointConfig
from clip_ray.errors import CheckpointError
from clip_ray.storage import FileDigest, LocalStore
from clip_ray.train import committer
from clip_ray.train.checkpoint import Checkpoints, Commit
from clip_ray.train.committer import DEFERRED_S, LEAST_PATIENCE_S, Committer

FILES: Any = {"state.json": b"{}"}
BOUND_S = 10  # for threads of this process


@dataclass
class Storage:
    """What the writes of a run's directory do: pass, wait until they are let go, or fail."""

    passes: threading.Event = field(default_factory=threading.Event)
    arrived: threading.Event = field(default_factory=threading.Event)
    error: OSError | None = None

    def meet(self) -> None:
        self.arrived.set()
        assert self.passes.wait(BOUND_S), "never let go"
        if self.error is not None:
            raise self.error


@dataclass(frozen=True)
class Store(LocalStore):
    storage: Storage = field(default_factory=Storage)

    def child(self, name: str) -> Store:
        return Store(self.root / name, self.storage)

    def write(self, name: str, data: bytes) -> None:
        self.storage.meet()
        super().write(name, data)

    def put(self, name: str, fill: Any) -> FileDigest:
        self.storage.meet()
        return super().put(name, fill)


@dataclass
class Made:
    storage: Storage
    checkpoints: Checkpoints
    events: list[tuple[str, dict[str, Any]]]
    committer: Committer
    now: float = 0.0

    def named(self, name: str) -> list[dict[str, Any]]:
        return [fields for kind, fields in self.events if kind == name]

    def commit(self, step: int, parts: int = 1) -> None:
        self.committer.begin(Commit(step, 1), FILES, parts, 0.01)


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Made:
    storage = Storage()
    checkpoints = Checkpoints(Store(tmp_path, storage))
    checkpoints.begin_attempt({})
    events: list[tuple[str, dict[str, Any]]] = []

    def event(name: str, **fields: Any) -> None:
        events.append((name, fields))

    config = CheckpointConfig(patience_s=900)
    found = Made(
        storage, checkpoints, events, Committer(checkpoints, config, 0, event, lambda: None, 0.2)
    )
    monkeypatch.setattr(committer.time, "monotonic", lambda: 1000 + found.now)
    return found


def test_a_write_that_hangs_holds_nothing_up_until_patience_ends(made: Made) -> None:
    made.commit(10)
    assert made.storage.arrived.wait(BOUND_S)
    for now in (0, DEFERRED_S + 1, 899):
        made.now = now
        begun = time.perf_counter()
        made.committer.deferred(20)
        assert made.committer.busy() and time.perf_counter() - begun < 1
    assert made.named("commit_deferred") == [{"step": 20, "waited_s": DEFERRED_S + 1}]
    made.now = 901
    with pytest.raises(TimeoutError, match="no commit was written for 901 s, 900 s are the pati"):
        made.committer.deferred(30)
    made.storage.passes.set()


def test_a_step_waits_a_moment_for_a_commit_once(made: Made) -> None:
    assert not made.committer.busy(due=True)
    made.commit(10)
    assert made.storage.arrived.wait(BOUND_S)
    begun = time.perf_counter()
    assert made.committer.busy() and made.committer.busy(due=True)
    assert time.perf_counter() - begun >= 0.2
    made.committer._hold_s = 100 * BOUND_S
    begun = time.perf_counter()
    assert made.committer.busy(due=True)
    assert time.perf_counter() - begun < BOUND_S
    made.storage.passes.set()
    made.committer.join(BOUND_S)
    # One that is written within that moment puts nothing off.
    made.commit(20)
    assert not made.committer.busy(due=True)
    assert [commit.step for commit in made.checkpoints.commits()] == [10, 20]
    # The waits are of the stall that the journal tells, beside the 0.01 s of a snapshot.
    first, second = (event["stall_s"] for event in made.named("commit"))
    assert first == 0.01 and 0.2 <= second < 0.2 + BOUND_S


def test_it_goes_on_once_the_storage_answers(made: Made) -> None:
    made.commit(10)
    made.committer.deferred(20)
    made.storage.passes.set()
    made.committer.join(BOUND_S)
    assert not made.committer.busy() and made.named("commit_deferred") == []
    # A deferral that has passed takes nothing off the patience with the next one.
    made.now = 2000
    made.storage.passes.clear()
    made.commit(21)
    made.committer.deferred(30)
    made.storage.passes.set()
    made.committer.join(BOUND_S)
    assert [e["commit"] for e in made.named("commit")] == ["step-00000010.a1", "step-00000021.a1"]


def test_failures_count_towards_the_patience_with_a_hang(made: Made) -> None:
    made.storage.error = OSError("503 SlowDown")
    made.storage.passes.set()
    made.commit(10)
    made.committer.join(BOUND_S)
    assert made.committer.failing
    assert made.named("commit_failed") == [
        {"step": 10, "commit": "step-00000010.a1", "why": "OSError: 503 SlowDown"}
    ]
    made.storage.passes.clear()
    made.now = 600
    made.commit(20)
    made.now = 890
    made.committer.deferred(30)
    made.now = 901
    with pytest.raises(TimeoutError, match="written for 901 s"):
        made.committer.deferred(31)
    made.storage.passes.set()


def test_a_storage_that_fails_for_longer_than_patience_ends_the_attempt(made: Made) -> None:
    made.storage.error = OSError("503 SlowDown")
    made.storage.passes.set()
    for now in (0, 899):
        made.now = now
        made.commit(10)
        made.committer.join(BOUND_S)
    made.now = 901
    made.commit(10)
    with pytest.raises(OSError, match="503 SlowDown"):
        made.committer.join(BOUND_S)


def test_without_patience_a_slow_commit_has_a_minute(made: Made) -> None:
    made.committer._config = CheckpointConfig(patience_s=0)
    made.commit(10)
    made.committer.deferred(20)
    made.now = LEAST_PATIENCE_S - 1
    made.committer.deferred(21)
    made.now = LEAST_PATIENCE_S + 1
    with pytest.raises(TimeoutError):
        made.committer.deferred(22)
    made.storage.passes.set()


def test_the_last_commit_is_written_after_the_one_that_was_under_way(made: Made) -> None:
    made.commit(10)
    assert made.storage.arrived.wait(BOUND_S)
    begun = time.perf_counter()
    made.commit(13)
    assert time.perf_counter() - begun < 1
    made.storage.passes.set()
    made.committer.join(BOUND_S)
    assert [e["step"] for e in made.named("commit")] == [10, 13]
    assert [commit.step for commit in made.checkpoints.commits()] == [10, 13]


def test_the_last_commit_is_waited_for_and_no_longer(made: Made) -> None:
    made.commit(10)
    with pytest.raises(TimeoutError, match=r"step-00000010.a1 is not written after 0.05 s"):
        made.committer.join(0.05)
    made.storage.passes.set()


def test_a_successor_ends_the_attempt_at_the_next_commit(made: Made) -> None:
    made.storage.passes.set()
    made.checkpoints.begin_attempt({})
    made.commit(10)
    made.committer._writer.join(BOUND_S)
    with pytest.raises(CheckpointError, match="attempt 2 has begun since"):
        made.commit(20)
    assert made.checkpoints.commits() == []


def test_another_rank_writes_its_part_and_says_nothing(made: Made) -> None:
    made.storage.passes.set()
    part = Committer(made.checkpoints, CheckpointConfig(), 1, pytest.fail, lambda: None)
    part.begin(Commit(10, 1), {"model-1.safetensors": b"half"}, 2, 0.01)
    part.join(BOUND_S)
    made.commit(10, parts=2)
    made.committer.join(BOUND_S)
    (commit,) = made.checkpoints.commits()
    assert made.checkpoints.verify(commit) == {**FILES, "model-1.safetensors": b"half"}
