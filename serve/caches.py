"""What a replica remembers of texts: features, and classifiers made of them.

Everything here belongs to one event loop and takes no locks: no method gives way between looking
and changing, except where it waits for a computation. Left out: what outlives a process
(serve.classifiers).
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import math
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
K = TypeVar("K", bound=Hashable)
V = TypeVar("V")
T = TypeVar("T")

# Eight of the largest that a request may ask for: 8,000 labels of E = 1024 are 33 MB.
MATRIX_BYTES = 256 << 20

log = logging.getLogger("clip_ray.serve")


def prompts_digest(labels: Sequence[str], templates: Sequence[str]) -> str:
    """Return the sha256 (hex) of labels and templates: what a classifier depends on, but a model.

    As a key it is 64 characters whatever the labels are; the strings themselves could be megabytes.
    """
    strings = [*labels, *templates]
    kind, joined = "joined", "\0".join(strings)
    if joined.count("\0") >= len(strings):
        # A string holds the separator, and two lists could join to the same. JSON marks where a
        # string ends, at five times the cost.
        kind, joined = "json", json.dumps(strings)
    data = f"{kind} {len(labels)} {len(templates)} {joined}".encode("utf-8", "surrogatepass")
    return hashlib.sha256(data).hexdigest()


class Lru(Generic[K, V]):
    """A dict of bounded length and size; what was used longest ago goes first.

    Args:
        entries: values kept.
        max_bytes: sum of the sizes kept; a value that is larger by itself is not kept at all.
    """

    def __init__(self, entries: float = math.inf, max_bytes: float = math.inf) -> None:
        self._entries = entries
        self._max_bytes = max_bytes
        self._kept: OrderedDict[K, tuple[V, int]] = OrderedDict()
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    def keys(self) -> tuple[K, ...]:
        """Return the keys, the one used longest ago first."""
        return tuple(self._kept)

    def get(self, key: K) -> V | None:
        """Return a value and count it as used, or None."""
        found = self._kept.get(key)
        if found is None:
            return None
        self._kept.move_to_end(key)
        return found[0]

    def put(self, key: K, value: V, size: int = 0) -> None:
        """Keep a value of `size` bytes in the place of the one before."""
        self.pop(key)
        if size > self._max_bytes or self._entries < 1:
            return
        self._kept[key] = (value, size)
        self.bytes += size
        while len(self._kept) > self._entries or self.bytes > self._max_bytes:
            _, (_, freed) = self._kept.popitem(last=False)
            self.bytes -= freed

    def pop(self, key: K) -> None:
        """Let a value go; one that is not there is no error."""
        found = self._kept.pop(key, None)
        if found is not None:
            self.bytes -= found[1]


@dataclass(eq=False)
class _Flight(Generic[T]):
    task: asyncio.Task[T]
    waiting: int = 0


class SingleFlight(Generic[T]):
    """Lets callers who want the same thing at the same time share one computation.

    A caller who is cancelled leaves; the others get their result. An error goes to all who wait,
    and the next caller begins anew.

    Args:
        cancel_abandoned: end a computation when its last caller has left. Without, it goes on.
    """

    def __init__(self, cancel_abandoned: bool) -> None:
        self._cancel_abandoned = cancel_abandoned
        self._flights: dict[Hashable, _Flight[T]] = {}

    async def run(self, key: Hashable, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Return the result of `work()`, or of the same key's computation under way."""
        flight = self._flights.get(key)
        if flight is None:
            flight = self._flights[key] = _Flight(asyncio.create_task(work()))
            flight.task.add_done_callback(lambda _: self._ended(key, flight))
        flight.waiting += 1
        try:
            return await asyncio.shield(flight.task)
        finally:
            flight.waiting -= 1
            if self._cancel_abandoned and flight.waiting == 0 and not flight.task.done():
                # At once: a caller who comes before the cancellation is through starts anew.
                self._forget(key, flight)
                flight.task.cancel()

    def _ended(self, key: Hashable, flight: _Flight[T]) -> None:
        self._forget(key, flight)
        if not flight.task.cancelled():
            error = flight.task.exception()  # asked for: asyncio complains of errors nobody saw
            if error is not None and flight.waiting == 0:
                log.warning(
                    "computed for callers who had left: %s: %s", type(error).__name__, error
                )

    def _forget(self, key: Hashable, flight: _Flight[T]) -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]


