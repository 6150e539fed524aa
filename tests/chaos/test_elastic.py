"""Clusters that shrink and grow under a run: several raylets on this machine, really killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from clip_ray.storage import LocalStore
from tests.chaos.support import (
    BACK_S,
    DEATH_S,
    STEPS,
    WAIT_S,
    assert_little_lost,
    assert_same_end,
    back_after,
    detected_after,
    events,
    inject,
    numbers,
    paced,
    workers,
)
from tests.runtime.support import Head, ray_node, wait_for

pytestmark = [pytest.mark.ray, pytest.mark.chaos]
FLAGS = (*STEPS, "--cluster.cpus_per_worker", "2", "--tracking.register_model", "false")
FLAGS += ("--cluster.num_workers", "[1, 2]")


def test_a_run_shrinks_with_a_lost_node_and_grows_with_a_new_one(elastic, undisturbed, tmp_path):
    run = LocalStore(elastic.run_dir("grows"))
    with paced(elastic.head, "grows"):
        with ray_node(elastic.head, tmp_path, cpus=2) as node:
            job = elastic.start("grows", *FLAGS)
            elastic.wait_for_step("grows", 25)
            assert numbers(run, "world_size") == [2]
            os.killpg(node.pid, signal.SIGKILL)
            killed = time.time()
            wait_for(lambda: numbers(run, "world_size") == [2, 1], WAIT_S, "one worker")
            elastic.wait_for_step("grows", numbers(run, "from_step")[-1] + 1)
            inject(elastic.head, "grows", "pace", 2000)  # a node needs its time to come
        with ray_node(elastic.head, tmp_path, cpus=2):
            wait_for(lambda: numbers(run, "world_size") == [2, 1, 2], WAIT_S, "two workers")
            inject(elastic.head, "grows", "pace", 0)
            output = elastic.finish(job)
    found, back = detected_after(run, "attempt_failed", killed), back_after(run, killed)
    print(f"found after {found:.1f} s, back after {back:.1f} s")
    assert "there is room for 2 workers: committing" in output
    first, _, after_growth = numbers(run, "recomputes")
    assert first == after_growth == 0  # growing commits first
    assert_little_lost(run)
    assert_same_end(run, undisturbed.rows("clip"))
    assert found <= DEATH_S and back <= BACK_S


def test_a_node_that_is_to_be_taken_away_is_left_in_time(elastic, undisturbed, tmp_path):
    run, deadline_s = LocalStore(elastic.run_dir("leaves")), 30
    with paced(elastic.head, "leaves"), ray_node(elastic.head, tmp_path, cpus=2) as node:
        job = elastic.start("leaves", *FLAGS)
        elastic.wait_for_step("leaves", 15)
        drain(elastic.head, deadline_s)
        wait_for(lambda: committed_to_yield(run), deadline_s, "a commit before the deadline")
        os.killpg(node.pid, signal.SIGKILL)
        wait_for(lambda: numbers(run, "world_size") == [2, 1], WAIT_S, "one worker")
    output = elastic.finish(job)
    assert "is to be taken away: committing" in output
    assert numbers(run, "world_size") == [2, 1]
    assert numbers(run, "recomputes") == [0, 0]
    assert_same_end(run, undisturbed.rows("clip"))


def committed_to_yield(run: LocalStore) -> bool:
    """Tell whether a commit was made after the run had decided to leave a node."""
    decided = [event["time"] for event in events(run, "yield")]
    return bool(decided) and any(c["time"] >= decided[0] for c in events(run, "commit"))


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


def test_a_rank_that_is_stopped_is_found_ended_and_named(jobs, undisturbed):
    """The second of two: the first waits for it, and is not the one that is blamed."""
    run = LocalStore(jobs.run_dir("still"))
    with paced(jobs.head, "still"):
        job = jobs.start("still", *STEPS)
        jobs.wait_for_step("still", 25)
        (first,) = numbers(run, "pid")
        (second,) = (p for p in workers(jobs.head) if p.pid != first)
        second.suspend()
        stopped = time.time()
        wait_for(lambda: len(numbers(run, "pid")) == 2, WAIT_S, "another group of workers")
    output = jobs.finish(job)
    (hang,) = events(run, "hang")
    steps = sorted(row["step_s"] for row in jobs.rows("still") if row["time"] < stopped)
    found, back = hang["time"] - stopped, back_after(run, stopped)
    print(f"found after {found:.1f} s, back after {back:.1f} s: {hang['why']}; {hang['ended']}")
    assert (hang["rank"], hang["pid"]) == (1, second.pid) and "T (stopped)" in hang["ended"]
    assert f"rank 1 (process {second.pid} on {hang['host']}) hangs: not heard of" in output
    assert '"TrainingThread(' in hang["stack"] and "; it was in " in output
    assert_little_lost(run)
    assert_same_end(run, undisturbed.rows("clip"))
    assert found <= max(DEATH_S, 5 * steps[len(steps) // 2]) and back <= BACK_S
