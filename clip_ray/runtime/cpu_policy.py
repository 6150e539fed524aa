"""Which waking process takes a CPU from another: Linux's scheduling policies, on a Ray of our own.

Ray's processes wake about three thousand times a second, mostly to find nothing to do. Where all
CPUs decode, each of these takes one from a decoding process, which goes on with cold caches: 7 % of
the CPU time of an image on two cores (tests/benchmarks/data). Under SCHED_BATCH a process that
wakes waits for its turn, some milliseconds at most. Workers are ordinary again: a step that waits
for its batch or for the others is to go on at once.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

_KNOWN = hasattr(os, "SCHED_BATCH")  # on Linux only


@contextlib.contextmanager
def batch() -> Iterator[None]:
    """Make the calling thread, and the processes that it starts meanwhile, wait for their turn."""
    ordinary = _KNOWN and os.sched_getscheduler(0) == os.SCHED_OTHER
    if ordinary:
        _set(os.SCHED_BATCH)
    try:
        yield
    finally:
        if ordinary:
            _set(os.SCHED_OTHER)


def leave_batch() -> None:
    """Make this process ordinary again: its threads, and what they start from now on."""
    for thread in map(int, os.listdir("/proc/self/task")) if _KNOWN else ():
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            if os.sched_getscheduler(thread) == os.SCHED_BATCH:
                _set(os.SCHED_OTHER, thread)


def _set(policy: int, thread: int = 0) -> None:
    with contextlib.suppress(PermissionError):  # a container may forbid it; then nothing is lost
        os.sched_setscheduler(thread, policy, os.sched_param(0))
