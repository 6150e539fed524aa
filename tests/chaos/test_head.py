"""The head of the cluster is lost; the calls between Ray's processes fail now and then."""

from __future__ import annotations

import json
import os
import signal
import time

import pytest

from clip_ray.storage import LocalStore
from tests.chaos.support import (
    BACK_S,
    STEPS,
    assert_little_lost,
    assert_same_end,
    back_after,
    numbers,
    paced,
    workers,
)
from tests.runtime.support import Jobs, ray_head

pytestmark = [pytest.mark.ray, pytest.mark.chaos]
END_S = 90  # a driver gives a lost head up after a minute
# Of all calls between processes, each side of each.
FAILING = {"*": {"num_failures": -1, "req_failure_prob": 1, "resp_failure_prob": 1}}


def test_a_lost_head_and_calls_that_fail(undisturbed, faults, tmp_path):
    """The same command, on another head, goes on with the same MLflow run; a worker is lost there.

    On that one, Ray's own calls fail, too.
    """
    jobs = Jobs(undisturbed.head, tmp_path)
    run = LocalStore(jobs.run_dir("moved"))
    with ray_head(tmp_path, cpus=4, **faults) as jobs.head, paced(jobs.head, "moved", 100):
        job = jobs.start("moved", *STEPS)
        jobs.wait_for_step("moved", 25)
        tracked = json.loads(run.read("tracking.json"))["run_id"]
        os.killpg(jobs.head.group, signal.SIGKILL)
        lost = time.time()
        job.wait(END_S)
        assert job.returncode != 0
        print(f"the job ended {time.time() - lost:.1f} s after its head")
    failing = {"RAY_testing_rpc_failure": json.dumps(FAILING)}
    with ray_head(tmp_path, cpus=4, **faults, **failing) as jobs.head:
        with paced(jobs.head, "moved", 100):
            job = jobs.start("moved", *STEPS)
            jobs.wait_for_step("moved", 60)
            workers(jobs.head)[0].kill()
            killed = time.time()
            jobs.wait_for_step("moved", 70)
        jobs.finish(job)
        print(f"back {back_after(run, killed):.1f} s after a worker; {numbers(run, 'from_step')}")
    assert jobs.summary("moved")["run_id"] == tracked
    assert back_after(run, killed) <= BACK_S
    assert_little_lost(run)
    assert_same_end(run, undisturbed.rows("clip"))
