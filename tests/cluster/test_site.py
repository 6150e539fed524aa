"""An empty cluster, trained and evaluated on by the commands of the pages alone.

The nodes have the dependencies and not our code: a job brings it as its working directory. The
cluster is on one machine, which shares disk, clock and network.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import mlflow
import psutil
import pytest
import yaml

from clip_ray.config import S3Options
from clip_ray.eval.evaluate import evaluate
from clip_ray.inference import Encoder
from cluster import local
from tests.cluster.site import ROOT, Site, ask, cluster_up
from tests.runtime.support import RECIPE, answers, free_ports, wait_for

pytestmark = [pytest.mark.ray, pytest.mark.slow]

NODES = 3
STEPS = 20
MODEL = "clip"
START_S = 240


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, s3: S3Options) -> Iterator[Site]:
    """Three nodes of two declared CPUs."""
    assert s3.endpoint is not None
    with cluster_up(
        tmp_path_factory.mktemp("site"), NODES, 2, AWS_ENDPOINT_URL=s3.endpoint
    ) as running:
        yield running


@dataclass(frozen=True)
class Tracking:
    """An MLflow server, and the storage that it is for."""

    storage: Path
    url: str
    pid: int


@pytest.fixture(scope="module")
def tracking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tracking]:
    """MLflow as `make cluster-up` says to start it."""
    folder = tmp_path_factory.mktemp("mlflow")
    (port,) = free_ports(1)
    command = [sys.executable, "jobs/ui.py", "--create", "--port", str(port)]
    command += ["--storage", str(folder / "runs")]
    log = folder / "log"
    with open(log, "wb") as output:
        server = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)
    try:
        url = f"http://127.0.0.1:{port}"
        wait_for(lambda: answers(f"{url}/health"), START_S, f"an MLflow server; see {log}")
        assert url in log.read_text()
        yield Tracking(folder / "runs", url, server.pid)
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture(scope="module")
def trained(site: Site, tracking: Tracking, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two runs, which are two versions of one model; what their jobs printed."""
    recipe = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE))
    command = ["python", "jobs/pretrain.py", "--config", str(recipe)]
    command += ["--run.storage", str(tracking.storage), "--tracking.uri", tracking.url]
    # A worker takes a whole node, so that two of them are on two.
    command += ["--tracking.model_name", MODEL, "--cluster.cpus_per_worker", "2"]
    return [
        site.submit(*command, "--run.name", f"seed-{seed}", "--run.seed", str(seed))
        for seed in (1, 2)
    ]


def addresses() -> list[str]:
    """Return the machine's IPv4 addresses that others may reach."""
    found = [a.address for nic in psutil.net_if_addrs().values() for a in nic if a.family == 2]
    return [address for address in found if not address.startswith("127.")]


def listeners(pids: set[int]) -> set[tuple[str, int]]:
    """Return where processes listen, by address and port."""
    return {
        (c.laddr.ip, c.laddr.port)
        for c in psutil.net_connections("tcp")
        if c.pid in pids and c.status == psutil.CONN_LISTEN
    }


