"""Storage that fails, fills up and rots under a run, and a run with one fault after the other."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from clip_ray.data.bundled import PREFIX, unbundle
from clip_ray.storage import LocalStore, Store, open_store
from clip_ray.train.checkpoint import Checkpoints
from clip_ray.train.journal import Row, lineage, read_journal
from clip_ray.train.verify import verify
from tests.chaos.conftest import STEPS
from tests.runtime.support import RECIPE, Head, Jobs, wait_for
from tests.s3_proxy import Faults, Proxy, s3_proxy

pytestmark = [pytest.mark.ray, pytest.mark.chaos]


def assert_same_end(run: Store, undisturbed: Jobs) -> None:
    """Each sample once a pass in the lineage of the weights, and the loss of the other run."""
    proof = verify(run)
    assert proof.holds, proof.as_text()
    expected, found = undisturbed.rows("clip"), lineage(read_journal(run, "metrics"))
    assert [r["samples_digest"] for r in found] == [r["samples_digest"] for r in expected]
    assert found[-1]["loss"] == pytest.approx(expected[-1]["loss"], rel=1e-4)


def events(run: Store, name: str) -> list[Row]:
    return [row for row in read_journal(run, "events") if row["event"] == name]


def processes(head: Head, title: str) -> list[psutil.Process]:
    """Return the processes of this head's Ray with such a title."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if " ".join(process.info["cmdline"] or []).startswith(title):
            with contextlib.suppress(psutil.Error):
                parents = [" ".join(parent.cmdline()) for parent in process.parents()]
                if any(head.env["RAY_TMPDIR"] in line for line in parents):
                    found.append(process)
    return found


# Object storage


@pytest.fixture
def proxy(s3) -> Iterator[Proxy]:
    with s3_proxy(s3.endpoint) as running:
        yield running


def far(proxy: Proxy, folder: Path, s3) -> tuple[Store, tuple[str, ...]]:
    """Return a run's directory behind the proxy, and the flags that put data and run there."""
    name = folder.name
    (source,) = RECIPE["data"]["sources"]
    local = Path(unbundle(source["path"], LocalStore(folder)))
    assert source["path"].startswith(PREFIX)
    open_store(f"s3://bucket/{name}/data", s3).write("train-0000.tar", local.read_bytes())
    flags = [
        *("--run.storage", f"s3://bucket/{name}/runs", "--run.s3.endpoint", proxy.endpoint),
        *("--data.sources", f"s3://bucket/{name}/data/train-0000.tar"),
        *("--data.s3.endpoint", proxy.endpoint, "--run.s3.timeout_s", "5"),
        *("--tracking.uri", f"sqlite:///{folder}/mlflow.db", "--tracking.register_model", "false"),
    ]
    return open_store(f"s3://bucket/{name}/runs/far", s3), (*STEPS, *flags)


def test_object_storage_that_fails_now_and_then(jobs, undisturbed, proxy, s3, tmp_path):
    run, flags = far(proxy, tmp_path, s3)
    proxy.begin(Faults(error=0.05, reset=0.01, stall=0.01))
    jobs.run("far", *flags)
    assert proxy.counts["error"] >= 3, proxy.counts
    assert_same_end(run, undisturbed)


def test_object_storage_that_is_away_for_a_while(jobs, undisturbed, proxy, s3, tmp_path):
    run, flags = far(proxy, tmp_path, s3)
    flags += ("--run.s3.retry_s", "2", "--train.global_batch", "32")
    job = jobs.start("far", *flags)
    wait_for(lambda: Checkpoints(run).commits(), 200, "a commit on S3")
    proxy.begin(Faults(error=1, only="PUT|POST"))
    wait_for(lambda: proxy.counts["error"] >= 1, 60, "a write that fails")
    time.sleep(3)
    before = Checkpoints(run).commits()
    Checkpoints(run).verify(before[-1])
    proxy.begin()
    jobs.finish(job)
    assert_same_end(run, undisturbed)


# Disks


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)])
    if done.returncode != 0:
        pytest.skip("no right to mount a file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_fills_up_costs_commits_and_nothing_else(jobs, small_disk):
    storage = small_disk / "runs"
    run = LocalStore(storage / "full")
    flags = ("--run.storage", str(storage), "--tracking.uri", f"sqlite:///{jobs.directory}/m.db")
    # Several commits fail, one after the other.
    steps = ("--train.steps", "400", "--checkpoint.every_steps", "7")
    job = jobs.start("full", *steps, *flags, "--tracking.register_model", "false")
    wait_for(lambda: Checkpoints(run).commits(), 200, "a commit")
    filler = small_disk / "filler"

    def one_fails() -> bool:
        # Again and again: what is deleted of old commits makes room.
        with open(filler, "ab", buffering=0) as file:
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(65536))
            # Journals still fit: they are what says that no commit does.
            file.truncate(max(file.tell() - 300_000, 0))
        return bool(events(run, "commit_failed"))

    wait_for(one_fails, 60, "a commit that fails")
    kept = Checkpoints(run).commits()
    assert kept and Checkpoints(run).verify(kept[-1])
    time.sleep(2)
    filler.unlink()
    output = jobs.finish(job)
    assert "NO COMMIT of step" in output and "No space left" in output
    assert len(events(run, "commit_failed")) >= 2 and len(events(run, "attempt")) == 1
    assert Checkpoints(run).commits()[-1].step == 400
    assert verify(run).holds


