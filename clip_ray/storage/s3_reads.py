"""Requests to S3 over a network that fails: retried, bounded; reads sent twice where one is slow.

botocore and s3fs retry too, but in three nested loops (6 x 5 x 5 requests of a minute each, where
a store hangs), without a bound over all of them; s3fs gives up a body that ends early in a way of
its own, and neither sees one that is whole by its headers and shorter than what was asked. So
their loops are set to one attempt here, and there is one loop, of ours, for writes as well.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import re
import time
from collections import deque
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, NamedTuple

import aiohttp
import s3fs
from botocore.exceptions import ConnectionError as BotocoreConnectionError
from botocore.exceptions import FlexibleChecksumError, HTTPClientError, IncompleteReadError
from botocore.parsers import ResponseParserError
from fsspec.asyn import sync, sync_wrapper

from clip_ray.errors import StorageError

PART = 32 << 20  # bytes of one request, at most: its time has a bound, so its size needs one
_PARTS = 4  # parts of one file on their way at a time
_BACKOFF_S = (0.2, 20.0)  # the first pause, doubled each time, and the longest
_CLIENT_S = 60.0  # to make a client: it loads descriptions of the API and asks for credentials
_SEEN = 1000  # GETs whose times are remembered
_FEW = 10  # GETs that tell nothing of the next
_ENOUGH = 100  # GETs that a 99th percentile wants
_AT_FIRST = 2.0  # requests that a process may send twice before it has earned any
_BURST = 10.0  # requests that may be sent twice in a row, after a long calm
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")

# What may pass, where there is no answer with a status to go by.
_PASSING = (
    TimeoutError,
    ConnectionError,
    BotocoreConnectionError,
    HTTPClientError,
    IncompleteReadError,
    FlexibleChecksumError,
    ResponseParserError,
    aiohttp.ClientError,
)


class ShortBodyError(ConnectionError):
    """An answer that holds less than it should."""


class Part(NamedTuple):
    """Bytes of a file, with the size and the ETag of the whole of it."""

    data: bytes
    size: int
    etag: str


class Pace:
    """How long the GETs of this process take, and which may be sent a second time.

    Only the time of the answer that came first counts, from its own sending: where one GET in a
    hundred hangs, that hundredth is sent twice and leaves no trace here, and where all GETs grow
    slow, so does what counts as slow.

    Args:
        share: of the GETs that may be sent twice, and two more.
        floor_s: seconds that are never slow: a second request, with a connection of its own, is
            hardly back earlier, and what is read ahead covers it.
        first_s: seconds that are slow before anything is known; the usual advice for S3.
    """

    def __init__(self, share: float, floor_s: float = 0.5, first_s: float = 2.0) -> None:
        self._share, self._floor_s, self._first_s = share, floor_s, first_s
        self._seen: deque[float] = deque(maxlen=_SEEN)
        self._allowance = _AT_FIRST if share else 0.0
        self.sent_twice = 0

    def saw(self, seconds: float) -> None:
        """Take note of an answer."""
        self._seen.append(seconds)
        self._allowance = min(self._allowance + self._share, _BURST)

    def patience(self) -> float:
        """Return the seconds after which a GET is slow: the 99th percentile of recent ones.

        Twice the slowest, as long as they are too few for that.
        """
        if len(self._seen) < _FEW:
            return self._first_s
        if len(self._seen) < _ENOUGH:
            return min(max(self._floor_s, 2 * max(self._seen)), self._first_s)
        return max(self._floor_s, sorted(self._seen)[int(0.99 * len(self._seen))])

    def may_send_twice(self) -> bool:
        """Tell whether one more GET may be sent twice, and count it."""
        if self._allowance < 1:
            return False
        self._allowance -= 1
        self.sent_twice += 1
        return True


class Reader(s3fs.S3FileSystem):
    """s3fs for reading: each request is repeated until it succeeds, cannot succeed, or time is up.

    fsspec gives all threads of a process one instance for the same arguments: they share its
    connections and its pace.

    Args:
        timeout_s: seconds that one attempt may take.
        retry_s: seconds after which a request that keeps failing is given up; 0: one attempt.
        hedge: share of the GETs that may be sent twice.
        options: for s3fs.
    """

    retries = 1  # s3fs's own

    def __init__(self, *, timeout_s: float, retry_s: float, hedge: float, **options: Any) -> None:
        super().__init__(**options)
        self._timeout_s, self._retry_s = timeout_s, retry_s
        self._random = random.Random()  # not seeded: processes that fail together must part
        self.pace = Pace(hedge)

    async def _call_s3(self, method: str, *defaults: Any, **kwargs: Any) -> Any:
        # Everything that s3fs lists or looks up comes by here, one request at a time.
        asked = kwargs.get("Key", kwargs.get("Prefix", ""))
        request = partial(super()._call_s3, method, *defaults, **kwargs)
        what = f"{method} of s3://{kwargs.get('Bucket')}/{asked}"
        # What is larger than a part is so because of the store's limits: it takes longer.
        return await self._persist(what, request, max(len(kwargs.get("Body", b"")) / PART, 1))

    call_s3 = sync_wrapper(_call_s3)

    def read_parts(
        self,
        path: str,
        start: int,
        stop: int | None,
        put: Callable[[int, bytes], object],
        etag: str = "",
    ) -> tuple[int, str]:
        """Read the bytes `[start, stop)` of a file, up to its end; all parts are of one version.

        Returns the file's size and its ETag.

        Args:
            path: s3:// URI.
            start: first byte.
            stop: the byte after the last; none = the file's end.
            put: takes each part and the byte where it begins; called by one thread at a time.
            etag: the ETag that the file has to have, in its quotes; empty = any.

        Raises:
            StorageError: the store failed for longer than the bound.
            OSError: the file was replaced meanwhile, or has another ETag: status 412.
        """
        whole: tuple[int, str] = sync(self.loop, self._read_parts, path, start, stop, put, etag)
        return whole

    async def _read_parts(
        self,
        path: str,
        start: int,
        stop: int | None,
        put: Callable[[int, bytes], object],
        etag: str,
    ) -> tuple[int, str]:
        first_stop = start + PART if stop is None else min(stop, start + PART)
        first = await self._part(path, start, first_stop, etag)
        put(start, first.data)
        stop = first.size if stop is None else min(stop, first.size)
        free = asyncio.Semaphore(_PARTS)

        async def fetch(at: int) -> None:
            async with free:
                put(at, (await self._part(path, at, min(at + PART, stop), first.etag)).data)

        tasks = [asyncio.ensure_future(fetch(at)) for at in range(first_stop, stop, PART)]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        return first.size, first.etag

    async def _part(self, path: str, start: int, stop: int, etag: str = "") -> Part:
        request = partial(self._get, path, start, stop, etag)
        what = f"reading bytes {start} to {stop} of {path}"
        return await self._persist(what, partial(self._first_answer, request))

    async def _get(self, path: str, start: int, stop: int, etag: str) -> Part:
        """Send one GET and read the whole answer."""
        bucket, key, _ = self.split_path(path)
        condition = {"IfMatch": etag} if etag else {}
        begin = time.monotonic()
        try:
            answer = await super()._call_s3(
                "get_object", Bucket=bucket, Key=key, Range=f"bytes={start}-{stop - 1}", **condition
            )
        except OSError as error:
            if status_of(error) == 416:  # nothing there: an empty file, or beyond its end
                return Part(b"", 0, "")
            raise
        try:
            data = await answer["Body"].read()
        finally:
            answer["Body"].close()
        match = _CONTENT_RANGE.fullmatch(answer.get("ContentRange", ""))
        if match is None:
            raise OSError(f"{path}: the store does not answer byte ranges; use another endpoint")
        size = int(match[3])
        if int(match[1]) != start or len(data) != min(stop, size) - start:
            raise ShortBodyError(f"{len(data)} bytes came ({match[0]}) of {stop - start} asked")
        self.pace.saw(time.monotonic() - begin)
        return Part(data, size, answer.get("ETag", ""))

    async def _first_answer(self, request: Callable[[], Awaitable[Part]]) -> Part:
        """Send a GET, and again if it is slow; return what comes first, drop the other."""
        tasks = {asyncio.ensure_future(request())}
        try:
            done, _ = await asyncio.wait(tasks, timeout=self.pace.patience())
            if not done and self.pace.may_send_twice():
                tasks.add(asyncio.ensure_future(request()))
            while True:
                done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                answers = [task for task in done if task.exception() is None]
                if answers or not pending:
                    return (answers or list(done))[0].result()
                tasks = pending
        finally:
            for task in tasks:
                task.cancel()

    async def _connected(self, what: str) -> None:
        """Have the client made: on a busy machine that takes seconds, none of them a request's."""
        try:
            async with asyncio.timeout(_CLIENT_S) as bound:
                await self.set_session()
        except Exception as error:
            if not bound.expired():
                error.add_note(f"while {what}")
                raise
            raise StorageError(
                f"{what}: no client of S3 was made within {_CLIENT_S:g} s; does what gives the "
                "credentials hang?"
            ) from error

    async def _persist(
        self, what: str, request: Callable[[], Awaitable[Any]], scale: float = 1.0
    ) -> Any:
        """Repeat a request until it succeeds, fails for good, or its time is up."""
        timeout_s = scale * self._timeout_s
        await self._connected(what)
        begin = time.monotonic()
        pause, longest = _BACKOFF_S
        for number in itertools.count(1):
            left = begin + self._retry_s - time.monotonic()
            limit = timeout_s if number == 1 else min(timeout_s, left)
            try:
                async with asyncio.timeout(limit):
                    return await request()
            except Exception as error:
                if not _may_pass(error):
                    error.add_note(f"while {what}")
                    raise
                spent = time.monotonic() - begin
                wait = pause * self._random.uniform(0.5, 1)
                if spent + wait >= self._retry_s:
                    raise StorageError(
                        f"{what} failed {number} times in {spent:.1f} s and was given up; the "
                        f"last time: {_words(error)}. Check the network and s3.endpoint, or raise "
                        f"s3.retry_s ({self._retry_s:g})"
                    ) from error
            await asyncio.sleep(wait)
            pause = min(2 * pause, longest)


def status_of(error: BaseException) -> int | None:
    """Return the HTTP status of the store's answer, where an error stands for one."""
    response = getattr(error.__cause__, "response", None)
    return response["ResponseMetadata"].get("HTTPStatusCode") if response else None


def _may_pass(error: Exception) -> bool:
    """Tell whether the same request may succeed a little later."""
    status = status_of(error)
    if status is None:
        return isinstance(error, _PASSING)
    # S3 says 400 RequestTimeout where it waited in vain for us: s3fs makes it a TimeoutError.
    return status in (408, 429) or 500 <= status != 501 or isinstance(error, TimeoutError)


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".removesuffix(": ")
