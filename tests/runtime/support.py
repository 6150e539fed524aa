"""Jobs on a Ray head, run and looked at as a user would."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from clip_ray.storage import LocalStore
from clip_ray.train.journal import lineage, read_journal

ROOT = Path(__file__).resolve().parents[2]
HOST = "127.0.0.1"
START_S = 120
JOB_S = 600
RECIPE = {
    # One reading process: each imports torch, which costs more than these tests do.
    "cluster": {"num_workers": 2, "data_cpus": 1},
    "data": {"sources": [{"path": "bundled:starter/train-0000.tar"}], "holdout": 0},
    "tokenizer": {"train_vocab": 1024},
    "model": {"name": "ViT-micro-8-32"},
    "train": {"steps": 20, "global_batch": 32},
    "optim": {"lr": 1e-3, "warmup": 4},
    "checkpoint": {"every_steps": 8},
    "tracking": {"flush_s": 0.2},
}


def free_ports(count: int) -> list[int]:
    """Return ports that nobody has, and that the system deals to nobody before they are used."""
    sockets: list[socket.socket] = []
    try:
        while len(sockets) < count:
            sockets.append(socket.socket())
            try:
                # Above those of Ray's workers, below those of whoever connects to something.
                sockets[-1].bind(("127.0.0.1", random.SystemRandom().randrange(20_000, 32_768)))
            except OSError:
                sockets.pop().close()
        return [s.getsockname()[1] for s in sockets]
    finally:
        for s in sockets:
            s.close()


@dataclass
class Head:
    """A running Ray head.

    Attributes:
        address: of its GCS.
        dashboard: its URL, for `ray job submit`.
        env: what a job's environment is.
        group: the process group that is all of it.
    """

    address: str
    dashboard: str
    env: dict[str, str]
    group: int


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False


def wait_for(condition: Callable[[], object], timeout_s: float, what: str) -> None:
    """Wait until a condition holds; fail the test when it does not in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"not within {timeout_s:g} s: {what}")
        time.sleep(0.1)


@contextlib.contextmanager
def ray_head(
    folder: Path, cpus: int, host: str = HOST, with_dashboard: bool = True, **variables: str
) -> Iterator[Head]:
    """Run a Ray head with more environment; its log goes to the folder.

    Args:
        folder: where its log goes.
        cpus: that it says it has.
        host: its address.
        with_dashboard: for `ray job submit`; its dozen processes take long to start.
        variables: more of its environment.
    """
    port, dashboard, client, agent, agent_grpc = free_ports(5)
    # Not below pytest's directory: a socket's path ends at 107 characters.
    with tempfile.TemporaryDirectory(prefix="cr-", ignore_cleanup_errors=True) as temp:
        env = {
            **{k: v for k, v in os.environ.items() if not k.startswith("RAY_")},
            "RAY_AUTH_MODE": "disabled",
            "RAY_TMPDIR": temp,
            "PYTHONUNBUFFERED": "1",
            # Idle workers kept ready cost CPU time for each job and are not needed.
            "RAY_prestart_worker_first_driver": "0",
            "RAY_enable_worker_prestart": "0",
            # Ray's 15 lets them starve beside any other work on this machine.
            "RAY_worker_niceness": "0",
            **variables,
        }
        options = [
            *("--head", f"--port={port}", f"--dashboard-port={dashboard}"),
            *(f"--include-dashboard={str(with_dashboard).lower()}", "--dashboard-host=127.0.0.1"),
            f"--temp-dir={temp}",
            *(f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}"),
            f"--dashboard-agent-grpc-port={agent_grpc}",
        ]
        log = folder / "head.log"
        with _ray_start(log, env, cpus, options, host) as process:
            url = f"http://127.0.0.1:{dashboard}"
            if with_dashboard:
                wait_for(lambda: answers(f"{url}/api/version"), START_S, f"see {log}")
            address = f"{host}:{port}"
            yield Head(address, url, {**env, "RAY_ADDRESS": address}, process.pid)


