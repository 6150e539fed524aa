"""What faults have cost a run: its recoveries, told from its journals."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from clip_ray.train.journal import Row

_CAUSES = {
    "hang": "hang",
    "yield": "resize",
    "preempted": "preempted",
    "controller_hang": "controller hang",
    "rollback": "rollback",
    "attempt_failed": "workers failed",
}
RESTARTED = "job restarted"


def recoveries(metrics: Sequence[Row], events: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Return how often each cause has ended an attempt, and the time that was lost by it.

    Lost is the time from the last step that counts to the first step of the next attempt, less
    that step itself: work that was done again, and the new start; for a job that was restarted
    also the time in which there was none.

    Args:
        metrics: rows of the journal of steps.
        events: rows of the journal of events.

    Returns:
        By cause: "times", and "seconds" in all.
    """
    usual = statistics.median(row["step_s"] for row in metrics) if metrics else 0.0
    begun = [event for event in events if event["event"] == "attempt"]
    found: dict[str, dict[str, float]] = {}
    for before, after in zip(begun, begun[1:], strict=False):
        between = [e for e in events if before["time"] <= e["time"] <= after["time"]]
        kinds = [e["event"] for e in between if e["event"] in _CAUSES]
        # A hang ends in failed workers, and a restarted job in neither.
        cause = _CAUSES["hang"] if "hang" in kinds else _CAUSES.get(kinds[-1]) if kinds else None
        one = found.setdefault(cause or RESTARTED, {"times": 0, "seconds": 0.0})
        one["times"] += 1
        first = next((r for r in metrics if r["attempt"] == after["attempt"]), None)
        kept = [r for r in metrics if before["attempt"] <= r["attempt"] < after["attempt"]]
        last = next((r for r in reversed(kept) if r["step"] <= after["from_step"]), before)
        until = first["time"] - usual if first is not None else after["time"]
        one["seconds"] += max(until - last["time"], 0.0)
    return found


def time_in_steps(line: Sequence[Row], events: Sequence[Row]) -> float:
    """Return the effective training time ratio: the share of the time in steps that count.

    The time is that from the first attempt's begin to the last step; 0 where there is no step.

    Args:
        line: the steps that led to the final weights (`journal.lineage`).
        events: rows of the journal of events.
    """
    if not line:
        return 0.0
    ended = line[-1]["time"]
    started = min((e["time"] for e in events if e["event"] == "attempt"), default=ended)
    useful = sum(row["step_s"] for row in line)
    return min(1.0, useful / max(ended - started, 1e-9))


def as_metrics(ettr: float, recovered: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Return what faults have cost as MLflow's metrics: `ettr`, `recovery/<cause>_<unit>`."""
    lost = {
        f"recovery/{cause.replace(' ', '_')}_{unit}": float(value)
        for cause, of in recovered.items()
        for unit, value in of.items()
    }
    return {"ettr": ettr, **lost}
