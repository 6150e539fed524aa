"""Ray Data: the plan's blocks, read by tasks anywhere in the cluster, dealt in order to the ranks.

A stream is one streaming execution of Ray Data: block numbers, mapped by tasks that read and decode
a few blocks one after the other, dealt round robin with the order preserved. It serves consecutive
ranks; one stream serves them all unless the cluster is too large for it (`cluster.deal_streams`).
The first of a stream's ranks builds it, all from the commit that rank 0 chose, so that model and
data cannot come from different commits. Every block carries its number and each rank checks that it
got its own: a wrong deal is an error, never a wrong sample.

Ray lists the tasks of an execution in advance, so an endless plan is cut into segments. The next
one is built while the last runs, and started before it ends.
"""

from __future__ import annotations

import functools
import itertools
import math
import queue
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import pyarrow as pa
import ray
import torch
from ray.data import DataContext, ExecutionResources
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from clip_ray.data.blocks import (
    Arrays,
    Batch,
    Block,
    BlockReader,
    Layout,
    assemble,
)
from clip_ray.data.pipe import Pipe
from clip_ray.data.threads import BLOCKS
from clip_ray.errors import TrainingError
from clip_ray.runtime.cluster import Share, usable_nodes
from clip_ray.runtime.tables import REST_BYTES, from_table, to_table

SEGMENT_BLOCKS = 16_384  # blocks of one streaming execution
# Ray looks for finished tasks up to ten times a second, and gives a CPU no new one before: a task
# of one block, a tenth of a second, would leave half of the CPUs waiting.
TASK_BLOCKS = 8
LEAD_WINDOWS = 2  # before a segment's end, when the next is started at the latest
LEAD_S = 10.0  # that an execution may take from its start to its first block
FIRST_BATCH_TIMEOUT_S = 300.0
CLOSE_S = 5.0


@dataclass(frozen=True)
class Deal:
    """The blocks of one stream, in the order in which they are dealt.

    Attributes:
        layout: how the rows of a window are cut into blocks.
        ranks: consecutive ranks that the stream serves.
        windows: whole windows.
    """

    layout: Layout
    ranks: range
    windows: range

    def __len__(self) -> int:
        return len(self.windows) * self.layout.chunks * len(self.ranks)

    def numbers(self, rank: int) -> range:
        """Return the numbers (see `Layout.block_at`) of the blocks that a rank gets."""
        first = self.windows.start * self.layout.blocks_per_window
        last = self.windows.stop * self.layout.blocks_per_window
        return range(first + rank, last, self.layout.world_size)


