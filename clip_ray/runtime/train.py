"""The training job's driver: prepare the run, have it trained, finish it.

Ray Train supplies processes, placement and restarts. Its checkpoint machinery is not used: what a
run has reached is what its directory says (`train.checkpoint`).
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from clip_ray import errors
from clip_ray.config import Config, S3Options
from clip_ray.data.bundled import PREFIX, unbundle
from clip_ray.data.manifest import Manifest
from clip_ray.data.quarantine import BadSample, summarise
from clip_ray.errors import DataError, StorageError, TrainingError
from clip_ray.runtime.cluster import (
    Share,
    absolute,
    check_storage,
    connected,
    fit_to_gpus,
    is_local,
    ray_temp,
)
from clip_ray.runtime.finish import evaluate_model, export_model, summarize
from clip_ray.runtime.fit import fit_run
from clip_ray.runtime.index import index_data
from clip_ray.runtime.progress import start_block, summary_table
from clip_ray.runtime.publish import (
    RUN_ID_TIMEOUT_S,
    catch_up,
    close_tracker,
    publish,
    publish_faults,
    start_tracker,
)
from clip_ray.runtime.recorder import Recorder, send_event
from clip_ray.runtime.signals import Signals, owned_signals
from clip_ray.runtime.worker import Result
from clip_ray.storage import LocalStore, Store, open_store
from clip_ray.tracking import default_tracking_uri
from clip_ray.train.abandoned import end_abandoned_in_background
from clip_ray.train.checkpoint import Checkpoints
from clip_ray.train.initial import initial_weights
from clip_ray.train.journal import Row, read_journal
from clip_ray.train.lease import held_lease
from clip_ray.train.requests import Inbox
from clip_ray.train.rundir import Run, claim, prepare, read_summary, run_store

Say = Callable[[str], None]
LOOK_S = 0.5  # between two looks at what the job is asked for, after training


@dataclass(frozen=True)
class Ended:
    """How a job ended: the run's summary, and the signal that stopped it, if one did."""

    summary: Row
    signal: int | None = None


def resolve(config: Config) -> Config:
    """Return the config with its paths absolute and bundled data copied into the storage."""
    storage = absolute(config.run.storage)
    store = open_store(storage, config.run.s3)

    def place(path: str) -> str:
        return absolute(unbundle(path, store))

    sources = tuple(
        s.model_copy(update={"path": place(s.path), "select": s.select and place(s.select)})
        for s in config.data.sources
    )
    # A bundled set is copied to where the run is: it is reached as the run is.
    bundled = any(s.path.startswith(PREFIX) for s in config.data.sources)
    s3 = config.run.s3 if bundled and config.data.s3 == S3Options() else config.data.s3
    data = config.data.model_copy(
        update={
            "s3": s3,
            "sources": sources,
            "exclude": config.data.exclude and place(config.data.exclude),
        }
    )
    vocab, tracking, weights = config.tokenizer.vocab, config.tracking, config.init.weights
    if weights is not None:
        weights = place(weights)
    if tracking.uri is not None and tracking.uri.startswith("sqlite:///"):
        uri = "sqlite:///" + absolute(tracking.uri.removeprefix("sqlite:///"))
        tracking = tracking.model_copy(update={"uri": uri})
    return config.model_copy(
        update={
            "run": config.run.model_copy(update={"storage": storage}),
            "data": data,
            "init": config.init.model_copy(update={"weights": weights}),
            "tracking": tracking,
            "eval": config.eval.model_copy(
                update={"datasets": tuple(place(path) for path in config.eval.datasets)}
            ),
            "tokenizer": config.tokenizer.model_copy(
                update={"vocab": vocab if vocab == "clip" else place(vocab)}
            ),
        }
    )


