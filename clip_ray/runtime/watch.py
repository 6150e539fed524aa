"""Following a run from its driver: rows to MLflow and the progress line, events to the user."""

from __future__ import annotations

import contextlib
import threading
import time
from dataclasses import asdict
from typing import Any

import ray

from clip_ray.data.blocks import Layout
from clip_ray.errors import StorageError
from clip_ray.runtime import stacks
from clip_ray.runtime.progress import ProgressLine
from clip_ray.runtime.pulse import STRAGGLES, Hang, Pulse, end_process
from clip_ray.runtime.recorder import send_event
from clip_ray.tracking import Tracker
from clip_ray.train.divergence import Diverged, Divergence, chance_loss
from clip_ray.train.journal import Row, read_journal
from clip_ray.train.requests import Inbox
from clip_ray.train.rundir import Run

END_S = 40.0  # longer than a node is waited for
NAMED, MANY = 3, 100  # shards of a block that is waited for, in a line and in an event


class Watch:
    """Follows the recorder: rows to MLflow and the progress line, events to the user."""

    def __init__(
        self, run: Run, recorder: Any, tracker: Tracker, line: ProgressLine, inbox: Inbox
    ) -> None:
        self._run, self._recorder, self._tracker, self._line = run, recorder, tracker, line
        self._inbox = inbox
        self._incarnation, self._cursor = "", 0
        self._slow, self._straggler = "", -1
        self._write_s: float | None = None
        self._wishes = False
        self._step = 0
        self._enders: list[threading.Thread] = []
        train = run.config.train
        self._divergence = Divergence(chance_loss(train.loss, train.global_batch))
        self.note = line.note

    def poll(self) -> list[Row]:
        """Take what is new, and return the steps. A recorder that restarts is asked again."""
        try:
            call = self._recorder.log_since.remote(self._incarnation, self._cursor)
            incarnation, self._cursor, rows = ray.get(call, timeout=30)
        except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
            return []
        if self._incarnation and incarnation != self._incarnation:
            # What the last one took and had not yet told: the journal has it.
            with contextlib.suppress(StorageError):
                self._tracker.offer(read_journal(self._run.store, "metrics"))
        self._incarnation = incarnation
        metrics = [row for journal, row in rows if journal == "metrics"]
        self._tracker.offer(metrics)
        for journal, row in rows:
            if journal == "events":
                self._event(row)
            elif journal == "quarantine":
                self._line.bad(row)
        self._line.steps(metrics, self._tracker.lag())
        for row in metrics:
            self._step = row["step"]
            diverged = self._divergence.took(row["step"], row["loss"])
            if diverged is not None:
                self._tell_of_divergence(diverged)
        self._inbox.saw(rows)
        return metrics

    def _tell_of_divergence(self, found: Diverged) -> None:
        """Say it and go on: only a person can tell a lost run from a hard stretch of it."""
        uri = self._run.store.uri
        self.note(
            f"THE LOSS HAS DIVERGED by step {found.step}: {found.loss:.3f} (median of the last "
            f"steps) after {found.best:.3f} at step {found.best_step}; chance is "
            f"{found.chance:.3f}. The run goes on; to end it: python jobs/stop.py {uri}. Lower "
            "optim.lr under another run.name, where --init.weights begins from a run's export"
        )
        self.event("diverged", **asdict(found))
        self._tracker.set_tags({"clip_ray.diverged": found.step})

    def asked_to_end(self) -> str:
        """Take what was asked through the storage; return who asked for the end, if anybody."""
        for request in self._inbox.take():
            self.event("asked", wish=request.wish, by=request.by)
            if request.wish == "commit":
                self.note(f"{request.by} asks for a commit")
        return self._inbox.stop_by and f"asked by {self._inbox.stop_by}"

    def relay_wish_for_commit(self) -> None:
        """Tell the ranks, through the recorder, whether a commit is asked for."""
        wanted = self._wishes or self._inbox.wants_commit
        call = self._recorder.ask if wanted else self._recorder.forget
        call.remote("commit")

    def wish_for_commit(self) -> None:
        """Have a commit made soon, besides those that are due."""
        self._wishes = True

    def hurry(self, left_s: float | None) -> None:
        """Warn where a commit may take longer than there is time for it.

        Args:
            left_s: seconds until its writer is taken away; none = nobody said.
        """
        if left_s is not None and self._write_s is not None and self._write_s > left_s:
            self.note(
                f"TOO LITTLE TIME: {max(left_s, 0):.0f} s are left, the last commit took "
                f"{self._write_s:.0f} s to write: the steps since it may be lost. More time of "
                "notice, more checkpoint.writers or fewer checkpoint.every_steps help"
            )
            self.event("short_notice", left_s=round(left_s, 1), write_s=self._write_s)

    def pulses(self, group: str) -> list[Pulse]:
        """Return the last sign of life of each worker."""
        try:
            found: list[Pulse] = ray.get(self._recorder.pulses.remote(group), timeout=30)
        except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
            return []
        return found

    def event(self, name: str, **fields: Any) -> None:
        """Journal an event of the driver's."""
        send_event(self._recorder, {"time": time.time(), "event": name, **fields})

    def end_hung(self, hang: Hang) -> None:
        """Kill a worker that hangs, on a thread, and say so."""

        def end(found: float) -> None:
            self.hang(hang, found, *end_process(hang.pulse))

        # A node that does not answer would hold the next group of workers up.
        self._enders.append(threading.Thread(target=end, args=(time.time(),), daemon=True))
        self._enders[-1].start()

    def close(self) -> None:
        """Wait, bounded, until all that was found is journaled."""
        for thread in self._enders:
            thread.join(timeout=END_S)

    def hang(self, hang: Hang, found: float, how: str, stack: str) -> None:
        """Say which worker hung, and where; the event has the stacks of all its threads."""
        pulse = hang.pulse
        where = stacks.short(stack)
        was = f"; it was in {where}" if where else ""
        self.note(f"{pulse.who} hangs: {hang.why}; {how}{was}")
        self.event(
            "hang",
            time=found,
            rank=pulse.rank,
            host=pulse.host,
            pid=pulse.pid,
            step=pulse.step,
            phase=pulse.phase,
            why=hang.why,
            ended=how,
            stack=stack,
        )

    def compared(self, times: Row) -> None:
        """Journal the ranks' times, and name one that is far slower than the others."""
        self.event("ranks", **times)
        numbers = {f"ranks/{name}": v for name, v in times.items() if name.endswith("_s")}
        self._tracker.log_metrics(numbers, self._step)
        slowest = f"{times['slowest_host']} (rank {times['slowest_rank']})"
        self._tracker.set_tags({"clip_ray.slowest_host": slowest})
        usual, most = times["compute_p50_s"], times["compute_max_s"]
        if most > STRAGGLES * usual and self._straggler != times["slowest_rank"]:
            self._straggler = times["slowest_rank"]
            self.note(
                f"rank {times['slowest_rank']} on {times['slowest_host']} holds the others up: "
                f"{1000 * most:.0f} ms of its own work a step, the median is {1000 * usual:.0f}"
            )

    def slow(self, pulse: Pulse, layout: Layout) -> None:
        """Say, once for each rank, phase and block, what all wait for."""
        text = f"all wait for {pulse.who}, in {pulse.phase}"
        if pulse.block is not None:
            text += f", block {pulse.block} of the data"
        if text == self._slow:
            return
        self._slow = text
        shards = [] if pulse.block is None else _shards(self._run, layout, pulse.block)
        named = ", ".join(shards[:NAMED]) + (" ..." if len(shards) > NAMED else "")
        self.note(f"{text}{f' (from {named})' if named else ''} for {pulse.still_s:.0f} s")
        self.event(
            "slow",
            rank=pulse.rank,
            host=pulse.host,
            phase=pulse.phase,
            block=pulse.block,
            shards=shards[:MANY],
        )

    def _event(self, row: Row) -> None:
        kind = row["event"]
        if kind == "commit":
            self._write_s, self._wishes = row["write_s"], False
            self._line.committed(row["step"])
            self._tracker.log_checkpoint(row["step"], row["uri"], row["digest"])
        elif kind == "commit_failed":
            self.note(f"NO COMMIT of step {row['step']}: {row['why']}; the next one is tried")
        elif kind == "commit_deferred":
            self.note(
                f"the commit due before step {row['step']} waits: the one before it is still being "
                f"written, for {row['waited_s']:.0f} s now (a slow or silent storage); steps go on"
            )
        elif kind == "attempt_failed":
            causes = "; ".join(f"rank {r}: {c}" for r, c in row["causes"].items())
            self._line.note(f"the workers stopped ({causes or 'process died'}); starting again")
        elif kind == "preempted":
            self.note(
                f"rank {row['rank']} (process {row['pid']} on {row['host']}) got SIGTERM: "
                "committing, then going on with other workers"
            )
        elif kind == "attempt" and row["attempt"] > 1:
            start = row["commit"] or "the beginning"
            self._line.note(f"attempt {row['attempt']} goes on from {start}")
        elif kind == "commit_rejected":
            self._line.note(f"COMMIT {row['commit']} IS DAMAGED and not used: {row['why']}")
        elif kind == "rollback":
            self._line.note(f"step {row['step']}: {row['reason']}; back to the last commit, once")
        elif kind == "tracking_outage":
            self._line.note(f"MLflow does not answer ({row.get('error')}); the journal keeps all")
        elif kind == "tracking_recovered":
            self._line.note("MLflow answers again")


def _shards(run: Run, layout: Layout, block: int) -> list[str]:
    """Return the shards that the rows of a block are read from."""
    window, chunk, rank = layout.block_at(block)
    span = layout.span(rank, chunk)
    rows = slice(span.start, span.stop)
    steps = range(window * layout.window, (window + 1) * layout.window)
    found = {int(s) for step in steps for s in run.plan.step_rows(step).shard[rows]}
    return sorted(run.manifest.shard(shard).path for shard in found)
