"""The ASGI application of a replica: its routes, their documentation, the layers around them.

The same under Ray Serve and under plain uvicorn. The handlers are in serve.api.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

import clip_ray
from clip_ray.config.serving import AppSettings
from clip_ray.errors import ConfigError
from clip_ray.keys import KeyRing
from serve import pages, schemas
from serve.api import Api, json_response
from serve.classifiers import ClassifierStore
from serve.errors import ApiError
from serve.fetch import Fetcher
from serve.metrics import Metrics
from serve.middleware import EXCHANGE, Edge, Gate

if TYPE_CHECKING:
    from serve.engine import Engine

Handler = Callable[[Request], Awaitable[Response]]

_DESCRIPTION = (
    "Embeddings of texts and images, zero-shot classification and ranking by a CLIP model. "
    "POST /v1/embeddings takes what OpenAI's clients send. Every answer names the model's version "
    "and digest; embeddings of different digests must not be compared."
)


def create_app(
    engine: Engine,
    settings: AppSettings,
    classifiers: ClassifierStore,
    keys: KeyRing | None,
    fetcher: Fetcher,
    metrics: Metrics,
    *,
    echo_id: bool = True,
) -> FastAPI:
    """Return the ASGI application of one replica.

    Args:
        engine: the models.
        settings: limits and auth.
        classifiers: the stored classifiers.
        keys: who may call; not looked at where `settings.auth` is off.
        fetcher: gets images by URL.
        metrics: counted into.
        echo_id: send x-request-id; off behind Ray Serve, which adds the same header itself.

    Raises:
        ConfigError: auth by keys without keys.
    """
    if settings.auth == "keys" and keys is None:
        raise ConfigError("auth keys, but no keys were read; set keys_file")
    api = Api(engine, settings.limits, classifiers, fetcher)
    # It warns of every broken form; that one was broken is in the access log.
    logging.getLogger("python_multipart").setLevel(logging.ERROR)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await api.close()

    app = FastAPI(
        title="CLIP-Ray",
        version=clip_ray.__version__,
        description=_DESCRIPTION,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        telemetry={"tracing": False, "metrics": False, "logs": False},  # ours are Ray's
        lifespan=lifespan,
    )
    app.router.route_class = PlainRoute
    for method, path, handler, documentation in _table(api):
        app.add_api_route(path, handler, methods=[method], response_model=None, **documentation)
    for path, handler in (("/health", api.health), ("/ready", api.ready)):
        # What some load balancers ask.
        app.add_api_route(
            path, handler, methods=["HEAD"], response_model=None, include_in_schema=False
        )
    app.include_router(pages.router())
    app.add_exception_handler(HTTPException, _http_error)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    # The last one added is outermost.
    app.add_middleware(
        Gate,
        settings=settings,
        budget=engine.budget,
        keys=keys if settings.auth == "keys" else None,
        metrics=metrics,
    )
    app.add_middleware(Edge, metrics=metrics, echo_id=echo_id)
    return app


class PlainRoute(APIRoute):
    """A documented route whose handler is called with the request, and nothing else is done.

    FastAPI's own way there looks for parameters, dependencies and bodies that ours have not: 0.05
    ms of each request.
    """

    def __init__(self, path: str, endpoint: Handler, **options: Any) -> None:
        super().__init__(path, endpoint, **options)

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            response = await endpoint(Request(scope, receive))
            await response(scope, receive, send)

        self.app = app


def _table(api: Api) -> list[tuple[str, str, Handler, dict[str, Any]]]:
    """Return the routes of the API with their documentation."""
    s, examples = schemas, schemas.EXAMPLES
    classifier, model = s.path_id("id of a stored classifier"), s.path_id("NAME or NAME/VERSION")
    return [
        ("POST", "/v1/embeddings", api.embeddings,
         s.operation("Embed texts and images", s.EMBEDDINGS_ANSWER, body=s.EMBEDDINGS,
                     examples=examples["embeddings"], form=s.EMBEDDINGS_FORM, images=True)),
        ("POST", "/v1/classify", api.classify,
         s.operation("Classify images by labels", s.CLASSIFY_ANSWER, body=s.CLASSIFY,
                     examples=examples["classify"], form=s.CLASSIFY_FORM)),
        ("POST", "/v1/rank", api.rank,
         s.operation("Rank texts and images by likeness", s.RANK_ANSWER, body=s.RANK,
                     examples=examples["rank"])),
        ("GET", "/v1/classifiers", api.list_classifiers,
         s.reading("List the stored classifiers of the key", s.CLASSIFIERS_ANSWER)),
        ("PUT", "/v1/classifiers/{id}", api.put_classifier,
         s.operation("Store a classifier", s.CLASSIFIER_ANSWER, body=s.CLASSIFIER,
                     examples=examples["classifier"], parameters=(classifier,))),
        ("GET", "/v1/classifiers/{id}", api.get_classifier,
         s.reading("Show a stored classifier", s.CLASSIFIER_ANSWER, 400, 404,
                   parameters=(classifier,))),
        ("DELETE", "/v1/classifiers/{id}", api.delete_classifier,
         s.reading("Delete a stored classifier", s.DELETED_ANSWER, 400, 404,
                   parameters=(classifier,))),
        ("GET", "/v1/models", api.list_models,
         s.reading("List the models that answer", s.MODELS_ANSWER)),
        ("GET", "/v1/models/{id:path}", api.get_model,
         s.reading("Show a model", s.MODEL_ANSWER, 404, 409, parameters=(model,))),
        ("GET", "/health", api.health, s.opened("Tell whether the process lives", s.HEALTH_ANSWER)),
        ("GET", "/ready", api.ready,
         s.opened("Tell whether a model is loaded and warm", s.READY_ANSWER, 503)),
    ]  # fmt: skip


async def _http_error(request: Request, error: Exception) -> Response:
    """Answer the router's own refusals, 404 and 405, in our shape."""
    assert isinstance(error, HTTPException)
    codes = {404: ("not_found", "no such route"), 405: ("method_not_allowed", "not this method")}
    code, message = codes.get(error.status_code, ("http_error", str(error.detail)))
    body = ApiError(error.status_code, code, f"{message}; see /docs").body(
        request.scope[EXCHANGE].id
    )
    answer = json_response(body)
    answer.status_code = error.status_code
    answer.headers.update(error.headers or {})
    return answer


def _openapi(app: FastAPI) -> dict[str, Any]:
    if app.openapi_schema is None:
        document = get_openapi(
            title=app.title, version=app.version, description=app.description, routes=app.routes
        )
        scheme = {"type": "http", "scheme": "bearer", "description": "a key of jobs/keys.py"}
        document.setdefault("components", {})["securitySchemes"] = {"key": scheme}
        app.openapi_schema = document
    return app.openapi_schema
