"""A crash at every write point: the newest commit is the one before or the new one, and whole."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from clip_ray.config import S3Options
from clip_ray.storage import LocalStore, Store, open_store
from clip_ray.train.checkpoint import Checkpoints, Commit
from tests.train.crashing import AFTER, BEFORE, attempt, content, refuse

SCRIPT = Path(__file__).with_name("crashing.py")
TIMEOUT_S = 300


def killed(runs: str, acknowledged: Path, endpoint: str | None = None) -> list[tuple[Store, int]]:
    """Return the runs that the script leaves, and the last step whose commit had returned."""
    acknowledged.mkdir()
    command = [sys.executable, str(SCRIPT), runs, str(acknowledged)]
    done = subprocess.run(
        command + ([endpoint] if endpoint else []),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    store = open_store(runs, S3Options(endpoint=endpoint))
    files = sorted(acknowledged.iterdir())
    return [(store.child(file.name), int(file.read_text())) for file in files]


def assert_goes_on(run: Store, acknowledged: int) -> int:
    """Check what a killed writer left, and that the next one works; return the newest step."""
    checkpoints = Checkpoints(run)
    found = checkpoints.newest(refuse)
    assert found is not None, "no commit is left"
    newest, files = found
    assert files == content(newest.step), f"{newest.name} is mixed"
    assert newest.step in (acknowledged, AFTER)
    attempt(run, lambda: None, lambda step: None)
    last = Commit(AFTER, checkpoints.newest_attempt())
    assert checkpoints.newest(refuse) == (last, content(AFTER)), f"after {newest.name}"
    assert run.child("checkpoints").directories() == [last.name], "orphans are left"
    return newest.step


def assert_all_go_on(left: list[tuple[Store, int]], at_least: int) -> None:
    """Check each of the runs: first those with the old commit, then those with the new one."""
    newest = [assert_goes_on(*one) for one in left]
    assert len(left) >= at_least and newest == sorted(newest) and set(newest) == {BEFORE, AFTER}
    # Killed before it had done anything; killed at the last deletion; not killed.
    assert left[0][1] == BEFORE and [step for _, step in left[-2:]] == [AFTER, AFTER]


def test_on_a_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # as the script
    assert_all_go_on(killed(str(tmp_path / "runs"), tmp_path / "acknowledged"), 40)


@pytest.mark.slow
def test_on_s3(tmp_path: Path, s3: S3Options) -> None:
    runs = f"s3://bucket/{tmp_path.name}"
    assert_all_go_on(killed(runs, tmp_path / "acknowledged", s3.endpoint), 12)


def test_a_commit_that_is_not_whole_is_found_out(tmp_path: Path) -> None:
    """The control: what a writer that puts COMMIT before the last file would leave."""
    run = LocalStore(tmp_path / "r")
    attempt(run, lambda: None, lambda step: None)
    (newest,) = Checkpoints(run).commits()
    run.delete(f"checkpoints/{newest.name}/state.json")
    with pytest.raises(AssertionError, match="state.json is missing"):
        assert_goes_on(run, AFTER)
