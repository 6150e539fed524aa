"""Following a run from its driver: rows to MLflow and the progress line, events to the user."""

from __future__ import annotations

import contextlib
import time
from typing import Any

import ray

from clip_ray.errors import StorageError
from clip_ray.runtime import stacks
from clip_ray.runtime.progress import ProgressLine
from clip_ray.runtime.pulse import STRAGGLES, Hang, Pulse
from clip_ray.runtime.recorder import send_event
from clip_ray.tracking import Tracker
from clip_ray.train.journal import Row, read_journal
from clip_ray.train.requests import Inbox
from clip_ray.train.rundir import Run


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
        self._inbox.saw(rows)
        return metrics

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

    def hang(self, hang: Hang, how: str, stack: str) -> None:
        """Say which worker hung, and where; the event has the stacks of all its threads."""
        pulse = hang.pulse
        where = stacks.short(stack)
        self.note(f"{pulse.who} hangs: {hang.why}; {how}" + (f"; it was in {where}" * bool(where)))
        self.event(
            "hang",
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
        usual, most = times["compute_p50_s"], times["compute_max_s"]
        if most > STRAGGLES * usual and self._straggler != times["slowest_rank"]:
            self._straggler = times["slowest_rank"]
            self.note(
                f"rank {times['slowest_rank']} on {times['slowest_host']} holds the others up: "
                f"{1000 * most:.0f} ms of its own work a step, the median is {1000 * usual:.0f}"
            )

    def slow(self, pulse: Pulse) -> None:
        """Say, once for each rank and phase, what all wait for."""
        text = f"all wait for {pulse.who}, in {pulse.phase}"
        if text != self._slow:
            self._slow = text
            self.note(f"{text} for {pulse.still_s:.0f} s")
            self.event("slow", rank=pulse.rank, host=pulse.host, phase=pulse.phase)

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