def pretrain(config: Config, command: list[str], say: Say = print) -> Ended:
    """Run a pre-training job: start or resume the run, train, export, evaluate, register.

    Args:
        config: the run's configuration; relative paths are resolved here.
        command: the command line, shown as the way to resume.
        say: prints a line for the user.

    Raises:
        ClipRayError: what kept the run from starting or from ending.
    """
    config = resolve(config)
    store = run_store(config)
    with owned_signals() as stop, held_lease(store, say) as lease_lost:
        if claim(store, config):
            say(f"run {config.run.name} exists in {store.uri}")
        done = _finished(store, config, say)
        if done is not None:
            return Ended(done)
        with contextlib.closing(Inbox(store)) as inbox:
            try:
                return _start(config, store, command, stop, lease_lost, inbox, say)
            except _AskedToEndError as asked:
                say(f"asked by {asked}: ended before training began")
                return Ended(_stopped(store, None, command, say))


def _start(
    config: Config,
    store: Store,
    command: list[str],
    stop: Signals,
    lease_lost: threading.Event,
    inbox: Inbox,
    say: Say,
) -> Ended:
    """Start Ray, prepare the run, and run it; the lease is held."""

    def check() -> None:
        inbox.take()
        if inbox.stop_by:
            raise _AskedToEndError(inbox.stop_by)

    config, gpu = fit_to_gpus(config, say)
    token_dir = Path(store.uri) if isinstance(store, LocalStore) else ray_temp()
    say("starting Ray" if is_local(config.cluster) else "connecting to Ray")
    check()
    with connected(config, gpu, token_dir) as share:
        # Ray has put its own handler of SIGTERM in place of ours.
        stop.own()
        stop.lease_lost = lease_lost
        check()
        tracking_uri = default_tracking_uri(config.tracking.uri, config.run.storage)
        check_storage(config.run.storage, tracking_uri)
        run = prepare(store, config, lambda: index_data(config.data, store, say, check), say)
        check()
        if config.init.weights is not None and not Checkpoints(store).commits():
            # What does not fit is refused here, before any worker starts.
            _, digest = initial_weights(run.config, run.tokenizer, store)
            say(f"beginning from {config.init.weights} (digest {digest[:12]})")
        return _run_job(run, share, command, stop, inbox, say)


class _AskedToEndError(Exception):
    """Somebody asked for the run's end before training began; who, is its text."""


def _finished(store: Store, config: Config, say: Say) -> Row | None:
    """Return the summary of a run that has nothing left to do."""
    summary = read_summary(store)
    if summary is None or not store.exists("manifest.parquet"):
        return None
    run = prepare(store, config, _no_manifest, say)
    if summary.get("status") != "finished" or summary["steps"] < run.total_steps:
        return None
    say(f"run {config.run.name} is finished; add steps with --run.extend N\n")
    summary = catch_up(run, summary, say)
    say(summary_table(summary, run))
    return summary


def _no_manifest() -> Manifest:
    raise AssertionError("the caller has checked that the manifest is there")


def _run_job(
    run: Run, share: Share, command: list[str], stop: Signals, inbox: Inbox, say: Say
) -> Ended:
    recorder = _start_recorder(run)

    def flush() -> None:
        ray.get(recorder.append.remote("driver", 0, [], durable=True), timeout=60)

    def event(name: str, details: Row) -> None:
        send_event(recorder, {"time": time.time(), "event": name, **details})

    tracker = start_tracker(run, flush, event)
    end_abandoned_in_background(tracker.uri, run.config.run.storage, run.config.run.s3)
    status, summary = "FAILED", None
    try:
        begun = time.time()
        start_step = _start_step(run)
        say(start_block(run, share, start_step, tracker.uri, command))
        if start_step < run.total_steps:
            result = fit_run(run, share, recorder, tracker, stop, start_step, inbox)
            _raise_failure(result, run)
            assert result.outcome is not None
            if result.outcome.reason == "stopped":
                status = "KILLED"
                return Ended(
                    _stopped(run.store, run.total_steps, command, say) | {"run_id": tracker.run_id},
                    stop.received,
                )
        with _ended_when_asked(inbox, event):
            digest = export_model(run, tracker.wait_run_id(RUN_ID_TIMEOUT_S))
            say(f"exported: {run.store.uri}/export (digest {digest[:12]})")
            results, figures = evaluate_model(run, share, say)
            summary = summarize(run, tracker.run_id, results, figures, digest, begun)
            summary = publish(run, tracker, summary, say)
        say("\n" + summary_table(summary, run))
        status = "FINISHED"
        return Ended(summary)
    except SystemExit:
        status = "KILLED"
        why = f"asked by {inbox.stop_by}" if inbox.stop_by else stop.name
        say(f"{why}: stopped; {_last_commit(run)}\nto go on: {' '.join(command)}")
        if inbox.stop_by:
            return Ended({"status": "stopped", "steps": run.total_steps})
        raise
    except Exception as error:
        error.add_note(f"{_last_commit(run)}; to resume: {' '.join(command)}")
        raise
    finally:
        with contextlib.suppress(ray.exceptions.RayError, ray.exceptions.GetTimeoutError):
            ray.get(recorder.close.remote(), timeout=60)
        if summary is None:
            publish_faults(run, tracker)
        close_tracker(run, tracker, status, summary, say)


