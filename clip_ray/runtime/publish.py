"""What a run sends to MLflow beside its journal; see `tracking` for how it is sent."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from clip_ray.data.quarantine import count_reasons
from clip_ray.errors import ClipRayError, StorageError
from clip_ray.registry import register
from clip_ray.tracking import RUN_DIR, TrackedRun, Tracker, source_version
from clip_ray.train.checkpoint import Checkpoints
from clip_ray.train.journal import Row, lineage, read_journal
from clip_ray.train.recovery import as_metrics, recoveries, time_in_steps
from clip_ray.train.rundir import Run

RUN_ID_TIMEOUT_S = 10.0
FINISH_TIMEOUT_S = 30.0

Say = Callable[[str], None]


def start_tracker(
    run: Run,
    flush: Callable[[], None] = lambda: None,
    on_event: Callable[[str, dict[str, Any]], None] | None = None,
) -> Tracker:
    """Start the sink of a run and hand it the run's settings, source version and data.

    Args:
        run: the run.
        flush: makes the journal durable; called before it is read back.
        on_event: told of outages.
    """
    config = run.config

    def replay(step: int) -> Iterator[Row]:
        flush()
        return (row for row in read_journal(run.store, "metrics") if row["step"] >= step)

    version = source_version(Path(__file__).parents[2])
    tracker = Tracker(
        TrackedRun(config.run.name, f"{run.store.uri}#{run.plan.digest[:12]}", config.run.storage),
        config.tracking,
        run.store,
        replay,
        tags={f"clip_ray.source.{key}": str(value) for key, value in version.items()},
        on_event=on_event,
    )
    tracker.log_params(config.model_dump(mode="json"))
    tracker.set_tags({"clip_ray.plan_digest": run.plan.digest, RUN_DIR: run.store.uri})
    tracker.log_dataset(config.run.name, f"{run.store.uri}/manifest.parquet", run.manifest.digest)
    return tracker


def publish(run: Run, tracker: Tracker, summary: Row, say: Say) -> Row:
    """Send a finished run's results and figures, and register its export.

    Returns:
        The summary with the MLflow run and the model version; also written to the run.
    """
    config = run.config
    for name, metrics in summary["evaluation"].items():
        numbers = {
            f"{name}/{key}": float(value)
            for key, value in metrics.items()
            if isinstance(value, int | float)
        }
        tracker.log_metrics(numbers, summary["steps"])
    faults = as_metrics(summary["ettr"], summary.get("recoveries", {}))
    tracker.log_metrics(faults | _bad_metrics(summary.get("bad_reasons", {})), summary["steps"])
    for file in run.store.child("figures").files():
        tracker.log_figure(run.store.read(f"figures/{file}"), f"figures/{file}")
    run_id = tracker.wait_run_id(RUN_ID_TIMEOUT_S)
    summary = {**summary, "run_id": run_id}
    if config.tracking.register_model and run_id is not None:
        name = config.tracking.model_name or config.run.name
        tags = {"step": str(summary["steps"]), "run": config.run.name}
        try:
            version = register(run.store.child("export"), name, run_id, tags, tracker.uri)
            summary |= {"model_name": name, "model_version": version}
        except ClipRayError as error:
            say(f"! not registered: {error}")
    _write(run, summary)
    return summary


def _bad_metrics(reasons: dict[str, int]) -> dict[str, float]:
    return {f"bad/{reason}": float(count) for reason, count in reasons.items()}


def publish_faults(run: Run, tracker: Tracker) -> None:
    """Send what faults and bad samples have cost a run that has not reached its end."""
    with contextlib.suppress(StorageError):
        rows, events = (list(read_journal(run.store, name)) for name in ("metrics", "events"))
        if rows:
            line = lineage(rows, Checkpoints(run.store).starts())
            faults = as_metrics(time_in_steps(line, events), recoveries(rows, events))
            bad = _bad_metrics(count_reasons(read_journal(run.store, "quarantine"), line))
            tracker.log_metrics(faults | bad, rows[-1]["step"])


def close_tracker(run: Run, tracker: Tracker, status: str, summary: Row | None, say: Say) -> None:
    """End the sink within half a minute; say so, and how to catch up, where something is left."""
    if not tracker.finish(status, FINISH_TIMEOUT_S):
        say(
            f"MLflow at {tracker.uri} did not take everything ({tracker.lag().error}); the "
            "journal in the run's directory has it, and starting the run again sends it"
        )
    elif summary is not None and summary["run_id"] is not None:
        _write(run, {**summary, "published": True})


def catch_up(run: Run, summary: Row, say: Say) -> Row:
    """Send what MLflow still lacks of a finished run; return its summary."""
    if summary.get("published"):
        return summary
    say("MLflow lacks results of this run: sending them")
    tracker = start_tracker(run)
    tracker.offer(lineage(read_journal(run.store, "metrics"), Checkpoints(run.store).starts()))
    summary = publish(run, tracker, summary, say)
    close_tracker(run, tracker, "FINISHED", summary, say)
    return summary


def _write(run: Run, summary: Row) -> None:
    run.store.write("summary.json", json.dumps(summary, indent=1).encode())
