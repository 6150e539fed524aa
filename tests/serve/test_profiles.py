"""The profiles gpu and cluster as a user deploys them: HAProxy, keys, and a GPU a replica.

The GPU is declared and not there; the replica computes on the CPU.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from clip_ray import keys
from clip_ray.config.serving import AppSettings
from clip_ray.registry import ServedModel
from clip_ray.runtime.serve_config import haproxy_environment
from clip_ray.runtime.serve_state import Running
from tests.runtime import serving_driver as driver
from tests.runtime.support import START_S, answers, free_ports, wait_for
from tests.serve.live import ROOT, deployed, features_of
from tests.serve.live import client as client_of
from tests.serve.models import picture
from tests.serve.support import data_uri, offline

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="HAProxy is there on Linux only"),
]

END_S = 60
MARK = "CLIP_RAY_TEST_PROFILE"


class Family:
    """Every process that descends from one environment, whoever adopted it since.

    Attributes:
        env: what its processes are started with.
    """

    def __init__(self) -> None:
        self._token = uuid.uuid4().hex
        # Ray's workers set their titles, which must not overwrite the mark in /proc/<pid>/environ.
        self.env = {MARK: self._token, "SPT_NOENV": "1"}

    def alive(self) -> dict[int, str]:
        """Return the processes' names by number."""
        found = {}
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(MARK) == self._token:
                    found[process.pid] = process.name()
        return found

    def ports(self) -> dict[int, set[str]]:
        """Return the names of its processes that listen, by TCP port."""
        found: dict[int, set[str]] = {}
        # First the sockets: HAProxy replaces its process whenever a replica comes.
        there, names = psutil.net_connections("tcp"), self.alive()
        for connection in there:
            if connection.status == psutil.CONN_LISTEN and connection.pid in names:
                found.setdefault(connection.laddr.port, set()).add(names[connection.pid])
        return found

    def kill(self) -> None:
        for pid in self.alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@pytest.fixture
def family() -> Iterator[Family]:
    made = Family()
    yield made
    made.kill()


@pytest.fixture
def key(tmp_path: Path) -> str:
    return keys.create(str(tmp_path / "keys.json"), "me", ("infer",), None, None)[0]


def flags(folder: Path) -> list[str]:
    """Return what both profiles are told here: one CPU, and the CPU in the place of CUDA."""
    return [
        *("--serve.device", "cpu", "--serve.cpus", "1"),
        *("--serve.keys_file", str(folder / "keys.json")),
    ]


def check(
    running: Running,
    ask: Callable[..., Any],
    family: Family,
    model: ServedModel,
    key: str,
) -> None:
    """Assert what both profiles promise while they serve."""
    doors = {running.port, *running.more_ports}

    def haproxy_listens() -> bool:
        found = family.ports()
        return doors <= found.keys() and found[running.port] == {"haproxy"}

    # Not at every moment: HAProxy's new process takes the listener over from the old.
    wait_for(haproxy_listens, END_S, "HAProxy, and no other, on Serve's port")
    own = offline(model)
    image = {"input": {"image": data_uri(picture(3))}}
    with client_of(running) as http:
        refused = http.post("/v1/embeddings", json=image)
        assert refused.status_code == 401, refused.text
        assert refused.json()["error"]["request_id"]
    with client_of(running, key) as http:
        for body, expected in (
            (image, own.encode_images([picture(3)])),
            ({"input": "a red circle"}, own.encode_texts(["a red circle"])),
        ):
            answer = http.post("/v1/embeddings", json=body)
            assert answer.status_code == 200, answer.text
            assert features_of(answer.json())[0] @ expected[0] > 0.99999
            assert answer.json()["clip"]["digest"] == model.digest
    assert ask(driver.held, "GPU") == ([1.0], 0.0)


def test_gpu_serves_through_haproxy_and_leaves_nothing(tmp_path, served, key, family):
    gpu = ["--profile", "gpu", "--serve.declared_gpus", "1", *flags(tmp_path)]
    with deployed(tmp_path, served, *gpu, env=family.env) as live:
        check(live.running, live.ask, family, served, key)
    assert "ended: nothing of it listens any more" in live.log.read_text()
    doors = {live.running.port, *live.running.more_ports}
    assert doors & family.ports().keys() == set()
    # Ray's dashboard ends its own children when it has gone.
    wait_for(lambda: not family.alive(), END_S, "the end of all that it has started")


