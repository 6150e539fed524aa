"""Storage that fails, hangs, fills up and rots under a run, and writers that die in a write."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from clip_ray.data.bundled import PREFIX, unbundle
from clip_ray.storage import LocalStore, Store, open_store
from clip_ray.train.checkpoint import Checkpoints
from tests.chaos.support import (
    BACK_S,
    DEATH_S,
    STEPS,
    WAIT_S,
    assert_little_lost,
    assert_same_end,
    back_after,
    events,
    fill_disk,
    inject,
    injected,
    numbers,
    paced,
    small_disk,
)
from tests.runtime.support import RECIPE, wait_for
from tests.s3_proxy import Faults, Proxy, s3_proxy

pytestmark = [pytest.mark.ray, pytest.mark.chaos]


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


def test_object_storage_that_fails_hangs_and_is_away(jobs, undisturbed, proxy, s3, tmp_path):
    """Some requests all the time; then no write is answered; then nothing is; one attempt."""
    usual = Faults(error=0.05, reset=0.01, stall=0.01)
    run, flags = far(proxy, tmp_path, s3)
    proxy.begin(usual)
    with paced(jobs.head, "far", 100):
        job = jobs.start("far", *flags, "--run.s3.retry_s", "2")
        wait_for(lambda: len(Checkpoints(run).commits()) >= 2, WAIT_S, "two commits on S3")
        wait_for(lambda: proxy.counts["error"] >= 3, 60, "errors")
        before = Checkpoints(run).commits()[-1]
        proxy.begin(Faults(hang=1, hang_s=3, only="PUT|POST"))
        # The journal is on S3, too: what is tried tells that two commits have been given up.
        wait_for(lambda: len(tried(proxy)) >= 3, WAIT_S, "commits that fail, one after the other")
        proxy.begin(Faults(error=1))
        time.sleep(20)
        assert proxy.counts["error"] >= 3
        proxy.begin()
        Checkpoints(run).verify(before)
        proxy.begin(usual)
    jobs.finish(job)
    assert len(events(run, "commit_failed")) >= 2
    assert numbers(run, "attempt") == [1]
    assert_same_end(run, undisturbed.rows("clip"))


def tried(proxy: Proxy) -> set[str]:
    """Return the checkpoints of which a file was tried to be written."""
    writes = (r.path for r in list(proxy.log) if r.method in ("PUT", "POST"))
    return {match[0] for path in writes if (match := re.search(r"step-\d+", path))}


def test_a_disk_that_fills_up_costs_commits_and_nothing_else(jobs, undisturbed, tmp_path):
    with small_disk(tmp_path / "disk") as disk:
        run, filler = LocalStore(disk / "runs" / "full"), disk / "filler"
        flags = (*STEPS, "--run.storage", str(disk / "runs"), "--tracking.register_model", "false")
        flags += ("--tracking.uri", f"sqlite:///{jobs.directory}/m.db")

        def two_fail() -> bool:
            fill_disk(filler)
            return len(events(run, "commit_failed")) >= 2

        with paced(jobs.head, "full", 100):
            job = jobs.start("full", *flags)
            wait_for(lambda: Checkpoints(run).commits(), 200, "a commit")
            wait_for(two_fail, 60, "commits that fail, one after the other")
            kept = Checkpoints(run).commits()
            assert kept and Checkpoints(run).verify(kept[-1])
            filler.unlink()
        output = jobs.finish(job)
        assert "NO COMMIT of step" in output and "No space left" in output
        assert numbers(run, "attempt") == [1]
        assert Checkpoints(run).commits()[-1].step == 120
        assert_same_end(run, undisturbed.rows("clip"))


def test_writers_that_die_in_a_write_and_a_commit_that_rots(jobs, undisturbed):
    """In a file, before COMMIT, and damaged: each time the commit before is gone on from."""
    run = LocalStore(jobs.run_dir("torn"))
    inject(jobs.head, "torn", "crash-in-file", 14)
    inject(jobs.head, "torn", "crash-before-commit", 35)
    with paced(jobs.head, "torn", 100):
        job = jobs.start("torn", *STEPS)
        jobs.wait_for_step("torn", 60)
        job.send_signal(signal.SIGTERM)
        jobs.finish(job, code=128 + signal.SIGTERM)
        assert numbers(run, "from_step") == [0, 7, 28]
        recovered = []
        for fault in ("crash-in-file", "crash-before-commit"):
            died = injected(jobs.head, "torn", f"{fault}.taken").stat().st_ctime
            found = next(e["time"] for e in events(run, "attempt_failed") if e["time"] > died)
            recovered.append((found - died, back_after(run, died)))
        print(f"found after, and back after (s): {recovered}")
        assert_little_lost(run)
        *_, older, newest = Checkpoints(run).commits()
        weights = jobs.run_dir("torn") / "checkpoints" / newest.name / "model.safetensors"
        data = bytearray(weights.read_bytes())
        data[len(data) // 2] ^= 1
        weights.write_bytes(data)
    output = jobs.run("torn", *STEPS)
    assert f"COMMIT {newest.name} IS DAMAGED and not used" in output
    assert f"goes on from {older.name}" in output
    assert [e["commit"] for e in events(run, "commit_rejected")] == [newest.name]
    assert_same_end(run, undisturbed.rows("clip"))
    assert all(found <= DEATH_S and back <= BACK_S for found, back in recovered)