def test_nothing_but_the_dependencies_is_there(site: Site, tmp_path: Path) -> None:
    look = "import importlib.util as u; print([bool(u.find_spec(n)) for n in ('ray', 'clip_ray')])"
    told = subprocess.run(
        [str(site.programs / "python"), "-c", look],
        cwd=tmp_path,
        env=site.env,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert told.stdout == "[True, False]\n"
    # The same of a job that brings no code, on a node.
    assert "[True, False]" in site.submit("python", "-c", look, cwd=tmp_path, working_dir=None)
    nodes = site.get("/api/v0/nodes")["data"]["result"]["result"]
    assert [node["state"] for node in nodes] == ["ALIVE"] * NODES
    assert sorted(node["resources_total"]["CPU"] for node in nodes) == [2.0] * NODES


def test_no_code_without_the_token(site: Site, tmp_path: Path) -> None:
    """The job API runs whatever it is given: neither the head's nor a node's takes it."""
    mark = tmp_path / "ran"
    job = {"entrypoint": f"touch {mark}"}
    for path in ("/api/jobs/", "/api/v0/nodes", "/api/serve/applications/"):
        assert ask(site.dashboard + path)[0] == 401, path
        assert ask(site.dashboard + path, "0" * 64)[0] == 403, path
        assert ask(site.dashboard + path, site.token)[0] == 200, path
    assert ask(site.dashboard + "/api/jobs/", body=job)[0] == 401
    seen: dict[int, set[str]] = {}
    for address, port in listeners(set(local._members(site.state))):
        host = "127.0.0.1" if address in ("0.0.0.0", "::") else address.removeprefix("::ffff:")
        for path in ("/api/jobs/", "/api/job_agent/jobs/"):
            status, _ = ask(f"http://{host}:{port}{path}", body=job)
            seen.setdefault(status, set()).add(address)
    # Metrics are only read (405); what does not speak HTTP is gRPC (0).
    assert set(seen) == {0, 401, 405}
    assert set(addresses()) & seen[401], "no node's agent was asked on the machine's address"
    assert not mark.exists()
    connect = "import ray, sys; ray.init(sys.argv[1])"
    stranger = subprocess.run(
        [str(site.programs / "python"), "-c", connect, site.state["address"]],
        env={k: v for k, v in site.env.items() if not k.startswith("RAY_A")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert stranger.returncode != 0 and "token" in stranger.stderr.lower()


def test_the_dashboard_is_on_loopback_only(site: Site) -> None:
    port = int(site.dashboard.rsplit(":", 1)[1])
    assert ask(f"http://127.0.0.1:{port}/")[0] == 200
    others = addresses()
    assert others, "this machine has no other address"
    for address in others:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((address, port), 10)


def test_a_run_is_spread_over_nodes_and_leaves_two_versions(
    site: Site, tracking: Tracking, trained: list[str]
) -> None:
    assert all("exported: " in told for told in trained)
    client = mlflow.MlflowClient(tracking.url)
    for number, seed in (("1", 1), ("2", 2)):
        version = client.get_model_version(MODEL, number)
        run = client.get_run(version.run_id)
        assert run.info.run_name == f"seed-{seed}" and run.info.status == "FINISHED"
        losses = client.get_metric_history(version.run_id, "loss")
        assert [point.step for point in losses] == list(range(1, STEPS + 1))
        # Ray drops .git on the way: what ran is known by its digest.
        assert run.data.tags["clip_ray.source.origin"] == "digest"
    workers: dict[str, set[str]] = {}
    for actor in site.get("/api/v0/actors?limit=1000&detail=true")["data"]["result"]["result"]:
        if actor["class_name"] == "RayTrainWorker":
            workers.setdefault(actor["job_id"], set()).add(actor["node_id"])
    assert [len(nodes) for nodes in workers.values()] == [2, 2]


def test_sqlite_is_refused_on_several_nodes(site: Site, tracking: Tracking) -> None:
    """And the job that is refused has failed, for whoever waits for it."""
    submit = [str(site.programs / "ray"), "job", "submit", "--address", site.dashboard]
    storage = tracking.storage.with_name("other")
    refused = subprocess.run(
        [*submit, "--working-dir", ".", "--", "python", "jobs/pretrain.py"]
        + ["--run.storage", str(storage)],
        cwd=ROOT,
        env=site.env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert refused.returncode != 0
    assert f"sqlite does not work over {NODES} nodes" in refused.stdout + refused.stderr


def test_a_job_evaluates_a_registered_version(
    site: Site, tracking: Tracking, trained: list[str], tmp_path: Path
) -> None:
    data, written = tracking.storage / "bundled/starter", tmp_path / "result.json"
    told = site.submit(
        *("python", "jobs/evaluate.py", "--model", f"models:/{MODEL}/1", "--dataset", str(data)),
        *("--json", str(written), "--tracking_uri", tracking.url, "--limit", "200"),
    )
    found = json.loads(written.read_text())
    own = Encoder.load(str(tracking.storage / "seed-1/export"), "cpu")
    result = evaluate(own, str(data), 256, 200)
    assert found["evaluation"] == {result.dataset: result.to_dict()}
    assert (found["version"], found["digest"]) == ("1", own.digest)
    assert result.metrics["retrieval.image_to_text.r10"] > 0
    assert result.dataset in told


def test_mlflow_is_on_loopback_only(tracking: Tracking) -> None:
    server = psutil.Process(tracking.pid)
    family = {server.pid, *(child.pid for child in server.children(recursive=True))}
    port = int(tracking.url.rsplit(":", 1)[1])
    assert listeners(family) == {("127.0.0.1", port)}
