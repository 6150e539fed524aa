"""The sizing rule against steps and images measured here: CPU time, one thread, ratios in one run.

What jobs/plan.py says of micro-batches, checkpointed gradients and patch dropout are operations; a
step on a CPU takes time. Their ratios to the plain step must agree within ERROR: what is not matrix
products (norms, activations, the optimizer, which is left out here) grows by other ratios.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from clip_ray.config import ModelConfig, TextConfig, VisionConfig
from clip_ray.contrastive import clip_loss, contrastive_step
from clip_ray.images import decode, train_crop
from clip_ray.model import build
from clip_ray.sizing import Assumptions
from clip_ray.sizing.calibration import executed_flops
from clip_ray.sizing.counts import count
from tests.pictures import photo

pytestmark = pytest.mark.bench

ERROR = 0.12
ROWS = 16
# Wide enough for matrix products to be most of a step, as they are of the models that are planned.
MODEL = ModelConfig(
    embed_dim=256,
    vision=VisionConfig(image_size=128, patch_size=16, width=512, layers=4, heads=8),
    text=TextConfig(context_length=32, vocab_size=4096, width=384, layers=4, heads=6),
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def step_of(
    micro_batch: int = ROWS, patch_dropout: float = 0.0, grad_checkpointing: bool = False
) -> Callable[[], None]:
    """Return a step's forward and backward pass over ROWS pairs."""
    model = build(MODEL, seed=0)
    model.set_training(patch_dropout, grad_checkpointing)
    model.train()
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (ROWS, 3, 128, 128), dtype=torch.uint8, generator=generator)
    ids = torch.randint(1, 4000, (ROWS, 32), generator=generator)
    ids[:, -1] = 4095
    inputs = [pixels, ids] + ([torch.arange(ROWS)] if patch_dropout else [])
    micro_batches = list(zip(*(tensor.split(micro_batch) for tensor in inputs), strict=True))

    def run() -> None:
        model.zero_grad()
        contrastive_step(model, micro_batches, clip_loss)

    run()
    return run


def in_turn(runs: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Return the least CPU seconds of each; in rounds, so that all meet the same load."""
    least = dict.fromkeys(runs, float("inf"))
    for _ in range(rounds):
        for name, run in runs.items():
            begun = time.process_time()
            run()
            least[name] = min(least[name], time.process_time() - begun)
    return least


def test_what_micro_batches_checkpointing_and_dropout_cost_is_what_is_planned() -> None:
    pair, dropped = count(MODEL), count(MODEL, patch_dropout=0.5)
    planned = {
        "plain": executed_flops(pair),
        "4 micro-batches": executed_flops(pair, two_passes=True),
        "checkpointing": executed_flops(pair, grad_checkpointing=True),
        "both": executed_flops(pair, two_passes=True, grad_checkpointing=True),
        "patch dropout 0.5": executed_flops(dropped),
    }
    measured = in_turn(
        {
            "plain": step_of(),
            "4 micro-batches": step_of(micro_batch=4),
            "checkpointing": step_of(grad_checkpointing=True),
            "both": step_of(micro_batch=4, grad_checkpointing=True),
            "patch dropout 0.5": step_of(patch_dropout=0.5),
        },
        rounds=5,
    )
    print(f"\nplain step of {ROWS} pairs: {measured['plain']:.2f} s of CPU")
    errors = {}
    for name in planned:
        expected, found = (times[name] / times["plain"] for times in (planned, measured))
        errors[name] = found / expected - 1
        print(f"{name:<20} planned {expected:.2f}x, measured {found:.2f}x ({errors[name]:+.0%})")
    assert {name for name, error in errors.items() if abs(error) > ERROR} == set()


def test_an_image_costs_a_cpu_what_is_assumed_within_a_factor_of_2() -> None:
    data, rng = photo(0, 256), np.random.default_rng(0)

    def hundred() -> None:
        for _ in range(100):
            train_crop(decode(data, 1 << 26), 224, rng)

    measured_ms = in_turn({"image": hundred}, rounds=5)["image"] * 10
    assumed_ms = Assumptions().decode_ms
    print(f"\nan image: {measured_ms:.2f} ms of CPU, {assumed_ms:.2f} are assumed")
    assert assumed_ms / 2 < measured_ms < assumed_ms * 2
