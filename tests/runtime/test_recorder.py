"""The recorder, used as the plain class that it is."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from clip_ray.config import S3Options
from clip_ray.errors import StorageError
from clip_ray.runtime.pulse import Pulse
from clip_ray.runtime.recorder import Recorder
from clip_ray.storage import LocalStore, open_store
from clip_ray.train.journal import read_journal

BOUND_S = 10


def rows(*steps: int) -> list[tuple[str, dict]]:
    return [("metrics", {"step": step, "attempt": 1}) for step in steps]


def durable(recorder: Recorder, sender: str, count: int) -> None:
    """Wait until so many rows of a sender are on storage."""
    deadline = time.monotonic() + BOUND_S
    while recorder.append(sender, count, [])[1] < count:
        assert time.monotonic() < deadline, "not durable in time"
        time.sleep(0.01)


class Parts:
    """Stands for a run's directory on S3: parts are created when the test lets them."""

    uri = "s3://bucket/run"

    def __init__(self) -> None:
        self.arrived: list[str] = []
        self.passes = threading.Event()
        self.error: OSError | None = None

    def child(self, name: str) -> Parts:
        return self

    def files(self) -> list[str]:
        return []

    def create(self, name: str, data: bytes) -> None:
        self.arrived.append(data.decode())
        assert self.passes.wait(BOUND_S), "never let go"
        if self.error is not None:
            raise self.error


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Parts:
    made = Parts()
    monkeypatch.setattr("clip_ray.runtime.recorder.open_store", lambda uri, s3: made)
    monkeypatch.setattr("clip_ray.runtime.recorder.RETRY_S", 0.01)
    return made


def arrives(store: Parts, count: int) -> None:
    deadline = time.monotonic() + BOUND_S
    while len(store.arrived) < count:
        assert time.monotonic() < deadline, "no flush in time"
        time.sleep(0.01)


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
    recorder.append("a", 1, rows(2), durable=True)
    durable(recorder, "a", 2)
    assert [row["step"] for row in read_journal(run, "metrics")] == [1, 2]
    recorder.close()
    assert run.exists("metrics.jsonl")


def test_a_storage_that_hangs_holds_up_neither_signs_of_life_nor_words(store):
    recorder = Recorder("s3://bucket/run", S3Options())
    begun = time.monotonic()
    recorder.append("a", 0, rows(1), durable=True)
    arrives(store, 1)
    recorder.beat("group", Pulse(0, 1, "node", "host"))
    recorder.ask("stop")
    assert recorder.append("a", 1, rows(2), durable=True) == ({"stop"}, 0)
    assert [pulse.rank for pulse in recorder.pulses("group")] == [0]
    assert len(recorder.log_since("", 0)[2]) == 2
    assert time.monotonic() - begun < BOUND_S / 2
    store.passes.set()
    durable(recorder, "a", 2)
    # What was taken while the first part was on its way is the second's.
    assert [part.count("step") for part in store.arrived] == [1, 1]


def test_a_part_that_may_have_arrived_is_sent_again_as_it_was(store):
    recorder = Recorder("s3://bucket/run", S3Options())
    store.passes.set()
    store.error = OSError("timed out")
    recorder.append("a", 0, rows(1), durable=True)
    arrives(store, 1)
    recorder.append("a", 1, rows(2), durable=True)
    arrives(store, 2)
    store.error = None
    recorder.append("a", 2, rows(3), durable=True)
    durable(recorder, "a", 3)
    first, *_ = store.arrived
    assert first.count("step") == 1 and set(store.arrived[:-1]) == {first}
    assert store.arrived[-1].count("step") == 2


def test_a_recorder_whose_storage_hangs_ends_all_the_same(store, monkeypatch):
    monkeypatch.setattr("clip_ray.runtime.recorder.CLOSE_S", 0.05)
    recorder = Recorder("s3://bucket/run", S3Options())
    recorder.append("a", 0, rows(1), durable=True)
    arrives(store, 1)
    with pytest.raises(StorageError, match="not written within 0.05 s"):
        recorder.close()
    store.passes.set()


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
