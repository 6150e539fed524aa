"""Ranks that are thought dead and are not: stopped in a commit, or cut off from the others."""

from __future__ import annotations

import time
from pathlib import Path

import psutil
import pytest

from clip_ray.storage import LocalStore
from clip_ray.train.checkpoint import Checkpoints
from tests.chaos.network import network
from tests.chaos.support import (
    BACK_S,
    DEATH_S,
    STEPS,
    WAIT_S,
    assert_same_end,
    back_after,
    events,
    inject,
    injected,
    numbers,
    paced,
    wait_for_end,
)
from tests.runtime.support import Jobs, ray_head, ray_node, wait_for

pytestmark = [pytest.mark.ray, pytest.mark.chaos]
FLAGS = (*STEPS, "--cluster.cpus_per_worker", "2", "--tracking.register_model", "false")
# A node that says nothing is declared dead by Ray after these; its defaults take over a minute.
SILENCE = {
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "5",
}


def everything(process: psutil.Process) -> list[psutil.Process]:
    return [process, *process.children(recursive=True)]


def test_a_rank_that_wakes_up_in_the_middle_of_a_commit(undisturbed, several_nodes, tmp_path):
    """Its whole node stops before COMMIT is created, and goes on when another has taken over."""
    with (
        ray_head(tmp_path, cpus=1, with_dashboard=False, **several_nodes, **SILENCE) as head,
        ray_node(head, tmp_path, cpus=2) as one,
        ray_node(head, tmp_path, cpus=2) as other,
    ):
        jobs = Jobs(head, tmp_path)
        run = LocalStore(jobs.run_dir("zombie"))
        inject(head, "zombie", "pause-before-commit", 21)
        with paced(head, "zombie"):
            job = jobs.start("zombie", *FLAGS, "--cluster.num_workers", "1")
            paused = injected(head, "zombie", "paused")
            wait_for(paused.exists, 200, "a commit in the making")
            zombie = psutil.Process(int(paused.read_text()))
            nodes = {one.pid, other.pid} & {parent.pid for parent in zombie.parents()}
            stopped = everything(psutil.Process(nodes.pop()))
            for process in stopped:
                process.suspend()
            since = time.time()
            wait_for(lambda: len(numbers(run, "pid")) == 2, WAIT_S, "another worker")
            wait_for(lambda: len(commits_of(run, 2)) >= 2, WAIT_S, "its commits")
            injected(head, "zombie", "go").touch()
            for process in stopped:
                process.resume()
            wait_for_end(zombie.pid, WAIT_S)
            assert job.poll() is None
            assert 21 not in commits_of(run, 1)
        jobs.finish(job)
        (hang,) = events(run, "hang")
        found, back = hang["time"] - since, back_after(run, since)
        print(f"found after {found:.1f} s, back after {back:.1f} s: {hang['ended']}")
        assert (hang["rank"], hang["pid"]) == (0, zombie.pid)
        assert numbers(run, "from_step") == [0, 14]
        assert_same_end(run, undisturbed.rows("clip"))
        assert found <= DEATH_S and back <= BACK_S


def commits_of(run: LocalStore, attempt: int) -> list[int]:
    return [commit.step for commit in Checkpoints(run).commits() if commit.attempt == attempt]


def test_a_node_that_is_cut_off_and_comes_back(undisturbed, several_nodes, tmp_path):
    """The run goes on without it. It still reaches the storage, and changes nothing there."""
    with network() as net:
        variables = {**several_nodes, **SILENCE, "GLOO_SOCKET_IFNAME": net.interface}
        with (
            ray_head(tmp_path, cpus=3, host=net.here, with_dashboard=False, **variables) as head,
            ray_node(head, tmp_path, cpus=2, host=net.there, namespace=net.namespace) as node,
        ):
            jobs = Jobs(head, tmp_path)
            run = LocalStore(jobs.run_dir("apart"))
            # Both ranks write of each commit.
            flags = (*FLAGS, "--cluster.num_workers", "[1, 2]", "--checkpoint.writers", "2")
            with paced(head, "apart"):
                job = jobs.start("apart", *flags)
                jobs.wait_for_step("apart", 25)
                assert numbers(run, "world_size") == [2]
                cut_off = everything(psutil.Process(node.pid))
                net.cut()
                since = time.time()
                wait_for(lambda: numbers(run, "world_size") == [2, 1], WAIT_S, "one worker")
                jobs.wait_for_step("apart", numbers(run, "from_step")[-1] + 1)
                before = files_of(run, 1)
                net.mend()
                for process in cut_off:
                    wait_for_end(process.pid, WAIT_S)
                assert job.poll() is None
                assert files_of(run, 1) <= before
            jobs.finish(job)
        found, back = events(run, "hang")[0]["time"] - since, back_after(run, since)
        print(f"found after {found:.1f} s, back after {back:.1f} s: {events(run, 'hang')}")
        assert numbers(run, "world_size") == [2, 1]
        assert_same_end(run, undisturbed.rows("clip"))
        assert found <= DEATH_S and back <= BACK_S


def files_of(run: LocalStore, attempt: int) -> set[Path]:
    """Return what is there of an attempt's commits."""
    return set(run.root.glob(f"checkpoints/*.a{attempt}/**/*"))
