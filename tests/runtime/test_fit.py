"""One group of workers after the other; what they do is made up, and no Ray is started."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

from clip_ray.config import ClusterConfig
from clip_ray.errors import ClusterError, StorageError, TrainingError
from clip_ray.runtime import cluster, fit
from clip_ray.runtime.cluster import Share
from clip_ray.runtime.pulse import Pulse
from clip_ray.runtime.signals import Signals
from clip_ray.runtime.worker import Result
from clip_ray.train.hooks import Outcome
from clip_ray.train.journal import Row
from clip_ray.train.state import Progress
from tests.train.test_loop import make_run

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
        self.stop = Signals()
        self.share = Share(2, 1, 0, 1, threads=1)
        self.shares: list[int] = []  # workers of each group
        self.run = SimpleNamespace(
            config=SimpleNamespace(cluster=ClusterConfig()),
            store=SimpleNamespace(uri="s3://bucket/run"),
            total_steps=8,
            plan=SimpleNamespace(digest="plan"),
        )
        self.watch = MagicMock()
        self.watch.asked_to_end.return_value = ""
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        monkeypatch.setattr(fit, "ProgressLine", MagicMock())
        monkeypatch.setattr(fit, "Watch", lambda *arguments: self.watch)
        monkeypatch.setattr(fit, "_Group", self._group)
        monkeypatch.setattr(fit, "_newest_commit", self._newest)
        self.whole = False
        monkeypatch.setattr(fit, "_is_whole", lambda run: self.whole)
        monkeypatch.setattr(fit, "read_journal", lambda *arguments: iter([]))
        monkeypatch.setattr(fit.time, "monotonic", lambda: self.waited_s)
        monkeypatch.setattr(fit.time, "sleep", self._sleep)

    def fit(self) -> Result:
        others = (MagicMock(), MagicMock(), self.stop, 0, MagicMock())
        return fit.fit_run(self.run, self.share, *others)

    def _group(self, run: Any, share: Share, *others: Any) -> World:
        self.shares.append(share.num_workers)
        return self

    def follow(self) -> Result | BaseException:
        return self.ends.pop(0)

    @property
    def groups(self) -> int:
        return len(self.shares)

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


@pytest.fixture
def nodes(world, monkeypatch) -> list[dict[str, Any]]:
    """The nodes of a cluster that the run did not start; a CPU each for a worker, one for data."""
    found = [
        {"NodeID": name, "Alive": True, "Resources": {"CPU": cpus}, "Labels": {}}
        for name, cpus in (("a", 2.0), ("b", 1.0))
    ]

    def free() -> dict[str, float]:
        return {"CPU": sum(node["Resources"]["CPU"] for node in found), "GPU": 0.0}

    world.run.config.cluster = ClusterConfig(
        num_workers=2, cpus_per_worker=1, rejoin_timeout_s=30, address="somewhere:6379"
    )
    monkeypatch.setattr(cluster, "free_resources", free)
    for module in (cluster, fit):
        monkeypatch.setattr(module, "usable_nodes", lambda: found)
    monkeypatch.setattr(cluster, "_has_room", lambda share: True)
    monkeypatch.setattr(cluster, "request_resources", lambda bundles: None)
    return found


def test_a_fixed_number_of_workers_waits_for_a_node_that_comes_back(world, nodes):
    lost = nodes.pop()

    def back() -> None:
        if world.waited_s == 20:
            nodes.append(lost)

    world.ends, world.commits, world.sleeps = [RuntimeError("lost"), FINISHED], ["a"], back
    assert world.fit() is FINISHED
    assert world.shares == [2, 2] and world.waited_s == 20
    assert world.notes[0].startswith("waiting up to 30 s for room: asked: 2 workers x 1 CPU")


def test_a_node_that_does_not_come_back_is_waited_for_as_long_as_was_said(world, nodes):
    nodes.pop()
    world.ends, world.commits = [RuntimeError("lost")], ["a"]
    with pytest.raises(ClusterError) as found:
        world.fit()
    assert world.groups == 1 and world.waited_s == 30
    for words in (
        "the workers that were lost were not replaced: asked: 2 workers x 1 CPU",
        "2 CPUs and 0 GPUs are free",
        "(after 30 s)",
        "cluster.rejoin_timeout_s",
    ):
        assert words in str(found.value)


def test_a_range_goes_on_with_those_that_are_left(world, nodes):
    world.run.config.cluster = world.run.config.cluster.model_copy(update={"num_workers": (1, 2)})
    nodes.pop()
    world.ends, world.commits = [RuntimeError("lost"), FINISHED], ["a"]
    assert world.fit() is FINISHED
    assert world.shares == [2, 1] and world.waited_s == 0
    assert world.notes == ["1 workers in the place of 2"]


class Group:
    """A real group whose Ray Train, recorder and workers are made up."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.returns = threading.Event()  # Ray Train's fit() does then
        self.rows: list[Row] = []
        self.pulses: list[Pulse] = []
        self.recorder, self.watch, self.stop = MagicMock(), MagicMock(), Signals()
        self.watch.poll.side_effect = lambda: self.rows
        self.watch.pulses.side_effect = lambda group: self.pulses
        self.watch.asked_to_end.return_value = ""
        for method in ("compared", "slow", "hang"):
            getattr(self.watch, method).side_effect = AssertionError(method)
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        monkeypatch.setattr(fit, "POLL_S", 0.01)
        monkeypatch.setattr(fit.ray, "put", lambda reader: "reader")
        monkeypatch.setattr(fit._Group, "_trainer", lambda group, scratch: self)
        run, share = make_run(folder), Share(1, 1, 0, 1, threads=1)
        self.made = fit._Group(run, share, self.recorder, "driver", self.watch, self.stop)

    def fit(self) -> Any:
        assert self.returns.wait(10), "never let go"
        return SimpleNamespace(return_value=FINISHED)

    @property
    def asked(self) -> list[str]:
        return [call.args[0] for call in self.recorder.ask.remote.call_args_list]