# What rots


def test_a_commit_that_rots_is_fallen_back_from_loudly(jobs, undisturbed):
    job = jobs.start("rotten", *STEPS)
    jobs.wait_for_step("rotten", 40)
    job.send_signal(signal.SIGTERM)
    jobs.finish(job, code=128 + signal.SIGTERM)
    run = LocalStore(jobs.run_dir("rotten"))
    *_, older, newest = Checkpoints(run).commits()
    weights = jobs.run_dir("rotten") / "checkpoints" / newest.name / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    output = jobs.run("rotten", *STEPS)
    assert f"COMMIT {newest.name} IS DAMAGED and not used" in output
    assert f"goes on from {older.name}" in output
    assert_same_end(run, undisturbed)


def test_a_shard_that_is_cut_short_under_a_run_is_void_and_counted(jobs, tmp_path):
    (source,) = RECIPE["data"]["sources"]
    first = tmp_path / "data" / "train-0000.tar"
    second = first.with_name("train-0001.tar")
    first.parent.mkdir()
    shutil.copy(unbundle(source["path"], LocalStore(tmp_path)), first)
    shutil.copy(first, second)
    flags = ("--data.sources", str(first.parent), "--data.max_bad_fraction", "1")
    flags += ("--data.copies", "true", "--train.steps", "240")
    job = jobs.start("cut", *flags)
    jobs.wait_for_step("cut", 10)
    os.truncate(second, second.stat().st_size // 3)
    jobs.finish(job)
    run = LocalStore(jobs.run_dir("cut"))
    proof = verify(run)
    assert proof.holds, proof.as_text()
    summary = jobs.summary("cut")
    bad = list(read_journal(run, "quarantine"))
    assert summary["steps"] == 240 and 0 < summary["bad_samples"] == len(bad)
    assert {Path(row["shard"]).name for row in bad} == {second.name}
    assert all("changed" in row["reason"] for row in bad)


# One fault after the other


def kill_worker(head: Head, dice: random.Random) -> None:
    dice.choice(processes(head, "ray::RayTrainWorker")).kill()


def stop_worker(head: Head, dice: random.Random) -> None:
    dice.choice(processes(head, "ray::RayTrainWorker")).suspend()


def kill_recorder(head: Head, dice: random.Random) -> None:
    dice.choice(processes(head, "ray::Recorder")).kill()


def kill_stream(head: Head, dice: random.Random) -> None:
    dice.choice(processes(head, "ray::SplitCoordinator")).kill()


def kill_controller(head: Head, dice: random.Random) -> None:
    dice.choice(processes(head, "ray::TrainController")).kill()


INSIDE = (kill_worker, stop_worker, kill_recorder, kill_stream, kill_controller)


def test_a_soak_of_ten_faults(jobs, undisturbed):
    """Five kinds of fault inside, the driver killed, the job asked to stop: in an order by seed."""
    dice = random.Random(6)
    faults = [*INSIDE, "driver", *dice.choices(INSIDE, k=3), "signal"]
    dice.shuffle(faults)
    run = LocalStore(jobs.run_dir("soak"))
    flags = ("--train.steps", "1200", "--checkpoint.every_steps", "20")
    flags += ("--cluster.max_fruitless_attempts", "5")
    job = jobs.start("soak", *flags)
    begun, happened = time.time(), []
    for fault in faults:
        here = len(list(read_journal(run, "metrics")))
        wait_for(lambda here=here: len(list(read_journal(run, "metrics"))) > here + 25, 120, fault)
        assert job.poll() is None, "the run has ended before its faults"
        happened.append(getattr(fault, "__name__", fault))
        if fault == "driver":
            os.killpg(job.pid, signal.SIGKILL)
            job.wait(20)
        elif fault == "signal":
            job.send_signal(signal.SIGTERM)
            jobs.finish(job, code=128 + signal.SIGTERM)
        else:
            fault(jobs.head, dice)
            continue
        job = jobs.start("soak", *flags)  # the same command, as any supervisor would give it
    jobs.finish(job)
    summary = jobs.summary("soak")
    print(
        f"{happened}: {time.time() - begun:.0f} s, {summary['attempts']} attempts, "
        f"{summary['recomputed_steps']} steps computed again, ETTR {summary['ettr']:.2f}; "
        f"{summary['recoveries']}"
    )
    assert len(happened) >= 10 and summary["attempts"] >= 8
    proof = verify(run)
    assert proof.holds, proof.as_text()
    reference = Jobs(jobs.head, jobs.directory / "reference")
    reference.directory.mkdir()
    reference.run("clip", *flags)
    assert_same_end(run, reference)
