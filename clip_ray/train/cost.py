"""How long a run's jobs have held their cluster: what a price per hour is multiplied by."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from clip_ray.storage import Store
from clip_ray.train.checkpoint import Checkpoints
from clip_ray.train.journal import Row


def held_s(run: Store, rows: Iterable[Row], before: float) -> float:
    """Return the seconds for which jobs that began before a time have held the cluster.

    A job counts from its first attempt to its last sign of life: not what passed between two jobs,
    nor a job's start-up and, as a job that was killed leaves no other sign, its evaluation.

    Args:
        run: the run's directory.
        rows: of the run's journals; their times are the signs of life.
        before: seconds since 1970; later attempts, and signs, are another's.
    """
    attempts = Checkpoints(run).attempts()
    starts = [
        # The attempts of one job follow each other.
        next(group)["started"]
        for _, group in itertools.groupby(attempts, key=lambda attempt: attempt["driver"])
    ]
    starts = [start for start in starts if start < before]
    times = sorted(row["time"] for row in rows)
    held = 0.0
    for start, following in itertools.pairwise([*starts, before]):
        signs = [time for time in times if start <= time < following]
        held += signs[-1] - start if signs else 0.0
    return held
