"""How a worker's rows are cut into blocks and put together again."""

from __future__ import annotations

import numpy as np
import pytest

from clip_ray.data.blocks import BLOCK_BYTES, Arrays, Block, Layout, assemble
from clip_ray.data.plan import Plan


def plan(global_batch: int, slot: int, window: int) -> Plan:
    sizes = dict(global_batch=global_batch, slot=slot, window=window)
    return Plan(np.array([4096]), np.array([0]), weights=None, seed=0, **sizes)


def blocks_of(layout: Layout, window: int) -> list[Block]:
    """Blocks whose rows count the worker's samples."""
    height = layout.rows_per_block
    found = []
    for chunk in range(layout.chunks):
        step = window * layout.window + np.arange(layout.window)
        row = chunk * height + np.arange(height)
        place = np.where(row < layout.rows, step[:, None] * layout.rows + row, -1).ravel()
        block: Block = {name: np.zeros((len(place), 1), np.uint8) for name in ("pixels", "ids")}
        block |= {"shard": place, "place": place, "valid": place >= 0}
        block |= {"truncated": place < 0, "bad": np.full(len(place), "", dtype=object)}
        found.append(block)
    return found


@pytest.mark.parametrize(
    ("world_size", "height", "rows_per_block"), [(2, 17, 16), (2, 7, 7), (3, 17, 16), (1, 999, 256)]
)
def test_blocks_are_cut_between_slots(world_size, height, rows_per_block):
    row_bytes = BLOCK_BYTES // (8 * height)
    layout = Layout.fit(plan(256, 64, 8), world_size, row_bytes)
    assert layout.rows_per_block == rows_per_block <= height
    assert (layout.chunks - 1) * rows_per_block < layout.rows <= layout.chunks * rows_per_block


@pytest.mark.parametrize(
    "layout", [Layout(2, 100, 4, 7, 8), Layout(1, 5, 2, 3), Layout(1, 3, 1, 1)]
)
def test_batches_are_the_rows_of_their_step(layout):
    arrays, held = Arrays(), []
    for window in range(3):
        for k, batch in enumerate(assemble(iter(blocks_of(layout, window)), layout, arrays)):
            first = (window * layout.window + k) * layout.rows
            assert (batch.place == np.arange(first, first + layout.rows)).all()
            assert batch.valid.all() and batch.truncated == 0 and batch.bad == ()
            held.append((first, batch))
    # Whoever keeps a batch keeps its content, though arrays are used again.
    assert all((batch.place == first + np.arange(layout.rows)).all() for first, batch in held)


def test_nothing_comes_of_a_window_that_ends_early():
    layout = Layout(1, 5, 2, 3)
    assert not list(assemble(blocks_of(layout, 0)[:2], layout, Arrays()))


def test_an_array_is_used_again_when_nobody_has_it():
    arrays = Arrays()
    first = arrays.take("pixels", (2, 2), np.uint8)
    view, address = first[1:], first.ctypes.data
    assert arrays.take("pixels", (2, 2), np.uint8).ctypes.data != address
    del first
    assert arrays.take("pixels", (2, 2), np.uint8).ctypes.data != address, "its view is alive"
    del view
    assert arrays.take("pixels", (2, 2), np.uint8).ctypes.data == address
