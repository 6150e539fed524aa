"""A load generator that costs little CPU: it runs beside the servers that it measures.

Run by `measure` as a process of its own, with a plan on stdin and its result on stdout. Requests
are whole byte strings made beforehand and answers are only framed, never decoded; a client library
would cost as much CPU as a small endpoint. Left out: TLS, HTTP/2, checking answers.
"""

from __future__ import annotations

import asyncio
import base64
import json
import random
import resource
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
WARM_S = 1.0  # load before the window: connections, caches and batches are then as they stay
DRAIN_S = 10.0  # wait after an open-loop window for answers that are owed
CONNECTIONS = 512  # of an open loop; requests beyond wait in the client, their time running
_TICKS = 100  # per second, of /proc/<pid>/stat (USER_HZ is 100 on every Linux that Ray runs on)


@dataclass(frozen=True)
class Request:
    """What is sent, again and again.

    Attributes:
        path: of a POST.
        bodies: sent in turn, so that no cache of single inputs could help.
        headers: besides host and content-length.
    """

    path: str
    bodies: Sequence[bytes]
    headers: Mapping[str, str] = field(default_factory=dict)

    def raw(self) -> list[bytes]:
        """Return whole HTTP requests."""
        lines = "".join(f"{name}: {value}\r\n" for name, value in self.headers.items())
        start = f"POST {self.path} HTTP/1.1\r\nhost: localhost\r\n{lines}".encode()
        return [start + b"content-length: %d\r\n\r\n%b" % (len(b), b) for b in self.bodies]


@dataclass(frozen=True)
class Plan:
    """One measurement.

    Attributes:
        port: of a server on 127.0.0.1.
        seconds: of the window that is measured.
        clients: closed loop: each sends when its last request was answered.
        rate: open loop, requests/s, with exponential gaps; excludes `clients`.
        seed: of the gaps.
    """

    port: int
    seconds: float
    clients: int | None = None
    rate: float | None = None
    seed: int = 0


@dataclass
class Result:
    """What a window gave; times in milliseconds, of answers with status 200 only.

    Attributes:
        rate: answers with status 200 a second.
        latency: percentiles p50, p95, p99 and max; open loop: from the planned time of sending.
        statuses: answers by status.
        errors: requests without an answer, by reason.
        received: bytes of answers' bodies.
        seconds: of the window, as it was.
        cpu_s: CPU seconds in the window by process name, and of `client`.
        others: CPUs that what is neither server nor client kept busy in the window.
    """

    rate: float = 0.0
    latency: dict[str, float] = field(default_factory=dict)
    statuses: dict[str, int] = field(default_factory=dict)
    errors: dict[str, int] = field(default_factory=dict)
    received: int = 0
    seconds: float = 0.0
    cpu_s: dict[str, float] = field(default_factory=dict)
    others: float = 0.0

    def cpu_ms(self) -> dict[str, float]:
        """Return milliseconds of CPU per request with status 200, by process."""
        done = max(self.statuses.get("200", 0), 1)
        return {name: 1000 * s / done for name, s in self.cpu_s.items()}


def measure(
    plan: Plan, request: Request, processes: Mapping[int, str], idle: Collection[int] = ()
) -> Result:
    """Run a plan in a process of its own.

    Args:
        plan: the load.
        request: what is sent.
        processes: the server's processes by id, with the names to sum CPU time under.
        idle: processes of servers that wait for their turn; they are not `others`.

    Raises:
        RuntimeError: the load generator failed or hung.
    """
    job = {
        "plan": asdict(plan),
        "raw": [base64.b64encode(raw).decode() for raw in request.raw()],
        "processes": {str(pid): name for pid, name in processes.items()},
        "idle": list(idle),
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.serving.load"],
        cwd=ROOT,
        input=json.dumps(job).encode(),
        stdout=subprocess.PIPE,
        timeout=plan.seconds + WARM_S + DRAIN_S + 60,
    )
    if done.returncode:
        raise RuntimeError(f"the load generator ended with {done.returncode}")
    return Result(**json.loads(done.stdout))


