"""The threads by which a process reads: made once, and used for all that it reads.

glibc gives a new thread one of the many parts of the heap (arenas), in turn, and each part keeps
the most that its threads ever had: with new threads for every task, a process that reads blocks of
60 MB grew to 1.2 GB, and still grew; with the same ones it stays at 0.5 (tests/benchmarks/data).
"""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor


@functools.cache
def readers(what: str, threads: int) -> ThreadPoolExecutor:
    """Return this process's threads for one purpose.

    Args:
        what: the purpose; who waits for threads of its own purpose waits forever.
        threads: how many there are at most.
    """
    return ThreadPoolExecutor(threads, thread_name_prefix=what)
