"""What may end a training job from outside: signals, and the loss of its lease."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

from clip_ray.errors import CheckpointError, TrainingError


class Signals:
    """What may end a run from outside, as facts to look at: signals, and the loss of the lease."""

    def __init__(self) -> None:
        self.received: int | None = None
        self.count = 0
        self.deferred = False
        self.lease_lost = threading.Event()

    @property
    def name(self) -> str:
        """Name of the last signal received, such as SIGTERM."""
        return signal.Signals(self.received).name if self.received else ""

    def check(self, run_uri: str) -> None:
        """Raise where nothing more is to be waited for.

        Raises:
            TrainingError: a second signal came.
            CheckpointError: another job has the run's lease.
        """
        if self.lease_lost.is_set():
            raise CheckpointError(
                f"run {run_uri} was taken over by another job while this one did not run"
            )
        if self.count > 1:
            raise TrainingError(f"stopped by {self.name} before the commit was written")

    def own(self) -> None:
        """Make SIGINT and SIGTERM come here; only the main thread can."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, self.take)

    def take(self, number: int, frame: Any) -> None:
        """Note a signal, or end the process where nobody looks; installed as its handler."""
        self.received = number
        self.count += 1
        if not self.deferred:
            raise SystemExit(128 + number)


@contextlib.contextmanager
def owned_signals() -> Iterator[Signals]:
    """Take SIGINT and SIGTERM while the block runs, and give them back."""
    signals = Signals()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signals.own()
    try:
        yield signals
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)
