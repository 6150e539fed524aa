"""The job from outside: real processes on a real Ray head, killed, stopped, resumed, refused."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
from pathlib import Path

import mlflow
import numpy as np
import psutil
import pytest
import safetensors.numpy
import simplejpeg

from clip_ray.storage import LocalStore, open_store
from clip_ray.train.checkpoint import Checkpoints
from clip_ray.train.journal import lineage, read_journal
from clip_ray.train.verify import verify
from tests.runtime.support import HOST, ROOT, Jobs, wait_for

pytestmark = pytest.mark.ray
# A window has 4 steps: commits fall inside windows too. Those of steps 21 and 42 are kept.
SLOW_STEPS = ("--train.steps", "60", "--checkpoint.every_steps", "7")
SLOW_STEPS += ("--checkpoint.keep_every", "21")


def series(run_dir: Path, run_id: str, name: str = "loss") -> list[tuple[int, float]]:
    client = mlflow.MlflowClient(f"sqlite:///{run_dir.parent}/mlflow.db")
    return [(m.step, m.value) for m in client.get_metric_history(run_id, name)]


def weights_after_21_steps(run_dir: Path) -> np.ndarray:
    checkpoint = run_dir / "checkpoints" / "step-00000021.a1"
    tensors = safetensors.numpy.load_file(checkpoint / "model.safetensors")
    return np.concatenate([tensors[k].ravel().astype(np.float64) for k in sorted(tensors)])


def relative(a, b) -> float:
    return max(abs(x - y) / abs(y) for x, y in zip(a, b, strict=True))


@pytest.fixture(scope="module")
def undisturbed(head, tmp_path_factory):
    """A run of 60 steps that nothing happened to."""
    jobs = Jobs(head, tmp_path_factory.mktemp("undisturbed"))
    jobs.run("clip", *SLOW_STEPS)
    return jobs


def assert_same_end(jobs, name: str, undisturbed) -> None:
    """The run saw the same samples, each once a pass, and reached the same loss."""
    proof = verify(LocalStore(jobs.run_dir(name)))
    assert proof.holds, proof.as_text()
    assert min(proof.passes) >= 1
    expected = undisturbed.rows("clip")
    found = lineage(jobs.rows(name))
    assert [r["samples_digest"] for r in found] == [r["samples_digest"] for r in expected]
    assert found[-1]["loss"] == pytest.approx(expected[-1]["loss"], rel=1e-4)


def test_a_run_leaves_what_the_design_promises(undisturbed):
    run = undisturbed.run_dir("clip")
    summary = undisturbed.summary("clip")
    assert summary["steps"] == 60 and summary["samples"] == 60 * 32
    assert {p.name for p in (run / "export").iterdir()} == {
        "config.json",
        "model.safetensors",
        "preprocessing.json",
        "tokenizer.json",
    }
    rows = undisturbed.rows("clip")
    assert [row["step"] for row in rows] == list(range(1, 61))
    phases = ("copy", "forward", "loss", "backward", "optimizer", "checkpoint")
    named = sum(row["data_wait"] + sum(row[f"time_{p}"] for p in phases) for row in rows)
    assert 0.9 * sum(row["step_s"] for row in rows) < named <= sum(row["step_s"] for row in rows)
    assert rows[-1]["loss"] < 0.9 * rows[0]["loss"]
    kept = sorted(p.name for p in (run / "checkpoints").iterdir())
    assert kept == [
        "step-00000021.a1",
        "step-00000042.a1",
        "step-00000049.a1",
        "step-00000056.a1",
        "step-00000060.a1",
    ]


def test_mlflow_has_what_the_journal_has(undisturbed):
    run, summary = undisturbed.run_dir("clip"), undisturbed.summary("clip")
    expected = [(row["step"], row["loss"]) for row in undisturbed.rows("clip")]
    assert series(run, summary["run_id"]) == expected
    client = mlflow.MlflowClient(f"sqlite:///{run.parent}/mlflow.db")
    record = client.get_run(summary["run_id"])
    assert record.info.status == "FINISHED"
    assert record.data.params["train.global_batch"] == "32"
    assert record.data.tags["clip_ray.source.origin"] in ("git", "BUILD", "digest")
    assert record.data.tags["clip_ray.manifest_digest"] == summary["manifest_digest"]
    assert record.data.tags["checkpoint.step"] == "60"
    figures = {a.path for a in client.list_artifacts(summary["run_id"], "figures")}
    assert figures == {"figures/loss.png"}
    version = client.get_model_version("clip", summary["model_version"])
    assert version.tags["digest"] == summary["digest"]


def assert_same_curve(jobs, name: str, undisturbed) -> None:
    """20 steps of one loss curve, and the same weights after them."""
    assert relative(jobs.losses(name)[:20], undisturbed.losses("clip")[:20]) <= 1e-4
    expected = weights_after_21_steps(undisturbed.run_dir("clip"))
    difference = weights_after_21_steps(jobs.run_dir(name)) - expected
    assert np.linalg.norm(difference) <= 1e-5 * np.linalg.norm(expected)


# The undisturbed run has two workers, and one micro-batch; the run with a killed worker has three,
# and two micro-batches.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("workers", "micro_batch"),
    [(1, 32), (1, 16), (1, 8), (2, 8), (2, 4), (3, 11), (3, 3), (4, 8), (4, 4), (4, 2)],
)
def test_any_number_of_workers_gives_the_same_curve(jobs, undisturbed, workers, micro_batch):
    """1 to 4 workers, with one micro-batch, with two and with four."""
    flags = ("--cluster.num_workers", str(workers), "--train.micro_batch", str(micro_batch))
    jobs.run("other", *SLOW_STEPS, *flags)
    assert_same_curve(jobs, "other", undisturbed)
    assert {row["world_size"] for row in jobs.rows("other")} == {workers}


@pytest.mark.slow
def test_a_slightly_other_run_is_told_apart(jobs, undisturbed):
    """Another learning rate by a thousandth leaves the bounds of the tests above."""
    jobs.run("other", *SLOW_STEPS, "--optim.lr", "1.001e-3")
    with pytest.raises(AssertionError):
        assert_same_curve(jobs, "other", undisturbed)


@pytest.fixture(scope="module")
def tuned(head, tmp_path_factory, undisturbed):
    """A run with options of the step, from given weights, whose MLflow does not answer."""
    jobs = Jobs(head, tmp_path_factory.mktemp("tuned"))
    flags = ("--train.loss", "siglip", "--model.init_logit_bias", "-10")
    flags += ("--train.mask_duplicates", "true", "--init.freeze", "[image]")
    flags += ("--init.weights", str(undisturbed.run_dir("clip") / "export"))
    flags += ("--train.micro_batch", "8", "--train.grad_checkpointing", "true")
    flags += ("--train.steps", "6")
    with socket.socket() as refused:
        refused.bind((HOST, 0))  # bound and not listening: connections are refused
        uri = f"http://{HOST}:{refused.getsockname()[1]}"
        output = jobs.run("tuned", *flags, "--tracking.uri", uri)
    return jobs, flags, output


def test_options_of_the_step_through_ray(tuned, undisturbed):
    """A sigmoid loss from given weights, a locked tower, duplicates masked: two workers."""
    jobs, _, output = tuned
    export = undisturbed.run_dir("clip") / "export"
    assert f"beginning from {export}" in output
    (begun,) = [e for e in jobs.rows("tuned", "events") if e["event"] == "initial_weights"]
    assert begun["digest"] == undisturbed.summary("clip")["digest"]
    before, after = (
        safetensors.numpy.load_file(folder / "model.safetensors")
        for folder in (export, jobs.run_dir("tuned") / "export")
    )
    assert after.keys() - before.keys() == {"logit_bias"}
    same = {name for name in before if np.array_equal(before[name], after[name])}
    assert same == {name for name in before if name.startswith("visual.")}


def test_mlflow_may_be_down(tuned):
    jobs, flags, output = tuned
    assert "MLflow does not answer" in output
    assert jobs.summary("tuned")["steps"] == 6
    # The same run, pointed at an MLflow that works, hands over everything.
    jobs.run("tuned", *flags, "--tracking.uri", f"sqlite:///{jobs.storage}/mlflow.db")
    run_id = json.loads((jobs.run_dir("tuned") / "tracking.json").read_text())["run_id"]
    expected = [(row["step"], row["loss"]) for row in jobs.rows("tuned")]
    assert series(jobs.run_dir("tuned"), run_id) == expected


@pytest.mark.slow
def test_weights_that_a_run_began_from_are_not_needed_again(jobs, undisturbed):
    export = jobs.directory / "given"
    shutil.copytree(undisturbed.run_dir("clip") / "export", export)
    flags = ("--init.weights", str(export), "--train.steps", "6")
    jobs.run("tuned", *flags)
    shutil.rmtree(export)
    jobs.run("tuned", *flags, "--run.extend", "3")
    begun = [e for e in jobs.rows("tuned", "events") if e["event"] == "initial_weights"]
    assert len(begun) == 1
    assert [row["step"] for row in jobs.rows("tuned")] == list(range(1, 10))


def test_a_killed_worker_costs_nothing_but_time(jobs, undisturbed):
    """With three workers: of 32 rows each has 11, filled up with void ones to two times six."""
    flags = ("--cluster.num_workers", "3", "--train.micro_batch", "6")
    job = jobs.start("killed", *SLOW_STEPS, *flags)
    jobs.wait_for_step("killed", 10)
    actor(jobs.head, "ray::Recorder").kill()  # its rows are sent again
    jobs.wait_for_step("killed", 24)
    actor(jobs.head, "ray::RayTrainWorker").kill()
    output = jobs.finish(job)
    assert "attempt 2 goes on from step-000000" in output
    assert_same_end(jobs, "killed", undisturbed)
    assert_same_curve(jobs, "killed", undisturbed)
    assert {row["world_size"] for row in jobs.rows("killed")} == {3}
    attempts = [e for e in jobs.rows("killed", "events") if e["event"] == "attempt"]
    assert len(attempts) == 2 and attempts[0]["pid"] != attempts[1]["pid"]
    assert attempts[1]["from_step"] >= 21
    recomputed = jobs.summary("killed")["recomputed_steps"]
    reached = max(row["step"] for row in jobs.rows("killed") if row["attempt"] == 1)
    # None, where the kill happened to come right after a commit.
    assert recomputed == len(jobs.rows("killed")) - 60 == reached - attempts[1]["from_step"]
    assert attempts[1]["recomputes"] == recomputed


def actor(head, title: str) -> psutil.Process:
    """Return the process of an actor on this head."""
    for process in psutil.process_iter(["cmdline"]):
        if title in " ".join(process.info["cmdline"] or []):
            parents = [" ".join(parent.cmdline()) for parent in process.parents()]
            if any(head.env["RAY_TMPDIR"] in line for line in parents):
                return process
    raise AssertionError(f"no process {title}")


def test_a_killed_job_is_resumed_by_the_same_command(jobs, undisturbed):
    job = jobs.start("again", *SLOW_STEPS, "--checkpoint.writers", "2")
    lease = jobs.run_dir("again") / "lease"
    wait_for(lambda: lease.is_dir() and any(lease.glob("*.json")), 60, "the lease")
    refused = jobs.run("again", *SLOW_STEPS, code=2)  # a second live writer
    assert f"is being written by process {job.pid} on {socket.gethostname()}" in refused
    jobs.wait_for_step("again", 29)
    os.killpg(job.pid, signal.SIGKILL)
    job.wait(20)
    before = json.loads((jobs.run_dir("again") / "tracking.json").read_text())["run_id"]
    assert list(jobs.run_dir("again").glob("checkpoints/*/model-00002-of-00002.safetensors"))
    # Nothing but the name and the run-defining settings has to stay: here one worker goes on,
    # from a commit that two have written.
    output = jobs.run("again", *SLOW_STEPS, "--cluster.num_workers", "1")
    start = int(re.search(r"from step (\d+)", output)[1])
    assert start >= 21 and start % 7 == 0
    assert_same_end(jobs, "again", undisturbed)
    assert jobs.summary("again")["run_id"] == before
    expected = [(row["step"], row["loss"]) for row in undisturbed.rows("clip")]
    found = series(jobs.run_dir("again"), before)
    assert [step for step, _ in found] == [step for step, _ in expected]
    assert relative([v for _, v in found], [v for _, v in expected]) <= 1e-4


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("number", "resumes"),
    [(signal.SIGTERM, False), slow(signal.SIGTERM, True), slow(signal.SIGINT, False)],
)
def test_a_signal_commits_and_ends(jobs, undisturbed, number, resumes):
    job = jobs.start("stopped", *SLOW_STEPS)
    jobs.wait_for_step("stopped", 19)
    if number == signal.SIGINT:
        os.killpg(job.pid, number)  # as a terminal does
    else:
        job.send_signal(number)
    output = jobs.finish(job, code=128 + number)
    last = jobs.rows("stopped")[-1]["step"]
    assert last < 60
    assert f"committed: step-{last:08d}.a1" in output
    assert jobs.rows("stopped")[-1]["step"] == last
    if resumes:
        jobs.run("stopped", *SLOW_STEPS)
        assert len(jobs.rows("stopped")) == 60  # nothing was computed twice
        assert_same_end(jobs, "stopped", undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("asked", [False, True])
def test_an_end_during_the_evaluation_costs_nothing(jobs, asked):
    """By a signal, or by jobs/stop.py."""
    flags = ("--train.steps", "8", "--eval.datasets", "[bundled:starter]")
    job = jobs.start("stopped", *flags)
    wait_for((jobs.run_dir("stopped") / "export" / "preprocessing.json").exists, 120, "an export")
    if asked:
        stop = [sys.executable, str(ROOT / "jobs/stop.py"), str(jobs.run_dir("stopped"))]
        done = subprocess.run(stop, env=jobs.head.env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0 and "the job has ended as asked" in done.stdout
    else:
        job.send_signal(signal.SIGTERM)
    output = jobs.finish(job, code=0 if asked else 128 + signal.SIGTERM)
    why = r"asked by \S+" if asked else "SIGTERM"
    go_on = r": stopped; last commit: step-00000008\.a1\nto go on: python"
    assert re.search(why + go_on, output), output
    told = [e["wish"] for e in jobs.rows("stopped", "events") if e["event"] == "asked"]
    assert told == (["stop"] if asked else [])
    client = mlflow.MlflowClient(f"sqlite:///{jobs.storage}/mlflow.db")
    assert client.search_runs(["1"])[0].info.status == "KILLED"

    assert "starter zero_shot.top5" in jobs.run("stopped", *flags)
    assert len(jobs.rows("stopped")) == 8
    assert client.search_runs(["1"])[0].info.status == "FINISHED"


def test_a_finished_run_is_shown_not_repeated(undisturbed):
    rows = len(undisturbed.rows("clip"))
    output = undisturbed.run("clip", *SLOW_STEPS)
    assert "is finished" in output and "checkpoint" in output
    assert len(undisturbed.rows("clip")) == rows


def test_other_settings_under_the_same_name_are_refused(undisturbed):
    output = undisturbed.run("clip", *SLOW_STEPS, "--optim.lr", "0.01", code=2)
    assert "optim.lr: was 0.001, now 0.01" in output
    assert "--run.name clip-2" in output


@pytest.mark.slow
def test_a_run_can_be_extended(jobs):
    flags = ("--train.steps", "8", "--data.holdout", "0.02", "--eval.datasets", "[bundled:starter]")
    flags += ("--train.profile_steps", "[2, 3]")
    output = jobs.run("longer", *flags)
    assert "holdout loss" in output and "starter zero_shot.top5" in output
    assert len(list((jobs.run_dir("longer") / "figures").iterdir())) == 4
    assert "traceEvents" in json.loads((jobs.run_dir("longer") / "trace-00000003.json").read_text())
    jobs.run("longer", *flags, "--run.extend", "4")
    assert [row["step"] for row in jobs.rows("longer")] == list(range(1, 13))
    assert jobs.summary("longer")["model_version"] == "2"
    assert verify(LocalStore(jobs.run_dir("longer"))).holds


def make_tar(path: Path, samples: int, bad: set[int]) -> Path:
    rng = np.random.default_rng(0)
    with tarfile.open(path, "w") as tar:
        for i in range(samples):
            image = simplejpeg.encode_jpeg(rng.integers(0, 255, (40, 40, 3), np.uint8))
            parts = {
                "jpg": image[: len(image) // 2] if i in bad else image,
                "txt": b"number %d" % i,
            }
            for suffix, data in parts.items():
                info = tarfile.TarInfo(f"{i:04d}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.slow
def test_too_many_bad_images_stop_the_run(jobs, tmp_path):
    data = make_tar(tmp_path / "all.tar", 128, bad=set(range(128)))
    flags = ("--data.sources", str(data), "--data.holdout", "0", "--train.steps", "100")
    output = jobs.run("bad", *flags, code=2)
    assert "samples are undecodable, more than data.max_bad_fraction 0.05 allows" in output
    assert f" in {data}; " in output  # the examples name their shard
    assert "truncated" in output and "quarantine.jsonl" in output
    assert jobs.rows("bad")[-1]["step"] < 100


@pytest.mark.slow
def test_a_run_that_is_not_finite_rolls_back_once_and_stops(jobs):
    """A learning rate that no weight outlives: the first step's loss is finite, no other's."""
    flags = ("--train.steps", "12", "--checkpoint.every_steps", "2", "--optim.lr", "1e30")
    output = jobs.run("wild", *flags, code=2)
    assert "not finite up to step 4, again after a roll-back: the features of rank 0, 1" in output
    events = [row["event"] for row in jobs.rows("wild", "events")]
    assert events.count("rollback") == 1 and "commit" not in events
    assert [row["finite"] for row in jobs.rows("wild")] == [True, False, False, False] * 2


@pytest.mark.slow
def test_attempts_that_get_nowhere_end(jobs):
    """A commit that cannot be written fails every attempt: a file stands in its way."""
    jobs.run_dir("stuck").mkdir(parents=True)
    (jobs.run_dir("stuck") / "checkpoints").write_text("in the way")
    flags = ("--checkpoint.every_steps", "4", "--cluster.max_fruitless_attempts", "1")
    flags += ("--checkpoint.patience_s", "1")
    output = jobs.run("stuck", *flags, code=2)
    assert "1 attempts in a row ended without a new commit; the last: rank" in output
    assert "nothing is committed yet; to resume:" in output


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--data.sources", "nowhere/*.tar"), "no shard matches"),
        (("--train.global_batch", "4000"), "train.global_batch 4000 is larger"),
        (("--cluster.num_workers", "40"), "asked: 40 workers"),
    ],
)
def test_what_cannot_be_done_is_said_before_it_is_tried(jobs, flags, words):
    output = jobs.run("no", *flags, "--cluster.start_timeout_s", "3", code=2)
    assert words in output and "Traceback" not in output


def submit(head, directory: Path, submission: str, *command: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [
            *(str(Path(sys.executable).with_name("ray")), "job", "submit"),
            *("--address", head.dashboard, "--submission-id", submission),
            *("--working-dir", str(directory), "--", *command),
        ],
        env={k: v for k, v in head.env.items() if k != "RAY_ADDRESS"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_ray_job_submit_with_everything_on_s3(head, jobs, s3, tmp_path):
    """Submit, kill, change a source line, submit again: it resumes. A config error fails it.

    Bad images are void, counted and named.
    """
    checkout = tmp_path / "checkout"
    ignore = shutil.ignore_patterns("__pycache__", "*.pyc")
    for name in ("clip_ray", "jobs"):
        shutil.copytree(ROOT / name, checkout / name, ignore=ignore)
    data = make_tar(tmp_path / "some.tar", 128, bad={3, 77})
    open_store("s3://bucket/data", s3).write("train-0000.tar", data.read_bytes())
    flags = (
        *("--run.storage", "s3://bucket/runs", "--run.s3.endpoint", s3.endpoint),
        *("--data.sources", "s3://bucket/data/train-{0000..0000}.tar"),
        *("--data.s3.endpoint", s3.endpoint),
        *("--tracking.uri", f"sqlite:///{tmp_path}/mlflow.db"),
        *("--tracking.register_model", "false"),
        *SLOW_STEPS,
    )
    _, script, _, recipe, *rest = jobs.command("far", *flags)
    shutil.copy(recipe, checkout / "recipe.yaml")
    script = str(Path(script).relative_to(ROOT))
    command = [sys.executable, script, "--config", "recipe.yaml", *rest]
    run = open_store("s3://bucket/runs/far", s3)

    failed = submit(head, checkout, "typo", *command, "--train.stepz", "1")
    assert failed.returncode != 0
    assert "did you mean train.steps?" in failed.stdout + failed.stderr

    first = subprocess.Popen(
        [
            *(str(Path(sys.executable).with_name("ray")), "job", "submit", "--no-wait"),
            *("--address", head.dashboard, "--submission-id", "first"),
            *("--working-dir", str(checkout), "--", *command),
        ],
        env={k: v for k, v in head.env.items() if k != "RAY_ADDRESS"},
        stdout=subprocess.DEVNULL,
    )
    assert first.wait(60) == 0
    wait_for(lambda: Checkpoints(run).commits(), 200, "a commit on S3")
    (lease,) = run.child("lease").files()
    driver = json.loads(run.child("lease").read(lease))["pid"]
    os.kill(driver, signal.SIGKILL)
    wait_for(lambda: not psutil.pid_exists(driver), 20, "the driver's end")
    assert not run.exists("summary.json")

    with open(checkout / "clip_ray" / "optim.py", "a") as source:
        source.write("\n# An edited line: the job's directory gets another name.\n")
    second = submit(head, checkout, "second", *command)
    assert second.returncode == 0, second.stdout + second.stderr
    assert re.search(r"from step (7|14|21|28|35)\n", second.stdout), second.stdout
    summary = json.loads(run.read("summary.json"))
    assert summary["steps"] == 60 and summary["attempts"] == 2
    assert "bad sample: 00" in second.stdout + second.stderr
    assert summary["bad_samples"] == 30  # fifteen passes over two bad samples
    assert summary["bad_reasons"] == {"truncated": 30}
    assert {row["key"] for row in read_journal(run, "quarantine")} == {"0003", "0077"}
    assert run.exists("metrics.jsonl") and run.exists("quarantine.jsonl")
    line = lineage(read_journal(run, "metrics"))
    assert [row["step"] for row in line] == list(range(1, 61))
    assert verify(run).holds
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    tags = client.get_run(summary["run_id"]).data.tags
    assert tags["clip_ray.source.origin"] == "digest"  # no .git in the job's directory
