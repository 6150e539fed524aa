"""How long a run's jobs held their cluster."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from clip_ray.storage import LocalStore, Store
from clip_ray.train.cost import held_s


@pytest.fixture
def run(tmp_path: Path) -> Store:
    """Job a: attempts at 100 and 150; job b, a day later: one at 90,000."""
    store = LocalStore(tmp_path / "r")
    for number, (driver, started) in enumerate([("a", 100), ("a", 150), ("b", 90_000)], 1):
        record = {"driver": driver, "attempt": number, "started": float(started)}
        store.write(f"attempts/{number:05d}.json", json.dumps(record).encode())
    return store


def signs(*times: float) -> list[dict[str, float]]:
    return [{"time": float(time)} for time in times]


def test_jobs_are_summed_and_the_time_between_them_is_free(run: Store) -> None:
    rows = signs(110, 120, 160, 220, 90_010, 90_030)
    assert held_s(run, rows, before=1e6) == (220 - 100) + (90_030 - 90_000)


def test_between_two_attempts_of_a_job_the_cluster_is_paid_for(run: Store) -> None:
    assert held_s(run, signs(110, 151), before=80_000) == 51


def test_the_job_that_asks_counts_itself(run: Store) -> None:
    rows = signs(220, 90_010)
    assert held_s(run, rows, before=90_000) == 120


def test_no_sign_of_life_and_no_attempt_cost_nothing(run: Store, tmp_path: Path) -> None:
    assert held_s(run, [], before=1e6) == 0
    assert held_s(LocalStore(tmp_path / "none"), signs(5), before=1e6) == 0
