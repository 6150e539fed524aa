"""A step's tensors: their micro-batches, and their way to the device one step ahead."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from clip_ray.config import Config
from clip_ray.data.blocks import Batch
from clip_ray.train.inputs import arrivals

ROWS, SIDE, LENGTH = 5, 4, 3


def batch_of(number: int, rows: int = ROWS, side: int = SIDE) -> Batch:
    rng = np.random.default_rng(number)
    pixels = torch.from_numpy(rng.integers(0, 256, (rows, side, side, 3), np.uint8)).movedim(-1, 1)
    return Batch(
        pixels=pixels,
        ids=torch.full((rows, LENGTH), number, dtype=torch.int32),
        valid=torch.ones(rows, dtype=torch.bool),
        shard=np.zeros(rows, np.int64),
        place=np.arange(rows),
        image_id=None,
        bad=(),
        truncated=0,
    )


def config_of(**train: object) -> Config:
    return Config.model_validate({"train": {"steps": 10, "global_batch": ROWS, **train}})


def test_rows_are_cut_into_equal_micro_batches_the_last_filled_up():
    threads = threading.active_count()
    arrived = list(arrivals(iter([batch_of(3)]), 3, config_of(micro_batch=2), torch.device("cpu")))
    assert threading.active_count() == threads, "nothing to prepare ahead on the CPU"
    inputs = arrived[0].inputs()
    assert [len(pixels) for pixels, _ in inputs.micro_batches] == [2, 2, 2]
    assert inputs.valid.tolist() == [True] * ROWS + [False]
    pixels = torch.cat([pixels for pixels, _ in inputs.micro_batches])
    assert torch.equal(pixels[:ROWS], arrived[0].batch.pixels)
    assert pixels.is_contiguous() and not pixels[ROWS:].any()


def test_dropped_patches_follow_the_position():
    def keys(batches: int, first: int) -> list[int]:
        config = config_of(patch_dropout=0.5)
        made = (batch_of(n) for n in range(batches))
        return [
            key
            for arrival in arrivals(made, first, config, torch.device("cpu"))
            for *_, key_B in arrival.inputs().micro_batches
            for key in key_B.tolist()
        ]

    assert keys(3, 7) == keys(5, 5)[2 * ROWS :]
    assert len(set(keys(5, 5))) == 5 * ROWS


@pytest.mark.gpu
def test_what_arrives_on_the_device_is_what_was_sent():
    """The device is busy with other work, so that a copy that is not waited for would show."""
    device = torch.device("cuda")
    big = torch.randn(4096, 4096, device=device)
    made = (batch_of(n, rows=64, side=224) for n in range(20))
    for number, arrival in enumerate(arrivals(made, 0, config_of(), device)):
        for _ in range(20):
            big = big @ big / 64
        pixels, ids = arrival.inputs().micro_batches[0]
        assert (ids == number).all()
        assert torch.equal(pixels.cpu(), arrival.batch.pixels), number


@pytest.mark.gpu
def test_an_error_of_the_reader_comes_through_the_thread():
    def batches():
        yield batch_of(0)
        raise OSError("the store is away")

    incoming = arrivals(batches(), 0, config_of(), torch.device("cuda"))
    next(incoming).inputs()
    with pytest.raises(OSError, match="the store is away"):
        next(incoming)
