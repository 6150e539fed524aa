"""The handlers of the API: from a checked request to an answer that one model gave.

Each handler picks the model once and passes it along. Left out: keys, limits, memory, deadlines
and errors, which are serve.middleware's, and what a request may contain, which is serve.inputs'.
"""

from __future__ import annotations

import asyncio
import heapq
import json
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from fastapi import Request, Response
from numpy.typing import NDArray

from clip_ray.config.serving import Limits
from serve import answers, inputs
from serve.classifiers import ClassifierStore
from serve.definitions import Definition
from serve.documents import Body
from serve.errors import ApiError
from serve.fetch import Fetcher
from serve.items import Item, check_image
from serve.middleware import EXCHANGE, Exchange

if TYPE_CHECKING:
    from serve.engine import Engine, Loaded

T = TypeVar("T")
Floats = NDArray[np.float32]

_ENCODER = json.JSONEncoder(separators=(",", ":"))
_INLINE = 256 * 1024  # bytes of a body that are parsed at once; a thread costs 0.1 ms
_PRODUCTS = 4_000_000  # multiplications of a matrix product on the event loop, about 1 ms
_PREDICTIONS = 1000  # of an answer that is made on the event loop, about 3 ms
_LABEL_CHARS = 2_000_000  # of all labels in an answer; JSON takes up to 12 bytes for each
_FETCHES = 4  # images of a request that are fetched at once


