"""The proof of exactly-once: a run's journal against what its manifest and plan say.

Each step journals an order-free digest of the samples that its workers really held. Recomputing
it from the plan alone shows that no sample was lost, repeated or swapped, whatever happened to
the run in between.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from clip_ray.config import Config
from clip_ray.data.manifest import Manifest
from clip_ray.data.plan import Plan, samples_digest
from clip_ray.errors import CheckpointError
from clip_ray.storage import Store
from clip_ray.train.checkpoint import Checkpoints
from clip_ray.train.journal import lineage, read_journal
from clip_ray.train.rundir import build_plan, read_config, read_manifest

MAX_COUNTED = 20_000_000  # samples of a pass that are counted one by one; 8 bytes each


@dataclass(frozen=True)
class Proof:
    """What a run's journal shows.

    Attributes:
        steps: steps that led to the final weights.
        first_missing: a step of them that the journal lacks; None if it lacks none.
        wrong: steps whose samples are not the plan's.
        passes: complete passes, each with every sample exactly once; None if not counted.
        attempts: attempts that these steps come from.
        committed: step of the newest commit; the journal must reach it.
    """

    steps: int
    first_missing: int | None
    wrong: tuple[int, ...]
    passes: int | None
    attempts: int
    committed: int

    @property
    def holds(self) -> bool:
        """Tell whether the run is what its manifest says."""
        whole = self.first_missing is None and self.steps >= self.committed
        return self.steps > 0 and whole and not self.wrong

    def as_text(self) -> str:
        """Return the findings in a few lines."""
        lines = [f"{self.steps} steps, from {self.attempts} attempts"]
        if self.first_missing is not None:
            lines.append(f"WRONG: step {self.first_missing} is not in the journal")
        if self.steps < self.committed:
            lines.append(f"WRONG: the journal ends before the commit of step {self.committed}")
        if self.wrong:
            shown = ", ".join(map(str, self.wrong[:10]))
            lines.append(f"WRONG: {len(self.wrong)} steps held other samples: {shown}")
        if self.holds:
            lines.append("each step held exactly the samples of the plan")
            if self.passes is not None:
                lines.append(f"{self.passes} complete passes, each sample once in each of them")
        return "\n".join(lines)


def verify(run: Store) -> Proof:
    """Recompute the samples of each step that led to the run's final weights.

    Raises:
        CheckpointError: there is no run, or none that has a manifest and a journal.
    """
    config, manifest, plan = _load(run)
    checkpoints = Checkpoints(run)
    rows = lineage(read_journal(run, "metrics"), checkpoints.starts())
    if not rows:
        raise CheckpointError(f"{run.uri}: metrics.jsonl has no steps yet")
    steps = [row["step"] for row in rows]
    missing = next((s for s, there in enumerate(steps, 1) if s != there), None)
    wrong = []
    counts = _Counts(manifest) if manifest.total <= MAX_COUNTED else None
    for row in rows:
        samples = plan.step_rows(row["step"] - 1)
        if f"{samples_digest(samples.shard, samples.place):016x}" != row["samples_digest"]:
            wrong.append(row["step"])
        if counts is not None:
            counts.add(samples.shard, samples.place, samples.turn)
    pooled = all(source.weight is None for source in config.data.sources)
    return Proof(
        steps=len(rows),
        first_missing=missing,
        wrong=tuple(wrong),
        passes=counts.complete() if counts is not None and pooled else None,
        attempts=len({row["attempt"] for row in rows}),
        committed=max((commit.step for commit in checkpoints.commits()), default=0),
    )


def samples_of_step(run: Store, step: int) -> Iterator[str]:
    """Yield a line for each sample of a step, counted from 1: pass, shard and ordinal in it."""
    _, manifest, plan = _load(run)
    rows = plan.step_rows(step - 1)
    for shard, place, turn in zip(rows.shard, rows.place, rows.turn, strict=True):
        ordinal = int(manifest.train_ordinals(int(shard), np.array([place]))[0])
        yield f"pass {turn}  {manifest.shard(int(shard)).path}  sample {ordinal}"


def _load(run: Store) -> tuple[Config, Manifest, Plan]:
    manifest = read_manifest(run)
    if manifest is None or not run.exists("config.yaml"):
        raise CheckpointError(f"{run.uri}: not a run's directory (no config.yaml and manifest)")
    config = read_config(run)
    return config, manifest, build_plan(manifest, config)


class _Counts:
    """Counts each sample of each pass; forgets a pass when it is complete."""

    def __init__(self, manifest: Manifest) -> None:
        self._starts = np.cumsum(manifest.train_counts) - manifest.train_counts
        self._total = manifest.total
        self._open: dict[int, np.ndarray] = {}
        self._complete = 0

    def add(self, shard: np.ndarray, place: np.ndarray, turn: np.ndarray) -> None:
        for number in np.unique(turn):
            mine = turn == number
            seen = self._open.setdefault(int(number), np.zeros(self._total, np.uint8))
            np.add.at(seen, self._starts[shard[mine]] + place[mine], 1)
            if (seen == 1).all():
                self._complete += 1
                del self._open[int(number)]

    def complete(self) -> int:
        return self._complete
