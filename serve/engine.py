"""The models of a replica: loading, swapping without a pause, and encoding for the routes.

A request picks a model once and passes it along, so one answer never mixes two versions. A new
target is loaded beside the old one, warmed up, and swapped in by one assignment; whatever goes
wrong on the way leaves the old one serving and shows in `status()`.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import itertools
import logging
import math
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from clip_ray.config.serving import AppSettings
from clip_ray.errors import ClipRayError
from clip_ray.eval.prompts import fill
from clip_ray.eval.zero_shot import ensemble
from clip_ray.images import ImageError, measure
from clip_ray.inference import Encoder
from clip_ray.registry import ServedModel, Target, load_served
from serve import tracing
from serve.admission import Budget
from serve.caches import MatrixCache, TextCache, prompts_digest
from serve.errors import ApiError
from serve.metrics import Metrics
from serve.work import Workers, token_counts

log = logging.getLogger("clip_ray.serve")

Floats = NDArray[np.float32]
DECODE_BYTES = 12  # of a pixel on its way to RGB: up to three copies of four bytes in Pillow
PREPARE_S = 20.0  # stored classifiers are waited for before a model is swapped in
LOAD_LOCK_S = 300  # wait for another replica of the node that loads; then load anyway
_CHARACTERS = 64_000  # tokenised by one job of a decoding thread: about 20 ms
_PROMPTS = 4096  # of a classifier that are in memory together; at least one label's


@dataclass(frozen=True, eq=False)
class Loaded:
    """A model in memory.

    Attributes:
        served: which one.
        encoder: encodes with it.
        logit_scale: factor on cosine similarities, exponentiated.
        logit_bias: added to them, 0 for a model without one.
    """

    served: ServedModel
    encoder: Encoder
    logit_scale: float
    logit_bias: float

    @property
    def id(self) -> str:
        """The model as answers name it, such as clip/7."""
        return self.served.id


Prepare = Callable[[Loaded, frozenset[str]], Awaitable[int]]


class Engine:
    """The models of one replica; use it from one event loop.

    Args:
        settings: limits, device, caches.
        cpus: CPUs of the replica.
        metrics: counted into.
        cache_dir: directory of the node for downloaded models, shared by its replicas.
    """

    def __init__(self, settings: AppSettings, cpus: int, metrics: Metrics, cache_dir: Path) -> None:
        limits = settings.limits
        self.settings = settings
        self.metrics = metrics
        self.replica = "local"
        self.workers = Workers(cpus, settings.batching, metrics)
        # Three shares, for a request holds one of each in this order, and nobody who holds waits
        # for more of the same: its body, its images as the model takes them, and one image's
        # decoding at a time, which gets most (25 Mpx are 300 MB).
        memory = limits.memory_mb * 1e6
        waits = metrics.waits
        self.budget = Budget(int(memory / 4), limits.queue_s, partial(waits, "body"))
        self._input_budget = Budget(int(memory / 8), limits.request_s, partial(waits, "input"))
        self._decode_budget = Budget(
            int(memory * 5 / 8), limits.request_s, partial(waits, "decode")
        )
        self._cache_dir = cache_dir
        self._matrices = MatrixCache(settings.classifier_cache)
        self._texts = TextCache(settings.text_cache)
        self._current: Loaded | None = None
        self._previous: Loaded | None = None
        self._wanted = ""  # digest of the newest target
        self._error: str | None = None
        self._task: asyncio.Task[None] | None = None
        self._preparing: asyncio.Task[None] | None = None
        # Set by the app: stored classifiers are computed for a model before it is swapped in.
        self.prepare: Prepare = _nothing_stored

    async def start(self, user_config: dict[str, Any]) -> None:
        """Load the first model; returns when it is warm.

        Raises:
            ClipRayError: the target is no `Target`, or its model cannot be used.
        """
        target = _parse(user_config)
        self._wanted = target.digest
        await self._switch(target)

    def retarget(self, user_config: dict[str, Any]) -> None:
        """Go to another model in the background; never raises.

        The digest that is served already changes nothing but the previous model.
        """
        if self._task is not None:
            self._task.cancel()
        try:
            target = _parse(user_config)
        except ClipRayError as error:
            self._wanted = str(user_config.get("digest") if isinstance(user_config, dict) else "")
            self._failed(error)
            return
        self._wanted, self._error = target.digest, None
        self._task = asyncio.create_task(self._retarget(target))

    async def _retarget(self, target: Target) -> None:
        try:
            await self._switch(target)
        except asyncio.CancelledError:
            raise
        except BaseException as error:  # the old weights stay, whatever it was
            self._failed(error)
        finally:
            if self._task is asyncio.current_task():
                self._task = None

    def _failed(self, error: BaseException) -> None:
        self._error = f"{type(error).__name__}: {error}"[:2000]
        self.metrics.target(failed=True)
        log.error("target %s is not served: %s", self._wanted[:12], self._error)

    async def _switch(self, target: Target) -> None:
        held = [model for model in self.models() if model.served.digest == target.digest]
        if held:
            current = replace(held[0], served=target.plain())
            if held[0].served == current.served:
                current = held[0]
        else:
            async with self._turn():
                current = await self._load(target)
        if current is not self._current:
            try:
                await asyncio.wait_for(self._prepare_stored(current, target), PREPARE_S)
            except TimeoutError:
                log.error("not all stored classifiers are ready after %g s", PREPARE_S)
        self._current, self._previous = current, await self._find_previous(target)
        self._error = None
        self.metrics.target(failed=False)
        log.info("serving %s, digest %s", current.id, current.served.digest)
        # What was not ready in time, and what another replica has stored since the last look.
        if self._preparing is not None:
            self._preparing.cancel()
        self._preparing = asyncio.create_task(self._prepare_stored(current, target))

    async def _prepare_stored(self, loaded: Loaded, target: Target) -> None:
        digests = {target.digest, target.previous.digest if target.previous else ""}
        if self._current is not None:
            digests.add(self._current.served.digest)
        try:
            await self.prepare(loaded, frozenset(digests - {""}))
        except ApiError as error:
            # The store's outage must not keep a replica from serving; each is computed when used.
            log.error("stored classifiers are not prepared: %s", error)

    async def _find_previous(self, target: Target) -> Loaded | None:
        if target.previous is None:
            return None
        for model in (self._current, self._previous):
            if model is not None and model.served == target.previous:
                return model
        try:
            async with self._turn():
                return await self._load(target.previous)
        except Exception as error:
            # Whatever it was: the model that callers ask for is there, and the one before it is a
            # convenience that must not keep it from serving.
            log.error("previous %s cannot be served: %s", target.previous.id, error)
            return None

    @contextlib.asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        """Let the replicas of a node load one after the other: loading takes CPU from serving."""
        self._cache_dir.mkdir(parents=True, exist_ok=True)
        lock = os.open(self._cache_dir / "loading.lock", os.O_CREAT | os.O_RDWR, 0o600)
        deadline = time.monotonic() + LOAD_LOCK_S
        try:
            while not _locked(lock) and time.monotonic() < deadline:
                await asyncio.sleep(0.2)
            yield
        finally:
            os.close(lock)

    async def _load(self, served: ServedModel) -> Loaded:
        def load() -> Encoder:
            model, tokenizer, info = load_served(served, self._cache_dir, self.settings.s3)
            return Encoder(
                model,
                tokenizer,
                info,
                device=self.settings.device,
                max_pixels=int(self.settings.limits.image_mpx * 1e6),
            )

        encoder = await asyncio.to_thread(load)
        await self.workers.warm_up(encoder)
        bias = encoder.model.logit_bias
        return Loaded(
            served.plain(),
            encoder,
            logit_scale=encoder.model.logit_scale.exp().item(),
            logit_bias=0.0 if bias is None else bias.item(),
        )

    def status(self) -> dict[str, Any]:
        """Return what this replica serves; what promotions and `--check` read."""
        current = self._current
        loading = self._task is not None and self._error is None
        return {
            "replica": self.replica,
            "pid": os.getpid(),
            "model": None if current is None else current.served.model_dump(),
            "previous": None if self._previous is None else self._previous.served.model_dump(),
            "target_digest": self._wanted,
            "state": "failed" if self._error else "loading" if loading or not current else "ready",
            "error": self._error,
        }

    def models(self) -> list[Loaded]:
        """Return the loaded models, the current one first."""
        return [model for model in (self._current, self._previous) if model is not None]

    def pick(self, model: str | None) -> Loaded:
        """Return the model that a request names.

        Args:
            model: none, NAME or NAME@champion for the current one; NAME/VERSION for that one.

        Raises:
            ApiError: 404 for a name, 409 for a version that is not loaded; 503 while loading.
        """
        current = self._current
        if current is None:
            raise ApiError(503, "loading", "the model is being loaded", retry_after=5)
        if not model or model in (current.served.name, f"{current.served.name}@champion"):
            return current
        for loaded in self.models():
            if model == loaded.id:
                return loaded
        there = ", ".join(loaded.id for loaded in self.models())
        name, _, version = model.rpartition("/")
        if version and name in {loaded.served.name for loaded in self.models()}:
            raise ApiError(
                409, "model_not_loaded", f"model {model[:200]!r} is not loaded; loaded: {there}",
                param="model",
            )  # fmt: skip
        raise ApiError(
            404, "model_not_found", f"no model {model[:200]!r} here; loaded: {there}", param="model"
        )

    async def embed_images(
        self, loaded: Loaded, images: Sequence[bytes], params: Sequence[str]
    ) -> Floats:
        """Return image features, (N, E) float32 of unit length.

        Args:
            loaded: the model.
            images: N image files.
            params: the place of each in the request, for errors.

        Raises:
            ApiError: 413 for too many pixels, 422 for a file that is no usable image.
        """
        encoder = loaded.encoder
        shape = (len(images), 3, encoder.image_size, encoder.image_size)
        async with self._input_budget.reserve(min(math.prod(shape), self._input_budget.total)):
            pixels_NCHW = np.empty(shape, np.uint8)
            start = time.perf_counter()
            with tracing.spanning("decode", items=len(images), bytes=sum(map(len, images))):
                if len(images) == 1:
                    pixels_NCHW[0] = await self._decode(encoder, images[0], params[0])
                else:
                    await self._decode_all(encoder, images, params, pixels_NCHW)
            self.metrics.stage("decode", 1000 * (time.perf_counter() - start))
            return await self.workers.encode_pixels(encoder, pixels_NCHW)

    async def _decode_all(
        self,
        encoder: Encoder,
        images: Sequence[bytes],
        params: Sequence[str],
        into: NDArray[np.uint8],
    ) -> None:
        """Decode with no more tasks than threads, so that another request's image comes between."""
        queue = iter(range(len(images)))

        async def run() -> None:
            for index in queue:
                into[index] = await self._decode(encoder, images[index], params[index])

        tasks = [asyncio.create_task(run()) for _ in range(min(self.workers.cpus, len(images)))]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    async def _decode(self, encoder: Encoder, image: bytes, param: str) -> NDArray[np.uint8]:
        def decode_small() -> NDArray[np.uint8] | int:
            """Return the pixels, or the bytes that a large image takes on the way to them."""
            # Not on the event loop: a header may be made to take long.
            width, height = measure(image)
            if width * height > encoder.max_pixels:
                raise ImageError(
                    "too-many-pixels", f"{width}x{height}, limit {encoder.max_pixels} pixels"
                )
            memory = width * height * DECODE_BYTES
            # Small ones are bounded by the threads; not worth the bookkeeping.
            return encoder.preprocess(image) if memory < 16_000_000 else memory

        try:
            found = await self.workers.decode(decode_small)
            if not isinstance(found, int):
                return found
            async with self._decode_budget.reserve(min(found, self._decode_budget.total)):
                return await self.workers.decode(encoder.preprocess, image)
        except ImageError as error:
            too_large = error.reason == "too-many-pixels"
            code = "too_many_pixels" if too_large else "undecodable_image"
            raise ApiError(
                413 if too_large else 422, code, f"image: {error}", param=param
            ) from None

    async def embed_texts(self, loaded: Loaded, texts: Sequence[str]) -> tuple[Floats, int]:
        """Return text features, (N, E) float32 of unit length, and the number of tokens."""
        digest, encoder = loaded.served.digest, loaded.encoder
        ids_NL = await self._tokenize(encoder, texts)
        found = self._texts.lookup(digest, texts)
        missing = [index for index, row in enumerate(found) if row is None]
        for row in found:
            self.metrics.cache("text", row is not None)
        features = np.empty((len(texts), encoder.embed_dim), np.float32)
        for index, row in enumerate(found):
            if row is not None:
                features[index] = row
        if missing:
            features[missing] = await self.workers.encode_ids(encoder, ids_NL[missing])
            self._texts.store(digest, [texts[i] for i in missing], features[missing])
        return features, sum(token_counts(ids_NL))

    async def _tokenize(self, encoder: Encoder, texts: Sequence[str]) -> NDArray[np.int32]:
        # Short texts cost less than the way to a thread and back.
        if sum(map(len, texts)) <= 1000:
            return encoder.tokenizer(texts)[0]
        parts, start, size = [], 0, 0
        for index, text in enumerate(texts, 1):
            size += len(text)
            if size >= _CHARACTERS or index == len(texts):
                part = await self.workers.decode(encoder.tokenizer, texts[start:index])
                parts.append(part[0])
                start, size = index, 0
        return np.concatenate(parts)

    async def classifier(
        self, loaded: Loaded, labels: Sequence[str], templates: Sequence[str]
    ) -> tuple[Floats, bool]:
        """Return the classifier of labels and templates, (C, E), and whether it was cached."""
        key = (loaded.served.digest, prompts_digest(labels, templates))
        matrix, cached = await self._matrices.get(
            key, lambda: self.build(loaded, labels, templates)
        )
        self.metrics.cache("classifier", cached)
        return matrix, cached

    async def build(
        self, loaded: Loaded, labels: Sequence[str], templates: Sequence[str]
    ) -> Floats:
        """Compute a classifier, (C, E), in passes that other requests come between."""
        encoder = loaded.encoder
        parts = []
        step = max(1, _PROMPTS // len(templates))
        for start in range(0, len(labels), step):
            block = labels[start : start + step]
            # Filled as they are needed: a label's templates may be many and long.
            sentences = (fill(template, label) for label in block for template in templates)
            rows = []
            while some := list(itertools.islice(sentences, 256)):
                ids = await self._tokenize(encoder, some)
                rows.append(await self.workers.encode_ids(encoder, ids))
            parts.append(ensemble(np.concatenate(rows), len(block)))
        return np.concatenate(parts)

    async def probe(self) -> None:
        """Encode something with the current model; raises what it raises."""
        if self._current is not None:
            await self.workers.probe(self._current.encoder)

    def close(self) -> None:
        """End the background work; for tests and the end of a replica."""
        for task in (self._task, self._preparing):
            if task is not None:
                task.cancel()
        self.workers.close()


async def _nothing_stored(loaded: Loaded, keep: frozenset[str]) -> int:
    return 0


def _parse(user_config: Any) -> Target:
    try:
        return Target.model_validate(user_config)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ClipRayError(
            f"user_config {place or 'of the deployment'}: {first['msg']}; the model is set by "
            "jobs/deploy.py and jobs/promote.py"
        ) from error


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
