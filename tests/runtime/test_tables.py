"""Blocks as tables; what Ray Data does to tables must not go unnoticed."""

from __future__ import annotations

import pickle

import numpy as np
import pyarrow as pa
import pytest
import ray.cloudpickle
from ray._private.arrow_serialization import _register_arrow_data_serializer

from clip_ray.runtime.tables import REST_BYTES, from_table, to_table

ROWS, SIDE = 6, 5


@pytest.fixture
def block() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "pixels": rng.integers(0, 256, (ROWS, SIDE, SIDE, 3), np.uint8),
        "ids": rng.integers(0, 9, (ROWS, 7), np.int32),
        "valid": np.arange(ROWS) % 2 == 0,
        "bad": np.array(["", '{"key": "é"}', "", "", "", ""], dtype=object),
    }


def test_a_block_comes_back_as_it_was_and_its_pixels_are_not_copied(block):
    table = to_table(block, 12, 1 << 59)
    assert table.num_rows == ROWS
    found, number, node = from_table(table)
    assert (number, node) == (12, 1 << 59)
    assert found.keys() == block.keys()
    for name, array in block.items():
        assert found[name].dtype == array.dtype and np.array_equal(found[name], array)
    assert np.shares_memory(found["pixels"], block["pixels"])


def test_a_block_goes_through_rays_serializer(block):
    _register_arrow_data_serializer_here()
    buffers: list[pickle.PickleBuffer] = []
    stored = ray.cloudpickle.dumps(
        to_table(block, 3, 4), protocol=5, buffer_callback=buffers.append
    )
    assert any(buffer.raw().nbytes == block["pixels"].nbytes for buffer in buffers)  # out of band
    found, *_ = from_table(pickle.loads(stored, buffers=buffers))
    assert np.array_equal(found["pixels"], block["pixels"])
    assert len(stored) < 4096


def _register_arrow_data_serializer_here() -> None:
    class Context:
        def _register_cloudpickle_reducer(self, kind: type, reduce: object) -> None:
            ray.cloudpickle.CloudPickler.dispatch[kind] = reduce

    _register_arrow_data_serializer(Context())


@pytest.mark.parametrize(("rows", "side", "length"), [(1, 1, 1), (8, 8, 1), (256, 32, 77)])
def test_a_table_is_larger_than_what_ray_is_told_to_end_blocks_at(rows, side, length):
    """A little, and not by half: Ray would join it with the next, or split it."""
    block: dict[str, np.ndarray] = {
        "pixels": np.zeros((rows, side, side, 3), np.uint8),
        "ids": np.zeros((rows, length), np.int32),
        "bad": np.full(rows, "", dtype=object),
        **{name: np.zeros(rows, bool) for name in ("valid", "truncated")},
        **{name: np.zeros(rows, np.int64) for name in ("shard", "place")},
    }
    told = rows * (3 * side**2 + 4 * length) + REST_BYTES
    assert told < to_table(block, 0, 0).nbytes
    block |= {"image_id": np.zeros(rows, np.int64)}
    assert to_table(block, 1 << 40, 1 << 59).nbytes < 1.5 * told


def test_blocks_that_were_joined_or_split_are_refused(block):
    table = to_table(block, 7, 0)
    joined = pa.concat_tables([table, to_table(block, 9, 0)]).combine_chunks()
    for wrong, words in (
        (joined, "2 blocks in one"),
        (table.slice(1), "0 blocks in one"),
        (table.slice(0, ROWS - 1), f"{ROWS - 1} rows of block 7, which has {ROWS}"),
    ):
        with pytest.raises(ValueError, match=words):
            from_table(wrong)
    padded = pa.concat_tables([table.slice(2), table])  # what is before a slice is not of it
    found, *_ = from_table(padded.combine_chunks().slice(ROWS - 2))
    assert np.array_equal(found["pixels"], block["pixels"])
