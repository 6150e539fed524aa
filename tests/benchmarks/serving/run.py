"""Compares servers side by side: rounds interleaved, medians, tables, JSON.

Machines that run this are shared and noisy: only ratios of one run mean something. Some cases:

    python tests/benchmarks/serving/run.py embed raw --servers plain,proxy,haproxy --out out.json
    python tests/benchmarks/serving/run.py embed --servers haproxy,haproxy+RAY_SERVE_LOG_TO_STDERR=0
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

if not __package__:  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from clip_ray.registry import Target
from tests.benchmarks.serving import cases
from tests.benchmarks.serving.load import ROOT, Plan, Request, Result, measure
from tests.benchmarks.serving.servers import CPUS, KINDS, Kind, Server, running

CASES = {
    "embed": cases.embed_json,
    "raw": cases.embed_raw,
    "form": cases.embed_form,
    "classify": cases.classify_inline,
    "stored": cases.classify_stored,
}
CLIENTS = (1, 8, 32)
SHARES = (0.5, 0.8, 1.1)  # of capacity, open loop
ROUNDS, SECONDS = 5, 3.0
QUIET, TRIES = 0.2, 3  # CPUs of other work above which a window is measured again, and how often


@dataclass
class Row:
    """The medians of a server under a load over all rounds.

    Attributes:
        server: its name.
        load: its load, such as c=32.
        rate: answers a second.
        latency: p50, p95, p99 and max in milliseconds.
        cpu_ms: CPU milliseconds a request, by process.
        failed: requests without a 200, of all rounds, by status or reason.
        received: bytes of an answer.
        rates: of each round.
        others: CPUs that other processes of the machine kept busy.
    """

    server: str
    load: str
    rate: float
    latency: dict[str, float]
    cpu_ms: dict[str, float]
    failed: dict[str, int]
    received: int
    rates: list[float]
    others: float

    def server_cpu_ms(self) -> float:
        """Return the CPU milliseconds a request of all the server's processes."""
        return sum(ms for name, ms in self.cpu_ms.items() if name != "client")


@dataclass(frozen=True)
class Load:
    """A request and how it is sent.

    Attributes:
        label: as in tables.
        request: what is sent.
        clients: closed loop: how many send.
        share: open loop: at this share of the rate that the server had under the load `of`.
        of: label of a closed loop that was measured before.
    """

    label: str
    request: Request
    clients: int | None = None
    share: float | None = None
    of: str = ""


def compare(
    servers: Sequence[Server],
    loads: Sequence[Load],
    rounds: int = ROUNDS,
    seconds: float = SECONDS,
    before: Sequence[Row] = (),
    each_round: Callable[[], None] | None = None,
) -> list[Row]:
    """Measure every server under every load, round by round, and return medians.

    Args:
        servers: that run; the ones not measured are idle.
        loads: each with all servers in turn before the next one.
        rounds: of all of it.
        seconds: of a window.
        before: what was measured before, for loads that are a share of it.
        each_round: what else is measured, once a round.
    """
    found: dict[tuple[str, str], list[Result]] = defaultdict(list)
    for number in range(rounds):
        for load in loads:
            for server in servers:
                name = server.kind.name
                rate = load.share * find(before, name, load.of).rate if load.share else None
                plan = Plan(server.port, seconds, load.clients, rate, seed=number)
                idle = [pid for s in servers if s is not server for pid in s.processes()]
                result = _undisturbed(server, plan, load.request, idle)
                found[name, load.label].append(result)
        if each_round is not None:
            each_round()
    return [_row(name, label, results) for (name, label), results in found.items()]


def _undisturbed(server: Server, plan: Plan, request: Request, idle: list[int]) -> Result:
    """Measure, again where other work of the machine took part; the quietest window counts."""
    results: list[Result] = []
    for _ in range(TRIES):
        results.append(measure(plan, request, server.processes(), idle))
        if results[-1].others < QUIET:
            break
    return min(results, key=lambda result: result.others)


def _failures(results: Sequence[Result]) -> dict[str, int]:
    failures: Counter[str] = Counter()
    for result in results:
        failures.update(result.errors)
        failures.update({s: n for s, n in result.statuses.items() if s != "200"})
    return dict(failures)


def _row(server: str, load: str, results: Sequence[Result]) -> Row:
    done = [result for result in results if result.latency]
    return Row(
        server,
        load,
        statistics.median(result.rate for result in results),
        _medians(result.latency for result in done),
        _medians(result.cpu_ms() for result in results),
        _failures(results),
        round(_median(r.received / max(sum(r.statuses.values()), 1) for r in results)),
        [round(result.rate, 1) for result in results],
        _median(result.others for result in results),
    )


def _medians(values: Iterable[dict[str, float]]) -> dict[str, float]:
    by_name: dict[str, list[float]] = defaultdict(list)
    for value in values:
        for name, number in value.items():
            by_name[name].append(number)
    return {name: statistics.median(numbers) for name, numbers in by_name.items()}


def _median(values: Iterable[float]) -> float:
    return statistics.median(list(values))