@pytest.fixture
def group(monkeypatch, tmp_path) -> Iterator[Group]:
    made = Group(monkeypatch, tmp_path)
    yield made
    made.returns.set()


STARTING = Pulse(0, 100, "node", "host")


@pytest.mark.parametrize("pulses", [[], [STARTING], [replace(STARTING, phase="data_wait")]])
def test_who_asks_for_the_end_before_the_first_step_waits_for_none(group, pulses):
    group.pulses = pulses
    group.watch.asked_to_end.return_value = "asked by ada"
    found = group.made.follow()
    assert found.outcome.reason == "stopped" and group.asked == []
    group.watch.note.assert_called_once_with("asked by ada: no step was done yet; stopping")


@pytest.mark.parametrize("sign", ["a row", "a pulse"])
def test_after_a_step_the_ranks_are_asked_to_commit(group, sign):
    group.rows = [{"step": 1, "step_s": 0.1}] if sign == "a row" else []
    group.pulses = [replace(STARTING, phase="loss", steps=1)] if sign == "a pulse" else []
    group.stop.received = signal.SIGTERM
    group.recorder.ask.remote.side_effect = lambda word: group.returns.set()
    assert group.made.follow() is FINISHED
    assert set(group.asked) == {"stop"}


def test_a_controller_that_says_nothing_is_killed_and_the_group_has_failed(group, monkeypatch):
    killed = []
    monkeypatch.setattr(
        group.made._overdue, "why", lambda pulses: "the workers have ended for 91 s"
    )
    monkeypatch.setattr(fit, "job_actors", lambda name, since: [("node", 77)])
    monkeypatch.setattr(fit, "signal_process", lambda *which: killed.append(which) or "killed")
    monkeypatch.setattr(fit, "END_S", 0.1)
    found = group.made.follow()
    assert isinstance(found, TrainingError) and "for 91 s" in str(found)
    assert killed == [("node", 77, signal.SIGKILL)]
    (note,) = (call.args[0] for call in group.watch.note.call_args_list)
    assert note.startswith("Ray Train's controller (process 77) hangs: the workers have ended")
