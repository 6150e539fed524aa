"""Ray Data: the plan's blocks, read by tasks anywhere in the cluster, dealt in order to the ranks.

One stream serves all ranks: a dataset of block numbers, mapped by a task that reads and decodes
one block, split round robin with the order preserved. Rank 0 builds it from the commit that it
chose, so that model and data cannot come from different commits. Every block carries its number
and each rank checks that it got its own: a wrong deal is an error, never a wrong sample.
"""

from __future__ import annotations

import functools
import queue
import threading
import time
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import ray
import torch
from ray.data import DataContext, ExecutionResources

from clip_ray.data.blocks import BLOCK_BYTES, Batch, Block, BlockReader, Layout, assemble
from clip_ray.errors import ClusterError, TrainingError

SEGMENT_BLOCKS = 16_384  # blocks of one streaming execution; Ray lists its tasks in advance
FIRST_BATCH_TIMEOUT_S = 300.0
CLOSE_S = 5.0


@functools.lru_cache(maxsize=2)
def _reader(reference: ray.ObjectRef) -> BlockReader:
    """Fetch the reader once per process: it holds a tokenizer, which is slow to unpickle."""
    torch.set_num_threads(1)
    reader: BlockReader = ray.get(reference)
    return reader


def build_stream(
    reference: ray.ObjectRef, layout: Layout, blocks: range, data_cpus: float
) -> list[ray.data.DataIterator]:
    """Return one iterator a rank over the blocks of whole windows, in order.

    Args:
        reference: a BlockReader in the object store.
        layout: how blocks are dealt.
        blocks: block numbers; whole windows.
        data_cpus: CPUs that the reading tasks may use.

    Raises:
        ClusterError: fewer than one CPU is left for the tasks.
    """
    if data_cpus < 1:
        raise ClusterError(
            f"{data_cpus:g} CPUs are left for reading data, and a task takes 1: lower "
            "cluster.num_workers or cluster.cpus_per_worker"
        )
    first = blocks.start

    def read(batch: dict[str, Any]) -> Block:
        number = first + int(batch["id"][0])
        block = _reader(reference).read(*layout.block_at(number))
        block["number"] = np.full(len(block["valid"]), number, np.int64)
        return block

    context = DataContext.get_current().copy()
    context.execution_options.preserve_order = True
    context.execution_options.resource_limits = ExecutionResources.for_limits(cpu=data_cpus)
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # A block must travel as it is: split or joined, it would be dealt to the wrong rank.
    context.target_max_block_size = 8 * BLOCK_BYTES
    with DataContext.current(context):
        dataset = ray.data.range(len(blocks), override_num_blocks=len(blocks))
        dataset = dataset.map_batches(read, batch_size=None, batch_format="numpy")
        return dataset.streaming_split(layout.world_size, equal=True)


def segments(layout: Layout, first_step: int, last_step: int) -> list[range]:
    """Cut the blocks of steps `[first_step, last_step)` into whole-window pieces for streams."""
    per_window = layout.blocks_per_window
    windows = range(first_step // layout.window, -(-last_step // layout.window))
    stride = max(SEGMENT_BLOCKS // per_window, 1)
    return [
        range(w * per_window, min(w + stride, windows.stop) * per_window)
        for w in range(windows.start, windows.stop, stride)
    ]


class BatchStream:
    """A rank's batches from `first_step` on, prefetched by a thread.

    Args:
        recorder: the actor whose mailbox carries the streams from rank 0 to the others.
        name: unique to the attempt.
        reference: a BlockReader in the object store.
        layout: how blocks are dealt.
        rank: this rank.
        first_step: first step delivered.
        last_step: the step after the last.
        data_cpus: CPUs that the reading tasks may use.
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
        data_cpus: float,
    ) -> None:
        self._recorder, self._name, self._reference = recorder, name, reference
        self._layout, self._rank, self._data_cpus = layout, rank, data_cpus
        self._steps = range(first_step, last_step)
        # One window is being assembled, one waits here: the next is ready when a window ends.
        self._queue: queue.Queue[Batch | BaseException | None] = queue.Queue(layout.window)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._fill, name="batches", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches; raises what the reading raised."""
        timeout = FIRST_BATCH_TIMEOUT_S
        while True:
            try:
                item = self._queue.get(timeout=timeout)
            except queue.Empty:
                raise TrainingError(
                    f"rank {self._rank}: no batch within {timeout:g} s; the reading tasks are "
                    "stuck or have no CPU (see the cluster's `ray status`)"
                ) from None
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item

    def close(self) -> None:
        """End the thread; batches not yet taken are dropped."""
        self._closed.set()
        # Bounded: a thread that waits for a block that never comes is left behind, a daemon.
        self._thread.join(timeout=CLOSE_S)

    def _put(self, item: Batch | BaseException | None) -> bool:
        while not self._closed.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def _fill(self) -> None:
        try:
            for number, blocks in enumerate(
                segments(self._layout, self._steps.start, self._steps.stop)
            ):
                for batch in self._segment(number, blocks):
                    if not self._put(batch):
                        return
            self._put(None)
        except BaseException as error:
            self._put(error)

    def _segment(self, number: int, blocks: range) -> Iterator[Batch]:
        layout = self._layout
        iterator = self._iterator(number, blocks)
        step = blocks.start // layout.blocks_per_window * layout.window
        expected = iter(n for n in blocks if layout.block_at(n)[2] == self._rank)
        window: list[Block] = []
        for block in iterator.iter_batches(batch_size=cast(int, None), batch_format="numpy"):
            wanted = next(expected, None)
            if wanted is None or not (block["number"] == wanted).all():
                raise TrainingError(
                    f"rank {self._rank}: expected block {wanted}, Ray Data delivered "
                    f"{np.unique(block['number'])}"
                )
            window.append(block)
            if len(window) == layout.chunks:
                for batch in assemble(window, layout):
                    if step in self._steps:
                        yield batch
                    step += 1
                window = []
        if window or next(expected, None) is not None:
            raise TrainingError(f"rank {self._rank}: Ray Data ended before block {blocks.stop}")

    def _iterator(self, number: int, blocks: range) -> ray.data.DataIterator:
        box = f"{self._name}/{number}"
        if self._rank == 0:
            streams = build_stream(self._reference, self._layout, blocks, self._data_cpus)
            # Every rank has begun the last segment: the one before it is needed no more.
            old = f"{self._name}/{number - 2}"
            ray.get(self._recorder.post.remote(box, streams, old), timeout=60)
            return streams[0]
        deadline = time.monotonic() + FIRST_BATCH_TIMEOUT_S
        while time.monotonic() < deadline and not self._closed.is_set():
            streams = ray.get(self._recorder.collect.remote(box), timeout=60)
            if streams is not None:
                iterator: ray.data.DataIterator = streams[self._rank]
                return iterator
            time.sleep(0.1)
        raise TrainingError(f"rank {self._rank}: rank 0 opened no stream for {box}")
