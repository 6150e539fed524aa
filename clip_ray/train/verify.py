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
from clip_ray.data.plan import Plan, Rows, samples_digest
from clip_ray.errors import CheckpointError
from clip_ray.storage import Store
from clip_ray.train.checkpoint import Checkpoints
from clip_ray.train.journal import lineage, read_journal
from clip_ray.train.rundir import build_plan, read_config, read_manifest

MAX_COUNTED = 20_000_000  # samples of a pass that are counted one by one; a byte each


@dataclass(frozen=True)
class Proof:
    """What a run's journal shows.

    Attributes:
        steps: steps that led to the final weights.
        first_missing: a step of them that the journal lacks; None if it lacks none.
        wrong: steps whose samples are not the plan's.
        passes: complete passes, each with every sample exactly once: of each source where they have
            weights, else of all in one; None if not counted.
        pools: what those are over, for a person.
        beyond: samples that were met twice in one pass, or in a pass beyond a source's max_passes.
        attempts: attempts that these steps come from.
        committed: step of the newest commit; the journal must reach it.
    """

    steps: int
    first_missing: int | None
    wrong: tuple[int, ...]
    passes: tuple[int, ...] | None
    attempts: int
    committed: int
    pools: tuple[str, ...] = ("all sources",)
    beyond: int = 0

    @property
    def holds(self) -> bool:
        """Tell whether the run is what its manifest says."""
        whole = self.first_missing is None and self.steps >= self.committed
        return self.steps > 0 and whole and not self.wrong and not self.beyond

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
        if self.beyond:
            lines.append(f"WRONG: {self.beyond} samples twice in a pass, or beyond max_passes")
        if self.holds:
            lines.append("each step held exactly the samples of the plan")
            lines += [
                f"{passes} complete passes over {pool}, each sample once in each of them"
                for pool, passes in zip(self.pools, self.passes or (), strict=False)
            ]
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
    pools = _pools(config, manifest)
    counted = manifest.total <= MAX_COUNTED
    counts = [_Counts(manifest, mask, most) for _, mask, most in pools] if counted else []
    for row in rows:
        samples = plan.step_rows(row["step"] - 1)
        if f"{samples_digest(samples.shard, samples.place):016x}" != row["samples_digest"]:
            wrong.append(row["step"])
        for count in counts:
            count.add(samples)
    return Proof(
        steps=len(rows),
        first_missing=missing,
        wrong=tuple(wrong),
        passes=tuple(count.complete for count in counts) if counted else None,
        attempts=len({row["attempt"] for row in rows}),
        committed=max((commit.step for commit in Checkpoints(run).commits()), default=0),
        pools=tuple(name for name, *_ in pools),
        beyond=sum(count.beyond for count in counts),
    )


def _pools(config: Config, manifest: Manifest) -> list[tuple[str, np.ndarray, int | None]]:
    """Return what passes are counted over: a name, its shards, and how many there may be."""
    sources = config.data.sources
    if all(source.weight is None for source in sources):
        return [("all sources", np.ones(len(manifest), bool), None)]
    return [
        (f"data.sources[{i}] {source.path}", manifest.source == i, source.max_passes)
        for i, source in enumerate(sources)
    ]


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
    """Counts each sample of each pass over some shards; forgets a pass when it is complete."""

    def __init__(self, manifest: Manifest, pool: np.ndarray, max_passes: int | None) -> None:
        counts = np.where(pool, manifest.train_counts, 0)
        self._pool, self._starts, self._total = pool, np.cumsum(counts) - counts, int(counts.sum())
        self._max = max_passes
        self._open: dict[int, np.ndarray] = {}
        self._left: dict[int, int] = {}
        self._done: set[int] = set()
        self.beyond = 0

    @property
    def complete(self) -> int:
        """Passes in which each sample was met."""
        return len(self._done)

    def add(self, rows: Rows) -> None:
        """Count the samples of a step."""
        mine = self._pool[rows.shard]
        at, turns = self._starts[rows.shard[mine]] + rows.place[mine], rows.turn[mine]
        for number in np.unique(turns).tolist():
            places, times = np.unique(at[turns == number], return_counts=True)
            if number in self._done or (self._max is not None and number >= self._max):
                self.beyond += int(times.sum())
                continue
            seen = self._open.setdefault(number, np.zeros(self._total, bool))
            again = seen[places]
            self.beyond += int((times - 1).sum() + again.sum())
            seen[places] = True
            left = self._left.get(number, self._total) - len(places) + int(again.sum())
            self._left[number] = left
            if not left:
                self._done.add(number)
                del self._open[number]
