"""A proxy in front of an S3 server that fails as networks and stores do, from a seed.

Each request draws one fault, or none. Everything that went by is kept, so that tests can count
requests and bytes, and tell that the faults they are about did happen.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import random
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

_ERROR = (
    "<?xml version='1.0' encoding='UTF-8'?><Error><Code>{code}</Code>"
    "<Message>{code} by the proxy</Message></Error>"
)
_CODES = {
    409: "ConditionalRequestConflict",
    429: "TooManyRequests",
    500: "InternalError",
    503: "SlowDown",
}


@dataclass(frozen=True)
class Faults:
    """Shares of the requests that go wrong.

    Attributes:
        error: answered 500 or 503 instead of being passed on.
        throttle: answered 429.
        conflict: answered 409, as two conditional writes of one object may be.
        reset: the connection is reset in the middle of the body.
        cut: the connection is closed in the middle of the body.
        short: half of the body, with headers that say it is whole.
        lost: passed on, and the connection is reset instead of the answer.
        stall: `stall_s` pass in the middle of the body.
        slow: `slow_s` pass before the request is passed on.
        hang: no answer for `hang_s`, then the connection is closed.
        only: regular expression of the "METHOD path" that they befall.
    """

    error: float = 0
    throttle: float = 0
    conflict: float = 0
    reset: float = 0
    cut: float = 0
    short: float = 0
    lost: float = 0
    stall: float = 0
    slow: float = 0
    hang: float = 0
    stall_s: float = 2.0
    slow_s: float = 5.0
    hang_s: float = 30.0
    only: str = ""


_KINDS = [f.name for f in fields(Faults) if f.default == 0]


@dataclass
class Request:
    """What went by: method, path, the Range header, the fault, and the bytes of the answer."""

    method: str
    path: str
    range: str
    fault: str
    sent: int = 0


@dataclass
class Proxy:
    """A running proxy: its address, its faults (which a test may change), its log."""

    endpoint: str
    faults: Faults
    random: random.Random
    counts: Counter[str] = field(default_factory=Counter)  # requests that each fault befell
    log: list[Request] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    ended: threading.Event = field(default_factory=threading.Event)

    def begin(self, faults: Faults = Faults(), seed: int = 0) -> None:  # noqa: B008 - frozen
        """Forget what went by, and inject other faults from now on."""
        with self.lock:
            self.faults = faults
            self.random.seed(seed)
            self.counts.clear()
            self.log.clear()

    def draw(self, method: str, path: str) -> str:
        """Return the fault that befalls a request, "" for none."""
        with self.lock:
            number = self.random.random()
            if not re.search(self.faults.only, f"{method} {path}"):
                return ""
            for kind in _KINDS:
                number -= getattr(self.faults, kind)
                if number < 0:
                    self.counts[kind] += 1
                    return kind
        return ""

    def range_reads(self) -> list[Request]:
        """Return the GETs of byte ranges that were answered with bytes."""
        return [r for r in self.log if r.method == "GET" and r.range and r.sent]


@contextlib.contextmanager
def s3_proxy(upstream: str) -> Iterator[Proxy]:
    """Run a proxy in front of the server at the URL `upstream`; it does no harm yet."""
    proxy = Proxy("", Faults(), random.Random(0))
    handler = type("Handler", (_Handler,), {"proxy": proxy, "upstream": urlsplit(upstream).netloc})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    proxy.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.ended.set()
        server.shutdown()
        server.socket.close()
        thread.join(10)


class _Handler(BaseHTTPRequestHandler):
    proxy: Proxy
    upstream: str
    protocol_version = "HTTP/1.1"

    def handle(self) -> None:
        with contextlib.suppress(OSError):  # the other side has gone: its right
            super().handle()

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:  # noqa: N802
        faults, fault = self.proxy.faults, self.proxy.draw(self.command, self.path)
        # Noted before it is answered: who counts has the answers, and nothing more to go by.
        request = Request(self.command, self.path, self.headers.get("Range", ""), fault)
        self.proxy.log.append(request)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if fault in ("error", "throttle", "conflict"):
            with self.proxy.lock:
                status = self.proxy.random.choice((500, 503))
            self._refuse({"throttle": 429, "conflict": 409}.get(fault, status))
        elif fault == "hang":
            self.proxy.ended.wait(faults.hang_s)
            self._reset()
        else:
            if fault == "slow":
                self.proxy.ended.wait(faults.slow_s)
            self._answer(request, *self._pass_on(body))

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET  # noqa: N815

    def _pass_on(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection(self.upstream, timeout=60)
        try:
            headers = {k: v for k, v in self.headers.items() if k.lower() != "connection"}
            connection.request(self.command, self.path, body, headers)
            answer = connection.getresponse()
            passed = [
                (k, v)
                for k, v in answer.getheaders()
                if k.lower() not in ("connection", "transfer-encoding", "date", "server")
            ]
            return answer.status, passed, answer.read()
        finally:
            connection.close()

    def _answer(
        self, request: Request, status: int, headers: list[tuple[str, str]], body: bytes
    ) -> None:
        fault, half = request.fault, len(body) // 2
        if fault == "lost":
            self._reset()
            return
        if fault == "short":
            body = body[:half]
        self.send_response(status)
        length = str(len(body))
        for name, value in headers:
            if name.lower() != "content-length":
                self.send_header(name, value)
            elif self.command == "HEAD":
                length = value
        self.send_header("Content-Length", length)
        self.end_headers()
        request.sent = half if fault in ("reset", "cut") else len(body)
        self.wfile.write(body[:half])
        if fault in ("reset", "cut"):
            self.wfile.flush()
            time.sleep(0.05)  # or a reset would take the half along
            if fault == "reset":
                self._reset()
            self.close_connection = True
            return
        if fault == "stall":
            self.wfile.flush()
            self.proxy.ended.wait(self.proxy.faults.stall_s)
        self.wfile.write(body[half:])

    def _refuse(self, status: int) -> None:
        body = b"" if self.command == "HEAD" else _ERROR.format(code=_CODES[status]).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _reset(self) -> None:
        """Close so that the other side sees a reset, not an end."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(self.connection.detach())
        self.close_connection = True
