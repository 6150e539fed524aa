"""A bounded queue between two threads: what one prepares ahead, the other takes in order.

A plain queue loses the error that ends its filling, and leaves a thread behind that waits for room
which nobody makes.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Pipe(Generic[T]):
    """A bounded queue from one thread to another, that either may leave.

    Args:
        size: items that wait in it.
        left: set by the receiver when it takes no more.
    """

    def __init__(self, size: int, left: threading.Event) -> None:
        self._queue: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(size)
        self._left = left

    def fill(self, items: Callable[[], Iterator[T]]) -> None:
        """Put all items, and then the end or what they raised."""
        try:
            for item in items():
                if not self._put(item, None):
                    return
            self._put(None, None)
        except BaseException as error:
            self._put(None, error)

    def _put(self, item: T | None, error: BaseException | None) -> bool:
        while not self._left.is_set():
            try:
                self._queue.put((item, error), timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def take(self, timeout_s: float) -> Iterator[T]:
        """Yield the items; raises what they raised, and queue.Empty where none comes in time."""
        deadline = time.monotonic() + timeout_s
        while not self._left.is_set():
            try:
                item, error = self._queue.get(timeout=0.1)
            except queue.Empty:
                if time.monotonic() > deadline:
                    raise
                continue
            if error is not None:
                raise error
            if item is None:
                return
            yield item
            deadline = time.monotonic() + timeout_s
