"""Where a replica's CPU work runs: decoding threads, one model thread, shared batches.

The event loop only moves bytes. The model has one thread of its own, so that a forward pass uses
torch's threads alone and passes queue in order; decoding has a thread a CPU.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from opentelemetry.trace import Span
from ray import serve

from clip_ray.config.serving import Batching
from clip_ray.inference import Encoder
from serve import tracing
from serve.metrics import Metrics

Floats = NDArray[np.float32]
T = TypeVar("T")
Owner = Span | None  # of a request that is traced; its passes are recorded below
Item = tuple[Encoder, NDArray[Any], Owner]  # one row

PASS_S = 0.04  # a forward pass of bulk work; others wait for one of them at most
_IMAGE, _TEXT = "image", "text"
_OPEN_ITEMS = 128  # of Ray's batches that are open at once


class Workers:
    """The threads and queues of a replica; use it from one event loop.

    Args:
        cpus: decoding threads, and torch's.
        batching: sizes and wait of shared batches.
        metrics: counted into.
    """

    def __init__(self, cpus: int, batching: Batching, metrics: Metrics) -> None:
        torch.set_num_threads(cpus)
        self.cpus = cpus
        self._metrics = metrics
        self._limit = {_IMAGE: batching.image_batch, _TEXT: batching.text_batch}
        self._decoders = ThreadPoolExecutor(cpus, "decode")
        self._model = ThreadPoolExecutor(1, "model")
        self._bulk = asyncio.Lock()
        # Seconds of one image, or of one token, by encoder and kind; learnt from each pass.
        self._cost: WeakKeyDictionary[Encoder, dict[str, float]] = WeakKeyDictionary()
        self._waiting: dict[str, deque[tuple[Item, asyncio.Future[Any]]]] = {
            kind: deque() for kind in self._limit
        }
        self._busy = {kind: asyncio.Lock() for kind in self._limit}
        # Made here, not declared on the class: Ray keeps one queue a function, and it belongs to
        # the event loop of its first call.
        self._shared = {kind: self._batched(kind, batching) for kind in self._limit}

    def _batched(self, kind: str, batching: Batching) -> Callable[[Item], Awaitable[Any]]:
        async def shared_pass(items: list[Item]) -> list[Any]:
            return await self._coalesced(kind, items)

        # Ray closes a batch after its wait, full or not, also while the model is busy. So several
        # may be open, and `_coalesced` puts together what has gathered when the model is free.
        batched: Callable[[Item], Awaitable[Any]] = serve.batch(
            max_batch_size=self._limit[kind],
            batch_wait_timeout_s=batching.wait_ms / 1000,
            max_concurrent_batches=max(2, _OPEN_ITEMS // self._limit[kind]),
        )(shared_pass)
        return batched

    def close(self) -> None:
        """End the threads; what is queued is dropped."""
        self._decoders.shutdown(wait=False, cancel_futures=True)
        self._model.shutdown(wait=False, cancel_futures=True)

    async def decode(self, work: Callable[..., T], *args: Any) -> T:
        """Run `work` on a decoding thread; a cancelled caller drops it where it has not begun."""
        return await asyncio.get_running_loop().run_in_executor(self._decoders, work, *args)

    async def encode_pixels(self, encoder: Encoder, pixels_NCHW: NDArray[np.uint8]) -> Floats:
        """Return image features (N, E); few images share a pass with other requests'."""
        return await self._encode(encoder, _IMAGE, pixels_NCHW)

    async def encode_ids(self, encoder: Encoder, ids_NL: NDArray[np.int32]) -> Floats:
        """Return text features (N, E); few texts share a pass with other requests'."""
        return await self._encode(encoder, _TEXT, ids_NL)

    async def _encode(self, encoder: Encoder, kind: str, rows: NDArray[Any]) -> Floats:
        # From the wait for others to the last pass.
        with tracing.spanning("encode", kind=kind, items=len(rows)) as owner:
            return await self._rows_of_one(encoder, kind, rows, owner)

    async def _rows_of_one(
        self, encoder: Encoder, kind: str, rows: NDArray[Any], owner: Owner
    ) -> Floats:
        if len(rows) > self._limit[kind] // 2:
            return await self._in_passes(encoder, kind, rows, [owner] * len(rows))
        shared = self._shared[kind]
        # An item each: the batcher fills passes from all requests.
        if len(rows) == 1:
            results = [await shared((encoder, rows[0], owner))]
        else:
            results = await asyncio.gather(*(shared((encoder, row, owner)) for row in rows))
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return np.stack(results)

    async def _coalesced(self, kind: str, items: list[Item]) -> list[Any]:
        """Return the results of a batch, which shares its passes with the other open ones."""
        futures = [asyncio.get_running_loop().create_future() for _ in items]
        waiting = self._waiting[kind]
        waiting.extend(zip(items, futures, strict=True))
        async with self._busy[kind]:
            while not all(future.done() for future in futures):
                count = min(len(waiting), self._limit[kind])
                taken = [waiting.popleft() for _ in range(count)]
                # Should this batch be cancelled, the others' items must not wait for ever.
                results: list[Any] = [RuntimeError("the forward pass was ended")] * count
                try:
                    results = await self._shared_pass(kind, [item for item, _ in taken])
                finally:
                    for (_, future), result in zip(taken, results, strict=True):
                        future.set_result(result)
        return [future.result() for future in futures]

    async def _shared_pass(self, kind: str, items: list[Item]) -> list[Any]:
        """Return a feature, or the error of its pass, per item; each model has its own pass."""
        results: list[Any] = [None] * len(items)
        groups: dict[int, list[int]] = {}
        for index, (encoder, _, _) in enumerate(items):
            groups.setdefault(id(encoder), []).append(index)
        for members in groups.values():
            encoder = items[members[0]][0]
            try:
                features = await self._in_passes(
                    encoder,
                    kind,
                    np.stack([items[index][1] for index in members]),
                    [items[index][2] for index in members],
                )
            except Exception as error:  # it belongs to these requests only
                for index in members:
                    results[index] = error
            else:
                for index, row in zip(members, features, strict=True):
                    results[index] = row
        return results

    async def _in_passes(
        self, encoder: Encoder, kind: str, rows: NDArray[Any], owners: Sequence[Owner]
    ) -> Floats:
        """Encode rows in passes of about PASS_S, so that no request keeps the model for long."""
        if len(rows) <= self._pass_size(encoder, kind, rows):
            return await self._one_pass(encoder, kind, rows, owners)
        parts: list[Floats] = []
        done = 0
        while done < len(rows):
            # One bulk pass in the model's queue at a time: a second would double others' wait.
            async with self._bulk:
                # Anew each time: each pass teaches what the next may cost.
                chunk = rows[done : done + self._pass_size(encoder, kind, rows)]
                theirs = owners[done : done + len(chunk)]
                parts.append(await self._one_pass(encoder, kind, chunk, theirs))
            done += len(chunk)
        return np.concatenate(parts)

    def _pass_size(self, encoder: Encoder, kind: str, rows: NDArray[Any]) -> int:
        cost = self._cost.get(encoder, {}).get(kind)
        if cost is None:
            return 1  # not measured yet: warm-up measures it before any request comes
        if kind == _TEXT:
            cost *= _length(rows)
        return max(1, min(self._limit[kind], int(PASS_S / cost)))

    async def _one_pass(
        self, encoder: Encoder, kind: str, rows: NDArray[Any], owners: Sequence[Owner]
    ) -> Floats:
        def run() -> tuple[Floats, float, int]:
            begun_ns, start = time.time_ns(), time.perf_counter()
            features = encoder.encode_pixels(rows) if kind == _IMAGE else encoder.encode_ids(rows)
            return features, time.perf_counter() - start, begun_ns

        features, seconds, begun_ns = await asyncio.get_running_loop().run_in_executor(
            self._model, run
        )
        tracing.record_pass(kind, owners, begun_ns, begun_ns + int(1e9 * seconds))
        self._metrics.batch(kind, len(rows))
        self._metrics.stage("model", 1000 * seconds)
        work = len(rows) * (_length(rows) if kind == _TEXT else 1)
        costs = self._cost.setdefault(encoder, {})
        # A slow mean: a pass that another process disturbed must not shrink all that follow.
        costs[kind] = 0.9 * costs.get(kind, seconds / work) + 0.1 * seconds / work
        return features

    async def warm_up(self, encoder: Encoder) -> None:
        """Run passes of several sizes: allocators, kernels and costs are then known.

        Raises:
            ValueError: the features are not finite unit vectors.
        """
        size = encoder.image_size
        generator = np.random.default_rng(0)
        ids_1L, _ = encoder.tokenizer(["a photo of a cat."])
        for count in (1, 1, 4, 16):
            pixels = generator.integers(0, 256, (count, 3, size, size), np.uint8)
            owners = [None] * count
            for features in (
                await self._in_passes(encoder, _IMAGE, pixels, owners),
                await self._in_passes(encoder, _TEXT, np.repeat(ids_1L, count, axis=0), owners),
            ):
                norms = np.linalg.norm(features, axis=1)
                if not np.allclose(norms, 1, atol=1e-3):  # NaN is close to nothing
                    raise ValueError(f"features have norms {norms[:4]}, expected 1")

    async def probe(self, encoder: Encoder) -> None:
        """Encode the shortest text; raises what the model raises."""
        ids_1L, _ = encoder.tokenizer([""])
        await self._one_pass(encoder, _TEXT, ids_1L, [None])


def _length(ids_NL: NDArray[np.int32]) -> int:
    """Return the tokens of the longest row, its end token included."""
    return int(ids_NL.argmax(axis=1).max()) + 1


def token_counts(ids_NL: NDArray[np.int32]) -> Sequence[int]:
    """Return the tokens of each row, start and end included."""
    return [int(end) + 1 for end in ids_NL.argmax(axis=1)]