def cpu_seconds(pids: Mapping[int, str]) -> dict[str, float]:
    """Return user and system time by name; a process that has ended counts as 0."""
    spent: Counter[str] = Counter()
    for pid, name in pids.items():
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        # Fields 14 and 15; the command before them may hold spaces and brackets.
        values = stat.rpartition(")")[2].split()
        spent[name] += (int(values[11]) + int(values[12])) / _TICKS
    return dict(spent)


class Connection(asyncio.Protocol):
    """A kept-alive connection with one request at a time.

    Args:
        parser: makes an HTTP answer parser that calls back into this object.
        answered: called with the connection, the status and the body's bytes.
        lost: called with the connection when it closes.
    """

    def __init__(
        self,
        parser: Callable[[Connection], Any],
        answered: Callable[[Connection, int, int], None],
        lost: Callable[[Connection], None],
    ) -> None:
        self.begun: float | None = None  # when the request in flight was due
        self._make, self._answered, self._lost = parser, answered, lost
        self._body = 0

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._parser = self._make(self)

    def send(self, raw: bytes, begun: float) -> None:
        self.begun = begun
        self._transport.write(raw)

    def close(self) -> None:
        self._transport.close()

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def connection_lost(self, error: Exception | None) -> None:
        self._lost(self)

    def on_body(self, body: bytes) -> None:
        self._body += len(body)

    def on_message_complete(self) -> None:
        size, self._body = self._body, 0
        self._answered(self, self._parser.get_status_code(), size)


