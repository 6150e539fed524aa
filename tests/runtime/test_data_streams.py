"""Streams on a cluster of three logical nodes, with a reader that decodes nothing."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from ray.cluster_utils import Cluster

from clip_ray.config import ClusterConfig
from clip_ray.data.blocks import Block, Layout
from clip_ray.runtime import data
from clip_ray.runtime.cluster import Share, deal_streams
from clip_ray.runtime.data import BatchStream
from clip_ray.runtime.recorder import Recorder
from tests.runtime.support import ROOT, wait_for

pytestmark = pytest.mark.ray
WORKERS, NODE_CPUS, DECODE_CPUS = 16, 6, 2
STORE_BYTES = 150_000_000
ROW_BYTES = 3 * 8**2 + 4  # of FakeReader's rows


@dataclass(frozen=True)
class FakeReader:
    """Returns blocks whose rows say which they are, and where they were made."""

    layout: Layout
    side: int = 8
    seconds: float = 0.0

    def fetch(self, *which: int) -> tuple[int, ...]:
        return which

    def decode(self, which: tuple[int, ...], arrays: Any) -> Block:
        window, chunk, rank = which
        time.sleep(self.seconds)
        layout, height = self.layout, self.layout.rows_per_block
        rows = layout.window * height
        step = window * layout.window + np.arange(layout.window)
        place = step[:, None] * layout.rows + chunk * height + np.arange(height)
        node = int(ray.get_runtime_context().get_node_id()[:15], 16)
        return {
            "pixels": np.zeros((rows, 3, self.side, self.side), np.uint8),
            "ids": np.zeros((rows, 1), np.int32),
            "valid": np.ones(rows, bool),
            "truncated": np.zeros(rows, bool),
            "shard": np.full(rows, rank),
            "place": place.ravel(),
            "bad": np.full(rows, "", dtype=object),
            "image_id": np.full(rows, node),
        }


class Host:
    """Holds a node's CPUs, and runs its ranks as threads. Used as an actor."""

    def take(self, ranks: range, last_step: int, *stream: Any) -> tuple[int, set[int]]:
        """Take all batches of some ranks; return their number and the nodes that made them."""
        taken: list[int] = []
        nodes: set[int] = set()
        errors: list[BaseException] = []

        def run(rank: int) -> None:
            try:
                batches = open_stream(rank, last_step, *stream)
                for step, batch in enumerate(batches):
                    rows = len(batch.valid)
                    assert (batch.shard == rank).all(), (rank, step, batch.shard)
                    assert (batch.place == step * rows + np.arange(rows)).all(), (rank, step)
                    assert batch.image_id is not None
                    nodes.update(batch.image_id.tolist())
                    taken.append(step)
                batches.close()
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=run, args=(rank,)) for rank in ranks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return len(taken), nodes


