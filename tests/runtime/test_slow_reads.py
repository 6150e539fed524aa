"""Ordered delivery to two ranks, over a store of which one GET in a hundred takes 5 s."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from clip_ray.config import DataConfig, S3Options, SourceConfig
from clip_ray.data.blocks import BlockReader, Layout
from clip_ray.data.manifest import build_manifest
from clip_ray.data.plan import Plan
from clip_ray.runtime.cluster import Share
from clip_ray.runtime.data import BatchStream
from clip_ray.runtime.recorder import Recorder
from clip_ray.storage import open_store
from clip_ray.tokenizer import Tokenizer
from tests.data.shard_files import pairs, write_tar
from tests.runtime.support import ROOT
from tests.s3_proxy import Faults, Proxy, s3_proxy

pytestmark = [pytest.mark.ray, pytest.mark.slow]
SLOW_S = 5.0
STALL_S = 4.0  # what a slow read costs, less what was read ahead
STEPS = 240
SIDE = 16


@pytest.fixture
def proxy(s3: S3Options) -> Iterator[Proxy]:
    """A Ray of our own whose tasks reach the S3 server through a proxy."""
    with pytest.MonkeyPatch.context() as patch, s3_proxy(str(s3.endpoint)) as running:
        for name in [name for name in os.environ if name.startswith("RAY_")]:
            patch.delenv(name)
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("PYTHONPATH", str(ROOT))
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
        try:
            yield running
        finally:
            ray.shutdown()


def reader_over(uri: str, s3: S3Options) -> BlockReader:
    """Return a reader whose blocks are two slots, a GET each: one a rank and step."""
    data = DataConfig(sources=(SourceConfig(path=uri),), s3=s3, holdout=0)
    manifest = build_manifest(data)
    plan = Plan(
        manifest.train_counts,
        manifest.source.astype(np.int64),
        weights=None,
        seed=3,
        global_batch=16,
        slot=16,
        window=2,
    )
    layout = Layout.fit(plan, 2, 3 * SIDE * SIDE)
    tokenizer = Tokenizer.train(["caption 1"], 514, 12)
    return BlockReader(plan, layout, manifest, data, tokenizer, SIDE)


def gaps(reader: BlockReader, name: str, folder: Path) -> list[float]:
    """Let two ranks take all batches at once; return the seconds that each waited for each."""
    recorder: Any = ray.remote(num_cpus=0)(Recorder).remote(str(folder), None)
    share = Share(2, 1, 0, 2.0, threads=1, stream_cpus=2.0)
    reference, found, errors = ray.put(reader), [], []

    def run(rank: int) -> None:
        try:
            stream = BatchStream(recorder, name, reference, reader.layout, rank, 0, STEPS, share)
            begun = None
            for batch in stream:
                assert bool(batch.valid.all())
                if begun is not None:  # the first waits for Ray
                    found.append(time.monotonic() - begun)
                begun = time.monotonic()
            stream.close()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    ray.kill(recorder)
    assert not errors and len(found) == 2 * (STEPS - 1), errors
    return found


def test_ordered_delivery_does_not_stall_on_one_slow_read(
    proxy: Proxy, tmp_path: Path, s3: S3Options
) -> None:
    store = open_store(f"s3://bucket/{tmp_path.name}", s3)
    for number in range(4):
        tar = write_tar(tmp_path / f"{number}.tar", pairs(1280)[640 * number : 640 * (number + 1)])
        store.write(tar.name, tar.read_bytes())
    stalls = {}
    for name, share in (("hedged", 0.05), ("plain", 0.0)):
        reader = reader_over(store.uri, S3Options(endpoint=proxy.endpoint, hedge=share))
        proxy.begin(Faults(slow=0.01, slow_s=SLOW_S, only="GET"), seed=13)
        waits = gaps(reader, name, tmp_path / name)
        slow = Counter(r.range + r.path for r in proxy.log if r.fault == "slow")
        stalls[name] = [wait for wait in waits if wait > STALL_S]
        print(
            f"{name}: {len(proxy.log)} GETs, {slow.total()} slow; {sum(waits):.0f} s waited, "
            f"longest {max(waits):.2f} s, {len(stalls[name])} stalls"
        )
        assert slow.total() >= 3
        if share:
            # Two in a row of the same range cannot be overtaken; each rank may wait for it.
            twice = sum(count - 1 for count in slow.values())
            assert len(stalls[name]) <= 2 * twice
            # A slot a step, and what was sent twice: the share, and two of each reading process.
            assert len(proxy.log) <= 1.05 * STEPS + 2 * 2
    assert len(stalls["plain"]) >= 3