class Generator:
    """Sends by plan and counts what falls into the window.

    Args:
        plan: the load.
        raw: whole requests, sent in turn.
        processes: whose CPU time is taken at both ends of the window.
        idle: processes whose CPU time is not `others`.
    """

    def __init__(
        self,
        plan: Plan,
        raw: Sequence[bytes],
        processes: Mapping[int, str],
        idle: Collection[int] = (),
    ) -> None:
        self._plan, self._raw, self._processes = plan, raw, processes
        self._idle_servers = dict.fromkeys(idle, "")
        self._next = 0
        self._idle: list[Connection] = []
        self._open = 0
        self._waiting: deque[float] = deque()  # due times of requests without a connection
        self._owed = 0  # open loop: requests of the window that are not answered yet
        self._window: tuple[float, float] | None = None
        self._sending = True
        self._latency: list[float] = []
        self._result = Result()
        self._statuses: Counter[str] = Counter()
        self._errors: Counter[str] = Counter()

    async def run(self) -> Result:
        """Warm up, measure, drain."""
        if self._plan.clients is not None:
            for _ in range(self._plan.clients):
                await self._connect(time.perf_counter())
            await asyncio.sleep(WARM_S)
            await self._measured(asyncio.sleep(self._plan.seconds))
        else:
            gaps = random.Random(self._plan.seed)
            await self._arrivals(gaps, WARM_S)
            await self._measured(self._arrivals(gaps, self._plan.seconds))
            end = time.perf_counter() + DRAIN_S
            while self._owed and time.perf_counter() < end:
                await asyncio.sleep(0.02)
            if self._owed:
                self._errors[f"no answer in {DRAIN_S:g} s"] += self._owed
        self._sending = False
        return self._finished()

    async def _measured(self, load: Any) -> None:
        cpu, own, others = cpu_seconds(self._processes), _own_cpu(), self._others_s()
        start = time.perf_counter()
        self._window = (start, start + self._plan.seconds)
        await load
        self._result.seconds = time.perf_counter() - start
        after = cpu_seconds(self._processes)
        spent = {name: after.get(name, 0.0) - before for name, before in cpu.items()}
        self._result.cpu_s = {**spent, "client": _own_cpu() - own}
        others = self._others_s() - others - sum(self._result.cpu_s.values())
        self._result.others = max(0.0, others / self._result.seconds)

    def _others_s(self) -> float:
        return _busy_cpu() - sum(cpu_seconds(self._idle_servers).values())

    async def _arrivals(self, gaps: random.Random, seconds: float) -> None:
        """Send at random times; a late wake-up sends at once what is due."""
        due = time.perf_counter()
        end = due + seconds
        while (due := due + gaps.expovariate(self._plan.rate)) < end:
            if (wait := due - time.perf_counter()) > 0:
                await asyncio.sleep(wait)
            if self._in_window(due):
                self._owed += 1
            if self._idle:
                self._send(self._idle.pop(), due)
            elif self._open < CONNECTIONS:
                asyncio.ensure_future(self._connect(due))
            else:
                self._waiting.append(due)
        if (wait := end - time.perf_counter()) > 0:
            await asyncio.sleep(wait)

    async def _connect(self, due: float) -> None:
        import httptools

        self._open += 1
        loop = asyncio.get_running_loop()
        try:
            _, connection = await loop.create_connection(
                lambda: Connection(httptools.HttpResponseParser, self._answered, self._lost),
                "127.0.0.1",
                self._plan.port,
            )
        except OSError as error:
            self._open -= 1
            self._fail(due, type(error).__name__)
            if self._plan.clients is not None and self._sending:
                await asyncio.sleep(0.1)
                await self._connect(time.perf_counter())
            return
        self._send(connection, due)

    def _send(self, connection: Connection, due: float) -> None:
        connection.send(self._raw[self._next], due)
        self._next = (self._next + 1) % len(self._raw)

    def _in_window(self, when: float) -> bool:
        return self._window is not None and self._window[0] <= when < self._window[1]

    def _answered(self, connection: Connection, status: int, size: int) -> None:
        now = time.perf_counter()
        due, connection.begun = connection.begun, None
        closed = self._plan.clients is not None
        # A closed loop counts what ends in the window, an open one what was due in it.
        if due is not None and self._in_window(now if closed else due):
            self._owed -= not closed
            self._statuses[str(status)] += 1
            self._result.received += size
            if status == 200:
                self._latency.append(now - due)
        if not self._sending:
            return
        if closed:
            self._send(connection, now)
        elif self._waiting:
            self._send(connection, self._waiting.popleft())
        else:
            self._idle.append(connection)

    def _lost(self, connection: Connection) -> None:
        self._open -= 1
        if connection in self._idle:
            self._idle.remove(connection)
        if connection.begun is not None:
            self._fail(connection.begun, "connection closed")
        if self._sending and self._plan.clients is not None:
            asyncio.ensure_future(self._connect(time.perf_counter()))
        elif self._sending and self._waiting:
            asyncio.ensure_future(self._connect(self._waiting.popleft()))

    def _fail(self, due: float, reason: str) -> None:
        closed = self._plan.clients is not None
        if self._in_window(time.perf_counter() if closed else due):
            self._owed -= not closed
            self._errors[reason] += 1

    def _finished(self) -> Result:
        result = self._result
        result.statuses, result.errors = dict(self._statuses), dict(self._errors)
        result.rate = len(self._latency) / max(result.seconds, 1e-9)
        result.latency = percentiles(self._latency)
        return result


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """Return p50, p95, p99 (nearest rank) and max in milliseconds; empty for no values."""
    if not seconds:
        return {}
    ordered = sorted(seconds)
    ranks = {"p50": 0.50, "p95": 0.95, "p99": 0.99, "max": 1.0}
    return {
        name: 1000 * ordered[max(0, -int(-share * len(ordered) // 1) - 1)]
        for name, share in ranks.items()
    }


def _busy_cpu() -> float:
    """Return the CPU seconds of the whole machine since its start, without idle ones."""
    values = [int(value) for value in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
    return (sum(values) - values[3] - values[4]) / _TICKS


def _own_cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _main() -> None:
    import uvloop

    job = json.load(sys.stdin)
    generator = Generator(
        Plan(**job["plan"]),
        [base64.b64decode(raw) for raw in job["raw"]],
        {int(pid): name for pid, name in job["processes"].items()},
        job["idle"],
    )
    json.dump(asdict(uvloop.run(generator.run())), sys.stdout)


if __name__ == "__main__":
    _main()
