"""Indexing through Ray, and what it says."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from clip_ray.config import DataConfig, SourceConfig
from clip_ray.data.earlier import BESIDE
from clip_ray.data.manifest import build_manifest
from clip_ray.data.manifest_file import save_manifest, to_bytes
from clip_ray.errors import ConfigError
from clip_ray.runtime import index
from clip_ray.runtime.index import index_data, write_beside
from clip_ray.storage import LocalStore
from tests.data.shard_files import pairs, write_tar
from tests.runtime.support import Head

ROOT = Path(__file__).resolve().parents[2]


def shards(folder: Path, numbers: range) -> None:
    folder.mkdir(exist_ok=True)
    for number in numbers:
        members = [(f"{number}-{name}", data) for name, data in pairs(3)]
        write_tar(folder / f"{number:05d}.tar", members)


def config(folder: Path, **options: object) -> DataConfig:
    return DataConfig(sources=(SourceConfig(path=str(folder)),), **{"holdout": 0.0, **options})


def test_the_bar_and_the_line_count_what_was_kept(tmp_path, capsys):
    shards(tmp_path / "set", range(9))
    store, said = LocalStore(tmp_path / "run"), []
    first = index_data(config(tmp_path / "set"), store, said.append)
    assert "9/9" in capsys.readouterr().err
    assert said == ["indexed 9 shards: 27 training samples, 0 held out"]
    save_manifest(first, store, "manifest.parquet")
    shards(tmp_path / "set", range(9, 20))
    index_data(config(tmp_path / "set"), store, said.append)
    bar = capsys.readouterr().err
    assert "9/20" in bar and "20/20" in bar and "| 8/20" not in bar
    assert said[1].endswith("; 9 shards kept from an earlier index, 11 scanned")
    shards(tmp_path / "set", range(20, 21))
    index_data(config(tmp_path / "set"), store, said.append)
    assert said[2].endswith("; 20 shards kept from an earlier index, 1 scanned")


def test_a_few_small_shards_need_no_tasks(tmp_path, monkeypatch):
    shards(tmp_path / "set", range(4))
    dealt = []
    monkeypatch.setattr(
        index, "_over_tasks", lambda f, jobs: dealt.append(len(jobs)) or map(f, jobs)
    )
    data = config(tmp_path / "set")

    size = sum(file.stat().st_size for file in (tmp_path / "set").iterdir())
    for few, most, expected in ((4, size, []), (3, size, [4]), (4, size - 1, [4])):
        monkeypatch.setattr(index, "FEW", few)
        monkeypatch.setattr(index, "FEW_BYTES", most)
        dealt.clear()
        index_data(data, LocalStore(tmp_path / f"{few}-{most}"), str)
        assert dealt == expected


def test_shards_of_the_same_keys_are_named(tmp_path):
    shards(tmp_path / "set", range(3))
    shutil.copy(tmp_path / "set/00000.tar", tmp_path / "set/copy.tar")
    said = []
    index_data(config(tmp_path / "set", copies=True), LocalStore(tmp_path / "run"), said.append)
    (warning,) = said[1:]
    folder = tmp_path / "set"
    assert warning.startswith(
        f"warning: {folder}/00000.tar, {folder}/copy.tar have the same sample keys: "
    )


def test_a_read_only_bucket_is_an_error_of_beside(tmp_path):
    shards(tmp_path / "set", range(1))
    data = config(tmp_path / "set/00000.tar")
    built = build_manifest(data)
    assert write_beside(data, built) == f"{tmp_path}/set/{BESIDE}"
    shutil.rmtree(tmp_path / "set")
    (tmp_path / "set").touch()
    with pytest.raises(ConfigError, match="set cannot be written to .*leave --beside out"):
        write_beside(data, built)


def run(head: Head, cwd: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run Python on the cluster; it has to succeed."""
    done = subprocess.run(
        [sys.executable, *command],
        env=head.env,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.mark.ray
def test_another_run_scans_new_shards_alone(head, tmp_path):
    data = config(tmp_path / "set", holdout=0.1)
    shards(tmp_path / "set", range(3))
    write_beside(data, build_manifest(data))
    shards(tmp_path / "set", range(3, 4 + index.FEW))
    command = [str(ROOT / "jobs/index.py"), "--run.name", "new", "--beside"]
    chosen = ["--data.sources", str(tmp_path / "set"), "--data.holdout", "0.1"]
    done = run(head, tmp_path, *command, *chosen)
    assert f"3 shards kept from an earlier index, {1 + index.FEW} scanned" in done.stdout
    assert f"beside the data: {tmp_path}/set/{BESIDE}" in done.stdout
    assert f"{4 + index.FEW}/{4 + index.FEW}" in done.stderr
    assert "Dataset" not in done.stderr
    written = (tmp_path / "runs/new/manifest.parquet").read_bytes()
    assert written == (tmp_path / "set" / BESIDE).read_bytes()
    assert written == to_bytes(build_manifest(data))
    assert not (tmp_path / "runs/new/index").exists()


OVER_TASKS = """
import contextlib
import os
import signal
import time

import psutil
import ray

from clip_ray.data.indexing import Job, Outcome
from clip_ray.errors import ClipRayError
from clip_ray.runtime import index
from clip_ray.storage import FileInfo


def work(job):
    does, _, argument = job.file.path.partition(" ")
    if does == "raise":
        raise ClipRayError(argument)
    if does == "slip":
        raise ValueError(argument)
    if does == "crash":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(float(argument or 0.05))
    return Outcome(job.number)


def over_tasks(*names):
    jobs = [Job(number, 0, FileInfo(name, 0, "")) for number, name in enumerate(names)]
    return index._over_tasks(work, jobs)


def kill(name):
    for _ in range(200):
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.cmdline()[:1] in ([f"ray::{name}"], [f"ray::{name}()"]):
                    process.kill()
                    return
        time.sleep(0.1)
    raise SystemExit(f"there is no {name}")


def outcome(*names):
    begun = time.monotonic()
    found = []
    try:
        for each in over_tasks(*names):
            found.append(each.number)
    except Exception as error:
        notes = getattr(error, "__notes__", [])
        said = f"{error} {'in work' in notes[0]}" if notes else error
        print(sorted(found), type(error).__name__, said, time.monotonic() - begun < 60, sep="; ")


ray.init(log_to_driver=False)
index.EVERY_S = 0.2
results = over_tasks(*["x"] * 400)
numbers = [next(results).number]
for process in ("_execute", "MapBatches(run)", "MapBatches(run)"):
    kill(process)
    numbers += [next(results).number for _ in range(20)]
numbers += [each.number for each in results]
print(sorted(numbers) == list(range(400)))
outcome("x", "raise no credentials")
outcome("x", "slip a slip")
outcome("x", "crash", "x", "crash", "x")
# What is found is handed on at once, not when the next is.
cpus = int(ray.cluster_resources()["CPU"])
begun = time.monotonic()
results = over_tasks(*["wait 0"] * cpus, *["wait 25"] * cpus)
next(results)
print(time.monotonic() - begun < 20)
results.close()
index.STALL_S = 5.0
outcome("wait 60")
"""


@pytest.mark.ray
def test_each_result_comes_once_and_an_error_as_what_it_is(head):
    said = run(head, ROOT, "-c", OVER_TASKS).stdout.splitlines()
    lines = [line for line in said if "(raylet)" not in line]
    once, users, ours, crash, soon, stalled = lines
    assert (once, soon) == ("True", "True")
    assert users.endswith("ClipRayError; no credentials; True")
    assert ours.endswith("ValueError; a slip True; True")
    # All others are found, and it is said which take their processes along.
    assert crash.startswith("[0, 2, 4]; ClusterError; crash, crash: not indexed, 3 times in a row")
    assert "died unexpectedly" in crash
    assert "no shard was indexed within 5 s" in stalled and stalled.endswith("True")
