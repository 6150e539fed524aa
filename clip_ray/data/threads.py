"""The threads by which a process reads: made once, and used for all that it reads.

glibc gives a new thread one of the many parts of the heap (arenas), in turn, and each part keeps
the most that its threads ever had: with new threads for every task, a process that reads blocks of
60 MB grew to 1.2 GB, and still grew; with the same ones it stays at 0.5 (tests/benchmarks/data).

Each waits for those that stand after it, never for others of its own kind. None is started before
it is needed.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

BLOCKS = ThreadPoolExecutor(1, "block")  # fetches the next one while one is decoded
SHARDS = ThreadPoolExecutor(8, "shard")  # those that a block is read from at a time, on S3
RANGES = ThreadPoolExecutor(16, "range")  # of slots whose samples lie far apart, on S3
