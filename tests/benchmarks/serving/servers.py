"""The servers under comparison: how each is started, told apart in /proc, and ended.

Each is a process group of its own with the same model, settings and share of CPU: the ASGI app of
`serve.routes` under plain uvicorn, and the deployment of `serve.app` under Ray Serve in several
modes. Run as a module this is the server; `Server` starts it and sees that nothing stays behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clip_ray.config.serving import AppSettings, ServeConfig
from clip_ray.registry import Target
from clip_ray.runtime.serve_config import declaration, haproxy_environment
from tests.benchmarks.serving.load import ROOT

START_S = 180
STOP_S = 90
CPUS = 1  # of the one replica: decoding threads, torch threads, OMP_NUM_THREADS
MARK = "CLIP_RAY_BENCH"  # in the environment of everything that a server starts
_TITLES = (  # of processes, as /proc/<pid>/cmdline shows them
    (r"^ray::ServeReplica", "replica"),
    (r"^ray::ServeController", "controller"),
    (r"^ray::HAProxyManager", "haproxy actor"),
    (r"^ray::ProxyActor", "proxy"),
    (r"haproxy", "haproxy"),
    (r"raylet/raylet|/raylet ", "raylet"),
    (r"gcs_server", "gcs"),
    (r"log_monitor", "log monitor"),
    (r"(?i)dashboard|runtime_?env_?agent", "agents"),
    (r"monitor\.py", "autoscaler monitor"),
    (r"^ray::IDLE", "idle workers"),
    (r"tests\.benchmarks\.serving\.servers", "main"),
)


@dataclass(frozen=True)
class Kind:
    """A way to serve.

    Attributes:
        name: as in tables.
        ray: whether Ray Serve does it; else plain uvicorn.
        env: environment of all its processes, set before they start.
        logging: Serve's logging_config of the application; none = as deployed.
    """

    name: str
    ray: bool = True
    env: Mapping[str, str] = field(default_factory=dict)
    logging: Mapping[str, Any] = field(default_factory=dict)


_HAPROXY = haproxy_environment(AppSettings())
KINDS = {
    kind.name: kind
    for kind in (
        Kind("plain", ray=False),
        Kind("proxy"),
        Kind("haproxy", env=_HAPROXY),
        Kind("throughput", env={**_HAPROXY, "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}),
    )
}


class Server:
    """A server that runs; `stop` ends it and tells what it left behind.

    Args:
        kind: the way to serve.
        target: the model.
        settings: of the app; state_uri is replaced by a directory that goes with the server.

    Raises:
        RuntimeError: it does not answer in time; its output is in the message.
    """

    def __init__(self, kind: Kind, target: Target, settings: AppSettings | None = None) -> None:
        self.kind = kind
        self._ports = free_ports(3 if kind.ray else 1)
        self.port = self._ports[0]
        self._token = uuid.uuid4().hex
        # Not below a test's directory: the path of a socket ends at 107 characters.
        self._directory = Path(tempfile.mkdtemp(prefix="crb-"))
        settings = (settings or AppSettings()).model_copy(
            update={"state_uri": str(self._directory / "state")}
        )
        job = {
            "ray": kind.ray,
            "port": self.port,
            "temp": str(self._directory / "r"),
            "settings": settings.model_dump(mode="json"),
            "target": target.model_dump(mode="json"),
            "logging": dict(kind.logging),
        }
        self._log = self._directory / "log"
        with open(self._log, "wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.benchmarks.serving.servers", json.dumps(job)],
                cwd=ROOT,
                env=self._environment(),
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        try:
            self._wait()
        except BaseException:
            self.stop()
            raise

    def _environment(self) -> dict[str, str]:
        private = self._directory / "h"
        private.mkdir()
        kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        return {
            **kept,
            MARK: self._token,
            # A process title must not overwrite the mark in /proc/<pid>/environ.
            "SPT_NOENV": "1",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": str(CPUS),
            "RAY_AUTH_MODE": "disabled",
            "RAY_TMPDIR": str(self._directory / "r"),
            "RAY_USAGE_STATS_ENABLED": "0",
            # Idle workers kept ready take CPU time while another server is measured.
            "RAY_prestart_worker_first_driver": "0",
            "RAY_enable_worker_prestart": "0",
            "RAY_SERVE_HAPROXY_STATS_PORT": str(self._ports[-2:][0]),
            "RAY_SERVE_HAPROXY_METRICS_PORT": str(self._ports[-1]),
            "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(private / "haproxy.cfg"),
            "RAY_SERVE_HAPROXY_SOCKET_PATH": str(private / "admin.sock"),
            "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(private / "metrics.sock"),
            "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(private),
            "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(private / "server-state"),
            **self.kind.env,
        }

    def _wait(self) -> None:
        deadline = time.monotonic() + START_S
        while True:
            if self._process.poll() is not None:
                raise RuntimeError(f"{self.kind.name} ended while it started:\n{self.output()}")
            with contextlib.suppress(OSError):
                url = f"http://127.0.0.1:{self.port}/v1/models"
                with urllib.request.urlopen(url, timeout=5):
                    return
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"{self.kind.name} does not answer within {START_S} s:\n{self.output()}"
                )
            time.sleep(0.2)

    def output(self) -> str:
        """Return the end of what it wrote."""
        return self._log.read_text(errors="replace")[-4000:]

    def send(self, method: str, path: str, body: bytes, headers: Mapping[str, str]) -> bytes:
        """Send one request and return the answer's body.

        Raises:
            RuntimeError: the answer is a refusal.
        """
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", body, dict(headers), method=method
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return bytes(answer.read())
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"{method} {path}: {error.code} {error.read()[:500]!r}") from error

    def processes(self) -> dict[int, str]:
        """Return its processes by id, with their names."""
        return {pid: _title(pid) for pid in _marked(self._token)}

    def stop(self) -> list[str]:
        """End it and return what went wrong: a failure, processes and listeners that it left."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        left = []
        try:
            if self._process.wait(STOP_S):
                left.append(f"exit status {self._process.returncode}:\n{self.output()}")
        except subprocess.TimeoutExpired:
            left.append(f"still running {STOP_S} s after it was told to end:\n{self.output()}")
        left += self._ended(5)
        for sign in (signal.SIGTERM, signal.SIGKILL):
            for pid in _marked(self._token):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, sign)
            self._ended(5)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        left += [f"listener on port {port}" for port in self._ports if _listens(port)]
        shutil.rmtree(self._directory, ignore_errors=True)
        return left

    def _ended(self, seconds: float) -> list[str]:
        """Return the names of the processes that are there after `seconds`."""
        deadline = time.monotonic() + seconds
        while (left := _marked(self._token)) and time.monotonic() < deadline:
            time.sleep(0.1)
        return [f"{_title(pid)} ({pid})" for pid in left]


