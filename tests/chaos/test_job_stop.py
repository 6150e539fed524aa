"""`ray job stop` gives a job 3 s before it is killed, or as many as the head was told."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from clip_ray.storage import LocalStore
from clip_ray.train.checkpoint import Checkpoints
from clip_ray.train.journal import lineage
from clip_ray.train.verify import verify
from tests.chaos.conftest import STEPS
from tests.runtime.support import ROOT, Head, Jobs, ray_head, wait_for

pytestmark = [pytest.mark.ray, pytest.mark.chaos]
FLAGS = (*STEPS, "--train.steps", "1500")


def ray_job(head: Head, *arguments: str) -> str:
    found = subprocess.run(
        [str(Path(sys.executable).with_name("ray")), "job", *arguments],
        env={k: v for k, v in head.env.items() if k != "RAY_ADDRESS"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    return found.stdout


@pytest.mark.parametrize("given_s", [None, "60"])
def test_a_job_that_is_stopped_is_resumed_by_the_same_command(tmp_path, given_s):
    """With time, it commits and loses no step; without, it goes on from its last commit."""
    variables = {"RAY_JOB_STOP_WAIT_TIME_S": given_s} if given_s else {}
    with ray_head(tmp_path, cpus=6, **variables) as head:
        jobs = Jobs(head, tmp_path)
        where = ("--address", head.dashboard)
        command = [*jobs.command("job", *FLAGS), "--run.storage", str(jobs.storage)]
        submit = ("submit", *where, "--working-dir", str(ROOT / "jobs"))
        ray_job(head, *submit, "--no-wait", "--submission-id", "one", "--", *command)
        again = ray_job(head, *submit, "--no-wait", "--submission-id", "one", "--", *command)
        assert "already exists" in again  # submitting twice changes nothing
        jobs.wait_for_step("job", 40)
        ray_job(head, "stop", *where, "one")
        said = ray_job(head, "status", *where, "one")
        assert "STOPPED" in said.upper()
        log = ray_job(head, "logs", *where, "one")
        run = LocalStore(jobs.run_dir("job"))
        last = Checkpoints(run).commits()[-1].step
        reached = jobs.rows("job")[-1]["step"]
        if given_s:
            assert f"committed: step-{last:08d}.a1" in log and last == reached
            assert re.search(r"SIGTERM: committing, then stopping", log)
        # The lease of a killed job is taken over by the next.
        job = jobs.start("job", *FLAGS)
        wait_for(lambda: len(jobs.rows("job")) > reached, 120, "a step of the second job")
        job.terminate()
        jobs.finish(job, code=128 + 15)
        (_, second) = [e for e in jobs.rows("job", "events") if e["event"] == "attempt"]
        assert second["from_step"] == last and second["recomputes"] == reached - last
        assert reached - last <= 7 + 7  # the commit before may have been in the making
        assert verify(run).holds
        steps = [row["step"] for row in lineage(jobs.rows("job"))]
        assert steps == list(range(1, steps[-1] + 1))
        jobs.close()
