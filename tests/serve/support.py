"""A whole replica without Ray: the real app on a tiny model, called in-process or over a socket."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx
import uvicorn
from fastapi import FastAPI

from clip_ray.config.serving import AppSettings
from clip_ray.inference import Encoder
from clip_ray.keys import KeyRing
from clip_ray.registry import ServedModel, Target
from clip_ray.storage import LocalStore
from serve.classifiers import ClassifierStore
from serve.engine import Engine
from serve.fetch import Fetcher
from serve.metrics import Metrics
from serve.middleware import Gate
from serve.routes import create_app
from tests.serve.models import replica_context

T = TypeVar("T")
Chunk = bytes | float | asyncio.Event
JSON = {"content-type": "application/json"}


@dataclass(frozen=True)
class Answer:
    """What an ASGI app answered."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The error, whose shape is checked on the way."""
        assert self.headers["content-type"] == "application/json", self.body
        error = self.json()["error"]
        assert set(error) == {"message", "type", "code", "param", "request_id"}
        assert error["message"] and error["code"] and error["type"]
        assert error["request_id"] == self.headers.get("x-request-id", error["request_id"])
        return error


class Client:
    """The other end of an ASGI connection: sends chunks at its own pace, and may leave.

    Args:
        chunks: of the body; a float is a pause in seconds, an event a pause until it is set.
        stays: False leaves as soon as the body is sent, a number after so many seconds.
    """

    def __init__(self, chunks: Sequence[Chunk] = (b"",), stays: bool | float = True):
        self._chunks = list(chunks)
        self._stays = stays
        self._answered = asyncio.Event()
        self.read = 0  # bytes that the app took
        self.status = 0
        self.headers: dict[str, str] = {}
        self.body = b""

    async def receive(self) -> dict[str, Any]:
        while self._chunks:
            chunk = self._chunks.pop(0)
            if isinstance(chunk, float):
                await asyncio.sleep(chunk)
                continue
            if isinstance(chunk, asyncio.Event):
                await chunk.wait()
                continue
            self.read += len(chunk)
            return {"type": "http.request", "body": chunk, "more_body": bool(self._chunks)}
        if self._stays is True:
            await self._answered.wait()
        elif self._stays is not False:
            await asyncio.sleep(self._stays)
        return {"type": "http.disconnect"}

    async def send(self, message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            assert not self.status, "two answers"
            self.status = message["status"]
            for name, value in message["headers"]:
                assert name == name.lower() and name.decode() not in self.headers, message
                self.headers[name.decode()] = value.decode("latin-1")
        else:
            self.body += message.get("body", b"")
            if not message.get("more_body", False):
                self._answered.set()


async def call(
    app: Any,
    method: str,
    path: str,
    chunks: Sequence[Chunk] = (b"",),
    headers: dict[str, str] | Sequence[tuple[bytes, bytes]] = (),
    *,
    client: Client | None = None,
    root_path: str = "",
) -> Answer:
    """Send a request into an ASGI app, in this event loop; no content-length unless given."""
    client = client or Client(chunks)
    raw, _, query = path.partition("?")
    if isinstance(headers, dict):
        headers = [(k.lower().encode("latin-1"), v.encode("latin-1")) for k, v in headers.items()]
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "path": raw,
        "raw_path": raw.encode("latin-1", "replace"),
        "query_string": query.encode("latin-1", "replace"),
        "root_path": root_path,
        "scheme": "http",
        "headers": list(headers),
        "server": ("test", 80),
        "client": ("127.0.0.1", 1),
    }
    await app(scope, client.receive, client.send)
    return Answer(client.status, client.headers, client.body)


class Site:
    """A replica in a thread of its own, so that tests can be plain functions.

    Attributes:
        model: what it serves.
        engine, app, metrics, settings: its parts.
        url: of its socket, where `listen` was called.
    """

    def __init__(
        self,
        folder: Path,
        model: ServedModel,
        settings: dict[str, Any] | None = None,
        fetcher: Any = None,
        keys: KeyRing | None = None,
        make_app: Callable[..., FastAPI] = create_app,
    ) -> None:
        replica_context()
        given = {"device": "cpu", "state_uri": str(folder / "state"), **(settings or {})}
        self.settings = AppSettings.model_validate(given)
        self.model = model
        self.metrics = Metrics()
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()
        self.server: uvicorn.Server | None = None
        self.url = ""
        self._folder = folder
        self._fetcher, self._keys, self._make_app = fetcher, keys, make_app
        self.run(self._start())

    async def _start(self) -> None:
        self.engine = Engine(self.settings, 1, self.metrics, self._folder / "cache")
        store = LocalStore(self._folder / "state")
        self.classifiers = ClassifierStore(store, self.engine.build, self.settings.limits)
        self.engine.prepare = self.classifiers.prepare
        await self.engine.start(Target(**self.model.model_dump()).model_dump())
        limit = int(self.settings.limits.image_mb * 1e6)
        self.fetcher = self._fetcher or Fetcher(self.settings.image_urls, limit)
        self.app = self._make_app(
            self.engine, self.settings, self.classifiers, self._keys, self.fetcher, self.metrics
        )

    def run(self, work: Coroutine[Any, Any, T], timeout: float = 60) -> T:
        """Run a coroutine in the replica's event loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(timeout)

    def call(self, method: str, path: str, body: Any = None, **options: Any) -> Answer:
        """Send a request in-process; a dict becomes JSON, bytes stay, a list is of chunks."""
        headers = dict(options.pop("headers", {}))
        if isinstance(body, dict):
            body = json.dumps(body).encode()
            headers = {**JSON, **headers}
        chunks = body if isinstance(body, list) else [body or b""]
        return self.run(call(self.app, method, path, chunks, headers, **options))

    def post(self, path: str, body: Any, **options: Any) -> Answer:
        return self.call("POST", path, body, **options)

    def gate(self) -> Gate:
        """Return the layer that counts who is in."""
        if self.app.middleware_stack is None:  # no request has come yet
            self.app.middleware_stack = self.app.build_middleware_stack()
        layer: Any = self.app.middleware_stack
        while not isinstance(layer, Gate):
            layer = layer.app
        return layer

    def listen(self) -> str:
        """Answer on a socket as well, with uvicorn; return the URL."""
        config = uvicorn.Config(self.app, port=0, log_config=None, lifespan="off")
        self.server = uvicorn.Server(config)
        self.server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign]
        asyncio.run_coroutine_threadsafe(self.server.serve(), self.loop)
        deadline = time.monotonic() + 20
        while not self.server.started:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        return self.url

    def close(self) -> None:
        async def end() -> None:
            self.engine.close()
            self.classifiers.close()
            if self.server is not None:
                self.server.should_exit = True
                await asyncio.sleep(0.3)

        self.run(end())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(10)


@contextlib.contextmanager
def running(site: Site) -> Iterator[Site]:
    try:
        yield site
    finally:
        site.close()


def data_uri(image: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"


def form(*parts: tuple[str, Any] | tuple[str, Any, str]) -> tuple[bytes, dict[str, str]]:
    """Return the body and headers of multipart/form-data: (name, text) or (name, bytes, file name).

    Made by httpx: the parser must read what others write.
    """
    files = [(part[0], (part[2], part[1]) if len(part) == 3 else (None, part[1])) for part in parts]
    request = httpx.Request("POST", "http://test", files=files)
    return request.read(), {"content-type": request.headers["content-type"]}


def offline(model: ServedModel) -> Encoder:
    """Return an encoder of the same weights that knows nothing of serving."""
    return Encoder.load(model.uri, "cpu")
