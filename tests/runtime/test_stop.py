"""jobs/stop.py against a real job: a commit, an end, and nothing that is obeyed later."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import mlflow
import pytest

from clip_ray.storage import open_store
from clip_ray.train.checkpoint import Checkpoints
from clip_ray.train.journal import last_row
from tests.runtime.support import ROOT, wait_for

pytestmark = pytest.mark.ray
# Only what is asked for is committed; the end is out of reach.
LONG = ("--train.steps", "5000", "--checkpoint.every_steps", "5000")


def stop(head, run: str, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "jobs/stop.py"), run, *flags],
        env=head.env,
        capture_output=True,
        text=True,
        timeout=180,
    )


def commits(run_dir: Path) -> list[str]:
    return sorted(path.name for path in run_dir.glob("checkpoints/step-*"))


def leave_a_request(run_dir: Path) -> None:
    (run_dir / "requests").mkdir(parents=True)
    old = {"id": "old", "wish": "stop", "by": "mallory", "lease": "of an earlier job"}
    (run_dir / "requests/old.json").write_text(json.dumps(old))


def test_a_job_commits_and_ends_as_asked(head, jobs):
    run_dir = jobs.run_dir("asked")
    leave_a_request(run_dir)
    job = jobs.start("asked", *LONG)
    jobs.wait_for_step("asked", 3)
    assert not (run_dir / "requests/old.json").exists()

    done = stop(head, str(run_dir))
    assert done.returncode == 0, done.stdout + done.stderr
    output = jobs.finish(job, code=0)
    last = jobs.rows("asked")[-1]["step"]
    assert f"the job has ended as asked; last commit: step-{last:08d}.a1" in done.stdout
    assert f"committed: step-{last:08d}.a1" in output and "to resume: " in output
    (asker,) = {e["by"] for e in jobs.rows("asked", "events") if e["event"] == "asked"}
    assert f"! asked by {asker}: committing, then stopping" in output
    assert "mallory" not in output and list((run_dir / "requests").iterdir()) == []
    (run,) = mlflow.MlflowClient(f"sqlite:///{jobs.storage}/mlflow.db").search_runs(["1"])
    assert run.info.status == "KILLED" and 0 < run.data.metrics["ettr"] <= 1

    done = stop(head, str(run_dir), "--timeout", "3600")
    assert done.returncode == 1
    assert done.stdout.startswith(f"not running; last commit: step-{last:08d}.a1")


@pytest.mark.slow
def test_commits_on_request_and_the_command_to_resume(head, jobs):
    run_dir = jobs.run_dir("asked")
    job = jobs.start("asked", *LONG)
    jobs.wait_for_step("asked", 3)
    # Two in a row are two commits: the ranks have heard in between that the first was done.
    for count in (1, 2):
        done = stop(head, str(run_dir), "--commit")
        assert done.returncode == 0, done.stdout + done.stderr
        assert len(commits(run_dir)) == count
        assert f"committed {commits(run_dir)[-1]}" in done.stdout
    reached = jobs.rows("asked")[-1]["step"]
    jobs.wait_for_step("asked", reached + 3)  # it goes on, without committing again and again
    assert len(commits(run_dir)) == 2 and job.poll() is None
    assert stop(head, str(run_dir)).returncode == 0
    jobs.finish(job, code=0)
    last = jobs.rows("asked")[-1]["step"]

    words = stop(head, str(run_dir)).stdout.split(", or ")[1].split()
    assert words[:2] == ["python", "jobs/pretrain.py"]
    command = [sys.executable, str(ROOT / words[1]), *words[2:]]
    again = subprocess.Popen(
        command, cwd=jobs.directory, env=head.env, stdout=subprocess.PIPE, text=True
    )
    jobs._running.append(again)
    jobs.wait_for_step("asked", last + 1)
    assert stop(head, str(run_dir)).returncode == 0
    jobs.finish(again, code=0)
    starts = [e["from_step"] for e in jobs.rows("asked", "events") if e["event"] == "attempt"]
    assert starts == [0, last]


@pytest.mark.slow
def test_a_job_that_starts_ends_before_it_trains(head, jobs):
    run_dir = jobs.run_dir("early")
    job = jobs.start("early", *LONG)
    wait_for((run_dir / "config.yaml").exists, 120, "a job that has the run")
    done = stop(head, str(run_dir))
    assert done.returncode == 0, done.stdout + done.stderr
    output = jobs.finish(job, code=0)
    assert "the job has ended as asked; nothing is committed yet" in done.stdout
    assert "stopped at step 0" in output and jobs.rows("early") == []


@pytest.mark.slow
def test_the_same_through_s3(head, jobs, s3, tmp_path):
    storage = f"s3://bucket/{tmp_path.name}"
    store = open_store(f"{storage}/asked", s3)
    flags = (*LONG, "--run.storage", storage, "--run.s3.endpoint", s3.endpoint)
    job = jobs.start("asked", *flags, "--tracking.uri", f"sqlite:///{tmp_path}/mlflow.db")
    wait_for(lambda: store.exists("attempts/00001.json"), 120, "an attempt")
    for wish in (["--commit"], []):
        done = stop(head, store.uri, *wish, "--endpoint", s3.endpoint)
        assert done.returncode == 0, done.stdout + done.stderr
    output = jobs.finish(job, code=0)
    assert "asks for a commit" in output and "asked by" in output
    newest = Checkpoints(store).commits()[-1]
    assert len(Checkpoints(store).commits()) == 2
    assert f"last commit: {newest.name}" in done.stdout
    assert last_row(store, "metrics")["step"] == newest.step
