"""What every request passes: its id, its key, its place, its body, its deadline, its log line.

Pure ASGI, so that the answer's bytes go through one wrapper and not through a task and a queue as
with Starlette's BaseHTTPMiddleware. `Edge` is outermost and turns whatever goes wrong into the one
JSON shape; `Gate` admits to the routes that need a key. Left out: what Serve's proxy answers
itself, and TLS.
"""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import re
import time
import uuid
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from clip_ray.config.serving import AppSettings
from clip_ray.keys import Key, KeyRing, RateLimiter
from serve import tracing
from serve.admission import Budget, Reservation
from serve.errors import ApiError
from serve.metrics import Metrics
from serve.pages import CSP

if TYPE_CHECKING:
    from serve.engine import Loaded

access_log = logging.getLogger("clip_ray.access")
log = logging.getLogger("clip_ray.serve")

EXCHANGE = "clip_ray.exchange"  # where a scope carries its Exchange
OPEN = ("/", "/docs", "/openapi.json", "/gallery.json", "/health", "/ready")
_OPEN_BELOW = {"/static/": "/static/{name}", "/gallery/": "/gallery/{n}"}
_KEYED = ("/v1/embeddings", "/v1/classify", "/v1/rank", "/v1/classifiers", "/v1/models")
_KEYED_BELOW = {
    "/v1/classifiers/": "/v1/classifiers/{id}",
    "/v1/models/": "/v1/models/{id}",
}
UNKNOWN = "unknown"

_BODILESS = ("GET", "HEAD", "DELETE")  # a body of theirs is not read
MAX_KEY = 256  # characters of a presented key; ours have 35, and hashing more is the caller's joy
CLIENT_GONE = 499  # nginx's number for it; nobody receives it
_GROWTH = 1 << 20  # bytes by which a body reserves memory as it comes
_ID = re.compile(r"[ -~]{1,128}")
_NOT_OF_ID = re.compile(r"[^A-Za-z0-9._:/+=@-]")
_SECURITY = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"content-security-policy", CSP.encode()),
    (b"cache-control", b"no-store"),
)
_OVERRIDABLE = frozenset(name for name, _ in _SECURITY)


@dataclass(slots=True)
class Exchange:
    """What is known of a request and its answer.

    Attributes:
        id: request id, the client's or ours.
        route: template of its path, for logs and metrics.
        is_open: no key is needed.
        started: seconds of the monotonic clock.
        key: whose request it is; None where auth is off.
        body: the request's body, whole; taken away by `take_body`.
        memory: what is reserved for the body; whoever needs more grows it, for a second
            reservation would wait while it holds the first.
        loaded: the model that answers, once one is picked.
        items: texts and images of the request.
        status: of the answer, 0 until it begins.
        is_gone: the client has left.
        trace: id of the trace that it belongs to; "" where it is not traced.
    """

    id: str
    route: str
    is_open: bool
    started: float = field(default_factory=time.perf_counter)
    key: Key | None = None
    body: bytes = b""
    memory: Reservation | None = None
    loaded: Loaded | None = None
    items: int = 0
    status: int = 0
    is_gone: bool = False
    trace: str = ""

    @property
    def namespace(self) -> str:
        """Where the stored classifiers of the caller are."""
        return "public" if self.key is None else self.key.id

    def take_body(self) -> bytes:
        """Return the body and let go of it: 20 MB that nobody reads again."""
        body, self.body = self.body, b""
        return body


class Edge:
    """The outermost layer: id, headers, errors, log line.

    Args:
        app: what is inside.
        metrics: counted into.
        echo_id: send x-request-id; off behind Ray Serve, which adds the same header itself.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, echo_id: bool = True) -> None:
        self.app = app
        self.metrics = metrics
        self.echo_id = echo_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, whatever happens inside; an ASGI application."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        exchange = Exchange(_request_id(scope), *route_of(scope), trace=tracing.trace_id())
        scope[EXCHANGE] = exchange

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                message["headers"] = self._headers(message.get("headers", ()), exchange)
            await send(message)

        try:
            await self.app(scope, receive, answer)
        except ApiError as error:
            await self._refuse(error, exchange, answer)
        except ClientGoneError:
            exchange.status = CLIENT_GONE
        except asyncio.CancelledError:
            # Serve cancels the requests of clients that left.
            exchange.status = exchange.status or CLIENT_GONE
            raise
        except Exception:
            # The operator's log may hold what the exception says; the answer never does.
            log.exception("request %s failed", exchange.id)
            await self._refuse(_internal_error(), exchange, answer)
        finally:
            self._record(scope, exchange)

    async def _refuse(self, error: ApiError, exchange: Exchange, send: Send) -> None:
        self.metrics.reject(error.code)
        if exchange.status:
            raise error  # the answer has begun: only breaking the connection tells the client
        body = json.dumps(error.body(exchange.id)).encode()
        headers = [(name.encode(), value.encode()) for name, value in error.headers().items()]
        headers += [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
        ]
        if error.status == 408:
            headers.append((b"connection", b"close"))  # what else it sends, nobody waits for
        await send({"type": "http.response.start", "status": error.status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    def _headers(self, headers: Any, exchange: Exchange) -> list[tuple[bytes, bytes]]:
        """Return an answer's headers with ours, except those that a page has of its own."""
        own = {name for name, _ in headers} & _OVERRIDABLE
        added = [*headers, *(pair for pair in _SECURITY if pair[0] not in own)]
        if self.echo_id:
            added.append((b"x-request-id", exchange.id.encode()))
        if exchange.trace:
            added.append((b"x-trace-id", exchange.trace.encode()))
        if exchange.loaded is not None:
            added += _provenance(exchange.loaded)
        return added

    def _record(self, scope: Scope, exchange: Exchange) -> None:
        ms = 1000 * (time.perf_counter() - exchange.started)
        self.metrics.request(exchange.route, exchange.status, ms)
        if not access_log.isEnabledFor(logging.INFO):
            return
        line = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "id": exchange.id,
            "key": None if exchange.key is None else exchange.key.name,
            # Methods are whatever a client likes to send; of the usual ones none is long.
            "method": scope["method"][:10],
            "route": exchange.route,
            "status": exchange.status,
            "items": exchange.items,
            "version": None if exchange.loaded is None else exchange.loaded.id,
            "ms": round(ms, 1),
        }
        if exchange.trace:
            line["trace"] = exchange.trace
        access_log.info(json.dumps(line))


