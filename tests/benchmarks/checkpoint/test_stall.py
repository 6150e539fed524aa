"""What a checkpoint holds up: the snapshot to host memory, beside a step of the same model.

.venv/bin/python -m pytest -m bench -s tests/benchmarks/checkpoint

The files are written by a thread, which this leaves out. A larger batch only makes the step longer.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import pytest
import torch

from clip_ray.config import Config
from clip_ray.contrastive import clip_loss, contrastive_step
from clip_ray.train.state import build_state, snapshot

pytestmark = pytest.mark.bench
ROUNDS = 3


def cpu_seconds(run: Any) -> float:
    begun = time.process_time()
    run()
    return time.process_time() - begun


@pytest.mark.parametrize(
    ("name", "batch", "vocabulary"), [("ViT-tiny-8-64", 64, 4096), ("ViT-B-32", 16, 49408)]
)
def test_a_snapshot_takes_less_than_a_step(name: str, batch: int, vocabulary: int) -> None:
    settings = {
        "train": {"steps": 1, "global_batch": batch},
        "model": {"name": name, "text": {"vocab_size": vocabulary}},
    }
    config = Config.model_validate(settings)
    model, optimizer = build_state(config)
    side, length = config.model.vision.image_size, config.model.text.context_length
    pixels = torch.randint(0, 255, (batch, 3, side, side), dtype=torch.uint8)
    ids = torch.randint(1, vocabulary, (batch, length), dtype=torch.int32)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        contrastive_step(model, [(pixels, ids)], clip_loss)
        optimizer.step()

    step()  # makes the moments
    steps, copies = [], []
    for _ in range(ROUNDS):
        steps.append(cpu_seconds(step))
        copies.append(cpu_seconds(lambda: snapshot(model, optimizer)))
    ratio = statistics.median(copies) / statistics.median(steps)
    megabytes = sum(3 * p.nbytes for p in model.parameters()) / 1e6
    print(
        f"{name}: {megabytes:.0f} MB, snapshot {statistics.median(copies):.3f} s of CPU, a step of "
        f"{batch} {statistics.median(steps):.3f} s: {ratio:.2f} steps"
    )
    assert ratio <= 1
