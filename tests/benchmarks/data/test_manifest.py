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

PROGRAM = """
import resource, sys, time
import numpy as np
from clip_ray.data.manifest import Evidence, Manifest
from clip_ray.data.plan import Plan
from clip_ray.data.ragged import Ragged

SHARDS, SAMPLES, STRIDE = 100_000, 10_000, 8
with_offsets = sys.argv[1] == "walked"


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def rows(per_shard, values):
    return Ragged(values, np.arange(0, SHARDS + 1, dtype=np.int64) * per_shard)


def none(dtype):
    return rows(0, np.zeros(0, dtype))


rng = np.random.default_rng(0)
held = np.tile(np.arange(0, SAMPLES, 100, dtype=np.int32), SHARDS)
marks = SAMPLES // STRIDE + 1
# Samples of 20 to 60 kB: blocks between every eighth.
steps = rng.integers(40 * STRIDE, 120 * STRIDE, (SHARDS, marks), dtype=np.uint32)
offsets = np.cumsum(steps, axis=1, dtype=np.uint32).ravel() if with_offsets else None
manifest = Manifest(
    source=np.zeros(SHARDS, np.int32),
    paths=Ragged.of_text([f"s3://bucket/laion/{i:06d}.tar" for i in range(SHARDS)]),
    kinds=np.zeros(SHARDS, np.int8),
    sizes=rng.integers(3e8, 4e8, SHARDS),
    versions=Ragged.of_text([f"{i:032x}" for i in range(SHARDS)]),
    samples=np.full(SHARDS, SAMPLES),
    offsets=rows(marks, offsets) if with_offsets else none(np.uint32),
    held=rows(SAMPLES // 100, held),
    holdout=rows(SAMPLES // 100, held),
    rows_skipped=none(np.int64),
    sources=("s3://bucket/laion/*.tar",),
    skipped_by_source=({},),
    invalid_utf8=(0,),
    options={},
    keys=rng.integers(0, 2**63, SHARDS).astype(np.uint64),
    evidence=Evidence(
        content=rng.integers(0, 2**63, SHARDS).astype(np.uint64),
        invalid_utf8=np.zeros(SHARDS, np.int64),
        sidecars=Ragged.of_text(["123456 " + "0" * 32] * SHARDS),
        notes=Ragged.of_text([""] * SHARDS),
        empty=(),
        settings=("0" * 64,),
    ),
)
data = manifest.to_bytes()
with open(sys.argv[2], "wb") as file:
    file.write(data)
"""

READ = """
import resource, sys, time
from pathlib import Path
import numpy as np
import pyarrow.parquet
from clip_ray.data.manifest import Manifest
from clip_ray.data.plan import Plan


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


base = peak()
begun = time.process_time()
data = Path(sys.argv[1]).read_bytes()
manifest = Manifest.from_bytes(data)
print(f"manifest of {len(data) / 1e6:.0f} MB read: {time.process_time() - begun:.2f} s of CPU, "
      f"peak {peak() - base:.0f} MB")
del data
base, begun = peak(), time.process_time()
plan = Plan(manifest.train_counts, manifest.source.astype("int64"), weights=None, seed=0,
            global_batch=32768, slot=64, window=8, manifest_digest=manifest.digest)
seconds = time.process_time() - begun
print(f"plan: {seconds:.2f} s")
for step in (0, 12_345, 900_000):
    begun = time.process_time()
    rows = plan.step_rows(step)
    spent = time.process_time() - begun
    print(f"seek to step {step}: {spent:.2f} s")
    assert len(rows.shard) == 32768 and spent < 5
print(f"plan and seeks: peak {peak() - base:.0f} MB more")
"""


@pytest.mark.parametrize("kind", ["sidecars", "walked"])
def test_a_billion_samples(tmp_path, kind):
    """Write the manifest in one process; read, plan and seek in another."""
    path = tmp_path / "manifest.parquet"
    subprocess.run([sys.executable, "-c", PROGRAM, kind, str(path)], check=True, timeout=600)
    done = subprocess.run(
        [sys.executable, "-c", READ, str(path)], check=True, timeout=600, capture_output=True
    )
    print(f"\n{kind}:\n{done.stdout.decode()}")
    assert done.stdout.count(b"seek to step") == 3


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
