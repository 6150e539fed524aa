"""A Ray head into whose workers faults can be put, jobs on it, and runs nothing happened to."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from clip_ray.config import S3Options
from tests.chaos.support import INJECT, STEPS
from tests.runtime.conftest import jobs  # noqa: F401 - a fixture, of the head below
from tests.runtime.support import START_S, Head, Jobs, answers, free_ports, ray_head, wait_for
from tests.s3_proxy import Proxy, s3_proxy


@pytest.fixture(scope="session")
def faults(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a Ray into whose workers faults can be put."""
    return {
        "PYTHONPATH": str(INJECT),
        "CHAOS_FAULTS": str(tmp_path_factory.mktemp("faults")),
        # The nodes promise more CPUs than there are: threads that wait actively take those that
        # others compute with.
        "OMP_WAIT_POLICY": "passive",
    }


@pytest.fixture(scope="session")
def head(
    tmp_path_factory: pytest.TempPathFactory, s3: S3Options, faults: dict[str, str]
) -> Iterator[Head]:
    # `s3` first: the head's processes inherit the credentials that it sets.
    with ray_head(
        tmp_path_factory.mktemp("ray"), cpus=6, with_dashboard=False, **faults
    ) as running:
        yield running


@pytest.fixture(scope="session")
def undisturbed(head: Head, tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    """A run that nothing happened to; in the folder CHAOS_UNDISTURBED an earlier pytest's."""
    folder = os.environ.get("CHAOS_UNDISTURBED") or tmp_path_factory.mktemp("undisturbed")
    made = Jobs(head, Path(folder))
    if not (made.run_dir("clip") / "summary.json").exists():
        made.run("clip", *STEPS)
    return made


@contextlib.contextmanager
def mlflow_server(folder: Path) -> Iterator[tuple[str, str]]:
    """Run an MLflow server, and yield its address and the URI of its database."""
    (port,) = free_ports(1)
    database = f"sqlite:///{folder}/mlflow.db"
    options = ["--port", str(port), "--workers", "1", "--backend-store-uri", database]
    server = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "server", *options],
        env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        wait_for(lambda: answers(f"http://127.0.0.1:{port}/health"), START_S, "MLflow")
        yield f"http://127.0.0.1:{port}", database
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)


@pytest.fixture(scope="session")
def several_nodes(
    tmp_path_factory: pytest.TempPathFactory, faults: dict[str, str]
) -> Iterator[dict[str, str]]:
    """The environment of a Ray of several nodes, for which a database in a file is refused."""
    with mlflow_server(tmp_path_factory.mktemp("mlflow")) as (address, _):
        yield {**faults, "MLFLOW_TRACKING_URI": address}


@pytest.fixture(scope="session")
def cluster(
    tmp_path_factory: pytest.TempPathFactory, several_nodes: dict[str, str]
) -> Iterator[Head]:
    """A head with room for the data and one worker of two CPUs; tests add nodes."""
    with ray_head(
        tmp_path_factory.mktemp("elastic"), cpus=3, with_dashboard=False, **several_nodes
    ) as head:
        yield head


@pytest.fixture
def elastic(cluster: Head, tmp_path: Path) -> Iterator[Jobs]:
    made = Jobs(cluster, tmp_path)
    yield made
    made.close()


@pytest.fixture
def tracking(tmp_path: Path) -> Iterator[tuple[Proxy, str]]:
    """An MLflow server behind a proxy, and the URI of its database."""
    with mlflow_server(tmp_path) as (address, database), s3_proxy(address) as proxy:
        yield proxy, database
