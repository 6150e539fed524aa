"""What a checkpoint holds up: the step that commits beside the median step of the same run.

.venv/bin/python -m pytest -m bench -s tests/benchmarks/checkpoint

The loop, the snapshot and the writer are those of a run, in one process on all of this machine's
cores, which the thread that writes shares. A larger batch only makes the step longer.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clip_ray.config import Config
from clip_ray.data.blocks import Batch
from clip_ray.storage import LocalStore
from clip_ray.train.checkpoint import Checkpoints, Commit
from clip_ray.train.committer import Committer
from clip_ray.train.hooks import Word
from clip_ray.train.loop import train
from clip_ray.train.state import Progress, build_state, snapshot

pytestmark = pytest.mark.bench
WRITE_S = 120  # a bound


class Hooks:
    """A run's surroundings without Ray: commits are written, the rest is kept."""

    def __init__(self, run: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        checkpoints = Checkpoints(LocalStore(run))
        self._attempt = checkpoints.begin_attempt({})
        self._model, self._optimizer = model, optimizer
        self.rows: list[dict[str, Any]] = []
        self.events: list[dict[str, Any]] = []
        settings = Config.model_validate({"train": {"steps": 1}}).checkpoint
        self.committer = Committer(checkpoints, settings, 0, self.event, lambda: None)
        self._since = 0.0

    def event(self, name: str, **fields: Any) -> None:
        self.events.append({"event": name, **fields})

    def record(self, row: dict[str, Any]) -> None:
        self.rows.append(row)

    def quarantine(self, rows: list[dict[str, Any]]) -> None:
        raise AssertionError("no sample is bad")

    def asked(self, due: bool) -> set[Word]:
        return {"busy"} if self.committer.busy(due) else set()

    def entered(self, step: int, phase: str) -> None:
        self._since = time.perf_counter()

    def timed(self, seconds: dict[str, float]) -> None:
        pass

    def commit(self, progress: Progress) -> None:
        files = dict(snapshot(self._model, self._optimizer))
        stall_s = time.perf_counter() - self._since
        self.committer.begin(Commit(progress.step, self._attempt), files, 1, stall_s)

    def deferred(self, step: int) -> None:
        self.committer.deferred(step)


def batches(config: Config, size: int) -> Iterator[Batch]:
    """Yield one batch for ever."""
    side, length = config.model.vision.image_size, config.model.text.context_length
    ids = torch.randint(1, config.model.text.vocab_size, (size, length), dtype=torch.int32)
    pixels = torch.randint(0, 255, (size, 3, side, side), dtype=torch.uint8)
    place = np.arange(size, dtype=np.int64)
    valid = torch.ones(size, dtype=torch.bool)
    batch = Batch(pixels, ids, valid, np.zeros(size, np.int64), place, None, (), 0)
    return itertools.repeat(batch)


@pytest.mark.parametrize(
    ("name", "batch", "vocabulary", "steps", "every"),
    [("ViT-tiny-8-64", 64, 4096, 24, 4), ("ViT-B-32", 16, 49408, 8, 2)],
)
def test_a_commit_costs_less_than_a_step(
    tmp_path: Path, name: str, batch: int, vocabulary: int, steps: int, every: int
) -> None:
    settings = {
        "train": {"steps": steps, "global_batch": batch},
        "model": {"name": name, "text": {"vocab_size": vocabulary}},
        "checkpoint": {"every_steps": every},
    }
    config = Config.model_validate(settings)
    model, optimizer = build_state(config)
    hooks = Hooks(tmp_path, model, optimizer)
    train(
        model,
        optimizer,
        batches(config, batch),
        Progress(0, "plan"),
        config=config,
        total_steps=steps,
        samples_per_pass=10**9,
        device=torch.device("cpu"),
        attempt=1,
        hooks=hooks,
    )
    hooks.committer.join(WRITE_S)
    rows = hooks.rows[1:]  # the first makes the moments
    commits = [row for row in rows if row["time_checkpoint"]]
    usual = statistics.median(row["step_s"] for row in rows if not row["time_checkpoint"])
    written = [event for event in hooks.events if event["event"] == "commit"]
    assert len(commits) >= 3 and len(written) == len(commits)
    # The loop does not see what a step has waited for the commit before, the event does.
    told = [event["stall_s"] for event in written]
    stalls = [max(row["time_checkpoint"], t) for row, t in zip(commits, told, strict=True)]
    longer = statistics.median(row["step_s"] for row in commits) / usual
    stall = statistics.median(stalls)
    megabytes = sum(3 * p.nbytes for p in model.parameters()) / 1e6
    writing = statistics.median(event["write_s"] for event in written)
    print(
        f"{name}: {megabytes:.0f} MB, {len(commits)} commits, stall {min(stalls):.3f} to "
        f"{max(stalls):.3f} s, a step of {batch} {usual:.3f} s: {stall / usual:.2f} steps; a step "
        f"that commits takes {longer:.2f} of one that does not; written in {writing:.2f} s"
    )
    # What the journal says of a commit is what it held up, but for the start of a thread.
    assert all(said > 0.8 * held - 0.05 for said, held in zip(told, stalls, strict=True))
    assert stall <= usual