@contextlib.contextmanager
def running(kinds: Sequence[Kind], target: Target) -> Iterator[list[Server]]:
    """Start servers, and end them.

    Raises:
        RuntimeError: one does not start, fails, or leaves something behind.
    """
    servers: list[Server] = []
    left: list[str] = []
    try:
        for kind in kinds:
            servers.append(Server(kind, target))
        yield servers
    finally:
        for server in servers:
            left += [f"{server.kind.name}: {what}" for what in server.stop()]
    if left:
        raise RuntimeError("servers did not end well: " + ", ".join(left))


_given: set[int] = set()  # a server that runs does not listen on all of its ports


def free_ports(count: int) -> list[int]:
    """Return ports that nothing listens on, new ones, below the range of outgoing connections."""
    found: list[int] = []
    for port in range(18000 + os.getpid() % 500 * 8, 32000):
        if port in _given:
            continue
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            _given.update(found)
            return found
    raise RuntimeError("no free ports")


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _marked(token: str) -> list[int]:
    mark = f"{MARK}={token}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            if mark in (entry / "environ").read_bytes():
                found.append(int(entry.name))
    return found


def _title(pid: int) -> str:
    try:
        line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return "ended"
    return next((name for pattern, name in _TITLES if re.search(pattern, line)), line[:60])


