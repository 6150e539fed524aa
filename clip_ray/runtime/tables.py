"""Blocks as Arrow tables, as Ray Data carries them.

Two columns, whatever a block holds: Ray Data's cost of a block is that of its columns. The pixels
are a column of fixed size, which neither side copies; all else, a thousandth of them, lies pickled
in the first row of the other.
"""

from __future__ import annotations

import pickle

import numpy as np
import pyarrow as pa

from clip_ray.data.blocks import Block

REST_BYTES = 500  # of the smallest table, beside its pixels and ids


def to_table(block: Block, number: int, node: int) -> pa.Table:
    """Return a block as a table of as many rows.

    Args:
        block: the block; its pixels are not copied.
        number: see `Layout.block_at`.
        node: where it was made.
    """
    pixels = block["pixels"]
    rows = len(pixels)
    kind = pa.binary(pixels[0].nbytes)
    column = pa.FixedSizeBinaryArray.from_buffers(kind, rows, [None, pa.py_buffer(pixels)])
    others = {name: array for name, array in block.items() if name != "pixels"}
    rest = pickle.dumps((number, node, pixels.shape, others), protocol=5)
    return pa.table({"pixels": column, "rest": pa.array([rest, *[b""] * (rows - 1)], pa.binary())})


def from_table(table: pa.Table) -> tuple[Block, int, int]:
    """Return the block of a table, its number, and the node where it was made.

    The pixels cannot be written to: they lie in the object store.

    Raises:
        ValueError: the table is not one whole block.
    """
    rests = [rest for rest in table["rest"].to_pylist() if rest]
    if len(rests) != 1:
        raise ValueError(f"{len(rests)} blocks in one")
    number, node, shape, block = pickle.loads(rests[0])
    if table.num_rows != shape[0] or table["pixels"].num_chunks != 1:
        raise ValueError(f"{table.num_rows} rows of block {number}, which has {shape[0]}")
    (column,) = table["pixels"].chunks
    pixels = np.frombuffer(column.buffers()[1], np.uint8)[column.offset * column.type.byte_width :]
    return {"pixels": pixels[: np.prod(shape)].reshape(shape), **block}, number, node
