"""The recorder: one actor on the driver's node through which a run's facts flow.

Training ranks send journal rows to it without ever waiting, and learn from its answers whether
the run has been asked to stop; the driver reads it for the progress line and MLflow. It also
carries rank 0's stream handles to the other ranks.
"""

from __future__ import annotations

import threading
import time
from typing import Any

import ray
from ray.train import UserCallback

from clip_ray.config import S3Options
from clip_ray.storage import open_store
from clip_ray.train.journal import Journal, Row

JOURNALS = ("metrics", "events", "quarantine")
FLUSH_S = 30.0


class Recorder:
    """Writes a run's journals and holds its mailbox. Used as an actor."""

    def __init__(self, run_uri: str, s3: S3Options) -> None:
        run = open_store(run_uri, s3)
        self._journals = {name: Journal(run, name) for name in JOURNALS}
        self._log: list[tuple[str, Row]] = []
        self._stop = False
        self._mailbox: dict[str, Any] = {}
        self._flushed = time.monotonic()

    def append(self, rows: list[tuple[str, Row]], durable: bool = False) -> bool:
        """Journal `(journal, row)` pairs; return whether the run has been asked to stop."""
        for name in JOURNALS:
            mine = [row for journal, row in rows if journal == name]
            if mine:
                self._journals[name].append(mine)
        self._log += rows
        if durable or time.monotonic() - self._flushed > FLUSH_S:
            for journal in self._journals.values():
                journal.flush()
            self._flushed = time.monotonic()
        return self._stop

    def log_since(self, cursor: int) -> tuple[int, list[tuple[str, Row]]]:
        """Return the rows that this actor took since `cursor`, and the new cursor."""
        return len(self._log), self._log[cursor:]

    def request_stop(self) -> None:
        """Ask the run to commit and end; the ranks hear of it with their next answer."""
        self._stop = True

    def post(self, name: str, content: Any) -> None:
        """Leave something in the mailbox."""
        self._mailbox[name] = content

    def collect(self, name: str) -> Any:
        """Return what was posted under `name`; None where nothing is there yet."""
        return self._mailbox.get(name)

    def discard(self, prefix: str) -> None:
        """Empty the mailbox of what begins with `prefix`."""
        self._mailbox = {k: v for k, v in self._mailbox.items() if not k.startswith(prefix)}

    def close(self) -> None:
        """Make everything durable and join the parts."""
        for journal in self._journals.values():
            journal.join()


class Reporter:
    """A rank's side of the recorder: sends what piles up, one call in flight, never waiting."""

    def __init__(self, recorder: Any) -> None:
        self._recorder = recorder
        self._lock = threading.Lock()
        self._pending: list[tuple[str, Row]] = []
        self._sent: list[tuple[str, Row]] = []
        self._call: Any = None
        self.stop_requested = False

    def add(self, journal: str, rows: list[Row]) -> None:
        """Queue rows and send them when the last call has been answered."""
        with self._lock:
            self._pending += [(journal, row) for row in rows]
            self._advance()

    def drain(self, timeout_s: float) -> None:
        """Wait until everything queued so far is durable.

        Raises:
            TimeoutError: it is not after `timeout_s`.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            # The lock is held for moments only: the training thread must not wait here.
            with self._lock:
                if not self._pending and not self._sent:
                    break
                self._advance()
            if time.monotonic() > deadline:
                raise TimeoutError(f"the recorder did not answer within {timeout_s:g} s")
            time.sleep(0.02)
        flushed = self._recorder.append.remote([], durable=True)
        ray.get(flushed, timeout=max(deadline - time.monotonic(), 1.0))

    def _advance(self) -> None:
        if self._call is not None:
            ready, _ = ray.wait([self._call], timeout=0)
            if not ready:
                return
            try:
                self.stop_requested |= bool(ray.get(self._call))
                self._sent = []
            except ray.exceptions.RayError:
                # The recorder restarted: what it had not acknowledged is sent again.
                self._pending, self._sent = self._sent + self._pending, []
            self._call = None
        self._sent, self._pending = self._pending, []
        # An empty call too: its answer carries the wish to stop.
        self._call = self._recorder.append.remote(self._sent)


class CauseOfRestart(UserCallback):
    """Tells the recorder why a worker group ended; runs in Ray Train's controller."""

    def __init__(self, recorder: Any) -> None:
        self._recorder = recorder

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Journal the first line of each rank's exception."""
        causes = {
            str(rank): f"{type(e).__name__}: {str(e).strip().splitlines()[-1][:300]}"
            for rank, e in worker_exceptions.items()
            if str(e).strip()
        }
        row = {"time": time.time(), "event": "attempt_failed", "causes": causes}
        self._recorder.append.remote([("events", row)])