@contextlib.contextmanager
def ray_node(
    head: Head, folder: Path, cpus: int, host: str = HOST, namespace: str = ""
) -> Iterator[subprocess.Popen[bytes]]:
    """Run another node of the head's cluster; its process group is all of it.

    Args:
        head: the cluster's head.
        folder: where its log goes.
        cpus: that it says it has.
        host: its address.
        namespace: the network namespace that it lives in, by name.
    """
    agent, agent_grpc = free_ports(2)
    options = [f"--address={head.address}", f"--dashboard-agent-listen-port={agent}"]
    options.append(f"--dashboard-agent-grpc-port={agent_grpc}")
    log = folder / f"node-{agent}.log"
    inside = ("ip", "netns", "exec", namespace) if namespace else ()
    with _ray_start(log, head.env, cpus, options, host, inside) as process:
        yield process


@contextlib.contextmanager
def _ray_start(
    log: Path,
    env: dict[str, str],
    cpus: int,
    options: list[str],
    host: str,
    inside: tuple[str, ...] = (),
) -> Iterator[subprocess.Popen[bytes]]:
    command = [
        *inside,
        *(str(Path(sys.executable).with_name("ray")), "start", "--block", *options),
        *(f"--node-ip-address={host}", f"--num-cpus={cpus}", "--num-gpus=0"),
        *("--object-store-memory=500000000", "--disable-usage-stats"),
        # It looks at each log file without end, and sends what nobody asks for.
        "--include-log-monitor=false",
    ]
    # Ray gives a node half a minute to start, on whatever machine.
    for _ in range(3):
        with open(log, "wb") as output:
            process = subprocess.Popen(
                command, env=env, stdout=output, stderr=output, start_new_session=True
            )
        try:
            if _has_joined(process, log):
                yield process
                return
        finally:
            _end_group(process)
    pytest.fail(f"a node did not start in three tries: {log.read_text()[-2000:]}")


def _has_joined(process: subprocess.Popen[bytes], log: Path) -> bool:
    """Wait until a node has joined; return false where it was too slow for Ray."""
    wait_for(
        lambda: "Ray runtime started" in log.read_text() or process.poll() is not None,
        START_S,
        f"see {log}",
    )
    if process.poll() is not None and "timed out during startup" not in log.read_text():
        pytest.fail(f"a node did not start: {log.read_text()[-2000:]}")
    return process.poll() is None


def _end_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)


@dataclass
class Jobs:
    """Runs jobs/pretrain.py against the head, in a directory of its own."""

    head: Head
    directory: Path
    _running: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def storage(self) -> Path:
        return self.directory / "runs"

    def run_dir(self, name: str) -> Path:
        return self.storage / name

    def command(self, name: str, *flags: str, script: str = "pretrain.py") -> list[str]:
        recipe = self.directory / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(RECIPE))
        return [
            *(sys.executable, str(ROOT / "jobs" / script), "--config", str(recipe)),
            *("--run.name", name, *flags),
        ]

    def start(self, name: str, *flags: str, env: dict[str, str] | None = None):
        process = subprocess.Popen(
            self.command(name, *flags),
            cwd=self.directory,
            env={**self.head.env, **(env or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._running.append(process)
        return process

    def run(self, name: str, *flags: str, env: dict[str, str] | None = None, code: int = 0) -> str:
        """Run to the end; assert the exit status and return the output."""
        return self.finish(self.start(name, *flags, env=env), code)

    def finish(self, process: subprocess.Popen[str], code: int = 0) -> str:
        output, _ = process.communicate(timeout=JOB_S)
        assert process.returncode == code, output
        return output

    def summary(self, name: str) -> dict:
        return json.loads((self.run_dir(name) / "summary.json").read_text())

    def rows(self, name: str, journal: str = "metrics") -> list[dict]:
        return list(read_journal(LocalStore(self.run_dir(name)), journal))

    def losses(self, name: str) -> list[float]:
        return [row["loss"] for row in lineage(self.rows(name))]

    def wait_for_step(self, name: str, step: int) -> None:
        def reached() -> bool:
            # One that was refused ends, while the one that has the run goes on.
            if self._running and all(job.poll() is not None for job in self._running):
                last = self._running[-1]
                if last.returncode != 0:
                    pytest.fail(f"the job has ended: {last.communicate()[0]}")
            rows = self.rows(name)
            return bool(rows) and rows[-1]["step"] >= step

        wait_for(reached, JOB_S, f"step {step} of {name}")

    def close(self) -> None:
        for process in self._running:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait(20)
