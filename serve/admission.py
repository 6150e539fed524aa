"""The memory that a replica gives to requests in flight: who gets it, who waits, who is refused.

Bytes are promised before they are allocated, first come, first served. Left out: what is counted
(the callers know), and the number of requests (Serve counts those).
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

from serve.errors import ApiError


class Budget:
    """Bytes shared by the requests of one event loop.

    Args:
        total_bytes: what all reservations together may hold.
        queue_s: seconds that a reservation waits for memory before it is refused.
        waits: told of each reservation that begins (1) and ends (-1) to wait.

    Attributes:
        total: total_bytes.
        in_use: bytes reserved now; never above `total`.
        peak: the highest that `in_use` has been.
    """

    def __init__(
        self, total_bytes: int, queue_s: float, waits: Callable[[int], None] = lambda change: None
    ) -> None:
        self.total = total_bytes
        self.in_use = 0
        self.peak = 0
        self._queue_s = queue_s
        self._waits = waits
        self._holders = 0
        self._newcomers: deque[_Waiter] = deque()
        self._growers: deque[_Waiter] = deque()

    @property
    def waiting(self) -> int:
        """Reservations that wait for memory now."""
        return len(self._newcomers) + len(self._growers)

    def reserve(self, nbytes: int) -> Reservation:
        """Return a reservation of `nbytes`, to be entered with `async with`.

        Entering raises:
            ApiError: 413 at once where `nbytes` is above the total, 429 after queue_s.
        """
        return Reservation(self, nbytes)

    async def _obtain(self, nbytes: int, held: int, queue: deque[_Waiter]) -> None:
        """Wait until `nbytes` more are the caller's, who holds `held` already."""
        if held + nbytes > self.total:
            raise ApiError(
                413,
                "request_too_large",
                f"the request needs {(held + nbytes) / 1e6:.1f} MB of memory, and this server "
                f"gives {self.total / 1e6:.1f} MB to all requests; send fewer or smaller items",
            )
        loop = asyncio.get_running_loop()
        waiter = _Waiter(nbytes, loop.create_future())
        queue.append(waiter)
        self._settle()
        if waiter.granted.done():
            waiter.granted.result()
            return
        # A timer that settles the future, not asyncio.timeout: so a grant and a refusal exclude
        # each other, even in one turn of the loop.
        timer = loop.call_later(self._queue_s, self._refuse, waiter, queue)
        self._waits(1)
        try:
            await waiter.granted
        except asyncio.CancelledError:
            if waiter.granted.cancelled():
                self._settle()  # it may have stood before others that fit
            elif waiter.granted.exception() is None:  # granted in the same turn of the loop
                self._release(nbytes, is_holder=queue is self._newcomers)
            raise
        finally:
            timer.cancel()
            self._waits(-1)

    def _settle(self) -> None:
        """Give free memory to those who wait.

        Holders who need more go first, whichever fits: only when they end does memory come free.
        Newcomers keep their order, so a large one is not overtaken for ever. If every holder
        waits for more, nobody would ever release: the last to ask gives way.
        """
        for queue in (self._growers, self._newcomers):
            # A cancelled task runs, and comes here, only after others may have been here.
            for waiter in [waiter for waiter in queue if waiter.granted.cancelled()]:
                queue.remove(waiter)
        for waiter in list(self._growers):
            if self._fits(waiter):
                self._growers.remove(waiter)
                self._grant(waiter)
        while self._newcomers and not self._growers and self._fits(self._newcomers[0]):
            self._holders += 1
            self._grant(self._newcomers.popleft())
        if self._growers and len(self._growers) == self._holders:
            self._refuse(self._growers[-1], self._growers)

    def _fits(self, waiter: _Waiter) -> bool:
        return self.in_use + waiter.nbytes <= self.total

    def _grant(self, waiter: _Waiter) -> None:
        self.in_use += waiter.nbytes
        self.peak = max(self.peak, self.in_use)
        waiter.granted.set_result(None)

    def _refuse(self, waiter: _Waiter, queue: deque[_Waiter]) -> None:
        if waiter.granted.done():
            return
        queue.remove(waiter)
        waiter.granted.set_exception(
            ApiError(
                429,
                "overloaded",
                "the memory for requests is in use by others; try again in a second",
                retry_after=1,
            )
        )
        self._settle()

    def _release(self, nbytes: int, is_holder: bool) -> None:
        self.in_use -= nbytes
        self._holders -= is_holder
        self._settle()


@dataclass(eq=False)
class _Waiter:
    nbytes: int
    granted: asyncio.Future[None]


class Reservation:
    """Bytes of a budget, held from entering to leaving an `async with`.

    Attributes:
        nbytes: bytes held, or asked for before entering.
    """

    def __init__(self, budget: Budget, nbytes: int) -> None:
        self.nbytes = nbytes
        self._budget = budget
        self._is_held = False
        self._is_growing = False

    async def __aenter__(self) -> Reservation:
        assert not self._is_held, "a reservation is entered once"
        await self._budget._obtain(self.nbytes, 0, self._budget._newcomers)
        self._is_held = True
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._is_held = False
        self._budget._release(self.nbytes, is_holder=True)

    async def grow(self, nbytes: int) -> None:
        """Reserve `nbytes` more; before all who hold nothing yet.

        On a refusal the reservation is what it was: leave it, so that others can go on.

        Raises:
            ApiError: 413 where it would be above the total; 429 after queue_s, or at once where
                every other holder waits too.
        """
        assert self._is_held and not self._is_growing, "held, and grown by one task at a time"
        self._is_growing = True
        try:
            await self._budget._obtain(nbytes, self.nbytes, self._budget._growers)
        finally:
            self._is_growing = False
        self.nbytes += nbytes
