"""One fault after the other in one run, of all kinds, and no hand that helps."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import mlflow
import psutil
import pytest

from clip_ray.storage import LocalStore
from clip_ray.train.journal import lineage, read_journal
from tests.chaos.bare import bare_rows
from tests.chaos.support import assert_same_end, events, fill_disk, paced, processes, small_disk
from tests.runtime.support import Jobs, wait_for
from tests.s3_proxy import Faults, Proxy

pytestmark = [pytest.mark.ray, pytest.mark.chaos]
STEPS, EVERY = 400, 10
STEPS_S = 240
BETWEEN = 2 * EVERY + 5  # steps from one fault to the next: a commit is among them


@dataclass
class Soak:
    """A run and all that can be done to it; each fault takes care that it has happened."""

    jobs: Jobs
    disk: Path
    mlflow: Proxy
    flags: tuple[str, ...]
    dice: random.Random
    job: subprocess.Popen[str]

    @property
    def run(self) -> LocalStore:
        return LocalStore(self.disk / "runs" / "soak")

    def rows(self) -> int:
        return len(list(read_journal(self.run, "metrics")))

    def one(self, title: str) -> psutil.Process:
        wait_for(lambda: processes(self.jobs.head, title), STEPS_S, title)
        return self.dice.choice(processes(self.jobs.head, title))

    def again(self) -> None:
        """Give the same command again, as any supervisor would."""
        self.job = self.jobs.start("soak", *self.flags)

    def kill_worker(self) -> None:
        self.one("ray::RayTrainWorker").kill()

    def stop_worker(self) -> None:
        self.one("ray::RayTrainWorker").suspend()

    def kill_recorder(self) -> None:
        self.one("ray::Recorder").kill()

    def kill_stream(self) -> None:
        self.one("ray::SplitCoordinator").kill()

    def kill_controller(self) -> None:
        self.one("ray::TrainController").kill()

    def kill_job(self) -> None:
        os.killpg(self.job.pid, signal.SIGKILL)
        self.job.wait(20)
        self.again()

    def ask_job_to_stop(self) -> None:
        self.job.send_signal(signal.SIGTERM)
        self.jobs.finish(self.job, code=128 + signal.SIGTERM)
        self.again()

    def fill_disk(self) -> None:
        before, filler = len(events(self.run, "commit_failed")), self.disk / "filler"

        def one_more() -> bool:
            fill_disk(filler)
            return len(events(self.run, "commit_failed")) > before

        wait_for(one_more, STEPS_S, "a commit that fails")
        filler.unlink()

    def silence_mlflow(self) -> None:
        self.mlflow.begin(Faults(hang=1))
        wait_for(lambda: self.mlflow.counts["hang"], 60, "a request that is not answered")
        here = self.rows()
        wait_for(lambda: self.rows() > here + BETWEEN, STEPS_S, "steps without MLflow")
        self.mlflow.begin()


INSIDE: tuple[Callable[[Soak], None], ...] = (
    Soak.kill_worker,
    Soak.stop_worker,
    Soak.kill_recorder,
    Soak.kill_stream,
    Soak.kill_controller,
)
OUTSIDE = (Soak.kill_job, Soak.ask_job_to_stop, Soak.fill_disk, Soak.silence_mlflow)


def test_a_soak_of_eleven_faults(jobs, tracking, tmp_path):
    """Nine kinds, each at least once, in an order by seed."""
    dice = random.Random(6)
    faults = [*INSIDE, *OUTSIDE, *dice.choices(INSIDE, k=2)]
    dice.shuffle(faults)
    proxy, database = tracking
    with small_disk(tmp_path / "disk") as disk:
        flags = ("--train.steps", str(STEPS), "--checkpoint.every_steps", str(EVERY))
        flags += ("--cluster.max_fruitless_attempts", "5", "--run.storage", str(disk / "runs"))
        flags += ("--tracking.uri", proxy.endpoint, "--tracking.register_model", "false")
        soak = Soak(jobs, disk, proxy, flags, dice, jobs.start("soak", *flags))
        begun = time.time()
        with paced(jobs.head, "soak", 50):
            for fault in faults:
                here, name = soak.rows(), fault.__name__
                wait_for(
                    lambda here=here: soak.rows() > here + BETWEEN, STEPS_S, f"steps to {name}"
                )
                assert soak.job.poll() is None, "the run has ended before its faults"
                fault(soak)
        jobs.finish(soak.job)
        run = soak.run
        summary = json.loads(run.read("summary.json"))
        print(
            f"{[fault.__name__ for fault in faults]}: {time.time() - begun:.0f} s, "
            f"{summary['attempts']} attempts, {summary['recomputed_steps']} steps computed again, "
            f"ETTR {summary['ettr']:.2f}; {summary['recoveries']}"
        )
        assert len(faults) >= 10 and summary["attempts"] >= 6
        assert_same_end(run, bare_rows(run))
        rows = lineage(read_journal(run, "metrics"))
        points = mlflow.MlflowClient(database).get_metric_history(summary["run_id"], "loss")
    # All the points that MLflow was away for, too.
    assert {p.step: p.value for p in points} == {row["step"]: row["loss"] for row in rows}