class Near(Host):
    """Tells what share of its ranks' bytes came from other nodes."""

    def take(self, ranks: range, near: bool, *stream: Any) -> list[float]:  # type: ignore[override]
        """Take 60 steps of some ranks, which need more time than the reading."""
        data.TASK_BLOCKS = 2  # those of the ranks of a node
        if not near:
            BatchStream._homes = lambda self: {}  # type: ignore[method-assign]
        found: dict[int, float] = {}

        def run(rank: int) -> None:
            batches = open_stream(rank, 60, *stream, 1000)
            total = 0
            for batch in batches:
                total += batch.pixels.numel()
                time.sleep(0.1)
            found[rank] = batches.foreign_bytes / total
            batches.close()

        threads = [threading.Thread(target=run, args=(rank,)) for rank in ranks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return list(found.values())


def open_stream(
    rank: int, last_step: int, recorder: Any, reader: list[Any], share: Share, blocks: int
) -> BatchStream:
    layout = ray.get(reader[0]).layout
    return BatchStream(recorder, "stream", reader[0], layout, rank, 0, last_step, share, blocks)


@pytest.fixture(scope="module")
def cluster() -> Iterator[list[dict[str, Any]]]:
    """Two nodes of workers, and one that workers leave CPUs on; yields `ray.nodes()`."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("RAY_")]:
            patch.delenv(name)
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("PYTHONPATH", str(ROOT))
        cluster = Cluster()
        try:
            store = {"object_store_memory": STORE_BYTES}
            cluster.add_node(num_cpus=NODE_CPUS, include_dashboard=False, **store)
            cluster.add_node(num_cpus=NODE_CPUS, **store)
            cluster.add_node(num_cpus=NODE_CPUS, labels={"role": "decode"}, **store)
            ray.init(cluster.address, log_to_driver=False)
            yield ray.nodes()
        finally:
            ray.shutdown()
            cluster.shutdown()


@pytest.fixture
def recorder(cluster, tmp_path: Path) -> Iterator[Any]:
    actor: Any = ray.remote(num_cpus=0)(Recorder)
    made = actor.remote(str(tmp_path), None)
    yield made
    ray.kill(made)


def share_of(nodes: list[dict[str, Any]], workers: int, **settings: Any) -> Share:
    data_cpus = 3.0 * NODE_CPUS - workers
    config = ClusterConfig(num_workers=workers, **settings)
    return deal_streams(Share(workers, 1, 0, data_cpus, threads=1), config, nodes)


@pytest.mark.slow
@pytest.mark.parametrize("streams", [1, 2])
def test_sixteen_ranks_with_fewer_spare_cpus_than_ranks_on_each_node(cluster, recorder, streams):
    share = share_of(cluster, WORKERS, data_streams=streams)
    assert (share.streams, share.stream_cpus) == (streams, DECODE_CPUS / streams)
    layout = Layout(WORKERS, rows=6, window=2, chunks=2, row_bytes=ROW_BYTES)
    reader = [ray.put(FakeReader(layout))]
    steps = 2 * 8
    hosts, held = [], (range(0, 6), range(6, 12), range(12, 16))
    for node, ranks in zip(cluster, held, strict=True):
        actor: Any = ray.remote(num_cpus=len(ranks))(Host)
        hosts.append(actor.options(label_selector={"ray.io/node-id": node["NodeID"]}).remote())
    begun = time.monotonic()
    taken = [
        host.take.remote(ranks, steps, recorder, reader, share, 6 * 2 * WORKERS)
        for host, ranks in zip(hosts, held, strict=True)
    ]
    counts = [count for count, _ in ray.get(taken, timeout=60)]
    assert counts == [len(ranks) * steps for ranks in held]
    print(f"{streams} streams: {time.monotonic() - begun:.1f} s")
    for host in hosts:
        ray.kill(host)


@pytest.mark.slow
@pytest.mark.parametrize("label", ["role=decode", None])
def test_reading_stays_on_labelled_nodes(cluster, recorder, label):
    share = share_of(cluster, 2, data_label=label)
    layout = Layout(1, rows=4, window=2, chunks=1, row_bytes=ROW_BYTES)
    reader = [ray.put(FakeReader(layout, seconds=0.1))]
    _, nodes = Host().take(range(1), 60, recorder, reader, share, 1000)
    labelled = {
        int(node["NodeID"][:15], 16) for node in cluster if node["Labels"].get("role") == "decode"
    }
    assert (nodes == labelled) == (label is not None)


@pytest.mark.slow
@pytest.mark.parametrize("near", [True, False])
def test_blocks_are_made_near_their_ranks(cluster, recorder, near):
    """Two ranks on each of two nodes with room for the reading; a third node has room, too."""
    share = replace(share_of(cluster, 4), data_cpus=6, stream_cpus=6)
    layout = Layout(4, rows=4, window=2, chunks=1, row_bytes=ROW_BYTES)
    reader = [ray.put(FakeReader(layout, seconds=0.05))]
    taken = []
    for first, node in ((0, cluster[0]), (2, cluster[1])):
        actor: Any = ray.remote(num_cpus=2)(Near)
        host = actor.options(label_selector={"ray.io/node-id": node["NodeID"]}).remote()
        taken.append(host.take.remote(range(first, first + 2), near, recorder, reader, share))
    foreign = [share for shares in ray.get(taken, timeout=120) for share in shares]
    print(f"near {near}: {foreign}")
    assert max(foreign) < 0.3 if near else max(foreign) > 0.3


@pytest.mark.slow
def test_what_is_read_ahead_stays_below_its_share_of_the_object_store(cluster, recorder):
    side = 146
    layout = Layout(1, rows=32, window=2, chunks=1, row_bytes=3 * side**2 + 4)
    block_bytes = 64 * 3 * side**2  # 4 MB
    reader = [ray.put(FakeReader(layout, side=side))]
    peaks = {}
    for part in (0.7, 0.2):
        share = replace(share_of(cluster, 12), object_store=part)
        batches = open_stream(0, 1000, recorder, reader, share, 1000)
        next(iter(batches))  # and then the consumer stalls
        peaks[part] = 0.0
        for _ in range(15):
            time.sleep(0.2)
            peaks[part] = max(peaks[part], store_used())
        batches.close()
        del batches
        wait_for(lambda: store_used() < 4 * block_bytes, 20, "blocks are let go")
    total = 3 * STORE_BYTES
    print({part: f"{peak / total:.2f}" for part, peak in peaks.items()})
    # What tasks have in the making, and what the rank has taken over, comes on top.
    assert peaks[0.2] <= 0.2 * total + (share.stream_cpus + 4) * block_bytes
    assert peaks[0.7] > 0.25 * total


def store_used() -> float:
    return 3 * STORE_BYTES - ray.available_resources()["object_store_memory"]


@pytest.mark.slow
def test_the_next_segment_begins_without_a_stall(cluster, recorder, tmp_path):
    layout = Layout(1, rows=4, window=2, chunks=1, row_bytes=ROW_BYTES)
    reader = [ray.put(FakeReader(layout))]
    share = share_of(cluster, 12)
    begun = time.monotonic()
    batches = open_stream(0, 240, recorder, reader, share, 40)  # 3 segments of 40 windows
    gaps = []
    for _ in batches:
        now = time.monotonic()
        gaps.append(now - begun)
        begun = now
        time.sleep(0.15)  # half a segment takes longer than an execution needs to open
    batches.close()
    opening, *others = gaps
    print(f"first batch {opening:.2f} s, longest wait later {max(others):.2f} s")
    assert max(others) < opening / 3
