"""SIGTERM to a worker's process alone, as by whoever takes one machine or container away.

Ray answers it by ending the process at once. A worker that trains notes it instead: all ranks
commit at the same step, and the run goes on with another group of workers.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import Any

from ray.train.torch import TorchConfig


class Notice:
    """Notes a SIGTERM while somebody heeds it; installed as its handler.

    Args:
        otherwise: the handler for all other times, and for a second one.
    """

    def __init__(self, otherwise: Callable[[int, Any], object] | None = None) -> None:
        self.received = False
        self._otherwise, self._heeded = otherwise, False

    def __call__(self, number: int, frame: Any) -> None:
        """Take the signal."""
        if self._heeded and not self.received:
            self.received = True
        elif self._otherwise is not None:
            self._otherwise(number, frame)

    @contextlib.contextmanager
    def heeded(self) -> Iterator[None]:
        """Let the first SIGTERM be noted while the block runs: somebody commits then."""
        self._heeded = True
        try:
            yield
        finally:
            self._heeded = False


def install() -> None:
    """Put a notice in the place of Ray's handler; on a worker's main thread, which only can."""
    before = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, Notice(before if callable(before) else None))


def installed() -> Notice:
    """Return this process's notice, on any thread; one that nothing reaches where there is none."""
    handler = signal.getsignal(signal.SIGTERM)
    return handler if isinstance(handler, Notice) else Notice()


class _Backend(TorchConfig().backend_cls):  # type: ignore[misc]
    """Sets torch's process group up, and each worker's notice: Ray runs this on main threads."""

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        """Prepare the workers of a new group."""
        super().on_start(worker_group, backend_config)
        worker_group.execute(install)


class WorkersConfig(TorchConfig):
    """Ray Train's settings of torch, with a notice of SIGTERM in each worker."""

    @property
    def backend_cls(self) -> type[Any]:
        """What sets workers up."""
        return _Backend
