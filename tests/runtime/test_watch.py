"""What the driver says and journals of what it sees; the recorder is a plain one, no Ray runs."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

from clip_ray.runtime import watch as module
from clip_ray.runtime.pulse import Hang, Pulse
from clip_ray.runtime.watch import Watch, _shards
from clip_ray.train.journal import Row
from clip_ray.train.rundir import Run
from tests.train.test_loop import make_run

PULSE = Pulse(1, 101, "node", "host-1", 9, "data_wait", still_s=12)


@dataclass
class Made:
    watch: Watch
    run: Run
    tracker: MagicMock
    line: MagicMock
    inbox: SimpleNamespace
    rows: list[tuple[str, Row]]
    events: list[Row]
    words: list[tuple[str, str]]

    def sees(self, journal: str, *rows: Row) -> None:
        """Let the recorder tell of rows."""
        self.rows[:] = [(journal, row) for row in rows]
        self.watch.poll()
        self.rows.clear()

    @property
    def notes(self) -> list[str]:
        return [call.args[0] for call in self.line.note.call_args_list]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture
def made(run: Run, monkeypatch: pytest.MonkeyPatch) -> Made:
    rows: list[tuple[str, Row]] = []
    events: list[Row] = []
    words: list[tuple[str, str]] = []
    recorder = MagicMock()
    for kind in ("ask", "forget"):
        getattr(recorder, kind).remote = lambda word, kind=kind: words.append((kind, word))
    monkeypatch.setattr(module.ray, "get", lambda call, timeout: ("one", len(rows), list(rows)))
    monkeypatch.setattr(module, "send_event", lambda recorder, row: events.append(row))
    tracker, line = MagicMock(), MagicMock()
    inbox = SimpleNamespace(saw=lambda rows: None, wants_commit=False)
    watch = Watch(run, recorder, tracker, line, inbox)
    return Made(watch, run, tracker, line, inbox, rows, events, words)


def commit(step: int, write_s: float) -> Row:
    return {"event": "commit", "step": step, "uri": "u", "digest": "d", "write_s": write_s}


def step(number: int, loss: float) -> Row:
    return {"step": number, "attempt": 1, "loss": loss}


def test_a_loss_that_diverges_is_said_loudly_journaled_and_tagged(made):
    made.sees("metrics", *[step(i, 1.0) for i in range(1, 101)])
    assert made.notes == []
    made.sees("metrics", *[step(i, 2.7) for i in range(101, 141)])
    (note,) = made.notes
    assert note.startswith("THE LOSS HAS DIVERGED by step 111: ")
    assert "after 1.000 at step 20; chance is 2.773" in note  # ln 16
    (event,) = made.events
    assert (event["event"], event["step"], event["best_step"]) == ("diverged", 111, 20)
    made.tracker.set_tags.assert_called_once_with({"clip_ray.diverged": 111})


def test_the_ranks_times_reach_mlflow_with_the_slowest_host(made):
    made.sees("metrics", step(7, 1.0))
    times: dict[str, Any] = {"compute_p50_s": 0.1, "compute_max_s": 0.4}
    times |= {"data_wait_p50_s": 0.0, "data_wait_max_s": 0.2, "ranks": {"3": [0.4, 0.0]}}
    times |= {"slowest_rank": 3, "slowest_host": "host-3"}
    made.watch.compared(times)
    numbers = {f"ranks/{name}": value for name, value in times.items() if name.endswith("_s")}
    assert len(numbers) == 4
    made.tracker.log_metrics.assert_called_once_with(numbers, 7)
    made.tracker.set_tags.assert_called_once_with({"clip_ray.slowest_host": "host-3 (rank 3)"})
    assert [event["ranks"] for event in made.events] == [{"3": [0.4, 0.0]}]
    assert made.notes[0].startswith("rank 3 on host-3 holds the others up: 400 ms")


def test_a_loader_that_stalls_is_named_by_rank_block_and_shards(made):
    layout = made.run.layout(2)
    for block in (3, 3, 5):
        made.watch.slow(replace(PULSE, block=block), layout)
    assert [event["block"] for event in made.events] == [3, 5]
    shards = made.events[0]["shards"]
    assert made.notes[0] == (
        "all wait for rank 1 (process 101 on host-1), in data_wait, block 3 of the data (from "
        f"{', '.join(shards)}) for 12 s"
    )
    made.watch.slow(replace(PULSE, phase="checkpoint"), layout)
    assert made.events[-1]["block"] is None and "in checkpoint for 12 s" in made.notes[-1]


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_the_shards_of_a_block_are_those_that_its_rows_come_from(run, workers):
    reader, layout = run.reader(workers), run.layout(workers)
    for number in range(2 * layout.blocks_per_window):
        read = set(reader.read(*layout.block_at(number))["shard"].tolist()) - {-1}
        assert read
        assert _shards(run, layout, number) == sorted(run.manifest.shard(s).path for s in read)


def test_a_hang_is_said_in_short_and_journaled_in_full(made):
    stack = 'Thread 9 (idle): "TrainingThread(run_worker)"\n    wait (gloo.py:7)\n    f (x.py:1)\n'
    made.watch.hang(Hang(PULSE, "in loss of step 10 for 9 s"), 1000.0, "killed", stack)
    assert made.notes == [
        "rank 1 (process 101 on host-1) hangs: in loss of step 10 for 9 s; killed; it was in "
        "wait (gloo.py:7) < f (x.py:1)"
    ]
    assert made.events[0]["stack"] == stack and made.events[0]["time"] == 1000.0
    made.watch.hang(Hang(PULSE, "in loss"), 1000.0, "killed", "no stack: not permitted")
    assert made.notes[1].endswith("hangs: in loss; killed")
    assert made.events[1]["stack"] == "no stack: not permitted"


def test_a_node_that_does_not_answer_is_not_waited_for(made, monkeypatch):
    answers = threading.Event()

    def end(pulse: Pulse) -> tuple[str, str]:
        assert answers.wait(60)
        return "not reached", ""

    monkeypatch.setattr(module, "end_process", end)
    before = time.time()
    made.watch.end_hung(Hang(PULSE, "not heard of for 9 s"))
    assert made.events == []  # and here we are
    after = time.time()
    answers.set()
    made.watch.close()
    (event,) = made.events
    assert event["ended"] == "not reached" and before <= event["time"] <= after


@pytest.mark.parametrize(("left_s", "short"), [(None, False), (41, False), (39, True), (-5, True)])
def test_too_short_a_notice_is_said(made, left_s, short):
    made.watch.hurry(left_s)
    assert made.notes == []  # nothing was written yet: nobody knows how long it takes
    made.sees("events", commit(7, write_s=40.0))
    made.watch.hurry(left_s)
    assert [event["event"] for event in made.events] == ["short_notice"] * short
    assert len(made.notes) == short
    if short:
        assert f"{max(left_s, 0)} s are left, the last commit took 40 s" in made.notes[0]


def test_a_wish_for_a_commit_ends_with_the_commit(made):
    made.watch.relay_wish_for_commit()
    made.watch.wish_for_commit()
    made.watch.relay_wish_for_commit()
    made.sees("events", commit(7, 1.0))
    made.watch.relay_wish_for_commit()
    assert made.words == [("forget", "commit"), ("ask", "commit"), ("forget", "commit")]


def test_a_recorder_that_restarts_while_the_storage_is_away_costs_nothing(made, monkeypatch):
    made.sees("metrics", step(1, 1.0))
    monkeypatch.setattr(module.ray, "get", lambda call, timeout: ("two", 0, []))

    def away(*arguments: Any) -> Any:
        raise module.StorageError("no answer")

    monkeypatch.setattr(module, "read_journal", away)
    assert made.watch.poll() == []
