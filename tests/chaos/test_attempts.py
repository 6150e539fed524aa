"""What ends an attempt, and what does not: one worker that is taken away, storage that hangs."""

from __future__ import annotations

import os
import signal

import mlflow
import psutil
import pytest

from clip_ray.storage import LocalStore
from tests.chaos.support import (
    STEPS,
    WAIT_S,
    assert_same_end,
    assert_whole,
    events,
    numbers,
    paced,
    processes,
)
from tests.runtime.support import ray_node, wait_for

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
    assert_same_end(run, undisturbed.rows("clip"))
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
    assert_same_end(run, undisturbed.rows("clip"))


FIXED = (*STEPS, "--cluster.cpus_per_worker", "2", "--tracking.register_model", "false")


def test_a_node_that_does_not_come_back_ends_the_run_with_the_way_on(elastic, tmp_path):
    jobs = elastic
    run = LocalStore(jobs.run_dir("fixed"))
    with paced(jobs.head, "fixed"):
        with ray_node(jobs.head, tmp_path, cpus=2) as node:
            job = jobs.start("fixed", *FIXED, "--cluster.rejoin_timeout_s", "5")
            jobs.wait_for_step("fixed", 15)
            os.killpg(node.pid, signal.SIGKILL)
            output = jobs.finish(job, code=2)
        # The same command goes on, and waits for a node that does come back.
        with ray_node(jobs.head, tmp_path, cpus=2) as node:
            job = jobs.start("fixed", *FIXED)
            wait_for(lambda: len(events(run, "attempt")) == 2, WAIT_S, "a second attempt")
            jobs.wait_for_step("fixed", events(run, "attempt")[1]["from_step"] + 5)
            os.killpg(node.pid, signal.SIGKILL)
            wait_for(lambda: len(events(run, "attempt_failed")) == 2, WAIT_S, "the loss of it")
    said = "error: the workers that were lost were not replaced: asked: 2 workers x 2 CPU"
    assert said in output and "(after 5 s)" in output
    assert "last commit: step-" in output and "to resume: " in output
    with ray_node(jobs.head, tmp_path, cpus=2):
        output = jobs.finish(job)
    assert "waiting up to 1800 s for room: asked: 2 workers x 2 CPU" in output
    assert numbers(run, "world_size") == [2, 2, 2]
    assert_whole(run)
