"""Data and steps that go bad under a run, against the same run with the same rows left out."""

from __future__ import annotations

import os
import shutil
import tarfile
import time
from collections import Counter
from pathlib import Path

import pytest

from clip_ray.data.bundled import unbundle
from clip_ray.storage import LocalStore
from clip_ray.train.journal import lineage, read_journal
from tests.chaos.bare import bare_rows
from tests.chaos.support import assert_whole, inject, injected, numbers
from tests.runtime.support import RECIPE

pytestmark = [pytest.mark.ray, pytest.mark.chaos]
STEPS, NAN_STEP = 120, 40
HELD_WINDOW = 4  # the first that is read after the data went bad


def spoil_image(shard: Path, number: int) -> str:
    """Overwrite an image's header; size and time stay as they were. Return the sample's key."""
    before = shard.stat()
    with tarfile.open(shard) as tar:
        image = [member for member in tar if member.name.endswith(".jpg")][number]
    with open(shard, "r+b") as file:
        file.seek(image.offset_data)
        file.write(bytes(64))
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert shard.stat().st_mtime_ns == before.st_mtime_ns
    return image.name.removesuffix(".jpg")


def test_a_spoilt_image_a_cut_shard_and_a_step_that_is_not_finite(jobs, tmp_path):
    """All three under one run: its losses are those of a bare loop that leaves out the same."""
    (source,) = RECIPE["data"]["sources"]
    first = tmp_path / "data" / "train-0000.tar"
    second = first.with_name("train-0001.tar")
    first.parent.mkdir()
    shutil.copy(unbundle(source["path"], LocalStore(tmp_path)), first)
    shutil.copy(first, second)
    whole, times = first.read_bytes(), [path.stat().st_mtime_ns for path in (first, second)]
    inject(jobs.head, "bad", "nan", NAN_STEP)
    flags = ("--data.sources", str(first.parent), "--data.max_bad_fraction", "1")
    inject(jobs.head, "data", "hold", HELD_WINDOW)
    try:
        job = jobs.start("bad", *flags, "--data.copies", "true", "--train.steps", str(STEPS))
        jobs.wait_for_step("bad", 10)
        spoilt = spoil_image(first, 100)
        os.truncate(second, second.stat().st_size // 3)
    finally:
        injected(jobs.head, "data", "hold").unlink()
    jobs.finish(job)

    run = LocalStore(jobs.run_dir("bad"))
    assert_whole(run)
    assert numbers(run, "attempt") == [1]
    summary, quarantine = jobs.summary("bad"), list(read_journal(run, "quarantine"))
    assert summary["steps"] == STEPS and summary["bad_samples"] == len(quarantine)
    reasons = Counter((Path(row["shard"]).name, row["reason"]) for row in quarantine)
    print(dict(reasons))
    of_first = {row["key"] for row in quarantine if row["shard"] == str(first)}
    assert of_first == {spoilt}
    assert reasons[second.name, "shard-changed"] and len(reasons) == 2
    rows = lineage(read_journal(run, "metrics"))
    assert [row["step"] - 1 for row in rows if not row["finite"]] == [NAN_STEP]

    # The bare loop reads whole data.
    for path, mtime in zip((first, second), times, strict=True):
        path.write_bytes(whole)
        os.utime(path, ns=(time.time_ns(), mtime))
    found = [row["loss"] for row in rows]
    expected = [row["loss"] for row in bare_rows(run, poisoned={NAN_STEP})]
    assert found[:NAN_STEP] == pytest.approx(expected[:NAN_STEP], rel=1e-4)
    assert found[-1] == pytest.approx(expected[-1], rel=1e-4)
    # Without the same gaps the loss is another.
    other = bare_rows(run, void=False, poisoned={NAN_STEP})[-1]["loss"]
    assert other != pytest.approx(found[-1], rel=1e-4)
