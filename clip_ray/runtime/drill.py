"""Drills: faults put into small runs on a user's own cluster and storage, and what came of them.

Each drill is a real job of its own, `jobs/pretrain.py` with the user's cluster, storage and
tracking and a model that trains in a minute. What the run's directory says afterwards is judged,
against a run that nothing was done to. Nothing but these runs is harmed: a node is lost by killing
the workers on it, not the node.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
import yaml

from clip_ray.config import Config
from clip_ray.errors import ClipRayError, TrainingError
from clip_ray.runtime.cluster import is_local
from clip_ray.runtime.pulse import signal_process
from clip_ray.storage import Store, open_store
from clip_ray.train.checkpoint import Checkpoints
from clip_ray.train.journal import Row, lineage, read_journal
from clip_ray.train.verify import verify

LENGTH_S = 40.0  # a run lasts so long when nothing happens: a fault comes in its middle
COMMITS = 20  # over its length
START_S = 600.0
JOB_S = 1800.0
SAME = 1e-4  # the last loss, relative: what another order of summation may change
_SHORT = 60  # steps of the run that tells how long a step takes
_NOBODY = "http://127.0.0.1:9"  # the discard port: refused at once


@dataclass(frozen=True)
class Finding:
    """What came of a drill.

    Attributes:
        fault: what was done.
        expected: what should come of it.
        observed: what did.
        back_s: seconds from the fault to the next step; none where there was none.
        held: whether it is what was expected.
    """

    fault: str
    expected: str
    observed: str
    back_s: float | None
    held: bool


@dataclass
class _Run:
    """A job that trains, and the run's directory."""

    recipe: Path
    name: str
    steps: int
    store: Store
    log: Path
    flags: tuple[str, ...] = ()
    jobs: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self) -> None:
        """Start the job: the same command each time, but for `flags`."""
        root = Path(__file__).resolve().parents[2]
        command = [sys.executable, str(root / "jobs" / "pretrain.py"), "--config", str(self.recipe)]
        command += ["--run.name", self.name, "--train.steps", str(self.steps)]
        command += ["--checkpoint.every_steps", str(max(self.steps // COMMITS, 1)), *self.flags]
        with open(self.log, "ab") as log:
            self.jobs.append(
                subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
            )

    def finish(self, status: int = 0) -> None:
        """Wait for the job's end. Raises TrainingError where it is another than expected."""
        try:
            found = self.jobs[-1].wait(JOB_S)
        except subprocess.TimeoutExpired:
            raise TrainingError(f"the job did not end within {JOB_S:g} s; see {self.log}") from None
        if found != status:
            last = self.log.read_text(errors="replace").strip().splitlines()[-1:]
            raise TrainingError(f"exit status {found}, {status} expected: {' '.join(last)}")

    def until_step(self, step: int) -> None:
        """Wait, bounded, until the run has made a step."""
        deadline = time.monotonic() + START_S
        while not any(row["step"] >= step for row in self.rows("metrics")):
            if self.jobs[-1].poll() is not None or time.monotonic() > deadline:
                raise TrainingError(f"the run did not reach step {step}; see {self.log}")
            time.sleep(0.2)

    def rows(self, journal: str) -> list[Row]:
        return list(read_journal(self.store, journal))

    def samples(self) -> list[str]:
        """Return the digest of each step's samples, of the steps that led to the weights."""
        line = lineage(self.rows("metrics"), Checkpoints(self.store).starts())
        return [row["samples_digest"] for row in line]

    def worker(self, number: int) -> None:
        """Send rank 0's process a signal, wherever it is."""
        attempt = [row for row in self.rows("events") if row["event"] == "attempt"][-1]
        if ray.is_initialized():
            signal_process(attempt["node"], attempt["pid"], number)
        else:
            os.kill(attempt["pid"], number)

    def kill(self) -> None:
        """Kill the job as a machine's loss would."""
        for job in self.jobs:
            if job.poll() is None:
                os.killpg(job.pid, signal.SIGKILL)
                job.wait(60)


def _kill_worker(run: _Run) -> None:
    run.worker(signal.SIGKILL)
    run.finish()


def _stop_worker(run: _Run) -> None:
    run.worker(signal.SIGSTOP)
    run.finish()


def _tell_worker(run: _Run) -> None:
    run.worker(signal.SIGTERM)
    run.finish()


def _kill_job(run: _Run) -> None:
    run.kill()
    run.start()
    run.finish()


def _stop_job(run: _Run) -> None:
    run.jobs[-1].send_signal(signal.SIGTERM)
    run.finish(128 + signal.SIGTERM)
    run.start()
    run.finish()


def _damage_commit(run: _Run) -> None:
    run.kill()
    commit = Checkpoints(run.store).commits()[-1]
    name = f"checkpoints/{commit.name}/model.safetensors"
    data = bytearray(run.store.read(name))
    data[len(data) // 2] ^= 1
    run.store.write(name, bytes(data))
    run.start()
    run.finish()


def _workers_by_node(run: _Run) -> dict[str, list[int]]:
    """Return the processes of the run's workers; rank 0's node is the first. None without Ray."""
    if not ray.is_initialized():
        return {}
    attempt = [row for row in run.rows("events") if row["event"] == "attempt"][-1]
    actors = ray._private.state.actors().values()
    alive = [
        (actor["Address"]["NodeID"], actor["Pid"], actor["JobID"])
        for actor in actors
        if actor["ActorClassName"] == "RayTrainWorker" and actor["State"] == "ALIVE"
    ]
    # Others may train on the cluster, too.
    first = (attempt["node"], attempt["pid"])
    jobs = {job for node, pid, job in alive if (node, pid) == first}
    found: dict[str, list[int]] = {attempt["node"]: []}
    for node, pid, job in alive:
        if job in jobs:
            found.setdefault(node, []).append(pid)
    return found


def _kill_workers_of_a_node(run: _Run) -> None:
    node, pids = list(_workers_by_node(run).items())[-1]
    for pid in pids:
        signal_process(node, pid, signal.SIGKILL)
    run.finish()


def _silence_mlflow(run: _Run) -> None:
    run.finish()
    run.flags = ()
    # The run is finished: this hands over what MLflow has not been told.
    run.start()
    run.finish()
    if not json.loads(run.store.read("tracking.json")).get("run_id"):
        raise TrainingError(f"MLflow was told nothing afterwards; see {run.log}")


@dataclass(frozen=True)
class _Drill:
    """A fault, and what should come of it.

    Attributes:
        fault: in words.
        expected: in words.
        event: journalled because of it.
        inject: does it to a run in its middle, and waits for the run's end.
        flags: of the job, until `inject` takes them away.
        begins_again: the run goes on from a commit.
        loses: steps may be done again.
        nodes: the workers must be on so many.
    """

    fault: str
    expected: str
    event: str
    inject: Callable[[_Run], None]
    flags: tuple[str, ...] = ()
    begins_again: bool = True
    loses: bool = True
    nodes: int = 1


_DRILLS = (
    _Drill("a worker is killed", "goes on from the last commit", "attempt_failed", _kill_worker),
    _Drill("a worker is stopped", "found, named and ended", "hang", _stop_worker),
    _Drill(
        "all workers of a node are killed",
        "goes on from the last commit",
        "attempt_failed",
        _kill_workers_of_a_node,
        nodes=2,
    ),
    _Drill(
        "a worker gets SIGTERM", "commits, no step is lost", "preempted", _tell_worker, loses=False
    ),
    _Drill("the job is killed", "the same command goes on", "attempt", _kill_job),
    _Drill("the job gets SIGTERM", "commits, no step is lost", "commit", _stop_job, loses=False),
    _Drill("the newest commit rots", "the one before is used", "commit_rejected", _damage_commit),
    _Drill(
        "MLflow does not answer",
        "trains on, tells it later",
        "tracking_outage",
        _silence_mlflow,
        flags=("--tracking.uri", _NOBODY),
        begins_again=False,
        loses=False,
    ),
)


def drill(config: Config, say: Callable[[str], None], length_s: float = LENGTH_S) -> list[Finding]:
    """Run all drills with a config's cluster, storage, tracking and device.

    Args:
        config: the user's.
        say: prints a line.
        length_s: seconds that a run lasts when nothing happens.

    Raises:
        ClipRayError: not even the run that nothing is done to ends.
    """
    folder = f"{config.run.storage}/drill-{time.strftime('%Y%m%d-%H%M%S')}"
    logs = Path(tempfile.mkdtemp(prefix="clip-ray-drill-"))
    say(f"runs: {folder}; the jobs' output: {logs}")
    with _connected(config):
        recipe = logs / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(_recipe(config, folder)))

        def run_of(name: str, steps: int, flags: tuple[str, ...] = ()) -> _Run:
            store = open_store(folder, config.run.s3).child(name)
            return _Run(recipe, name, steps, store, logs / f"{name}.log", flags)

        short = _undisturbed(run_of("short", _SHORT))
        rows = short.rows("metrics")[_SHORT // 2 :]
        step_s = sum(row["step_s"] for row in rows) / len(rows)
        steps = max(round(length_s / step_s), 2 * _SHORT)
        say(f"{1000 * step_s:.1f} ms a step, so {steps} steps a run")
        reference = _undisturbed(run_of("undisturbed", steps))
        found = []
        for number, one in enumerate(_DRILLS, 1):
            say(f"drill {number} of {len(_DRILLS)}: {one.fault}")
            run = run_of(f"drill-{number}", steps, one.flags)
            try:
                finding = _carried_out(run, reference, one)
            finally:
                run.kill()
            if finding is None:
                say(f"left out: the run's workers are not on {one.nodes} nodes")
            else:
                found.append(finding)
    return found


def _undisturbed(run: _Run) -> _Run:
    run.start()
    try:
        run.finish()
    finally:
        run.kill()
    return run


def _carried_out(run: _Run, reference: _Run, drill: _Drill) -> Finding | None:
    """Return what came of a drill; None where the run's workers are on too few nodes for it."""
    run.start()
    try:
        run.until_step(run.steps // 3)
        if drill.nodes > 1 and len(_workers_by_node(run)) < drill.nodes:
            return None
        happened = time.time()
        drill.inject(run)
        proof = verify(run.store)
    except ClipRayError as error:
        return Finding(drill.fault, drill.expected, str(error), None, False)
    after = [row for row in run.rows("events") if row["time"] >= happened]
    steps = [row for row in run.rows("metrics") if row["time"] >= happened]
    again = next((row for row in steps if row["attempt"] > 1), None)
    lost = sum(row["recomputes"] for row in after if row["event"] == "attempt")
    end, undisturbed = (one.rows("metrics")[-1]["loss"] for one in (run, reference))
    # Flags do their harm from the start.
    seen = any(
        row["event"] == drill.event for row in (run.rows("events") if drill.flags else after)
    )
    faults = [
        "OTHER SAMPLES" if run.samples() != reference.samples() else "",
        "ANOTHER LOSS" if abs(end - undisturbed) > SAME * abs(undisturbed) else "",
        "" if proof.holds else proof.as_text(),
        "" if seen else f"no {drill.event} event",
        "did not begin again" if drill.begins_again and again is None else "",
        "steps were lost" if lost and not drill.loses else "",
    ]
    observed = f"{lost} steps done again, loss {end:.4f} (undisturbed {undisturbed:.4f})"
    wrong = "; ".join(fault for fault in faults if fault)
    return Finding(
        drill.fault,
        drill.expected,
        f"{wrong}; {observed}" if wrong else f"the same samples, {observed}",
        again["time"] - happened if again else None,
        not wrong,
    )


def _recipe(config: Config, folder: str) -> dict[str, Any]:
    batch = min(max(64, 2 * config.cluster.worker_counts[-1]), 512)
    return {
        "run": {"storage": folder, "s3": config.run.s3.model_dump(mode="json")},
        "cluster": config.cluster.model_dump(mode="json"),
        "tracking": {"uri": config.tracking.uri, "register_model": False},
        "data": {"sources": [{"path": "bundled:starter/train-0000.tar"}], "holdout": 0},
        "tokenizer": {"train_vocab": 1024},
        "model": {"name": "ViT-micro-8-32"},
        "train": {"steps": _SHORT, "global_batch": batch, "device": config.train.device},
        "optim": {"lr": 1e-3, "warmup": 4},
    }


@contextlib.contextmanager
def _connected(config: Config) -> Iterator[None]:
    """Reach the workers' nodes; a Ray of the job's own is on this machine."""
    if is_local(config.cluster):
        yield
        return
    ray.init(config.cluster.address or os.environ["RAY_ADDRESS"], log_to_driver=False)
    try:
        yield
    finally:
        ray.shutdown()


def table(findings: list[Finding]) -> str:
    """Return the findings as a table for the terminal."""
    rows = [("fault", "expected", "back after", "", "observed")]
    for one in findings:
        back = f"{one.back_s:.0f} s" if one.back_s is not None else "-"
        rows.append((one.fault, one.expected, back, "ok" if one.held else "NOT", one.observed))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return "\n".join(
        "  ".join([*(f"{row[i]:<{widths[i]}}" for i in range(4)), row[4]]) for row in rows
    )
