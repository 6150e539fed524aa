"""What tests/benchmarks/scale times at 1,024 ranks: that it does what it is timed for, at 64."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmarks.scale import cases

RANKS = 64


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> type[cases.Late]:
    for name in ("asked", "together", "waiting"):
        monkeypatch.setattr(cases.Late, name, 0)
    return cases.Late


def test_the_ranks_together_read_exactly_the_step(tmp_path: Path) -> None:
    manifest = cases.make_manifest(1_000, tmp_path)
    assert len(manifest) == 1_000 and manifest.total < 1_000 * cases.SAMPLES
    plan = cases.plan_of(manifest, RANKS)
    assert cases.ranks_make_the_step(plan, RANKS, 700)
    # The control: other ranks' rows make another step.
    assert not cases.ranks_make_the_step(plan, RANKS // 2, 700)


def test_the_parts_of_a_commit_are_asked_for_together(tmp_path: Path, late) -> None:
    _, files = cases.commit_s(tmp_path, RANKS)
    assert files == RANKS
    # Three commits; of each every part once, and little else: one after the other is 1.
    assert 3 * (RANKS - 1) <= late.asked <= 3 * (RANKS + 4)
    assert late.together > 8


def test_commits_are_looked_for_together(tmp_path: Path, late) -> None:
    cases.look_s(tmp_path, RANKS)
    assert 3 * RANKS <= late.asked <= 3 * (RANKS + 4) and late.together > 8


def test_a_run_that_is_journalled_and_tracked_arrives_whole(tmp_path: Path) -> None:
    assert min(cases.record_s(tmp_path / "run", 200)) > 0
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 200
    _, values = cases.track_s(tmp_path / "tracked", 200)
    assert values == 200 * 13


def test_every_rank_is_heard_and_dealt_with(tmp_path: Path) -> None:
    assert min(cases.beat_s(tmp_path, RANKS)) > 0
    dealt = cases.deal(RANKS)
    assert dealt.workers == RANKS and 1 <= dealt.streams <= RANKS
