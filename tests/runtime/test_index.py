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
    for few, most, expected in ((5, size, []), (4, size, [4]), (5, size - 1, [4])):
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


@pytest.mark.ray
def test_another_run_scans_new_shards_alone(head, tmp_path):
    data = config(tmp_path / "set", holdout=0.1)
    shards(tmp_path / "set", range(3))
    write_beside(data, build_manifest(data))
    shards(tmp_path / "set", range(3, 3 + index.FEW))
    done = subprocess.run(
        [sys.executable, str(ROOT / "jobs/index.py"), "--run.name", "new", "--beside"]
        + ["--data.sources", str(tmp_path / "set"), "--data.holdout", "0.1"],
        env=head.env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"3 shards kept from an earlier index, {index.FEW} scanned" in done.stdout
    assert f"beside the data: {tmp_path}/set/{BESIDE}" in done.stdout
    assert f"{3 + index.FEW}/{3 + index.FEW}" in done.stderr
    assert "Dataset" not in done.stderr
    written = (tmp_path / "runs/new/manifest.parquet").read_bytes()
    assert written == (tmp_path / "set" / BESIDE).read_bytes()
    assert written == to_bytes(build_manifest(data))
    assert not (tmp_path / "runs/new/index").exists()


OVER_TASKS = """
import time

import psutil
import ray

from clip_ray.errors import ClipRayError
from clip_ray.runtime import index


def double(job):
    if isinstance(job, Exception):
        raise job
    time.sleep(60 if job is None else 0.01)
    return 2 * job


def kill_the_execution():
    for process in psutil.process_iter():
        if process.cmdline()[:1] in (["ray::_execute"], ["ray::_execute()"]):
            process.kill()
            return
    raise SystemExit("there is none: " + str([p.cmdline()[:1] for p in psutil.process_iter()]))


def outcome(jobs):
    begun = time.monotonic()
    try:
        list(index._over_tasks(double, jobs))
    except Exception as error:
        said = "a slip" if "ValueError: a slip" in str(error) else str(error)
        print(type(error).__name__, said, time.monotonic() - begun < 30, sep="; ")


ray.init(log_to_driver=False)
index.EVERY_S = 0.0
results = index._over_tasks(double, list(range(500)))
found = [next(results)]
kill_the_execution()
found += results
print(sorted(found) == list(range(0, 1000, 2)))
outcome([1, ClipRayError("no credentials")])
outcome([1, ValueError("a slip")])
index.ATTEMPTS = 1
results = index._over_tasks(double, list(range(500)))
print(next(results) % 2)
kill_the_execution()
try:
    list(results)
except Exception as error:
    print(type(error).__name__, error, sep="; ")
index.STALL_S = 5.0
outcome([1, None])
"""


@pytest.mark.ray
def test_each_result_comes_once_and_an_error_as_what_it_is(head, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", OVER_TASKS],
        env=head.env,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if "(raylet)" not in line]
    once, users, ours, begun, lost, stalled = lines
    assert (once, begun) == ("True", "0")
    assert users == "ClipRayError; no credentials; True"
    assert ours == "RayTaskError(ValueError); a slip; True"
    assert lost.startswith("ClusterError; the process that deals shards to tasks was lost 1 times")
    assert stalled.startswith("ClusterError; no shard was indexed within 5 s") and "True" in stalled
