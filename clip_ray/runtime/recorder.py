"""The recorder: one actor on the driver's node through which a run's facts flow.

Training ranks send journal rows to it without ever waiting, and learn from its answers what the
run has been asked to do; the driver reads it for the progress line and MLflow. It also carries
the stream handles of the ranks that open streams to the others.
"""

from __future__ import annotations

import threading
import time
import uuid
from dataclasses import replace
from typing import Any

import ray

from clip_ray.config import S3Options
from clip_ray.errors import StorageError
from clip_ray.runtime.metrics import TrainingMetrics
from clip_ray.runtime.pulse import Pulse
from clip_ray.storage import LocalStore, open_store
from clip_ray.train.hooks import Word
from clip_ray.train.journal import Journal, Row

JOURNALS = ("metrics", "events", "quarantine")
FLUSH_S = 30.0
RETRY_S = 1.0  # after a flush that failed
CLOSE_S = 45.0


class Recorder:
    """Writes a run's journals and holds its mailbox. Used as an actor."""

    def __init__(self, run_uri: str, s3: S3Options) -> None:
        run = open_store(run_uri, s3)
        self._journals = {name: Journal(run, name) for name in JOURNALS}
        # On a local disk an appended row survives this process; on S3 a flushed one does.
        self._durable_at_once = isinstance(run, LocalStore)
        self._incarnation = uuid.uuid4().hex
        self._log: list[tuple[str, Row]] = []
        self._dropped = 0
        self._taken: dict[str, int] = {}
        self._asked: set[Word] = set()
        self._mailbox: dict[str, Any] = {}
        self._group = ""
        self._pulses: dict[int, tuple[float, Pulse]] = {}
        self._durable: dict[str, int] = {}
        # A storage that hangs must hold up neither signs of life nor what is asked.
        self._taking, self._flushing = threading.Lock(), threading.Lock()
        self._wanted = threading.Event()
        threading.Thread(target=self._keep_durable, name="flush", daemon=True).start()
        # Ray's agent exports them: without a Ray there is nobody to.
        name = run_uri.rstrip("/").rpartition("/")[2]
        self._metrics = TrainingMetrics(name) if ray.is_initialized() else None

    def append(
        self, sender: str, first: int, rows: list[tuple[str, Row]], durable: bool = False
    ) -> tuple[set[Word], int]:
        """Journal a sender's `(journal, row)` pairs.

        Args:
            sender: who sends; unique to a process.
            first: number of the first row among all that the sender has had.
            rows: rows that were taken before are not taken twice.
            durable: begin to make them durable now; a later call tells when they are.

        Returns:
            What the run has been asked to do, and how many of the sender's rows are durable.
        """
        new = rows[max(self._taken.get(sender, first) - first, 0) :]
        with self._taking:
            for name in JOURNALS:
                mine = [row for journal, row in new if journal == name]
                if mine:
                    self._journals[name].append(mine)
            self._taken[sender] = max(self._taken.get(sender, 0), first + len(rows))
        self._log += new
        if self._metrics is not None:
            self._metrics.took(new)
        if durable:
            self._wanted.set()
        safe = self._taken if self._durable_at_once else self._durable
        return self._asked, safe.get(sender, 0)

    def log_since(self, incarnation: str, cursor: int) -> tuple[str, int, list[tuple[str, Row]]]:
        """Return the rows taken since `cursor`; earlier ones are forgotten.

        Returns:
            This actor's incarnation, the new cursor, and the rows. Another incarnation than the
            caller's means that the actor was restarted and has counted from 0 again.
        """
        if incarnation != self._incarnation:
            cursor = 0
        keep = max(cursor - self._dropped, 0)
        self._log, self._dropped = self._log[keep:], self._dropped + keep
        return self._incarnation, self._dropped + len(self._log), self._log

    def ask(self, word: Word) -> None:
        """Ask the ranks for something; they hear of it with their next answer."""
        self._asked.add(word)

    def forget(self, word: Word) -> None:
        """Ask no more: a new group of workers begins."""
        self._asked.discard(word)

    def training_ended(self) -> None:
        """Note that what follows is export and evaluation."""
        if self._metrics is not None:
            self._metrics.ended()

    def beat(self, group: str, pulse: Pulse) -> None:
        """Take a rank's sign of life."""
        if group != self._group:
            self._group, self._pulses = group, {}
        self._pulses[pulse.rank] = (time.monotonic(), pulse)

    def pulses(self, group: str) -> list[Pulse]:
        """Return the last sign of life of each rank of a group."""
        if group != self._group:
            return []
        now = time.monotonic()
        return [replace(pulse, age_s=now - at) for at, pulse in self._pulses.values()]

    def post(self, name: str, content: Any, replaces: str = "") -> None:
        """Leave something in the mailbox, in the place of what was posted under `replaces`."""
        self._mailbox.pop(replaces, None)
        self._mailbox[name] = content

    def collect(self, name: str) -> Any:
        """Return what was posted under `name`; None where nothing is there yet."""
        return self._mailbox.get(name)

    def close(self) -> None:
        """Make everything durable and join the parts.

        Raises:
            StorageError: the storage has not answered for `CLOSE_S`.
        """
        if not self._flushing.acquire(timeout=CLOSE_S):
            raise StorageError(f"the journals were not written within {CLOSE_S:g} s")
        try:
            for journal in self._journals.values():
                journal.join()
        finally:
            self._flushing.release()

    def _keep_durable(self) -> None:
        while True:
            self._wanted.wait(FLUSH_S)
            self._wanted.clear()
            try:
                self._flush()
            except OSError:
                time.sleep(RETRY_S)  # who waits for it is told that it is not durable

    def _flush(self) -> None:
        with self._flushing:
            with self._taking:
                taken = dict(self._taken)
            for journal in self._journals.values():
                journal.flush()
            self._durable = taken


