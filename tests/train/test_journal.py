"""Journals: rows that are there after a kill, and which of them led to the weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from clip_ray.config import S3Options
from clip_ray.errors import StorageError
from clip_ray.storage import LocalStore, Store, open_store
from clip_ray.train.checkpoint import Commit
from clip_ray.train.journal import Journal, Row, last_row, lineage, read_journal


@pytest.fixture(params=["local", "s3"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "local":
        return open_store(tmp_path / "r")
    options = request.getfixturevalue("s3")
    return open_store(f"s3://bucket/{tmp_path.name}/r", options)


ROWS = [{"step": step, "text": "zwei\nZeilen\r ü\u2028"} for step in range(1, 5)]


def test_rows_come_back_in_order(run: Store) -> None:
    assert list(read_journal(run, "metrics")) == []
    journal = Journal(run, "metrics")
    journal.append(ROWS[:1])
    journal.flush()
    journal.append(ROWS[1:2])
    journal.append(ROWS[2:3])
    journal.flush()
    journal.flush()  # nothing new: no empty part
    assert list(read_journal(run, "metrics")) == ROWS[:3]
    again = Journal(run, "metrics")  # after a restart
    again.append(ROWS[3:])
    again.flush()
    assert list(read_journal(run, "metrics")) == ROWS
    assert list(read_journal(run, "events")) == []


def test_join_gives_the_stable_name(run: Store) -> None:
    journal = Journal(run, "metrics")
    for row in ROWS:
        journal.append([row])
        journal.flush()
    journal.append([{"step": 5}])  # join flushes
    journal.join()
    lines = run.read("metrics.jsonl").decode().rstrip("\n").split("\n")
    assert [json.loads(line) for line in lines] == [*ROWS, {"step": 5}]
    assert list(read_journal(run, "metrics")) == [*ROWS, {"step": 5}]


def test_joining_nothing_writes_nothing(run: Store) -> None:
    Journal(run, "metrics").join()
    assert not run.exists("metrics.jsonl")


def test_parts_on_s3_are_numbered_and_never_rewritten(tmp_path: Path, s3: object) -> None:
    run = open_store(f"s3://bucket/{tmp_path.name}/r", s3)  # type: ignore[arg-type]
    for number in range(2):
        journal = Journal(run, "metrics")
        journal.append([{"step": number}])
        journal.flush()
    # Eleven more: their names sort by number.
    for number in range(2, 13):
        journal.append([{"step": number}])
        journal.flush()
    parts = run.child("metrics.parts").files()
    assert parts == [f"{number:08d}.jsonl" for number in range(1, 14)]
    assert [row["step"] for row in read_journal(run, "metrics")] == list(range(13))


def test_what_was_not_flushed_on_s3_is_not_there(tmp_path: Path, s3: object) -> None:
    run = open_store(f"s3://bucket/{tmp_path.name}/r", s3)  # type: ignore[arg-type]
    Journal(run, "metrics").append(ROWS)
    assert list(read_journal(run, "metrics")) == []


def test_a_storage_that_is_away_keeps_no_journal_from_opening(s3: S3Options) -> None:
    """A recorder that restarts amid an outage takes rows; they are written after it."""
    away = s3.model_copy(update={"endpoint": "http://127.0.0.1:1", "retry_s": 0})
    journal = Journal(open_store("s3://bucket/away", away), "metrics")
    journal.append(ROWS)
    with pytest.raises(StorageError):
        journal.flush()
    journal._run = open_store("s3://bucket/away", s3)  # it is back
    journal.flush()
    assert list(read_journal(journal._run, "metrics")) == ROWS


@pytest.mark.parametrize("torn", [b'{"step": 9, "lo', b"{", b"\xc3"])
def test_a_torn_line_is_left_out_and_cut(tmp_path: Path, torn: bytes) -> None:
    """A writer was killed in the middle of a row; the next one must not append to its rest."""
    run = LocalStore(tmp_path)
    journal = Journal(run, "metrics")
    journal.append(ROWS[:2])
    journal.flush()
    path = tmp_path / "metrics.jsonl"
    with open(path, "ab") as file:
        file.write(torn)
    assert list(read_journal(run, "metrics")) == ROWS[:2]
    after = Journal(run, "metrics")
    after.append(ROWS[2:])
    after.flush()
    assert list(read_journal(run, "metrics")) == ROWS
    assert path.read_bytes().count(b"\n") == 4


def test_a_journal_of_nothing_but_a_torn_line(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step"')
    Journal(LocalStore(tmp_path), "metrics")
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


def rows(*steps: tuple[int, int]) -> list[Row]:
    """Return rows of (attempt, step), told apart by their place in the journal."""
    return [{"attempt": a, "step": s, "place": i} for i, (a, s) in enumerate(steps)]


@pytest.mark.parametrize(
    ("journal", "places"),
    [
        ([], []),
        ([(1, 1), (1, 2), (1, 3)], [0, 1, 2]),
        # Resumed after step 2: steps 3 and 4 of attempt 1 did not lead to the weights.
        ([(1, 1), (1, 2), (1, 3), (1, 4), (2, 3), (2, 4)], [0, 1, 4, 5]),
        # It died again before it was as far: step 4 of attempt 1 is superseded all the same.
        ([(1, 1), (1, 2), (1, 3), (1, 4), (2, 3)], [0, 1, 4]),
        # From the beginning.
        ([(1, 1), (1, 2), (2, 1), (3, 1), (3, 2)], [3, 4]),
        # An attempt that did no step, and one that goes on where the last one ended.
        ([(1, 1), (1, 2), (4, 3)], [0, 1, 2]),
        # Rows of a thought-dead attempt that arrive late do not count.
        ([(1, 1), (1, 2), (2, 2), (1, 3), (2, 3)], [0, 2, 4]),
        # Back and further back.
        ([(1, 1), (1, 2), (1, 3), (2, 3), (3, 2), (3, 3)], [0, 4, 5]),
    ],
)
def test_lineage_by_hand(journal: list[tuple[int, int]], places: list[int]) -> None:
    assert [row["place"] for row in lineage(rows(*journal))] == places


@pytest.mark.parametrize(
    ("journal", "starts", "places"),
    [
        # As without records, and the beginning.
        ([(1, 1), (1, 2), (1, 3), (2, 3)], {1: (0, 0), 2: (2, 1)}, [0, 1, 3]),
        ([(1, 1), (1, 2), (2, 1)], {1: (0, 0), 2: (0, 0)}, [2]),
        # Attempt 2 went on from 1, attempt 3 from a commit at 3 that attempt 1 made later.
        ([(1, 1), (1, 2), (1, 3), (2, 2), (3, 4)], {2: (1, 1), 3: (3, 1)}, [0, 1, 2, 4]),
        # Attempt 3 went on from attempt 1's 2: what attempt 2 did is not in it.
        ([(1, 1), (1, 2), (2, 3), (3, 3)], {2: (2, 1), 3: (2, 1)}, [0, 1, 3]),
        # A step that is missing stays missing.
        ([(1, 1), (1, 2), (3, 4)], {1: (0, 0), 3: (3, 1)}, [0, 1, 2]),
        ([(1, 1), (3, 3)], {1: (0, 0), 3: (2, 2)}, [0, 1]),
        # Only the last attempt's is known: begun by an older version.
        ([(1, 1), (1, 2), (2, 2), (2, 3), (3, 3)], {3: (2, 2)}, [0, 2, 4]),
        # And the other way round.
        ([(1, 1), (1, 2), (1, 3), (2, 2), (3, 3)], {2: (1, 1)}, [0, 3, 4]),
    ],
)
def test_lineage_follows_what_the_attempts_recorded(
    journal: list[tuple[int, int]], starts: dict[int, tuple[int, int]], places: list[int]
) -> None:
    recorded = {attempt: Commit(*start) for attempt, start in starts.items()}
    assert [row["place"] for row in lineage(rows(*journal), recorded)] == places


def test_the_last_row_is_found_without_the_rest(tmp_path: Path) -> None:
    run = LocalStore(tmp_path)
    assert last_row(run, "metrics") is None
    journal = Journal(run, "metrics")
    journal.append({"step": step, "filler": "x" * 500} for step in range(1, 400))
    assert run.info("metrics.jsonl").size > 2 * (64 << 10)
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 400, "torn')
    found = last_row(run, "metrics")
    assert found is not None and found["step"] == 399