@contextlib.contextmanager
def _ended_when_asked(inbox: Inbox, event: Callable[[str, Row], None]) -> Iterator[None]:
    """While the block runs, a request to stop does as SIGTERM does: there is nothing to commit."""
    over = threading.Event()

    def look() -> None:
        while not over.wait(LOOK_S):
            for request in inbox.take():
                event("asked", {"wish": request.wish, "by": request.by})
            if inbox.stop_by:
                # To that thread, so that what it waits for is interrupted.
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
                return

    looking = threading.Thread(target=look, name="asked", daemon=True)
    looking.start()
    try:
        yield
    finally:
        over.set()
        looking.join()


def _last_commit(run: Run) -> str:
    try:
        commits = Checkpoints(run.store).commits()
    except StorageError:
        return "the storage does not answer: what is committed last is not known"
    return f"last commit: {commits[-1].name}" if commits else "nothing is committed yet"


def _start_step(run: Run) -> int:
    """Return the step that the run goes on from; a last commit is believed only if it verifies."""
    checkpoints = Checkpoints(run.store)
    commits = checkpoints.commits()
    if commits and commits[-1].step >= run.total_steps:
        verified = checkpoints.newest(lambda commit, why: None)
        return verified[0].step if verified else 0
    return commits[-1].step if commits else 0


def _start_recorder(run: Run) -> Any:
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor: Any = ray.remote(Recorder)
    options = {"num_cpus": 0, "max_restarts": -1, "scheduling_strategy": here}
    return actor.options(**options).remote(run.store.uri, run.config.run.s3)


def _raise_failure(result: Result, run: Run) -> None:
    """Raise what ended the training for good; a retry cannot mend it."""
    if result.error is not None:
        kind, message = result.error
        raise getattr(errors, kind, TrainingError)(message)
    assert result.outcome is not None
    progress = result.outcome.progress
    if result.outcome.reason == "bad-data":
        rows = list(read_journal(run.store, "quarantine"))
        bad = [BadSample(r["key"], r["reason"], shard=r["shard"]) for r in rows]
        seen = progress.step * run.config.train.global_batch
        raise DataError(
            f"{progress.bad} of {seen} samples are undecodable, more than data.max_bad_fraction "
            f"{run.config.data.max_bad_fraction:g} allows: {summarise(bad)}; all of them are in "
            f"{run.store.uri}/quarantine.jsonl. Raise the limit, or mend the data and train under "
            "another run.name"
        )
    if result.outcome.reason == "nonfinite":
        last = progress.step
        rows_of_step = run.plan.step_rows(last - 1)
        shards = sorted({run.manifest.shard(int(s)).path for s in set(rows_of_step.shard)})[:3]
        raise TrainingError(
            f"not finite up to step {last}, again after a roll-back: {result.outcome.detail}. "
            "Lower optim.lr (under another run.name), or look at the samples of these steps "
            f"(python jobs/verify_run.py --run {run.store.uri} --step {last}; shards "
            f"{', '.join(shards)})"
        )


def _stopped(store: Store, total_steps: int | None, command: list[str], say: Say) -> Row:
    commits = Checkpoints(store).commits()
    step = commits[-1].step if commits else 0
    say(
        f"stopped at step {step}{'' if total_steps is None else f' of {total_steps}'}; "
        f"{f'committed: {commits[-1].name}' if commits else 'nothing is committed yet'}\n"
        f"to resume: {' '.join(command)}"
    )
    return {"status": "stopped", "steps": step}
