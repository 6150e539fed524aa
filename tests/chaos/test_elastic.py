"""Clusters that shrink and grow under a run: several raylets on this machine, really killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from clip_ray.storage import LocalStore
from clip_ray.train.journal import lineage
from clip_ray.train.verify import verify
from tests.runtime.support import Head, Jobs, ray_head, ray_node, wait_for

pytestmark = [pytest.mark.ray, pytest.mark.chaos]
# A quarter of a second a step: the cluster changes while the run goes on.
FLAGS = ("--train.steps", "240", "--train.global_batch", "256", "--checkpoint.every_steps", "10")
# sqlite is refused on several nodes; an MLflow that is not there costs nothing.
FLAGS += ("--cluster.cpus_per_worker", "2", "--tracking.uri", "http://127.0.0.1:1")
SHRINK_S = 60


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Iterator[Jobs]:
    """The same run on one worker, which nothing happened to."""
    folder = tmp_path_factory.mktemp("reference")
    with ray_head(folder, cpus=4) as head:
        jobs = Jobs(head, folder)
        jobs.run("clip", *FLAGS, "--cluster.num_workers", "1")
        yield jobs


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Head]:
    with ray_head(tmp_path, cpus=3) as head:
        yield head


@pytest.fixture
def jobs(cluster: Head, tmp_path: Path) -> Iterator[Jobs]:
    made = Jobs(cluster, tmp_path)
    yield made
    made.close()


def attempts(jobs: Jobs, name: str) -> list[int]:
    """One number of each attempt so far."""
    return [e[name] for e in jobs.rows("elastic", "events") if e["event"] == "attempt"]


def assert_same_run(jobs: Jobs, reference: Jobs) -> None:
    proof = verify(LocalStore(jobs.run_dir("elastic")))
    assert proof.holds, proof.as_text()
    expected, found = reference.rows("clip"), lineage(jobs.rows("elastic"))
    assert [r["samples_digest"] for r in found] == [r["samples_digest"] for r in expected]
    assert found[-1]["loss"] == pytest.approx(expected[-1]["loss"], rel=1e-4)


def test_a_run_shrinks_with_a_lost_node_and_grows_with_a_new_one(jobs, reference, tmp_path):
    flags = (*FLAGS, "--cluster.num_workers", "[1, 2]")
    with ray_node(jobs.head, tmp_path, cpus=2) as node:
        job = jobs.start("elastic", *flags)
        jobs.wait_for_step("elastic", 25)
        assert attempts(jobs, "world_size") == [2]
        os.killpg(node.pid, signal.SIGKILL)
        killed = time.monotonic()
        reached = jobs.rows("elastic")[-1]["step"]
        wait_for(lambda: attempts(jobs, "world_size") == [2, 1], SHRINK_S, "a group of one worker")
        jobs.wait_for_step("elastic", reached + 1)
        print(f"back after {time.monotonic() - killed:.0f} s")
        assert time.monotonic() - killed < SHRINK_S
    with ray_node(jobs.head, tmp_path, cpus=2):
        wait_for(
            lambda: attempts(jobs, "world_size") == [2, 1, 2], SHRINK_S, "a group of two workers"
        )
        output = jobs.finish(job)
    assert "there is room for 2 workers: committing" in output
    # The commit before the loss may still have been in the making; growing commits first.
    first, shrunk, grown = attempts(jobs, "recomputes")
    assert first == grown == 0 and shrunk <= 10 + 2
    assert_same_run(jobs, reference)


def test_a_node_that_is_to_be_taken_away_is_left_in_time(jobs, reference, tmp_path):
    flags = (*FLAGS, "--cluster.num_workers", "[1, 2]")
    with ray_node(jobs.head, tmp_path, cpus=2) as node:
        job = jobs.start("elastic", *flags)
        jobs.wait_for_step("elastic", 15)
        drain(jobs.head, deadline_s=25)
        time.sleep(25)
        os.killpg(node.pid, signal.SIGKILL)
        output = jobs.finish(job)
    assert "is to be taken away: committing" in output
    assert attempts(jobs, "world_size") == [2, 1]
    assert attempts(jobs, "recomputes") == [0, 0]
    assert_same_run(jobs, reference)


def drain(head: Head, deadline_s: int) -> None:
    """Announce that the node that is not the head will be taken away."""
    script = (
        "import json, ray; ray.init(logging_level='ERROR'); print(json.dumps([n['NodeID'] for n in "
        "ray.nodes() if n['Alive'] and 'node:__internal_head__' not in n['Resources']]))"
    )
    found = subprocess.run(
        [sys.executable, "-c", script], env=head.env, capture_output=True, text=True, check=True
    )
    (node,) = json.loads(found.stdout.splitlines()[-1])
    ray = str(Path(sys.executable).with_name("ray"))
    subprocess.run(
        [
            *(ray, "drain-node", "--address", head.address, "--node-id", node),
            *("--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"),
            *("--deadline-remaining-seconds", str(deadline_s)),
        ],
        env=head.env,
        check=True,
    )


def test_a_rank_that_is_stopped_is_found_ended_and_named(jobs, reference):
    import psutil

    flags = (*FLAGS, "--cluster.num_workers", "1")
    job = jobs.start("elastic", *flags)
    jobs.wait_for_step("elastic", 25)
    (attempt,) = [e for e in jobs.rows("elastic", "events") if e["event"] == "attempt"]
    stopped = time.time()
    psutil.Process(attempt["pid"]).suspend()
    output = jobs.finish(job)
    (hang,) = [e for e in jobs.rows("elastic", "events") if e["event"] == "hang"]
    print(f"found after {hang['time'] - stopped:.1f} s: {hang['why']}; {hang['ended']}")
    assert (hang["rank"], hang["pid"]) == (0, attempt["pid"]) and "T (stopped)" in hang["ended"]
    assert f"rank 0 (process {attempt['pid']} on {hang['host']}) hangs: not heard of" in output
    back = next(row["time"] for row in jobs.rows("elastic") if row["attempt"] == 2)
    assert back - stopped < 60
    assert_same_run(jobs, reference)
