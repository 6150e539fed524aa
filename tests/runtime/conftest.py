"""A Ray head with its dashboard on free ports, shared by the tests of the runtime."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from clip_ray.config import S3Options
from tests.runtime.support import START_S, Head, Jobs, answers, free_ports, wait_for


@pytest.fixture(scope="session")
def head(tmp_path_factory: pytest.TempPathFactory, s3: S3Options) -> Iterator[Head]:
    # `s3` first: the head's processes inherit the credentials that it sets.
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
        }
        command = [
            *(str(Path(sys.executable).with_name("ray")), "start", "--head", "--block"),
            *(f"--port={port}", f"--dashboard-port={dashboard}", "--include-dashboard=true"),
            *(f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}"),
            *(f"--dashboard-agent-grpc-port={agent_grpc}", "--dashboard-host=127.0.0.1"),
            *("--node-ip-address=127.0.0.1", "--num-cpus=6", "--num-gpus=0"),
            *("--object-store-memory=500000000", "--disable-usage-stats", f"--temp-dir={temp}"),
        ]
        log = tmp_path_factory.mktemp("ray") / "head.log"
        with open(log, "wb") as output:
            process = subprocess.Popen(
                command, env=env, stdout=output, stderr=output, start_new_session=True
            )
            try:
                url = f"http://127.0.0.1:{dashboard}"
                wait_for(lambda: answers(f"{url}/api/version"), START_S, f"see {log}")
                address = f"127.0.0.1:{port}"
                yield Head(address, url, {**env, "RAY_ADDRESS": address})
            finally:
                os.killpg(process.pid, signal.SIGTERM)
                try:
                    process.wait(5)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture
def jobs(head: Head, tmp_path: Path) -> Iterator[Jobs]:
    made = Jobs(head, tmp_path)
    yield made
    made.close()