@contextlib.contextmanager
def ray_head(folder: Path, family: Family) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Run a Ray head with one declared GPU, prepared for HAProxy as the docs say.

    Yields:
        Its address; the ports that HAProxy and the fallback proxy have beside Serve's.
    """
    port, dashboard, client, agent, agent_grpc, stats, metrics, fallback = free_ports(8)
    with contextlib.ExitStack() as stack:
        # Not below pytest's directory: a socket's path ends at 107 characters.
        temp = stack.enter_context(
            tempfile.TemporaryDirectory(prefix="cr-", ignore_cleanup_errors=True)
        )
        scratch = Path(temp) / "ha"
        scratch.mkdir()
        env = {
            **{k: v for k, v in os.environ.items() if not k.startswith("RAY_")},
            **family.env,
            **haproxy_environment(AppSettings()),
            # The image of a cluster has the repository.
            "PYTHONPATH": str(ROOT),
            "RAY_AUTH_MODE": "disabled",
            "RAY_TMPDIR": temp,
            # Other tests' HAProxy, and anybody's, must not meet this one.
            "RAY_SERVE_HAPROXY_STATS_PORT": str(stats),
            "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics),
            "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(fallback),
            "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(scratch / "haproxy.cfg"),
            "RAY_SERVE_HAPROXY_SOCKET_PATH": str(scratch / "admin.sock"),
            "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(scratch / "metrics.sock"),
            "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(scratch),
            "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(scratch / "server-state"),
            "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",
            "RAY_prestart_worker_first_driver": "0",
            "RAY_enable_worker_prestart": "0",
        }
        command = [
            *(str(Path(sys.executable).with_name("ray")), "start", "--head", "--block"),
            *(f"--port={port}", f"--dashboard-port={dashboard}", "--include-dashboard=true"),
            *(f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}"),
            *(f"--dashboard-agent-grpc-port={agent_grpc}", "--dashboard-host=127.0.0.1"),
            *("--node-ip-address=127.0.0.1", "--num-cpus=3", "--num-gpus=1"),
            *("--object-store-memory=200000000", "--disable-usage-stats", f"--temp-dir={temp}"),
        ]
        log = stack.enter_context(open(folder / "head.log", "wb"))
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
        try:
            url = f"http://127.0.0.1:{dashboard}/api/version"
            wait_for(lambda: answers(url), START_S, f"a Ray head; see {log.name}")
            yield f"127.0.0.1:{port}", (stats, metrics, fallback)
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait(5)


def test_cluster_serves_through_haproxy_and_leaves_nothing(tmp_path, served, key, family):
    (port,) = free_ports(1)
    command = [
        *(sys.executable, "jobs/deploy.py", "--profile", "cluster", "--model", served.uri),
        *("--serve.port", str(port), "--serve.max_replicas", "1", *flags(tmp_path)),
        *("--serve.state_uri", str(tmp_path / "state"), "--storage", str(tmp_path / "runs")),
        *("--serve.model_store", str(tmp_path / "store")),
    ]
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    with ray_head(tmp_path, family) as (address, more_ports):
        command += ["--serve.address", address]
        done = subprocess.run(
            command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=START_S
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "HAProxy is off" not in done.stdout and served.digest in done.stdout
        running = Running(
            machine="", pid=0, started="", name="clip", host="0.0.0.0",
            port=port, more_ports=more_ports, token="",
        )  # fmt: skip
        with driver.start_at(address) as asked:
            check(running, lambda f, *a: asked.submit(f, *a).result(60), family, served, key)
            asked.submit(driver.shut_down).result(90)
        doors = {port, *more_ports}
        wait_for(lambda: not doors & family.ports().keys(), END_S, "the end of Serve's proxies")
    wait_for(lambda: not family.alive(), END_S, "the end of all that the head has started")