class MatrixCache:
    """Classifiers' matrices, least recently used out, each computed once for all who ask.

    Args:
        entries: matrices kept.
        max_bytes: bytes of the matrices kept; a larger one is computed whenever it is asked for.
        cancel_abandoned: end a computation when its last caller has left: a client that comes
            and goes would otherwise buy minutes of model time with each request.

    Attributes:
        hits: lookups answered from memory.
        misses: lookups that waited, for a computation of their own or another's.
    """

    def __init__(
        self, entries: float, max_bytes: float = MATRIX_BYTES, cancel_abandoned: bool = True
    ) -> None:
        self._kept: Lru[Hashable, Floats] = Lru(entries, max_bytes)
        self._flights: SingleFlight[Floats] = SingleFlight(cancel_abandoned)
        self.hits = 0
        self.misses = 0

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def bytes(self) -> int:
        """Bytes of the matrices kept."""
        return self._kept.bytes

    async def get(
        self,
        key: Hashable,
        compute: Callable[[], Coroutine[Any, Any, Floats]],
        keep: bool = True,
    ) -> tuple[Floats, bool]:
        """Return a matrix, and whether it was in memory.

        Args:
            key: model digest and `prompts_digest`, say: all that the matrix depends on.
            compute: makes it, (C, E) float32; becomes read-only in place, for all share it.
            keep: False shares the computation, and forgets the matrix.
        """
        found = self._kept.get(key)
        if found is not None:
            self.hits += 1
            return found, True
        self.misses += 1

        async def work() -> Floats:
            matrix = await compute()
            matrix.flags.writeable = False
            if keep:
                self._kept.put(key, matrix, matrix.nbytes)
            return matrix

        return await self._flights.run(key, work), False

    def keys(self) -> tuple[Any, ...]:
        """Return the keys in memory, the one used longest ago first."""
        return self._kept.keys()

    def drop(self, condition: Callable[[Any], bool]) -> None:
        """Forget the matrices whose key meets a condition."""
        for key in self._kept.keys():
            if condition(key):
                self._kept.pop(key)


class TextCache:
    """Text features by model and text, least recently used out.

    Rows are float32: half precision would save half and make a cached answer differ from a fresh
    one. An entry is 4 E bytes and about 300 more, so 50,000 of E = 512 take 120 MB.

    Args:
        entries: texts kept; 0 keeps none.

    Attributes:
        hits: texts found.
        misses: texts not found.
    """

    def __init__(self, entries: int) -> None:
        self._kept: Lru[bytes, Floats] = Lru(entries)
        self.hits = 0
        self.misses = 0

    def __len__(self) -> int:
        return len(self._kept)

    def lookup(self, digest: str, texts: Sequence[str]) -> list[Floats | None]:
        """Return the row of each text, (E,), or None; about 2 microseconds a text.

        Args:
            digest: the model's.
            texts: as the caller sent them.
        """
        found = [self._kept.get(_text_key(digest, text)) for text in texts]
        missed = sum(row is None for row in found)
        self.hits += len(found) - missed
        self.misses += missed
        return found

    def store(self, digest: str, texts: Sequence[str], rows: Floats) -> None:
        """Keep features.

        Args:
            digest: the model's.
            texts: N texts.
            rows: (N, E), copied.
        """
        for text, row in zip(texts, rows, strict=True):
            kept = np.array(row, np.float32)  # a view would hold on to the whole batch
            kept.flags.writeable = False
            self._kept.put(_text_key(digest, text), kept)


def _text_key(digest: str, text: str) -> bytes:
    """Return 16 bytes for a text of up to 2,000 characters: the key must not outweigh the row."""
    data = text.encode("utf-8", "surrogatepass")
    return hashlib.blake2b(data, digest_size=16, key=digest.encode()[:64]).digest()
