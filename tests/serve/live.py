"""A real Serve, started as a user starts it, with load on it and its replicas asked directly."""

from __future__ import annotations

import asyncio
import base64
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
import httpx
import numpy as np

from clip_ray.registry import ServedModel, store_model
from clip_ray.runtime.serve_state import Running, read_running
from tests.runtime import serving_driver

T = TypeVar("T")
ROOT = Path(__file__).resolve().parents[2]
START_S = 180


@dataclass
class Deployed:
    """A Serve in the foreground of a process of its own.

    Attributes:
        process: jobs/deploy.py.
        running: what it says of itself.
        log: what it prints.
        driver: a process that is connected to its Ray.
    """

    process: subprocess.Popen[bytes]
    running: Running
    log: Path
    driver: ProcessPoolExecutor

    @property
    def url(self) -> str:
        return self.running.url

    def ask(self, function: Callable[..., T], *args: Any) -> T:
        """Call a function of tests.runtime.serving_driver in its process."""
        return self.driver.submit(function, *args).result(180)


@contextmanager
def deployed(
    folder: Path, model: ServedModel, *flags: str, env: Mapping[str, str] | None = None
) -> Iterator[Deployed]:
    """Serve a model with jobs/deploy.py until the block ends: profile local, or as flags say.

    Args:
        folder: of all that it writes.
        model: a directory's; a flag `--model` names the same one otherwise.
        flags: of jobs/deploy.py.
        env: more of its environment.
    """
    stored = store_model(model.uri, folder / "models", name="clip")
    log = folder / "deploy.log"
    command = [sys.executable, "jobs/deploy.py", "--storage", str(folder / "runs")]
    command += ["--model", model.uri, "--serve.port", "0", "--serve.device", "cpu", *flags]
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    with open(log, "wb") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**kept, **(env or {})},
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    home = folder / "runs" / "serving"
    try:
        deadline = time.monotonic() + START_S
        while "API docs" not in log.read_text():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        running = read_running(home)
        assert running is not None and stored.digest in log.read_text()
        with serving_driver.start(home) as driver:
            yield Deployed(process, running, log, driver)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(90)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise


@dataclass
class Load:
    """What a constant load saw.

    Attributes:
        answers: (second of the answer, its latency, the request's number, model id, features).
        failures: what was no answer with 200.
    """

    answers: list[tuple[float, float, int, str, np.ndarray]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def percentile(self, q: float, start: float = 0, end: float = float("inf")) -> float:
        """Return a percentile of the latencies of answers between two times."""
        return float(np.percentile([a[1] for a in self.answers if start <= a[0] < end], q))


async def load(
    url: str,
    bodies: list[dict[str, Any]],
    stop: asyncio.Event,
    clients: int = 0,
    pause_s: float = 0.0,
    rate: float = 0.0,
    key: str | None = None,
) -> Load:
    """Send embedding requests until `stop`; nothing is retried.

    Args:
        url: of the Serve.
        bodies: requests, sent in turn.
        stop: ends it.
        clients: closed loop: each sends its next when it has an answer, and has paused.
        pause_s: of a client.
        rate: open loop in the place of clients: requests a second, Poisson, whatever is answered.
        key: sent along.
    """
    seen = Load()
    turn = itertools.count()
    connector = aiohttp.TCPConnector(limit=0)
    headers = {"authorization": f"Bearer {key}"} if key else {}
    async with aiohttp.ClientSession(connector=connector, headers=headers) as session:

        async def send() -> None:
            which, start = next(turn) % len(bodies), time.monotonic()
            try:
                async with session.post(f"{url}/v1/embeddings", json=bodies[which]) as answer:
                    if answer.status != 200:
                        seen.failures.append(f"{answer.status} {await answer.text()}")
                        return
                    document = await answer.json()
            except (aiohttp.ClientError, OSError) as error:
                seen.failures.append(f"{type(error).__name__}: {error}")
                await asyncio.sleep(0.05)
                return
            now = time.monotonic()
            features = features_of(document)
            seen.answers.append((now, now - start, which, document["model"], features))

        async def client() -> None:
            while not stop.is_set():
                await send()
                await asyncio.sleep(pause_s)

        async def arrivals() -> None:
            gaps = np.random.default_rng(0)
            async with asyncio.TaskGroup() as group:
                while not stop.is_set():
                    group.create_task(send())
                    await asyncio.sleep(gaps.exponential(1 / rate))

        await asyncio.gather(*([arrivals()] if rate else [client() for _ in range(clients)]))
    return seen


@contextmanager
def loaded(url: str, bodies: list[dict[str, Any]], **how: Any) -> Iterator[Callable[[], Load]]:
    """Keep a load on during the block; the yielded function ends it and returns what it saw."""
    stop = asyncio.Event()
    loop = asyncio.new_event_loop()
    result: list[Load] = []

    def run() -> None:
        result.append(loop.run_until_complete(load(url, bodies, stop, **how)))

    thread = threading.Thread(target=run)
    thread.start()

    def end() -> Load:
        loop.call_soon_threadsafe(stop.set)
        thread.join(60)
        return result[0]

    try:
        yield end
    finally:
        if thread.is_alive():
            end()


def features_of(document: dict[str, Any]) -> np.ndarray:
    """Return the (N, E) float32 of an embeddings answer, float or base64."""
    rows = [entry["embedding"] for entry in document["data"]]
    if isinstance(rows[0], str):
        return np.stack([np.frombuffer(base64.b64decode(row), "<f4") for row in rows])
    return np.array(rows, np.float32)


def until(condition: Any, timeout_s: float, what: str) -> float:
    """Wait until a condition holds; return the seconds that it took."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < timeout_s, what
        time.sleep(0.2)
    return time.monotonic() - start


def client(running: Deployed, key: str | None = None) -> httpx.Client:
    """Return a client that opens a connection a request, so that any replica may answer."""
    headers = {"connection": "close"} | ({"authorization": f"Bearer {key}"} if key else {})
    return httpx.Client(base_url=running.url, headers=headers, timeout=40, trust_env=False)
