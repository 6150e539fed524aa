"""The end of a run: export the weights, evaluate them on the cluster, sum up."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import ray

from clip_ray import model as models
from clip_ray.config import Config
from clip_ray.data.quarantine import count_reasons
from clip_ray.errors import CheckpointError
from clip_ray.eval.evaluate import evaluate
from clip_ray.eval.holdout import evaluate_holdout
from clip_ray.eval.report import confusion_figure, loss_figure, similarity_figure
from clip_ray.inference import Encoder
from clip_ray.registry import load_export, write_export
from clip_ray.runtime.cluster import Share
from clip_ray.storage import open_store
from clip_ray.train.checkpoint import Checkpoints
from clip_ray.train.cost import held_s
from clip_ray.train.journal import Row, lineage, read_journal
from clip_ray.train.recovery import recoveries, time_in_steps
from clip_ray.train.rundir import Run
from clip_ray.train.state import Progress, restore_weights

EVALUATION_TIMEOUT_S = 3600.0


def export_model(run: Run, run_id: str | None) -> str:
    """Write the newest commit's weights to `export/`; return the model digest."""
    found = Checkpoints(run.store).newest(lambda commit, why: None)
    if found is None:
        raise CheckpointError(f"{run.store.uri}: no checkpoint to export")
    commit, files = found
    if commit.step < run.total_steps:
        raise CheckpointError(
            f"{run.store.uri}: the commit of step {run.total_steps} is damaged, the newest that "
            f"verifies is of step {commit.step}; start the run again to compute the rest anew"
        )
    model = models.build(run.config.model)
    restore_weights(model, files)
    origin = {
        "run": run.config.run.name,
        "run_id": run_id,
        "step": commit.step,
        "manifest_digest": run.manifest.digest,
        "plan_digest": run.plan.digest,
    }
    run.store.delete("export")
    turned = run.config.data.exif_orientation
    return write_export(run.store.child("export"), model, run.tokenizer, origin, turned)


def evaluate_model(
    run: Run, share: Share, say: Callable[[str], None]
) -> tuple[dict[str, Row], dict[str, bytes]]:
    """Evaluate the export on each data set and the hold-out, one Ray task each.

    An evaluation that fails is reported under its data set as `error`; it does not fail the run.

    Returns:
        The results by data set, and PNG figures by name.
    """
    task = _evaluate_task.options(num_cpus=1, num_gpus=share.worker_gpus)
    device = "cuda" if share.worker_gpus else "cpu"
    jobs: dict[str, Any] = {}
    for uri in run.config.eval.datasets:
        name = uri.rstrip("/").rsplit("/", 1)[-1]
        jobs[uri if name in jobs else name] = task.remote(
            run.store.uri, run.config, device, uri, None
        )
    if run.manifest.holdout.any():
        jobs["holdout"] = task.remote(
            run.store.uri, run.config, device, None, ray.put(run.manifest)
        )
    results: dict[str, Row] = {}
    figures: dict[str, bytes] = {}
    for name, job in jobs.items():
        say(f"evaluating on {name}")
        try:
            results[name], drawn = ray.get(job, timeout=EVALUATION_TIMEOUT_S)
            figures |= {f"{name}-{kind}": figure for kind, figure in drawn.items()}
        except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError) as error:
            results[name] = {"error": f"{type(error).__name__}: {error}".strip().splitlines()[-1]}
            say(f"! {name}: {results[name]['error']}")
    return results, figures


@ray.remote
def _evaluate_task(
    run_uri: str, config: Config, device: str, dataset: str | None, manifest: Any
) -> tuple[Row, dict[str, bytes]]:
    model, tokenizer, info = load_export(open_store(run_uri, config.run.s3).child("export"))
    encoder = Encoder(model, tokenizer, info, device=device, batch=config.eval.batch)
    if dataset is None:
        result = evaluate_holdout(encoder, manifest, config.data)
    else:
        result = evaluate(encoder, dataset, config.eval.batch, s3=config.data.s3)
    figures = {}
    if result.similarity is not None:
        figures["similarity"] = similarity_figure(result.similarity)
    if result.confusion is not None:
        figures["confusion"] = confusion_figure(result.confusion, result.classnames)
    return result.to_dict(), figures


def summarize(
    run: Run,
    run_id: str | None,
    results: dict[str, Row],
    figures: dict[str, bytes],
    digest: str,
    begun: float,
) -> Row:
    """Write `summary.json` and the figures of a run that has reached its last step."""
    config = run.config
    checkpoints = Checkpoints(run.store)
    commit = checkpoints.commits()[-1]
    rows = list(read_journal(run.store, "metrics"))
    line = lineage(rows, checkpoints.starts())
    events = list(read_journal(run.store, "events"))
    started = min((e["time"] for e in events if e["event"] == "attempt"), default=begun)
    ended = rows[-1]["time"] if rows else begun
    # The first step of each attempt waits for Ray Data to start: it is in ettr, not in the speed.
    median_step = statistics.median(row["step_s"] for row in line) if line else 0.0
    hours = (held_s(run.store, [*rows, *events], begun) + time.time() - begun) / 3600
    price = config.cluster.price_per_hour
    progress = Progress.from_bytes(run.store.read(f"checkpoints/{commit.name}/state.json"))
    summary: Row = {
        "status": "finished",
        "run": config.run.name,
        "run_id": run_id,
        "steps": commit.step,
        "samples": commit.step * config.train.global_batch,
        "passes": round(run.plan.passes_at(commit.step), 3),
        "loss": progress.loss,
        "samples_per_s": config.train.global_batch / median_step if line else 0.0,
        "seconds": ended - started,
        "ettr": time_in_steps(line, events),
        "cluster_hours": hours,
        "cost": None if price is None else price * hours,
        "attempts": sum(e["event"] == "attempt" for e in events),
        "recoveries": recoveries(rows, events),
        "recomputed_steps": len(rows) - len(line),
        "bad_samples": progress.bad,
        "bad_reasons": count_reasons(read_journal(run.store, "quarantine"), line),
        "truncated_captions": progress.truncated,
        "skipped_steps": progress.skipped,
        "checkpoint": checkpoints.uri(commit),
        "export": f"{run.store.uri}/export",
        "digest": digest,
        "manifest_digest": run.manifest.digest,
        "evaluation": results,
    }
    figures["loss"] = loss_figure(line)
    for name, figure in figures.items():
        run.store.write(f"figures/{name}.png", figure)
    run.store.write("summary.json", json.dumps(summary, indent=1).encode())
    return summary
