"""How a worker's rows are cut into blocks and put together again."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from clip_ray.data.blocks import BLOCK_BYTES, MOST_BYTES, Arrays, Block, Layout, assemble
from clip_ray.data.plan import Plan


def plan(global_batch: int, slot: int, window: int) -> Plan:
    sizes = dict(global_batch=global_batch, slot=slot, window=window)
    return Plan(np.array([65536]), np.array([0]), weights=None, seed=0, **sizes)


def blocks_of(layout: Layout, window: int, rank: int = 0) -> list[Block]:
    """Blocks whose rows count the samples of the plan; what they need not hold is void."""
    height, batch = layout.rows_per_block, layout.rows * layout.world_size
    found = []
    for chunk in range(layout.chunks):
        step = window * layout.window + np.arange(layout.window)
        span = layout.span(rank, chunk)
        row = np.concatenate([np.array(span, np.int64), np.full(height - len(span), -1)])
        place = np.where(row >= 0, step[:, None] * batch + row, -1).ravel()
        block: Block = {name: np.zeros((len(place), 1), np.uint8) for name in ("pixels", "ids")}
        block |= {"shard": place, "place": place, "valid": place >= 0}
        block |= {"truncated": place < 0, "bad": np.full(len(place), "", dtype=object)}
        found.append(block)
    return found


@pytest.mark.parametrize(
    ("world_size", "height", "rows_per_block"), [(2, 17, 16), (2, 7, 8), (3, 17, 16), (1, 999, 256)]
)
def test_blocks_are_cut_between_slots(world_size, height, rows_per_block):
    row_bytes = BLOCK_BYTES // (8 * height)
    layout = Layout.fit(plan(256, 64, 8), world_size, row_bytes)
    assert layout.rows_per_block == rows_per_block
    assert (layout.chunks - 1) * rows_per_block < layout.rows <= layout.chunks * rows_per_block


@pytest.mark.parametrize(
    ("batch", "world_size", "side", "most"),
    [
        (256, 2, 224, 1.0),
        (1000, 3, 224, 1.02),
        (32768, 48, 224, 1.02),
        (32768, 64, 384, 1.0),
        (32768, 64, 448, 1.0),
        (4096, 96, 224, 1.2),  # 43 rows a worker: 95 edges among 512 slots
    ],
)
def test_a_slot_is_read_once_but_at_the_edge_of_two_workers(batch, world_size, side, most):
    layout = Layout.fit(plan(batch, 64, 8), world_size, 3 * side**2 + 4 * 77)
    reads = 0
    for rank in range(world_size):
        held: list[int] = []
        for chunk in range(layout.chunks):
            span = layout.span(rank, chunk)
            span = range(span.start, min(span.stop, batch))
            assert len(span) <= layout.rows_per_block
            held += span
            reads += -(-span.stop // 8) - span.start // 8 if span else 0
        first = rank * layout.rows
        assert held == list(range(first, min(first + layout.rows, batch)))
    slots = batch / 8
    assert 1 <= reads / slots <= most
    assert reads <= slots + world_size


def test_only_a_huge_slot_is_cut():
    rows = MOST_BYTES // 64
    assert Layout.fit(plan(256, 64, 8), 2, rows).share == 8
    assert Layout.fit(plan(256, 64, 8), 2, rows + 1).share == 1


@pytest.mark.parametrize(
    "layout",
    [Layout(2, 100, 4, 7, 8), Layout(3, 21, 2, 3, 8), Layout(1, 5, 2, 3), Layout(1, 3, 1, 1)],
)
def test_batches_are_the_rows_of_their_step(layout):
    arrays, held = Arrays(), []
    batch_rows = layout.world_size * layout.rows
    for window, rank in itertools.product(range(3), range(layout.world_size)):
        blocks = blocks_of(layout, window, rank)
        for k, batch in enumerate(assemble(iter(blocks), layout, rank, arrays)):
            first = (window * layout.window + k) * batch_rows + rank * layout.rows
            assert (batch.place == np.arange(first, first + layout.rows)).all()
            assert batch.valid.all() and batch.truncated == 0 and batch.bad == ()
            held.append((first, batch))
    # Whoever keeps a batch keeps its content, though arrays are used again.
    assert all((batch.place == first + np.arange(layout.rows)).all() for first, batch in held)


def test_nothing_comes_of_a_window_that_ends_early():
    layout = Layout(1, 5, 2, 3)
    assert not list(assemble(blocks_of(layout, 0)[:2], layout, 0, Arrays()))


def test_an_array_is_used_again_when_nobody_has_it():
    arrays = Arrays()
    first = arrays.take("pixels", (2, 2), np.uint8)
    view, address = first[1:], first.ctypes.data
    assert arrays.take("pixels", (2, 2), np.uint8).ctypes.data != address
    del first
    assert arrays.take("pixels", (2, 2), np.uint8).ctypes.data != address, "its view is alive"
    del view
    assert arrays.take("pixels", (2, 2), np.uint8).ctypes.data == address
