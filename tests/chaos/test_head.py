"""The head of the cluster is lost; the calls between Ray's processes fail now and then."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from clip_ray.storage import LocalStore
from tests.chaos.support import (
    BACK_S,
    STEPS,
    WAIT_S,
    assert_little_lost,
    assert_same_end,
    back_after,
    numbers,
    paced,
    workers,
)
from tests.runtime.support import Jobs, ray_head, wait_for

pytestmark = [pytest.mark.ray, pytest.mark.chaos]
END_S = 120  # a driver gives a lost head up after a minute
# Calls that Ray repeats by itself. Calls of an actor's methods are not among them: Ray Train calls
# its workers every second and takes the first failure for their death.
CALLS = (
    *(f"NodeManagerService.grpc_client.{name}" for name in ("RequestWorkerLease", "PinObjectIDs")),
    *(
        f"NodeManagerService.grpc_client.{name}"
        for name in ("ReturnWorkerLease", "PrepareBundleResources", "CommitBundleResources")
    ),
    *(
        f"ray::rpc::ActorInfoGcsService.grpc_client.{name}"
        for name in ("RegisterActor", "CreateActor", "GetActorInfo", "GetAllActorInfo")
    ),
    *(
        f"ray::rpc::PlacementGroupInfoGcsService.grpc_client.{name}"
        for name in ("CreatePlacementGroup", "WaitPlacementGroupUntilReady", "GetPlacementGroup")
    ),
    *(
        f"ray::rpc::InternalKVGcsService.grpc_client.InternalKV{name}"
        for name in ("Get", "Put", "Exists")
    ),
    "ray::rpc::NodeInfoGcsService.grpc_client.GetAllNodeInfo",
    "ray::rpc::NodeResourceInfoGcsService.grpc_client.GetAllAvailableResources",
    "ray::rpc::NodeResourceInfoGcsService.grpc_client.GetDrainingNodes",
)
RATE = {"num_failures": -1, "req_failure_prob": 10, "resp_failure_prob": 10}


def test_a_lost_head(undisturbed, faults, tmp_path):
    """The same command, on another head, goes on with the same MLflow run."""
    jobs = Jobs(undisturbed.head, tmp_path)
    run = LocalStore(jobs.run_dir("moved"))
    with (
        ray_head(tmp_path, cpus=4, with_dashboard=False, **faults) as jobs.head,
        paced(jobs.head, "moved", 100),
    ):
        job = jobs.start("moved", *STEPS)
        jobs.wait_for_step("moved", 25)
        tracked = json.loads(run.read("tracking.json"))["run_id"]
        os.killpg(jobs.head.group, signal.SIGKILL)
        lost = time.time()
        job.wait(END_S)
        assert job.returncode != 0
        print(f"the job ended {time.time() - lost:.1f} s after its head")
    with ray_head(tmp_path, cpus=4, with_dashboard=False, **faults) as jobs.head:
        jobs.run("moved", *STEPS)
    assert jobs.summary("moved")["run_id"] == tracked
    assert len(numbers(run, "attempt")) == 2
    assert_little_lost(run)
    assert_same_end(run, undisturbed.rows("clip"))


def test_calls_that_fail(undisturbed, faults, tmp_path):
    """A fifth of Ray's own calls, while a run trains and loses a worker."""
    failing = {"RAY_testing_rpc_failure": json.dumps(dict.fromkeys(CALLS, RATE))}
    with ray_head(tmp_path, cpus=4, with_dashboard=False, **faults, **failing) as head:
        jobs = Jobs(head, tmp_path)
        run = LocalStore(jobs.run_dir("noisy"))
        with paced(head, "noisy", 100):
            job = jobs.start("noisy", *STEPS)
            jobs.wait_for_step("noisy", 25)
            workers(head)[0].kill()
            killed = time.time()
            wait_for(lambda: len(numbers(run, "attempt")) == 2, WAIT_S, "another group")
        jobs.finish(job)
        logs = Path(head.env["RAY_TMPDIR"]).glob("session_latest/logs/*")
        lines = [log.read_text(errors="replace") for log in logs if log.is_file()]
        injected = sum(text.count("Inject RPC") for text in lines)
    back = back_after(run, killed)
    print(f"{injected} calls failed; back after {back:.1f} s")
    assert injected >= 10
    assert_little_lost(run)
    assert_same_end(run, undisturbed.rows("clip"))
    assert back <= BACK_S
