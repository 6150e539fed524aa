"""How blocks are dealt to ranks; no Ray is started."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pyarrow as pa
import pytest

from clip_ray.config import ClusterConfig
from clip_ray.data.blocks import Arrays, Layout
from clip_ray.errors import ClusterError
from clip_ray.runtime import data as runtime_data
from clip_ray.runtime.cluster import Share, deal_streams, spare_cpus
from clip_ray.runtime.data import BatchStream, Deal, ranks_beside, read_blocks, segments
from clip_ray.runtime.tables import from_table, to_table
from tests.runtime.support import wait_for


def node(name: str, cpus: float, gpus: float = 0, store: float = 1e9, **labels: str) -> dict:
    resources = {"CPU": cpus, "GPU": gpus, "object_store_memory": store}
    return {"NodeID": name, "Alive": True, "Resources": resources, "Labels": labels}


def share(workers: int, data_cpus: float, cpus: float = 1, gpus: int = 0) -> Share:
    return Share(workers, cpus, gpus, data_cpus, threads=1)


def streams(found: Share) -> tuple[int, float]:
    return found.streams, found.stream_cpus


def test_streams_are_cut_at_whole_windows():
    layout = Layout(world_size=2, rows=8, window=4, chunks=3)  # 6 blocks a window
    assert segments(layout, 2, 5, 22, 13) == [range(1, 3), range(3, 5), range(5, 6)]
    assert segments(layout, 2, 0, 4, 13) == [range(0, 1)]
    assert segments(layout, 1, 0, 16, 13) == [range(0, 4)]
    assert segments(layout, 2, 0, 8, 1) == [range(0, 1), range(1, 2)]


@pytest.mark.parametrize(("world_size", "streams"), [(1, 1), (7, 1), (7, 3), (16, 5), (8, 8)])
def test_streams_deal_every_block_to_its_rank_once(world_size, streams):
    layout = Layout(world_size, rows=8, window=4, chunks=3)
    served = {ranks_beside(rank, world_size, streams) for rank in range(world_size)}
    assert len(served) == streams
    assert sorted(rank for ranks in served for rank in ranks) == list(range(world_size))
    numbers = []
    for ranks in served:
        deal = Deal(layout, ranks, range(2, 5))
        assert len(deal) == sum(len(deal.numbers(rank)) for rank in ranks)
        for rank in ranks:
            assert {layout.block_at(n)[2] for n in deal.numbers(rank)} == {rank}
            numbers += deal.numbers(rank)
    first, last = (window * layout.blocks_per_window for window in (2, 5))
    assert sorted(numbers) == list(range(first, last))


def test_all_tasks_of_a_process_fetch_in_one_thread(monkeypatch):
    fetched: list[tuple[int, threading.Thread]] = []

    class Reader:
        layout = Layout(world_size=2, rows=8, window=4, chunks=3)

        def fetch(self, window: int, chunk: int, rank: int) -> int:
            number = (window * 3 + chunk) * 2 + rank
            fetched.append((number, threading.current_thread()))
            return number

        def decode(self, number: int, arrays: Arrays) -> dict[str, Any]:
            return {"pixels": np.full((4, 2, 2, 3), number, np.uint8)}

    monkeypatch.setattr(runtime_data, "_reader", lambda reference: (Reader(), Arrays()))
    context = SimpleNamespace(get_node_id=lambda: "0" * 56)
    monkeypatch.setattr(runtime_data.ray, "get_runtime_context", lambda: context)
    tasks = [[1, 3, 5], [7, 9], [11]]
    found = [[from_table(table)[:2] for table in read_blocks(None, task)] for task in tasks]
    assert [[number for _, number in task] for task in found] == tasks
    assert all((block["pixels"] == number).all() for task in found for block, number in task)
    assert [number for number, _ in fetched] == [1, 3, 5, 7, 9, 11]
    threads = {thread for _, thread in fetched}
    assert len(threads) == 1 and threading.current_thread() not in threads


def test_workers_fill_nodes_one_after_the_other():
    nodes = [node("a", 96), node("b", 96, gpus=8), node("c", 96, gpus=8)]
    assert spare_cpus(share(12, 200, gpus=1), None, nodes) == [88, 92, 96]
    nodes = [node("a", 4), node("b", 6), {**node("dead", 99), "Alive": False}]
    assert spare_cpus(share(7, 3), None, nodes) == [0, 3]
    assert spare_cpus(share(7, 3), ("role", "decode"), nodes) == []
    nodes.append(node("d", 5, role="decode"))
    assert spare_cpus(share(7, 8), ("role", "decode"), nodes) == [4]


def test_there_is_one_stream_until_it_could_not_keep_up():
    few = [node(f"n{i}", 96, gpus=8) for i in range(1)]
    many = [node(f"n{i:02}", 96, gpus=8) for i in range(16)]
    config = ClusterConfig(num_workers=8)
    assert streams(deal_streams(share(8, 88, gpus=1), config, few)) == (1, 88)
    # 16 nodes x 88 spare CPUs / 128 = 11 streams of 16 x (88 // 11) CPUs.
    assert streams(deal_streams(share(128, 1408, gpus=1), config, many)) == (11, 128)


def test_a_stream_gets_what_its_number_divides_of_each_node():
    nodes = [node("a", 8), node("b", 7), node("c", 4)]
    found = deal_streams(share(16, 3), ClusterConfig(num_workers=16), nodes)
    assert streams(found) == (1, 3)
    config = ClusterConfig(num_workers=16, data_streams=3)
    with pytest.raises(ClusterError, match="4 streams of data: none is left a CPU.*0, 0, 3") as e:
        deal_streams(share(16, 3), ClusterConfig(num_workers=16, data_streams=4), nodes)
    assert "Lower cluster.num_workers" in str(e.value)
    assert streams(deal_streams(share(16, 3), config, nodes)) == (3, 1)


def test_what_cannot_be_dealt_is_refused():
    halves = [node(f"n{i}", 1.5) for i in range(3)]
    with pytest.raises(ClusterError, match="1 streams of data: none is left a CPU.*0.5, 0.5, 0.5"):
        deal_streams(share(3, 1.5), ClusterConfig(num_workers=3), halves)
    with pytest.raises(ClusterError, match="cluster.data_streams 3.*there are 2"):
        deal_streams(share(2, 90), ClusterConfig(data_streams=3), [node("a", 96)])
    config = ClusterConfig(data_label="role=decode")
    with pytest.raises(ClusterError, match="with the label role=decode: none"):
        deal_streams(share(2, 90), config, [node("a", 96)])


class Stalls(BatchStream):
    """A stream that delivers a rank's first block, and the others when it is let go."""

    let_go: threading.Event

    def _iterator(self, number: int, deal: Deal) -> Any:
        def blocks(**options: Any) -> Iterator[pa.Table]:
            for count, which in enumerate(deal.numbers(self._rank)):
                assert count == 0 or self.let_go.wait(10), "never let go"
                names = ("valid", "truncated", "shard", "place")
                block: dict[str, Any] = {name: np.zeros(4, np.int64) for name in names}
                block |= {"pixels": np.zeros((4, 1, 1, 3), np.uint8)}
                block |= {"ids": np.zeros((4, 1), np.int32), "bad": np.full(4, "", dtype=object)}
                yield to_table(block, which, 0)

        return SimpleNamespace(iter_batches=blocks)


def test_a_stream_says_which_block_it_waits_for(monkeypatch):
    here = SimpleNamespace(get_node_id=lambda: "00" * 28)
    monkeypatch.setattr("clip_ray.runtime.data.ray.get_runtime_context", lambda: here)
    layout = Layout(world_size=2, rows=2, window=2, chunks=1)
    Stalls.let_go = threading.Event()
    stream = Stalls(MagicMock(), "s", MagicMock(), layout, 1, 0, 6, share(2, 1))
    batches = iter(stream)
    for _ in range(2):
        next(batches)
    wait_for(lambda: stream.awaited == 3, 10, "the second block of rank 1")
    Stalls.let_go.set()
    assert len(list(batches)) == 4
    wait_for(lambda: stream.awaited is None, 10, "the end")
    stream.close()