def _run_plain(job: dict[str, Any]) -> None:
    """Serve with uvicorn alone, in this process."""
    import uvicorn
    import uvloop

    from clip_ray.storage import open_store
    from serve.app import _set_up_logs
    from serve.classifiers import ClassifierStore
    from serve.engine import Engine
    from serve.fetch import Fetcher
    from serve.metrics import Metrics
    from serve.routes import create_app

    settings = AppSettings.model_validate(job["settings"])
    _set_up_logs()  # a line a request is written here too

    async def run() -> None:
        _pretend_to_be_a_replica(settings.limits.ongoing)
        metrics = Metrics()
        engine = Engine(settings, CPUS, metrics, Path(job["temp"]))
        store = open_store(settings.state_uri, settings.s3)
        classifiers = ClassifierStore(store, engine.build, settings.limits)
        engine.prepare = classifiers.prepare
        await engine.start(job["target"])
        fetcher = Fetcher(settings.image_urls, int(settings.limits.image_mb * 1e6))
        app = create_app(engine, settings, classifiers, None, fetcher, metrics)
        server = uvicorn.Server(
            uvicorn.Config(
                app, port=job["port"], http="httptools", access_log=False, log_level="warning"
            )
        )
        server.install_signal_handlers = lambda: None  # type: ignore[method-assign]
        serving = asyncio.create_task(server.serve())
        await asyncio.to_thread(sys.stdin.read)
        server.should_exit = True
        await serving

    uvloop.run(run())


def _pretend_to_be_a_replica(max_ongoing: int) -> None:
    """Give @serve.batch the context that it asks for."""
    from ray.serve._private.common import DeploymentID, ReplicaID
    from ray.serve._private.config import DeploymentConfig
    from ray.serve.context import _set_internal_replica_context
    from ray.serve.schema import ReplicaRank

    _set_internal_replica_context(
        replica_id=ReplicaID("plain", DeploymentID("clip", "clip")),
        servable_object=None,
        _deployment_config=DeploymentConfig(max_ongoing_requests=max_ongoing),
        rank=ReplicaRank(rank=0, node_rank=0, local_rank=0),
        world_size=1,
    )


def _run_ray(job: dict[str, Any]) -> None:
    """Start Ray and Serve here, deploy as jobs/deploy.py does, and end both with stdin."""
    import ray
    from ray import serve
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeDeploySchema

    declared = declaration(
        ServeConfig(**job["settings"], port=job["port"], cpus=CPUS), Target(**job["target"])
    )
    if job["logging"]:
        declared["applications"][0]["logging_config"] = job["logging"]
    ray.init(
        num_cpus=CPUS + 1,
        include_dashboard=False,
        object_store_memory=200_000_000,
        log_to_driver=False,
        _temp_dir=job["temp"],
    )
    try:
        serve.start(proxy_location="HeadOnly", http_options=declared["http_options"])
        _get_global_client().deploy_apps(ServeDeploySchema.model_validate(declared))
        _wait_until_running()
        sys.stdin.read()
    finally:
        # First: a HAProxy whose cluster is gone would go on listening.
        serve.shutdown()
        ray.shutdown()


def _wait_until_running() -> None:
    """Return when the application runs; a failed deployment ends the server, with its reason."""
    from ray import serve

    while True:
        application = serve.status().applications["clip"]
        if application.status == "RUNNING":
            return
        if application.status == "DEPLOY_FAILED":
            raise RuntimeError(f"{application.message}\n{application.deployments}")
        time.sleep(0.2)


if __name__ == "__main__":
    _job = json.loads(sys.argv[1])
    (_run_ray if _job["ray"] else _run_plain)(_job)
