"""The recorder, used as the plain class that it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from clip_ray.config import S3Options
from clip_ray.runtime.recorder import Recorder
from clip_ray.storage import LocalStore, open_store
from clip_ray.train.journal import read_journal


def rows(*steps: int) -> list[tuple[str, dict]]:
    return [("metrics", {"step": step, "attempt": 1}) for step in steps]


@pytest.fixture
def recorder(tmp_path: Path) -> Recorder:
    return Recorder(str(tmp_path / "run"), S3Options())


def journal(tmp_path: Path) -> list[int]:
    return [row["step"] for row in read_journal(LocalStore(tmp_path / "run"), "metrics")]


def test_rows_that_are_sent_again_are_taken_once(recorder, tmp_path):
    assert recorder.append("a", 0, rows(1, 2)) == (set(), 2)
    assert recorder.append("a", 0, rows(1, 2, 3)) == (set(), 3)
    assert recorder.append("b", 0, rows(4)) == (set(), 1)
    assert journal(tmp_path) == [1, 2, 3, 4]


def test_a_restarted_recorder_goes_on_where_the_sender_is(recorder, tmp_path):
    recorder.append("a", 0, rows(1, 2))
    again = Recorder(str(tmp_path / "run"), S3Options())
    assert again.append("a", 2, rows(3)) == (set(), 3)
    assert journal(tmp_path) == [1, 2, 3]


def test_on_s3_a_row_is_durable_when_it_is_flushed(s3):
    recorder = Recorder("s3://bucket/recorder", s3)
    run = open_store("s3://bucket/recorder", s3)
    assert recorder.append("a", 0, rows(1)) == (set(), 0)
    assert list(read_journal(run, "metrics")) == []  # a kill here would lose it: kept by the sender
    assert recorder.append("a", 1, rows(2), durable=True) == (set(), 2)
    assert [row["step"] for row in read_journal(run, "metrics")] == [1, 2]
    recorder.close()
    assert run.exists("metrics.jsonl")


def test_the_log_tells_a_restart_from_silence(recorder, tmp_path):
    recorder.append("a", 0, rows(1, 2))
    name, cursor, told = recorder.log_since("", 0)
    assert [row["step"] for _, row in told] == [1, 2]
    assert recorder.log_since(name, cursor) == (name, cursor, [])
    recorder.append("a", 2, rows(3))
    assert [row["step"] for _, row in recorder.log_since(name, cursor)[2]] == [3]
    again = Recorder(str(tmp_path / "run"), S3Options())
    again.append("a", 3, rows(4))
    other, _, told = again.log_since(name, cursor)
    assert other != name
    assert [row["step"] for _, row in told] == [4]


def test_what_is_asked_comes_with_the_answer(recorder):
    recorder.ask("stop")
    recorder.ask("yield")
    assert recorder.append("a", 0, [])[0] == {"stop", "yield"}
    recorder.forget("yield")
    assert recorder.append("b", 0, [])[0] == {"stop"}


def test_the_mailbox_forgets_what_is_replaced(recorder):
    recorder.post("streams/1/0", "old")
    recorder.post("streams/1/2", "new", replaces="streams/1/0")
    assert recorder.collect("streams/1/0") is None
    assert recorder.collect("streams/1/2") == "new"
