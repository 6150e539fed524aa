"""A cluster as an engineer sets it up: nodes that have the dependencies and not our code."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from cluster import local

ROOT = local.ROOT
COMMANDS = {"ray": "ray.scripts.scripts:main", "serve": "ray.serve.scripts:cli"}
COMMAND = """#!{python}
import sys
from {module} import {function}
sys.exit({function}())
"""
UP_S = 400
JOB_S = 300


def dependencies_only(folder: Path) -> Path:
    """Make a virtual environment that has our dependencies and not us; return its programs.

    An editable install is a `.pth` file, which Python reads in its own site-packages only.
    """
    venv = [sys.executable, "-m", "venv", "--without-pip", str(folder)]
    subprocess.run(venv, check=True, timeout=60)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(f"{Path(ray.__file__).parents[1]}\n")
    for name, entry in COMMANDS.items():
        module, function = entry.split(":")
        program = folder / "bin" / name
        python = folder / "bin/python"
        program.write_text(COMMAND.format(python=python, module=module, function=function))
        program.chmod(0o755)
    # `make` has nothing to install into it.
    (folder / ".installed").touch()
    return folder / "bin"


@dataclass(frozen=True)
class Site:
    """A cluster that runs.

    Attributes:
        folder: of its state and logs.
        state: as cluster/local.py wrote it down.
        programs: of the environment that has the dependencies.
        env: of whoever may use the cluster.
        told: what `make cluster-up` printed.
    """

    folder: Path
    state: dict[str, Any]
    programs: Path
    env: dict[str, str]
    told: str

    @property
    def dashboard(self) -> str:
        return self.state["dashboard"]

    @property
    def token(self) -> str:
        return Path(self.state["token"]).read_text()

    def submit(self, *command: str, cwd: Path = ROOT, working_dir: str | None = ".") -> str:
        """Submit a job as the pages say, wait for its end, return what it printed."""
        submit = [str(self.programs / "ray"), "job", "submit", "--address", self.dashboard]
        submit += ["--working-dir", working_dir] if working_dir else []
        return self.run([*submit, "--", *command], cwd, JOB_S)

    def run(self, command: list[str], cwd: Path, timeout_s: float) -> str:
        """Run a command that must succeed; return its standard output."""
        done = subprocess.run(
            command, cwd=cwd, env=self.env, capture_output=True, text=True, timeout=timeout_s
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def get(self, path: str) -> Any:
        """Return the JSON of a route of the dashboard."""
        status, body = ask(self.dashboard + path, self.token)
        assert status == 200, body
        return json.loads(body)


def ask(
    url: str,
    token: str | None = None,
    body: dict[str, Any] | None = None,
    method: str | None = None,
) -> tuple[int, str]:
    """Ask over HTTP; return status and text; 0 where nobody answers in HTTP."""
    headers = {"content-type": "application/json"}
    headers |= {"authorization": f"Bearer {token}"} if token else {}
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, headers, method=method)
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(request, timeout=20) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
    except (OSError, http.client.HTTPException) as error:
        return 0, f"{type(error).__name__}: {error}"


@contextlib.contextmanager
def cluster_up(folder: Path, nodes: int, cpus: int, **variables: str) -> Iterator[Site]:
    """Start a cluster with `make cluster-up`, and end it with `make cluster-down`.

    Args:
        folder: of its environment, state and logs.
        nodes: nodes, the head among them.
        cpus: CPUs that each declares.
        variables: more of the nodes' environment.
    """
    programs = dependencies_only(folder / "venv")
    where = folder / "cluster"
    env = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "PYTHONPATH"))}
    # Idle workers kept ready cost CPU time for each job and are not needed.
    env |= {"RAY_prestart_worker_first_driver": "0", "RAY_enable_worker_prestart": "0"}
    env |= variables
    make = ["make", f"VENV={programs.parent}", f"CLUSTER={where}", f"N={nodes}", f"CPUS={cpus}"]
    try:
        up = subprocess.run(
            [*make, "cluster-up"], cwd=ROOT, env=env, capture_output=True, text=True, timeout=UP_S
        )
        assert up.returncode == 0, up.stdout + up.stderr
        state = json.loads((where / local.STATE).read_text())
        yield Site(where, state, programs, env | local.environment(state), up.stdout)
    finally:
        subprocess.run([*make, "cluster-down"], cwd=ROOT, env=env, check=True, timeout=120)