def table(rows: Sequence[Row], baseline: str) -> str:
    """Return rows as text, with rates also as multiples of the baseline server's."""
    base = {row.load: row.rate for row in rows if row.server == baseline}
    servers = list(dict.fromkeys(row.server for row in rows))
    loads = list(dict.fromkeys(row.load for row in rows))
    lines = ["load | server | req/s | ratio | p50 | p95 | p99 ms | failed | others | CPU-ms"]
    for row in sorted(rows, key=lambda r: (loads.index(r.load), servers.index(r.server))):
        ratio = f"{row.rate / base[row.load]:.2f}" if base.get(row.load) else "-"
        times = " | ".join(f"{row.latency.get(p, math.nan):.1f}" for p in ("p50", "p95", "p99"))
        shown = {n: ms for n, ms in row.cpu_ms.items() if ms >= 0.005 and n != "client"}
        cpu = ", ".join(f"{n} {ms:.2f}" for n, ms in sorted(shown.items(), key=lambda x: -x[1]))
        lines.append(
            f"{row.load} | {row.server} | {row.rate:.1f} | {ratio} | {times} | "
            f"{row.failed or 0} | {row.others:.2f} | {row.server_cpu_ms():.2f} = {cpu}"
        )
    return "\n".join(lines)


def find(rows: Sequence[Row], server: str, load: str) -> Row:
    """Return the row of a server and a load."""
    return next(row for row in rows if (row.server, row.load) == (server, load))


def closed(case: str, clients: Sequence[int] = CLIENTS) -> list[Load]:
    """Return a case's closed loops."""
    request = CASES[case](cases.pictures())
    return [Load(f"{case} c={count}", request, clients=count) for count in clients]


def opened(case: str) -> list[Load]:
    """Return a case's open loops, at shares of the capacity that 32 clients found."""
    request = CASES[case](cases.pictures())
    return [Load(f"{case} open {s:.0%}", request, share=s, of=f"{case} c=32") for s in SHARES]


def store_classifier(servers: Iterable[Server]) -> None:
    """Store the classifier that `cases.classify_stored` asks for."""
    for server in servers:
        path = f"/v1/classifiers/{cases.CLASSIFIER}"
        headers = {"content-type": "application/json"}
        server.send("PUT", path, cases.classifier_definition(), headers)


class Bare:
    """Decode + encode without a server, measured once a round; `rows` gives the medians.

    Args:
        target: the model.
        count: images of a group.
        seconds: of a window.
    """

    def __init__(self, target: Target, count: int = cases.IMAGES, seconds: float = SECONDS) -> None:
        self._command = [
            *(sys.executable, "-m", "tests.benchmarks.serving.bare"),
            *(target.uri, str(count), str(seconds), str(CPUS)),
        ]
        self._count = count
        self._found: list[dict[str, float]] = []

    def __call__(self) -> None:
        """Measure, in a process of its own."""
        done = subprocess.run(
            self._command, cwd=ROOT, check=True, stdout=subprocess.PIPE, timeout=300
        )
        self._found.append(json.loads(done.stdout))

    def rows(self, load: str) -> list[Row]:
        """Return a row a loop, in groups of `count` images a second."""
        return [
            Row(
                server=f"bare {name}",
                load=load,
                rate=items / self._count,
                latency={},
                cpu_ms={},
                failed={},
                received=0,
                rates=[round(found[name] / self._count, 1) for found in self._found],
                others=0.0,
            )
            for name, items in _medians(self._found).items()
        ]


def parse_kind(text: str) -> Kind:
    """Return a kind with changes: NAME+VARIABLE=VALUE..., `log.KEY` for Serve's logging_config."""
    base, *changes = text.split("+")
    env, logging = dict(KINDS[base].env), dict(KINDS[base].logging)
    for change in changes:
        name, _, value = change.partition("=")
        if name.startswith("log."):
            logging[name.removeprefix("log.")] = json.loads(value)
        else:
            env[name] = value
    return replace(KINDS[base], name=text, env=env, logging=logging)


def write(path: str | Path, content: Any) -> None:
    """Write rows, or whatever holds them, as JSON."""
    Path(path).write_text(json.dumps(content, indent=1, default=asdict) + "\n")


def main() -> None:
    """Run cases; see the module's docstring."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cases", nargs="+", choices=CASES)
    parser.add_argument("--servers", default=",".join(KINDS))
    parser.add_argument("--clients", default=",".join(map(str, CLIENTS)))
    parser.add_argument("--open", action="store_true", help="open loops too; needs 32 clients")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--seconds", type=float, default=SECONDS)
    parser.add_argument("--out", help="JSON file")
    args = parser.parse_args()
    kinds = [parse_kind(text) for text in args.servers.split(",")]
    clients = [int(count) for count in args.clients.split(",")]
    with tempfile.TemporaryDirectory(prefix="crb-") as temp:
        target = cases.write_model(Path(temp) / "model")
        bare = Bare(target, seconds=args.seconds) if "form" in args.cases else None
        with running(kinds, target) as servers:
            if "stored" in args.cases:
                store_classifier(servers)
            loads = [load for case in args.cases for load in closed(case, clients)]
            rows = compare(servers, loads, args.rounds, args.seconds, each_round=bare)
            if args.open:
                loads = [load for case in args.cases for load in opened(case)]
                rows += compare(servers, loads, args.rounds, args.seconds, before=rows)
        if bare is not None:
            rows += bare.rows(f"form c={clients[-1]}")
        print(table(rows, kinds[0].name))
        if args.out:
            write(args.out, rows)


if __name__ == "__main__":
    main()
