"""What a run sends to MLflow when it does not reach its end."""

from __future__ import annotations

from pathlib import Path

import mlflow
import pytest

from clip_ray.runtime.publish import close_tracker, publish_faults, start_tracker
from clip_ray.train.journal import Journal
from tests.train.test_loop import make_run


def test_what_faults_have_cost_is_there_for_a_run_that_fails(tmp_path: Path) -> None:
    run = make_run(tmp_path, run={"storage": str(tmp_path)})
    metrics, events = Journal(run.store, "metrics"), Journal(run.store, "events")
    at = 1_700_000_000.0
    for attempt, first in ((1, 1), (2, 4)):
        metrics.append(
            {"step": first + i, "attempt": attempt, "step_s": 1.0, "time": at + 20 * attempt + i}
            for i in range(5)
        )
    events.append(
        [
            {"event": "attempt", "attempt": 1, "from_step": 0, "time": at + 14},
            {"event": "hang", "time": at + 25},
            {"event": "attempt", "attempt": 2, "from_step": 3, "time": at + 35},
        ]
    )
    said: list[str] = []
    tracker = start_tracker(run)
    publish_faults(run, tracker)
    close_tracker(run, tracker, "FAILED", None, said.append)
    assert said == []
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (found,) = client.search_runs(["1"])
    assert found.info.status == "FAILED"
    # Eight steps of a second count in the 30 s from 14 to 44; the third ended at 22, the fourth
    # was done again at 40: 17 s beside its own.
    assert found.data.metrics["ettr"] == pytest.approx(8 / 30)
    assert found.data.metrics["recovery/hang_times"] == 1
    assert found.data.metrics["recovery/hang_seconds"] == pytest.approx(17)


def test_a_run_without_a_step_has_nothing_to_tell(tmp_path: Path) -> None:
    run = make_run(tmp_path, run={"storage": str(tmp_path)})
    publish_faults(run, None)  # type: ignore[arg-type] - it is not asked
