"""The index: a manifest of 1e9 samples at a run's start, and tars on S3 with and without tables."""

from __future__ import annotations

import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pytest

from clip_ray.config import DataConfig, SourceConfig
from clip_ray.data.manifest import build_manifest
from clip_ray.storage import S3Store, open_store
from tests.data.shard_files import write_parquet, write_tar

pytestmark = pytest.mark.bench

MEASURE = """
import resource, sys, time
from pathlib import Path
import numpy as np


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def own():
    \"\"\"MB that this process shares with nobody; pages of files are no part of it.\"\"\"
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024
"""

# Builds, as an index's driver does, from what 100,000 tasks found, which come in any order.
BUILD = """
from clip_ray.config import DataConfig, SourceConfig
from clip_ray.data import manifest as manifests
from clip_ray.data.details import Lists
from clip_ray.data.indexing import Entry, Job, Outcome, Scope
from clip_ray.data.manifest_file import save_manifest
from clip_ray.data.tar import STRIDE
from clip_ray.storage import FileInfo, LocalStore

SHARDS, SAMPLES, KINDS = 100_000, 10_000, 500
walked = sys.argv[1] != "sidecars"
half = sys.argv[1] == "half selected"
rng = np.random.default_rng(0)
none = np.zeros(0, np.int64)
marks = SAMPLES // STRIDE + 1


def lists():
    # Samples of 20 to 60 kB; one in a hundred, or every second, is not trained on.
    steps = rng.integers(40 * STRIDE, 120 * STRIDE, marks)
    held = np.flatnonzero(rng.random(SAMPLES) < (0.5 if half else 0.01))
    return Lists(np.cumsum(steps) if walked else none, held, none if half else held, none)


some = [lists() for _ in range(KINDS)]
packed = [(len(one.offsets), len(one.held), len(one.holdout), one.digest(), one.pack())
          for one in some]
path = "s3://bucket/laion/*.tar"
jobs = [Job(i, 0, FileInfo(f"s3://bucket/laion/{i:06d}.tar", 300_000_000 + i, f"{i:032x}"))
        for i in range(SHARDS)]
scopes = (Scope(SourceConfig(path=path), None, None, "0" * 64),)
manifests.find_jobs = lambda data, apart: (jobs, scopes, {})


def found(function, todo):
    for number in rng.permutation(SHARDS).tolist():
        marks, held, holdout, digest, record = packed[number % KINDS]
        file = jobs[number].file
        yield Outcome(number, Entry(
            file.path, "tar", file.size, file.version, SAMPLES, number, marks, held, holdout,
            digest, bytes(bytearray(record)), content=number, sidecar="123456 " + "0" * 32))


base, begun = peak(), time.process_time()
manifest = manifests.build_manifest(DataConfig(sources=(SourceConfig(path=path),)), found)
store = LocalStore(Path(sys.argv[2]))
saved = save_manifest(manifest, store, "manifest.parquet")
table, details = (store.info(name).size / 1e6 for name in ("manifest.parquet", saved.details.name))
spent, most = time.process_time() - begun, peak() - base
print(f"built and written: {spent:.1f} s of CPU, peak {most:.0f} MB; "
      f"{table:.0f} MB and {details:.0f} MB of details")
assert spent < 60 and most < 1000
"""

READ = """
from clip_ray.data.manifest_file import load_manifest
from clip_ray.data.plan import Plan
from clip_ray.storage import LocalStore

base, begun = peak(), time.process_time()
manifest = load_manifest(LocalStore(Path(sys.argv[2])), "manifest.parquet")
loaded = time.process_time() - begun
plan = Plan(manifest.train_counts, manifest.source.astype("int64"), weights=None, seed=0,
            global_batch=32768, slot=64, window=8, manifest_digest=manifest.digest)
planned = time.process_time() - begun
print(f"loaded: {loaded:.2f} s of CPU; planned: {planned - loaded:.2f} s")
last = manifest.total // 32768 * 30
for step in (0, 12_345, last):
    now = time.process_time()
    rows = plan.step_rows(step)
    print(f"seek to step {step}: {time.process_time() - now:.2f} s")
    assert len(rows.shard) == 32768
spent, most = time.process_time() - begun, peak() - base
print(f"all of it: {spent:.2f} s of CPU, peak {most:.0f} MB more")
assert spent < 10 and most < 1000

# What a reading process does, for as many shards as it may ever come by.
kept, now, shards = own(), time.process_time(), np.random.default_rng(1).permutation(len(manifest))
for shard in shards.tolist():
    entry = manifest.shard(shard)
    manifest.train_ordinals(shard, np.arange(64))
each, more = (time.process_time() - now) / len(shards), own() - kept
print(f"lists of each shard: {1e6 * each:.0f} us of CPU a shard; {more:.1f} MB more of its own")
assert each < 1e-3 and more < 32
"""


@pytest.mark.parametrize("kind", ["sidecars", "walked", "half selected"])
def test_a_billion_samples(tmp_path, kind):
    """Build the manifest in one process; load, plan, seek and read its lists in another."""
    print(f"\n{kind}:")
    for program in (BUILD, READ):
        done = subprocess.run(
            [sys.executable, "-c", MEASURE + program, kind, str(tmp_path)],
            timeout=600,
            capture_output=True,
            text=True,
        )
        print(done.stdout, end="")
        assert done.returncode == 0, done.stderr
    assert done.stdout.count("seek to step") == 3


def test_an_index_by_sidecars_against_streaming(s3, tmp_path, monkeypatch):
    """Four img2dataset shards of 2,000 samples of 38 kB on moto, indexed both ways in one run."""
    store = open_store("s3://bucket/bench", s3)
    image = np.random.default_rng(0).bytes(38_000)
    for shard in range(4):
        keys = [f"{shard:05d}{i:04d}" for i in range(2000)]
        members = [
            member
            for key in keys
            for member in ((f"{key}.jpg", image), (f"{key}.txt", f"caption of {key}".encode()))
        ]
        store.write(f"{shard}.tar", write_tar(tmp_path / "a.tar", members).read_bytes())
        columns = {
            "key": pa.array(keys),
            "status": pa.array(["success"] * 2000),
            "caption": pa.array([f"caption of {key}" for key in keys]),
            "url": pa.array([f"https://example.org/pictures/{key}.jpg" for key in keys]),
        }
        path = write_parquet(tmp_path / "a.parquet", columns, rows=100)
        store.write(f"{shard}.parquet", path.read_bytes())
    count = {"gets": 0, "bytes": 0}
    plain = S3Store.read

    def counted(self, name, *which):
        data = plain(self, name, *which)
        count["gets"] += 1
        count["bytes"] += len(data)
        return data

    monkeypatch.setattr(S3Store, "read", counted)
    results = {}
    print()
    for sidecars in (True, False):
        data = DataConfig(
            sources=(SourceConfig(path="s3://bucket/bench/"),), s3=s3, sidecars=sidecars
        )
        count.update(gets=0, bytes=0)
        begun, cpu = time.monotonic(), time.process_time()
        manifest = build_manifest(data)
        seconds, cpu = time.monotonic() - begun, time.process_time() - cpu
        results[sidecars] = (manifest, count["bytes"], seconds)
        way = "by sidecars" if sidecars else "streamed"
        print(
            f"{way:<12} {seconds:6.2f} s, {cpu:6.2f} s of CPU, "
            f"{count['gets'] / 4:.0f} GETs and {count['bytes'] / 4e6:.2f} MB a shard"
        )
    assert results[True][0].digest == results[False][0].digest
    assert results[True][1] < results[False][1] / 100
