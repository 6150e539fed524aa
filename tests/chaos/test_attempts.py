"""What ends an attempt, and what does not: one worker that is taken away, storage that hangs."""

from __future__ import annotations

import mlflow
import psutil
import pytest

from clip_ray.storage import LocalStore
from tests.chaos.conftest import STEPS
from tests.chaos.test_faults import assert_same_end, events, processes

pytestmark = [pytest.mark.ray, pytest.mark.chaos]


def test_a_worker_that_is_told_to_go_costs_no_step(jobs, undisturbed):
    """SIGTERM to rank 1's process alone, as when one container of several is taken away."""
    job = jobs.start("told", *STEPS)
    jobs.wait_for_step("told", 30)
    run = LocalStore(jobs.run_dir("told"))
    (began,) = events(run, "attempt")
    (other,) = [p for p in processes(jobs.head, "ray::RayTrainWorker") if p.pid != began["pid"]]
    other.terminate()
    output = jobs.finish(job)
    (told,) = events(run, "preempted")
    assert (told["rank"], told["pid"]) == (1, other.pid) and not psutil.pid_exists(other.pid)
    assert f"rank 1 (process {other.pid} on " in output and "got SIGTERM: committing" in output
    assert [event["recomputes"] for event in events(run, "attempt")] == [0, 0]
    assert events(run, "attempt_failed") == []
    summary = jobs.summary("told")
    assert summary["recomputed_steps"] == 0 and list(summary["recoveries"]) == ["preempted"]
    assert_same_end(run, undisturbed)
    client = mlflow.MlflowClient(f"sqlite:///{jobs.storage}/mlflow.db")
    (tracked,) = client.search_runs(["1"])
    assert tracked.data.metrics["recovery/preempted_times"] == 1
    assert tracked.data.metrics["ettr"] == pytest.approx(summary["ettr"])


def test_a_controller_that_hangs_is_not_waited_for_for_ever(jobs, undisturbed):
    """SIGSTOP to Ray Train's controller: the workers reach the end, and nobody says so."""
    job = jobs.start("held", *STEPS)
    jobs.wait_for_step("held", 30)
    (controller,) = processes(jobs.head, "ray::TrainController")
    controller.suspend()
    output = jobs.finish(job)
    assert f"Ray Train's controller (process {controller.pid}) hangs: the workers have" in output
    run = LocalStore(jobs.run_dir("held"))
    (hang,) = events(run, "controller_hang")
    assert hang["pid"] == controller.pid and hang["ended"] == "killed (state T (stopped))"
    assert len(events(run, "attempt")) == 1 and jobs.summary("held")["recomputed_steps"] == 0
    assert_same_end(run, undisturbed)