class Reporter:
    """A process's side of the recorder: sends what piles up, one call in flight, never waiting.

    Rows are kept until they are durable: a recorder that is restarted gets them again.
    """

    def __init__(self, recorder: Any) -> None:
        self._recorder = recorder
        self._sender = uuid.uuid4().hex
        self._lock = threading.Lock()
        self._rows: list[tuple[str, Row]] = []
        self._first = 0  # number of the first row that is kept
        self._sent = 0  # number of the first row that is not sent
        self._call: Any = None
        self.asked: set[Word] = set()

    def add(self, journal: str, rows: list[Row]) -> None:
        """Queue rows and send them when the last call has been answered."""
        with self._lock:
            self._rows += [(journal, row) for row in rows]
            self._advance()

    def advance(self) -> None:
        """Send what was queued while a call was in flight."""
        with self._lock:
            if self._call is not None or self._sent < self._first + len(self._rows):
                self._advance()

    def drain(self, timeout_s: float) -> None:
        """Wait until everything queued so far is durable.

        Raises:
            TimeoutError: it is not after `timeout_s`.
        """
        deadline = time.monotonic() + timeout_s
        with self._lock:
            goal = self._first + len(self._rows)
        while True:
            # The lock is held for moments only: the training thread must not wait here.
            with self._lock:
                if self._first >= goal:
                    return
                self._advance(durable=True)
            if time.monotonic() > deadline:
                raise TimeoutError(f"the recorder did not answer within {timeout_s:g} s")
            time.sleep(0.02)

    def _advance(self, durable: bool = False) -> None:
        if self._call is not None:
            ready, _ = ray.wait([self._call], timeout=0)
            if not ready:
                return
            try:
                asked, safe = ray.get(self._call)
                self.asked = asked
                self._rows = self._rows[max(safe - self._first, 0) :]
                self._first = max(self._first, safe)
            except ray.exceptions.RayError:
                self._sent = self._first  # it restarted: what is not known to be durable, again
            self._call = None
        # With nothing to send too: the answer carries what is asked.
        rows = self._rows[self._sent - self._first :]
        self._call = self._recorder.append.remote(self._sender, self._sent, rows, durable)
        self._sent += len(rows)


def send_event(recorder: Any, row: Row) -> None:
    """Journal one event, from a process that has no Reporter; does not wait."""
    recorder.append.remote(uuid.uuid4().hex, 0, [("events", row)])