class Gate:
    """The way in to the routes that need a key, or would if auth were on.

    In this order: key and its rate, a place among those in flight, the body within its time and
    the memory for it, a turn among those worked on. Then the deadline, and cancellation when the
    client leaves.

    Args:
        app: what is inside.
        settings: limits and auth.
        budget: memory for bodies.
        keys: None lets everybody in.
        metrics: told who waits for a turn.
    """

    def __init__(
        self,
        app: ASGIApp,
        settings: AppSettings,
        budget: Budget,
        keys: KeyRing | None,
        metrics: Metrics,
    ) -> None:
        self.app = app
        self.metrics = metrics
        self.limits = settings.limits
        self.budget = budget
        self.keys = keys
        self.rates = RateLimiter()
        self.in_flight = 0
        self._most = self.limits.ongoing + self.limits.queued
        self._turns = asyncio.Semaphore(self.limits.ongoing)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request in, or refuse it; an ASGI application inside an Edge."""
        exchange: Exchange | None = scope.get(EXCHANGE)
        if exchange is None or exchange.is_open:
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        self._admit(headers, needed_scope(scope["method"], exchange.route), exchange)
        if self.in_flight >= self._most:
            raise _overloaded(f"{self.in_flight} requests are in flight already")
        self.in_flight += 1
        try:
            await self._within_deadline(scope, receive, send, headers)
        finally:
            self.in_flight -= 1

    def _admit(self, headers: dict[bytes, bytes], scope: str, exchange: Exchange) -> None:
        if self.keys is None:
            return
        presented = _presented_key(headers)
        if presented is None:
            raise ApiError(401, "missing_key", "no API key; send it as 'Authorization: Bearer KEY'")
        key = self.keys.find(presented) if len(presented) <= MAX_KEY else None
        if key is None:
            raise ApiError(401, "invalid_key", "the API key is unknown, revoked or expired")
        exchange.key = key
        if scope not in key.scopes:
            raise ApiError(403, "missing_scope", f"the API key lacks the scope {scope!r}")
        wait_s = self.rates.take(key)
        if wait_s > 0:
            raise ApiError(
                429,
                "rate_limited",
                f"the API key has {key.rate:g} requests a second; try again in {wait_s:.1f} s",
                retry_after=wait_s,
            )

    async def _within_deadline(
        self, scope: Scope, receive: Receive, send: Send, headers: dict[bytes, bytes]
    ) -> None:
        exchange: Exchange = scope[EXCHANGE]
        deadline = asyncio.timeout(self.limits.request_s)
        try:
            async with deadline:
                if scope["method"] in _BODILESS:
                    await self._in_turn(scope, receive, send)
                    return
                limit = int(self.limits.body_mb * 1e6)
                declared = _content_length(headers)
                if declared > limit:
                    raise _too_large(limit)
                # Held as long as the request is worked on. Of what is only announced a step:
                # idle connections that promise large bodies must not keep others out.
                async with self.budget.reserve(min(declared, _GROWTH)) as memory:
                    exchange.memory = memory
                    exchange.body = await self._read(receive, memory, declared, limit)
                    await self._in_turn(scope, receive, send)
        except TimeoutError:
            if not deadline.expired():
                raise
            raise ApiError(
                408,
                "request_timeout",
                f"not done within {self.limits.request_s:g} s; send fewer items",
            ) from None

    async def _read(
        self, receive: Receive, memory: Reservation, declared: int, limit: int
    ) -> bytes:
        timer = asyncio.timeout(self.limits.body_s)
        try:
            async with timer:
                return await _read_all(receive, memory, declared, limit)
        except TimeoutError:
            if not timer.expired():
                raise
            raise ApiError(
                408, "body_timeout", f"the body did not arrive within {self.limits.body_s:g} s"
            ) from None

    async def _in_turn(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Wait among `limits.queued` others for one of `limits.ongoing` turns, then answer."""
        if self._turns.locked():
            self.metrics.waits("turn", 1)
            try:
                async with asyncio.timeout(self.limits.queue_s):
                    await self._turns.acquire()
            except TimeoutError:
                raise _overloaded(f"no turn within {self.limits.queue_s:g} s") from None
            finally:
                self.metrics.waits("turn", -1)
        else:
            await self._turns.acquire()
        try:
            await self._work(scope, receive, send)
        finally:
            self._turns.release()

    async def _work(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, unless the client leaves before the answer begins."""
        exchange: Exchange = scope[EXCHANGE]
        task = asyncio.current_task()
        assert task is not None

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            # uvicorn says so after a finished answer too.
            if not exchange.status:
                exchange.is_gone = True
                task.cancel()

        watching = asyncio.create_task(watch())
        try:
            await self.app(scope, receive, send)
        except asyncio.CancelledError:
            if not exchange.is_gone:
                raise
            task.uncancel()
            raise ClientGoneError from None
        finally:
            watching.cancel()


class ClientGoneError(Exception):
    """The client has left: there is nobody to answer."""


def route_of(scope: Scope) -> tuple[str, bool]:
    """Return the template of a request's path, and whether the route is open to everybody.

    Known before routing, so that refusals have it too; what is not listed as open needs a key.
    """
    path, root = scope["path"], scope.get("root_path", "")
    if root and path.startswith(f"{root}/"):
        path = path[len(root) :]
    if path in OPEN:
        return path, True
    if path in _KEYED:
        return path, False
    for below, is_open in ((_OPEN_BELOW, True), (_KEYED_BELOW, False)):
        for prefix, template in below.items():
            if path.startswith(prefix):
                return template, is_open
    return UNKNOWN, False


def needed_scope(method: str, route: str) -> str:
    """Return the scope that a key needs for a route."""
    writes = method not in ("GET", "HEAD") and route.startswith("/v1/classifiers")
    return "classifiers" if writes else "infer"


async def _read_all(receive: Receive, memory: Reservation, declared: int, limit: int) -> bytes:
    """Return the body; memory is reserved in steps as it comes, whatever its length is said to be.

    Raises:
        ApiError: 413 above `limit`, 429 where there is no memory.
    """
    chunks, total = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        chunk = message.get("body", b"")
        total += len(chunk)
        if total > limit:
            raise _too_large(limit)
        if total > memory.nbytes:
            expected = declared if total <= declared else limit
            step = min(_GROWTH, expected - memory.nbytes)
            await memory.grow(max(total - memory.nbytes, step))
        chunks.append(chunk)
        if not message.get("more_body", False):
            return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def _request_id(scope: Scope) -> str:
    """Return the client's id as it is, where it is printable ASCII of at most 128 characters.

    Another one is cut to what is harmless in logs and headers, or replaced by ours where nothing
    is left. Behind Ray Serve, whose x-request-id is always the client's own, the id in the JSON
    and in the log is then not the header's.
    """
    for name, value in scope["headers"]:
        if name == b"x-request-id":
            given: str = value[:512].decode("latin-1")
            if _ID.fullmatch(given) and not given.isspace():
                return given
            given = _NOT_OF_ID.sub("", given)[:128]
            if given:
                return given
    return uuid.uuid4().hex


def _presented_key(headers: dict[bytes, bytes]) -> str | None:
    scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
    if scheme.lower() != b"bearer":
        key = headers.get(b"x-api-key", b"")
    return key.strip().decode("latin-1") or None


def _content_length(headers: dict[bytes, bytes]) -> int:
    """Return the body's length as the client says; 0 where it does not, or lies."""
    value = headers.get(b"content-length", b"")
    return int(value) if value.isdigit() and len(value) < 19 else 0


def _provenance(loaded: Loaded) -> list[tuple[bytes, bytes]]:
    served = loaded.served
    pairs = [
        (b"x-clip-model", _header(loaded.id)),
        (b"x-clip-version", _header(served.version)),
        (b"x-clip-digest", _header(served.digest)),
    ]
    if served.run_id is not None:
        pairs.append((b"x-clip-run-id", _header(served.run_id)))
    return pairs


@functools.lru_cache(maxsize=32)
def _header(name: str) -> bytes:
    """Return a name as a header can carry it: percent-encoded where it is not plain ASCII."""
    return quote(name, safe="/._-").encode()


def _too_large(limit: int) -> ApiError:
    return ApiError(
        413, "body_too_large", f"body of more than {limit / 1e6:g} MB; send several requests"
    )


def _internal_error() -> ApiError:
    return ApiError(
        500, "internal_error", "an error of the server; its log has it under the request id"
    )


def _overloaded(why: str) -> ApiError:
    return ApiError(429, "overloaded", f"the replica is full: {why}", retry_after=1)
