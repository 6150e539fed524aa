"""One group of workers after the other; what they do is made up, and no Ray is started."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

from clip_ray.config import ClusterConfig
from clip_ray.errors import StorageError, TrainingError
from clip_ray.runtime import fit
from clip_ray.runtime.signals import Signals
from clip_ray.runtime.worker import Result
from clip_ray.train.hooks import Outcome
from clip_ray.train.state import Progress

DOWN = StorageError("s3://bucket/run: no answer")
FINISHED = Result(Outcome("finished", Progress(8, "plan")))
YIELDED = Result(Outcome("yielded", Progress(4, "plan")))


class World:
    """A run whose groups end as scripted, and whose storage names commits as scripted.

    Attributes:
        ends: how each group ends.
        commits: the newest commit at each look, or the error of it; the last one stays.
        sleeps: called at each sleep.
        waited_s: seconds slept in all.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ends: list[Any] = []
        self.commits: list[str | Exception] = [""]
        self.sleeps: Callable[[], None] = lambda: None
        self.waited_s = 0.0
        self.groups = 0
        self.stop = Signals()
        self.run = SimpleNamespace(
            config=SimpleNamespace(cluster=ClusterConfig()),
            store=SimpleNamespace(uri="s3://bucket/run"),
            total_steps=8,
            plan=SimpleNamespace(digest="plan"),
        )
        self.watch = MagicMock()
        self.watch.asked_to_end.return_value = ""
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        for name in ("ProgressLine", "Inbox"):
            monkeypatch.setattr(fit, name, MagicMock())
        monkeypatch.setattr(fit, "Watch", lambda *arguments: self.watch)
        monkeypatch.setattr(fit, "_Group", lambda *arguments: self)
        monkeypatch.setattr(fit, "_newest_commit", self._newest)
        self.whole = False
        monkeypatch.setattr(fit, "_is_whole", lambda run: self.whole)
        monkeypatch.setattr(fit, "read_journal", lambda *arguments: iter([]))
        monkeypatch.setattr(fit.time, "monotonic", lambda: self.waited_s)
        monkeypatch.setattr(fit.time, "sleep", self._sleep)

    def fit(self) -> Result:
        return fit.fit_run(self.run, MagicMock(), MagicMock(), MagicMock(), self.stop, 0)

    def follow(self) -> Result | BaseException:
        self.groups += 1
        return self.ends.pop(0)

    @property
    def notes(self) -> list[str]:
        return [call.args[0] for call in self.watch.note.call_args_list]

    def _newest(self, run: Any) -> str:
        found = self.commits.pop(0) if len(self.commits) > 1 else self.commits[0]
        if isinstance(found, Exception):
            raise found
        return found

    def _sleep(self, seconds: float) -> None:
        self.waited_s += seconds
        self.sleeps()


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return World(monkeypatch)


def test_a_storage_that_comes_back_is_waited_for(world):
    world.ends, world.commits = [FINISHED], [DOWN, DOWN, "step-4"]
    assert world.fit() is FINISHED
    assert world.groups == 1 and world.waited_s == 10 + 20
    assert [note.partition("; again ")[2] for note in world.notes] == [
        "in 10 s, attempt 2 of 3",
        "in 20 s, attempt 3 of 3",
    ]


def test_a_storage_that_stays_away_ends_the_run(world):
    world.commits = [DOWN]
    with pytest.raises(TrainingError, match=r"3 attempts in a row .*; the last: StorageError: s3:"):
        world.fit()
    assert world.groups == 0 and world.waited_s == 30


def test_how_a_group_ended_is_not_lost_with_the_storage(world):
    world.ends, world.commits = [FINISHED], ["step-4", DOWN]
    assert world.fit() is FINISHED


def test_a_group_after_which_the_storage_is_away_got_nowhere(world):
    world.ends, world.commits = [RuntimeError("lost"), FINISHED], ["step-4", DOWN, "step-4"]
    assert world.fit() is FINISHED
    assert world.groups == 2 and world.waited_s == 10


def test_groups_that_get_nowhere_end_the_run_and_a_commit_begins_anew(world):
    lost = RuntimeError("worker lost")
    world.ends = [lost, lost, lost, lost, lost]
    # Before and after each group: the third one has committed.
    world.commits = ["a", "a", "a", "a", "a", "b", "b"]
    with pytest.raises(TrainingError, match="3 attempts in a row .* RuntimeError: worker lost"):
        world.ends += [lost]
        world.fit()
    assert world.groups == 6 and world.waited_s == 0


def test_what_ends_a_group_after_its_last_commit_changes_nothing(world):
    world.ends, world.commits, world.whole = [RuntimeError("lost")], ["a", "b"], True
    found = world.fit()
    assert found.outcome is not None and found.outcome.reason == "finished" and world.groups == 1


def test_a_group_that_yields_is_no_failure(world):
    world.ends, world.commits = [*[YIELDED] * 5, FINISHED], ["a"]
    assert world.fit() is FINISHED and world.groups == 6


@pytest.mark.parametrize("how", ["signal", "request"])
def test_who_asks_for_the_end_does_not_wait_for_the_storage(world, how):
    def asked() -> None:
        if how == "signal":
            world.stop.received = 15
        else:
            world.watch.asked_to_end.return_value = "asked by ada"

    world.commits, world.sleeps = [DOWN], asked
    found = world.fit()
    assert found.outcome is not None and found.outcome.reason == "stopped"
    assert world.waited_s == fit.POLL_S