def ranks_beside(rank: int, world_size: int, streams: int) -> range:
    """Return the ranks that are served by the same stream as `rank`."""
    stream = rank * streams // world_size
    return range(-(-stream * world_size // streams), -(-(stream + 1) * world_size // streams))


def segments(
    layout: Layout, ranks: int, first_step: int, last_step: int, blocks: int
) -> list[range]:
    """Cut the windows of steps `[first_step, last_step)` into pieces of about `blocks` blocks."""
    windows = range(first_step // layout.window, -(-last_step // layout.window))
    stride = max(blocks // (layout.chunks * ranks), 1)
    return [
        range(first, min(first + stride, windows.stop))
        for first in range(windows.start, windows.stop, stride)
    ]


@functools.lru_cache(maxsize=2)
def _reader(reference: ray.ObjectRef) -> tuple[BlockReader, Arrays]:
    """Fetch the reader once per process: it holds a tokenizer, which is slow to unpickle."""
    torch.set_num_threads(1)
    return ray.get(reference), Arrays()


def read_blocks(reference: ray.ObjectRef, numbers: Sequence[int]) -> Iterator[pa.Table]:
    """Yield blocks as tables; called in reading tasks.

    While a block is decoded, the files of the next one are fetched.
    """
    (reader, arrays), node = _reader(reference), _short(ray.get_runtime_context().get_node_id())
    places = (reader.layout.block_at(number) for number in numbers)
    fetching = BLOCKS.submit(reader.fetch, *next(places))
    for number in numbers:
        fetched = fetching.result()
        following = next(places, None)
        if following is not None:
            fetching = BLOCKS.submit(reader.fetch, *following)
        yield to_table(reader.decode(fetched, arrays), number, node)


def _short(node: str) -> int:
    """Return a node's name as a number that fits an array."""
    return int(node[:15], 16)


def task_blocks(share: Share, block_bytes: int, store_bytes: float) -> int:
    """Return the number of blocks that a task of a stream reads.

    The blocks of all tasks wait for those of the first: together they fill half of what the
    stream may use at most.

    Args:
        share: what the streams may use.
        block_bytes: size of a block.
        store_bytes: size of the cluster's object store.
    """
    mine = store_bytes * share.object_store / share.streams
    return int(min(max(mine / (2 * share.stream_cpus * block_bytes), 1), TASK_BLOCKS))


def build_stream(
    reference: ray.ObjectRef, deal: Deal, share: Share, homes: Mapping[int, str]
) -> list[ray.data.DataIterator]:
    """Return one iterator for each of a stream's ranks.

    Args:
        reference: a BlockReader in the object store.
        deal: the stream's blocks.
        share: what the stream may use.
        homes: the node of each rank, where blocks are to be made near their rank; else empty.
    """
    # Numbers, not the deal, and a late import: Ray's coordinator of the stream unpickles the
    # function, and would else import torch, which takes seconds and 100 MB.
    first, world_size, ranks = deal.numbers(0).start, deal.layout.world_size, deal.ranks
    store_bytes = ray.cluster_resources().get("object_store_memory", 0.0)
    each, size = task_blocks(share, deal.layout.block_bytes, store_bytes), len(deal)
    tasks = -(-size // each)

    def read(batch: dict[str, Any]) -> Iterator[Any]:
        from clip_ray.runtime.data import read_blocks

        (task,) = next(iter(batch.values())).tolist()
        places = (divmod(at, len(ranks)) for at in range(task * each, min((task + 1) * each, size)))
        yield from read_blocks(
            reference, [first + row * world_size + ranks[turn] for row, turn in places]
        )

    with DataContext.current(stream_context(share, deal.layout.block_bytes)):
        dataset: ray.data.Dataset
        settings: dict[str, Any] = {}
        if homes:
            # No range: tasks that have a place are not joined with those that make its rows.
            dataset = ray.data.from_items(list(range(tasks)), override_num_blocks=tasks)
            nodes = [homes[rank] for rank in ranks]
            settings["ray_remote_args_fn"] = functools.partial(
                _near, itertools.count(), each, nodes
            )
        else:
            dataset = ray.data.range(tasks, override_num_blocks=tasks)
        dataset = dataset.map_batches(read, batch_size=None, batch_format="numpy", **settings)
        # Blocks are equal as they are: made equal by Ray, the first would wait for the last rank's.
        return dataset.streaming_split(len(ranks), equal=False)


def _near(turn: Iterator[int], each: int, homes: Sequence[str]) -> dict[str, Any]:
    """Return where the next task runs: on the node of most of its blocks' ranks, if it has room.

    Ray asks once for each task, in their order.
    """
    first = next(turn) * each
    nodes = [homes[at % len(homes)] for at in range(first, first + each)]
    node = max(set(nodes), key=nodes.count)
    near = NodeAffinitySchedulingStrategy(node, soft=True, _spill_on_unavailable=True)
    return {"scheduling_strategy": near}


def stream_context(share: Share, block_bytes: int) -> DataContext:
    """Return the settings of a stream's execution."""
    context = DataContext.get_current().copy()
    options = context.execution_options
    options.preserve_order = True
    options.resource_limits = ExecutionResources.for_limits(cpu=share.stream_cpus)
    if share.data_label is not None:
        options.label_selector = dict([share.data_label])
    context.override_object_store_memory_limit_fraction = share.object_store
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # They cost time at each turn of Ray's loop, and one asks `_near` for a task that there is not.
    context.issue_detectors_config.detectors = []
    context.memory_usage_poll_interval_s = None  # or each task starts a thread to measure itself
    # A block must travel as it is: split or joined, it would be dealt to the wrong rank. Ray ends a
    # block that is larger than this, as ours are by a little, and splits one of half as much again.
    context.target_max_block_size = block_bytes + REST_BYTES
    return context


@dataclass(frozen=True)
class _Segment:
    """A rank's blocks of one streaming execution, which runs when `begin` is set."""

    begin: threading.Event
    blocks: Pipe[Block]


class BatchStream:
    """A rank's batches from `first_step` on, prefetched by threads.

    Args:
        recorder: the actor whose mailbox carries the streams from their builders to the others.
        name: unique to the attempt.
        reference: a BlockReader in the object store.
        layout: how blocks are dealt.
        rank: this rank.
        first_step: first step delivered.
        last_step: the step after the last.
        share: CPUs and memory for reading, and the number of streams.
        segment_blocks: blocks of one streaming execution.

    Attributes:
        foreign_bytes: pixels that came from other nodes.
    """

    def __init__(
        self,
        recorder: Any,
        name: str,
        reference: ray.ObjectRef,
        layout: Layout,
        rank: int,
        first_step: int,
        last_step: int,
        share: Share,
        segment_blocks: int = SEGMENT_BLOCKS,
    ) -> None:
        self._recorder, self._name, self._reference = recorder, name, reference
        self._layout, self._rank, self._share = layout, rank, share
        self._steps = range(first_step, last_step)
        self._ranks = ranks_beside(rank, layout.world_size, share.streams)
        self._pieces = segments(layout, len(self._ranks), first_step, last_step, segment_blocks)
        self._boxes: list[str] = []
        self._awaited: dict[int, int] = {}  # by segment that is read: the next block
        self._closed = threading.Event()
        self._home = ray.get_runtime_context().get_node_id()
        self._recorder.post.remote(f"{name}/home {rank}", self._home)
        self.foreign_bytes = 0
        # The next window is assembled while the half of this one that waits here is trained on.
        self._batches: Pipe[Batch] = Pipe(max(layout.window // 2, 1), self._closed)
        self._thread = threading.Thread(
            target=self._batches.fill, args=(self._assembled,), name="batches", daemon=True
        )
        self._thread.start()

    @property
    def awaited(self) -> int | None:
        """Number of the block that comes next, None where there is none (yet)."""
        return min(dict(self._awaited).values(), default=None)

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches; raises what the reading raised."""
        try:
            yield from self._batches.take(FIRST_BATCH_TIMEOUT_S)
        except queue.Empty:
            raise TrainingError(
                f"rank {self._rank}: no batch within {FIRST_BATCH_TIMEOUT_S:g} s (block "
                f"{self.awaited} of the stream of ranks {self._ranks.start} to "
                f"{self._ranks.stop - 1}); the reading tasks are stuck or have no CPU (see the "
                "cluster's `ray status`)"
            ) from None

    def close(self) -> None:
        """End the threads and the rank's streams; batches not yet taken are dropped."""
        self._closed.set()
        self._recorder.post.remote("", None, f"{self._name}/home {self._rank}")
        for box in self._boxes:
            # A stream lives, and holds its blocks, as long as somebody has its handle.
            self._recorder.post.remote("", None, box)
        # Bounded: a thread that waits for a block that never comes is left behind, a daemon.
        self._thread.join(timeout=CLOSE_S)

    def _assembled(self) -> Iterator[Batch]:
        layout, pieces, arrays = self._layout, self._pieces, Arrays()
        following = self._open(0)
        for number, windows in enumerate(pieces):
            current, opened = following, number + 1 == len(pieces)
            current.begin.set()
            blocks = current.blocks.take(FIRST_BATCH_TIMEOUT_S)
            begun = time.monotonic()
            for done, window in enumerate(windows):
                left = windows.stop - window
                if not opened and left <= max(len(windows) // 2, LEAD_WINDOWS):
                    following, opened = self._open(number + 1), True
                left_s = left * (time.monotonic() - begun) / done if done else math.inf
                if opened and (left <= LEAD_WINDOWS or left_s <= LEAD_S):
                    following.begin.set()
                batches = assemble(
                    itertools.islice(blocks, layout.chunks), layout, self._rank, arrays
                )
                for step, batch in enumerate(batches, window * layout.window):
                    if step in self._steps:
                        yield batch

    def _open(self, number: int) -> _Segment:
        segment = _Segment(threading.Event(), Pipe(1, self._closed))
        blocks = functools.partial(self._blocks, number, segment.begin)
        threading.Thread(
            target=segment.blocks.fill, args=(blocks,), name=f"segment {number}", daemon=True
        ).start()
        return segment

    def _blocks(self, number: int, begin: threading.Event) -> Iterator[Block]:
        deal = Deal(self._layout, self._ranks, self._pieces[number])
        iterator = self._iterator(number, deal)
        while not begin.wait(timeout=0.1):
            if self._closed.is_set():
                return
        expected = iter(deal.numbers(self._rank))
        self._awaited[number] = deal.numbers(self._rank).start
        home = _short(self._home)
        for table in iterator.iter_batches(batch_size=cast(int, None), batch_format="pyarrow"):
            wanted = next(expected, None)
            try:
                block, found, node = from_table(table)
            except ValueError as error:
                raise TrainingError(
                    f"rank {self._rank}: expected block {wanted}, Ray Data delivered {error}"
                ) from error
            if found != wanted:
                raise TrainingError(
                    f"rank {self._rank}: expected block {wanted}, Ray Data delivered {found}"
                )
            self._awaited[number] = wanted + self._layout.world_size
            if node != home:
                self.foreign_bytes += block["pixels"].nbytes
            yield block
        del self._awaited[number]
        wanted = next(expected, None)
        if wanted is not None:
            raise TrainingError(f"rank {self._rank}: Ray Data ended before block {wanted}")

    def _iterator(self, number: int, deal: Deal) -> ray.data.DataIterator:
        group = f"{self._name}/{deal.ranks.start}"
        box = f"{group}/{number}"
        if self._rank == deal.ranks.start:
            streams = build_stream(self._reference, deal, self._share, self._homes())
            self._boxes.append(box)
            # Every rank has begun the segment before this one, and needs no earlier one.
            old = f"{group}/{number - 2}"
            ray.get(self._recorder.post.remote(box, streams, old), timeout=60)
            return streams[0]
        found = self._posted(box, f"rank {deal.ranks.start} opened no stream")
        iterator: ray.data.DataIterator = found[self._rank - deal.ranks.start]
        return iterator

    def _homes(self) -> dict[int, str]:
        """Return the nodes of the stream's ranks, if blocks can be made on more than one."""
        if self._share.data_label is not None or len(usable_nodes()) < 2:
            return {}
        return {
            rank: self._posted(f"{self._name}/home {rank}", f"rank {rank} does not say where it is")
            for rank in self._ranks
        }

    def _posted(self, box: str, problem: str) -> Any:
        deadline = time.monotonic() + FIRST_BATCH_TIMEOUT_S
        while time.monotonic() < deadline and not self._closed.is_set():
            found = ray.get(self._recorder.collect.remote(box), timeout=60)
            if found is not None:
                return found
            time.sleep(0.1)
        raise TrainingError(f"rank {self._rank}: {problem} ({box})")
