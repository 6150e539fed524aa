"""A run's steps in one process without Ray, with the same rows void and the same steps poisoned.

The second opinion on a run in which data went bad: what it held must be all that made it differ.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace

import numpy as np
import torch

from clip_ray.data.blocks import Batch, read_batches
from clip_ray.data.manifest import Manifest
from clip_ray.data.shards import read_ordinals
from clip_ray.storage import Store
from clip_ray.train.hooks import PHASES
from clip_ray.train.journal import Row, lineage, read_journal
from clip_ray.train.loop import train
from clip_ray.train.rundir import Run, prepare, read_config
from clip_ray.train.state import Progress, build_state


class _Rows:
    """The loop's hooks: keeps the journal's rows and does nothing else."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def record(self, row: Row) -> None:
        self.rows.append(row)

    def quarantine(self, rows: list[Row]) -> None:
        raise AssertionError(f"the data are to be whole again: {rows}")

    def asked(self, due: bool) -> set:
        return set()

    def entered(self, step: int, phase: str) -> None:
        assert phase in PHASES

    def timed(self, seconds: dict[str, float]) -> None:
        pass

    def commit(self, progress: Progress) -> None:
        pass


def bare_rows(store: Store, void: bool = True, poisoned: Collection[int] = ()) -> list[Row]:
    """Train a finished run again, and return its journal's rows.

    Args:
        store: the run's directory; its data must be as they were at its start.
        void: leave out the rows that the run's quarantine names.
        poisoned: steps, from 0, whose pixels are NaN.
    """
    torch.set_num_threads(1)  # two that wait for each other starve beside other work
    run = prepare(store, read_config(store), _no_manifest, lambda text: None)
    left_out = quarantined(run) if void else set()
    model, optimizer = build_state(run.config, torch.device("cpu"))
    hooks = _Rows()
    train(
        model,
        optimizer,
        _spoiled(read_batches(run.reader(1), 0, 0, run.total_steps), left_out, poisoned),
        Progress(0, run.plan.digest),
        config=run.config,
        total_steps=run.total_steps,
        samples_per_pass=run.manifest.total,
        device=torch.device("cpu"),
        attempt=1,
        hooks=hooks,
    )
    return hooks.rows


def _no_manifest() -> Manifest:
    raise AssertionError("the run has one")


def quarantined(run: Run) -> set[tuple[int, int, int]]:
    """Return (step from 0, shard, place) of what was void in the lineage of the weights."""
    attempts = {
        row["step"] - 1: row["attempt"] for row in lineage(read_journal(run.store, "metrics"))
    }
    bad = [
        row
        for row in read_journal(run.store, "quarantine")
        if attempts[row["step"]] == row["attempt"]
    ]
    paths = [run.manifest.shard(index).path for index in range(len(run.manifest.train_counts))]
    found = set()
    for path in {row["shard"] for row in bad}:
        index = paths.index(path)
        entry = run.manifest.shard(index)
        places = np.arange(run.manifest.train_counts[index])
        ordinals = run.manifest.train_ordinals(index, places)
        source = run.config.data.sources[entry.source]
        samples = read_ordinals(entry, source, run.config.data.s3, ordinals)
        place_of = {sample.key: place for place, sample in enumerate(samples)}
        # The key of a sample that could not be read at all is its number in the shard.
        place_of |= {f"#{ordinal}": place for place, ordinal in enumerate(ordinals)}
        found |= {(row["step"], index, place_of[row["key"]]) for row in bad if row["shard"] == path}
    return found


def _spoiled(
    batches: Iterator[Batch], left_out: set[tuple[int, int, int]], poisoned: Collection[int]
) -> Iterator[Batch]:
    for step, batch in enumerate(batches):
        void = [
            (step, int(shard), int(place)) in left_out
            for shard, place in zip(batch.shard, batch.place, strict=True)
        ]
        batch = replace(batch, valid=batch.valid & ~torch.tensor(void))
        if step in poisoned:
            batch = replace(batch, pixels=torch.full(batch.pixels.shape, torch.nan))
        yield batch