class Api:
    """The handlers, a method each.

    Args:
        engine: the models.
        limits: of requests.
        classifiers: the stored classifiers.
        fetcher: gets images by URL.
    """

    def __init__(
        self, engine: Engine, limits: Limits, classifiers: ClassifierStore, fetcher: Fetcher
    ) -> None:
        self.engine = engine
        self.limits = limits
        self.classifiers = classifiers
        self.fetcher = fetcher
        # One thread: reading a body holds the interpreter anyway, and several at once would hold
        # several times a body's memory on the way.
        self._reader = ThreadPoolExecutor(1, "read")

    async def close(self) -> None:
        """End what the handlers keep open."""
        self._reader.shutdown(wait=False, cancel_futures=True)
        await self.fetcher.close()

    async def embeddings(self, request: Request) -> Response:
        """Answer POST /v1/embeddings."""
        exchange: Exchange = request.scope[EXCHANGE]
        wanted = await self._read(request, inputs.read_embeddings)
        loaded = self._pick(exchange, wanted.model)
        dim = loaded.encoder.embed_dim
        if wanted.dimensions not in (None, dim):
            raise ApiError(
                400,
                "unsupported_dimensions",
                f"dimensions {wanted.dimensions}: {loaded.id} has {dim}; leave dimensions out",
                param="dimensions",
            )
        features_NE, tokens = await self._embed(exchange, loaded, wanted.items)
        if "application/octet-stream" in request.headers.get("accept", ""):
            return Response(
                answers.little_endian(features_NE),
                media_type="application/octet-stream",
                headers={"x-clip-dim": str(dim), "x-clip-count": str(len(features_NE))},
            )
        return json_response(
            {
                "object": "list",
                "data": answers.embeddings(features_NE, wanted.items, wanted.base64),
                "usage": answers.usage(tokens, wanted.items),
                **answers.provenance(loaded),
            }
        )

    async def classify(self, request: Request) -> Response:
        """Answer POST /v1/classify."""
        exchange: Exchange = request.scope[EXCHANGE]
        wanted = await self._read(request, inputs.read_classify)
        loaded = self._pick(exchange, wanted.model)
        # First: an id that is not there costs no image's work.
        definition, matrix_CE, cached = await self._matrix(exchange, loaded, wanted)
        labels = definition.labels
        if wanted.top_k is not None and wanted.top_k > len(labels):
            raise ApiError(
                400,
                "invalid_value",
                f"top_k {wanted.top_k}: there are {len(labels)} labels",
                param="top_k",
            )
        top_k = wanted.top_k or min(inputs.TOP_K, len(labels))
        _check_label_chars(len(wanted.items), labels, top_k)
        scoring = wanted.scoring or definition.scoring
        features_NE, _ = await self._embed(exchange, loaded, wanted.items)

        def respond() -> Response:
            scored = answers.classify(
                features_NE, matrix_CE, loaded.logit_scale, loaded.logit_bias, scoring, top_k
            )
            data = [
                {
                    "index": index,
                    "predictions": [
                        {"label": labels[c], "score": score, "logit": logit, "label_index": c}
                        for c, score, logit in best
                    ],
                }
                for index, best in enumerate(scored)
            ]
            return json_response(
                {
                    "object": "classify",
                    "data": data,
                    "scoring": scoring,
                    "classifier": wanted.classifier,
                    "cached": cached,
                    "usage": answers.usage(0, wanted.items),
                    **answers.provenance(loaded),
                }
            )

        is_large = len(features_NE) * matrix_CE.size > _PRODUCTS
        if is_large or len(features_NE) * top_k > _PREDICTIONS:
            return await asyncio.to_thread(respond)
        return respond()

    async def rank(self, request: Request) -> Response:
        """Answer POST /v1/rank."""
        exchange: Exchange = request.scope[EXCHANGE]
        wanted = await self._read(request, inputs.read_rank)
        loaded = self._pick(exchange, wanted.model)
        items = [*wanted.queries, *wanted.documents]
        features_NE, tokens = await self._embed(exchange, loaded, items)
        split = len(wanted.queries)
        top_n = min(wanted.top_n or len(wanted.documents), len(wanted.documents))

        def shown(index: int, cosine: float) -> dict[str, Any]:
            result: dict[str, Any] = {"index": index, "relevance_score": cosine}
            text = wanted.documents[index].text
            if wanted.return_documents and text is not None:
                result["document"] = {"text": text}
            return result

        results = [
            [shown(index, cosine) for index, cosine in ranked]
            for ranked in answers.rank(features_NE[:split], features_NE[split:], top_n)
        ]
        return json_response(
            {
                "object": "rank",
                "results": results[0] if wanted.single else results,
                "usage": answers.usage(tokens, items),
                **answers.provenance(loaded),
            }
        )

    async def list_classifiers(self, request: Request) -> Response:
        """Answer GET /v1/classifiers."""
        exchange: Exchange = request.scope[EXCHANGE]
        loaded = self._pick(exchange, None)
        data = []
        for listed in await self.classifiers.list(exchange.namespace):
            entry: dict[str, Any] = {"object": "classifier", "id": listed.id}
            if listed.error is not None:
                entry["error"] = listed.error
            else:
                entry["labels"] = listed.labels
                entry["templates"] = listed.templates
                entry["scoring"] = listed.scoring
                entry["created"] = listed.created
            data.append(entry)
        return json_response({"object": "list", "data": data, **answers.provenance(loaded)})

    async def put_classifier(self, request: Request) -> Response:
        """Answer PUT /v1/classifiers/{id}."""
        exchange: Exchange = request.scope[EXCHANGE]
        identifier = inputs.check_id(request.path_params["id"], "id")
        definition = await self._read(request, inputs.read_classifier)
        loaded = self._pick(exchange, None)
        stored = await self.classifiers.put(exchange.namespace, identifier, definition)
        return json_response(_classifier(identifier, stored, loaded))

    async def get_classifier(self, request: Request) -> Response:
        """Answer GET /v1/classifiers/{id}."""
        exchange: Exchange = request.scope[EXCHANGE]
        identifier = inputs.check_id(request.path_params["id"], "id")
        loaded = self._pick(exchange, None)
        definition = await self.classifiers.get(exchange.namespace, identifier)
        if definition is None:
            raise _no_classifier(identifier)
        return json_response(_classifier(identifier, definition, loaded))

    async def delete_classifier(self, request: Request) -> Response:
        """Answer DELETE /v1/classifiers/{id}."""
        exchange: Exchange = request.scope[EXCHANGE]
        identifier = inputs.check_id(request.path_params["id"], "id")
        loaded = self._pick(exchange, None)
        if not await self.classifiers.delete(exchange.namespace, identifier):
            raise _no_classifier(identifier)
        answer = {"object": "classifier", "id": identifier, "deleted": True}
        return json_response({**answer, **answers.provenance(loaded)})

    async def list_models(self, request: Request) -> Response:
        """Answer GET /v1/models."""
        loaded = self._pick(request.scope[EXCHANGE], None)
        data = [_model(model) for model in self.engine.models()]
        return json_response({"object": "list", "data": data, **answers.provenance(loaded)})

    async def get_model(self, request: Request) -> Response:
        """Answer GET /v1/models/{id}."""
        return json_response(_model(self._pick(request.scope[EXCHANGE], request.path_params["id"])))

    async def health(self, request: Request) -> Response:
        """Answer GET /health: the process lives and its event loop turns."""
        return json_response({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        """Answer GET /ready; during a promotion the old model answers, so that is ready too."""
        return json_response({"status": "ready", "model": self.engine.pick(None).id})

    async def _read(self, request: Request, read: Callable[[Body, Limits], T]) -> T:
        """Return the checked request; a large body is read in a thread."""
        exchange: Exchange = request.scope[EXCHANGE]
        encoding = request.headers.get("content-encoding", "identity")
        if encoding.lower() != "identity":
            # Unpacking could make a thousand times as much of it as was counted on the way in.
            raise ApiError(
                415, "unsupported_encoding", f"content-encoding {encoding[:50]!r}: send it unpacked"
            )
        body = Body(
            exchange.take_body(),
            request.headers.get("content-type", ""),
            request.scope["query_string"].decode("latin-1"),
        )
        if len(body.data) <= _INLINE:
            return read(body, self.limits)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._reader, read, body, self.limits)

    def _pick(self, exchange: Exchange, model: str | None) -> Loaded:
        loaded = self.engine.pick(model)
        exchange.loaded = loaded
        return loaded

    async def _matrix(
        self, exchange: Exchange, loaded: Loaded, wanted: inputs.ClassifyRequest
    ) -> tuple[Definition, Floats, bool]:
        """Return labels, their matrix, and whether it was in memory."""
        if wanted.classifier is None:
            matrix_CE, cached = await self.engine.classifier(
                loaded, wanted.labels, wanted.templates
            )
            return Definition(wanted.labels, wanted.templates, "softmax"), matrix_CE, cached
        definition, matrix_CE, cached = await self.classifiers.matrix(
            loaded, exchange.namespace, wanted.classifier
        )
        self.engine.metrics.cache("classifier", cached)
        return definition, matrix_CE, cached

    async def _embed(
        self, exchange: Exchange, loaded: Loaded, items: Sequence[Item]
    ) -> tuple[Floats, int]:
        """Return the features of texts and images, (N, E) in their order, and the text tokens."""
        exchange.items = len(items)
        missing = [item for item in items if item.url is not None]
        if not missing:
            return await self._encode(loaded, items)
        for item in missing:  # first: what is refused anyway takes no memory from others
            try:
                self.fetcher.check(item.url or "")
            except ApiError as error:
                error.param = error.param or item.param
                raise
        # They count as bytes of the body. How many is known only when they are there, so each
        # fetch may be one image too many.
        each, limit = int(self.limits.image_mb * 1e6), int(self.limits.body_mb * 1e6)
        assert exchange.memory is not None, "a request with a body has passed the gate"
        # The body's own reservation, grown: who waited for another while holding it could wait
        # for somebody who waits likewise.
        await exchange.memory.grow(min(len(missing) * each, limit + _FETCHES * each))
        await self._fetch(missing, limit)
        return await self._encode(loaded, items)

    async def _encode(self, loaded: Loaded, items: Sequence[Item]) -> tuple[Floats, int]:
        of_images = [index for index, item in enumerate(items) if item.text is None]
        if not of_images:
            return await self.engine.embed_texts(loaded, [item.text or "" for item in items])
        images = self.engine.embed_images(
            loaded, [items[i].image for i in of_images], [items[i].param for i in of_images]
        )
        if len(of_images) == len(items):
            return await images, 0
        texts = self.engine.embed_texts(loaded, [item.text for item in items if item.text])
        image_ME, (text_TE, tokens) = await _all((images, texts))
        features_NE = np.empty((len(items), loaded.encoder.embed_dim), np.float32)
        is_image = np.zeros(len(items), bool)
        is_image[of_images] = True
        features_NE[is_image] = image_ME
        features_NE[~is_image] = text_TE
        return features_NE, tokens

    async def _fetch(self, items: Sequence[Item], limit: int) -> None:
        """Fetch images that are URLs, a few at a time, `limit` bytes together."""
        left = limit
        queue = iter(items)

        async def fetch() -> None:
            nonlocal left
            for item in queue:
                try:
                    image = await self.fetcher.get(item.url or "")
                    item.image = check_image(image, item.param, self.limits)
                except ApiError as error:
                    error.param = error.param or item.param
                    raise
                left -= len(image)
                if left < 0:
                    raise ApiError(
                        413,
                        "body_too_large",
                        f"the images by URL are more than {limit / 1e6:g} MB together",
                        param=item.param,
                    )

        await _all(fetch() for _ in range(min(_FETCHES, len(items))))


async def _all(work: Iterable[Awaitable[Any]]) -> list[Any]:
    """Await all at once; when one fails, or the caller is cancelled, the others are cancelled."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


def _check_label_chars(images: int, labels: Sequence[str], top_k: int) -> None:
    """Refuse an answer that long labels could make far larger than its request.

    Raises:
        ApiError: 413.
    """
    if images * top_k * max(map(len, labels)) <= _LABEL_CHARS:
        return
    chars = images * sum(heapq.nlargest(top_k, map(len, labels)))
    if chars > _LABEL_CHARS:
        raise ApiError(
            413,
            "too_many_predictions",
            f"{images} images x top_k {top_k}: labels of up to {chars} characters in the answer, "
            f"limit {_LABEL_CHARS}; ask for fewer, or send several requests",
            param="top_k",
        )


def json_response(answer: dict[str, Any]) -> Response:
    """Return an answer as compact JSON, in ASCII: labels may be any text."""
    return Response(_ENCODER.encode(answer), media_type="application/json")


def _model(loaded: Loaded) -> dict[str, Any]:
    return {
        "id": loaded.id,
        "object": "model",
        "created": 0,
        "owned_by": "clip-ray",
        "image_size": loaded.encoder.image_size,
        "clip": answers.facts(loaded),
    }


def _classifier(identifier: str, definition: Definition, loaded: Loaded) -> dict[str, Any]:
    return {
        "object": "classifier",
        "id": identifier,
        "labels": definition.labels,
        "templates": definition.templates,
        "scoring": definition.scoring,
        "created": definition.created,
        **answers.provenance(loaded),
    }


def _no_classifier(identifier: str) -> ApiError:
    return ApiError(
        404, "classifier_not_found", f"no classifier {identifier!r} is stored for this key",
        param="id",
    )  # fmt: skip
