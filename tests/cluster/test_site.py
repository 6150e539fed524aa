"""From an empty cluster to a promoted model under load, by the commands of the pages alone.

The nodes have the dependencies and not our code: a job brings it as its working directory, Serve
gets the zip of `make package`. The cluster is on one machine, which shares disk, clock and network.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import mlflow
import numpy as np
import psutil
import pytest
import yaml
from PIL import Image

from clip_ray.config import S3Options
from clip_ray.eval.evaluate import evaluate
from clip_ray.inference import Encoder
from cluster import local
from tests.browser import Browser, Page
from tests.cluster.site import ROOT, Site, ask, cluster_up
from tests.runtime.support import RECIPE, answers, free_ports, ray_head, wait_for
from tests.serve.live import loaded
from tests.serve.models import picture
from tests.serve.support import data_uri

pytestmark = [pytest.mark.ray, pytest.mark.slow]

NODES = 3
STEPS = 20
MODEL = "clip"
START_S = 240
PICTURES = [picture(i, "JPEG", (224, 224)) for i in range(8)]
BODIES = [{"input": {"image": data_uri(image, "jpeg")}} for image in PICTURES]


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


@dataclass(frozen=True)
class Served:
    """What is deployed.

    Attributes:
        url: of Serve.
        key: that it asks for.
        file: the declarative config.
        code: the zip's address.
    """

    url: str
    key: str
    file: Path
    code: str


@pytest.fixture(scope="module")
def served(
    site: Site, tracking: Tracking, trained: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Served:
    """Version 1, deployed by `serve deploy` from an empty directory."""
    folder = tmp_path_factory.mktemp("serving")
    file, empty = folder / "serve.yaml", folder / "empty"
    empty.mkdir()
    (port,) = free_ports(1)
    package = ["make", "-s", "package", f"VENV={site.programs.parent}", "DEST=s3://bucket/code"]
    code = site.run(package, ROOT, 120).splitlines()[-1]
    keys = str(folder / "keys.json")
    make_key = [sys.executable, "jobs/keys.py", "create", "--file", keys, "--name", "site"]
    key = next(word for word in site.run(make_key, ROOT, 60).split() if word.startswith("cr-"))
    deploy = [sys.executable, "jobs/deploy.py", "--profile", "cluster", "--print"]
    deploy += ["--serve.working_dir", code, "--serve.state_uri", "s3://bucket/state"]
    deploy += ["--serve.model_store", "s3://bucket/models", "--serve.device", "cpu"]
    deploy += ["--serve.host", "127.0.0.1", "--serve.port", str(port), "--serve.keys_file", keys]
    # A replica takes a whole node, so that three of them are on three.
    deploy += ["--serve.gpus", "0", "--serve.cpus", "2", "--serve.max_replicas", str(NODES)]
    deploy += ["--serve.target_ongoing", "0.5", "--serve.upscale_delay_s", "2"]
    declared = yaml.safe_load(site.run(deploy, ROOT, 120))
    # The nodes are one machine here: their proxies would share the port.
    declared["proxy_location"] = "HeadOnly"
    file.write_text(yaml.safe_dump(declared, sort_keys=False))
    promote(site, tracking, "--version", "1", "--target", "file", "--file", str(file))
    serve = [str(site.programs / "serve"), "deploy", "--address", site.dashboard, str(file)]
    site.run(serve, empty, 120)
    here = Served(f"http://127.0.0.1:{port}", key, file, code)
    wait_for(lambda: replicas(site), START_S, "a replica")
    return here


def promote(site: Site, tracking: Tracking, *flags: str) -> str:
    """Promote, or check, as somebody does who has the repository and the token."""
    command = [sys.executable, "jobs/promote.py", "--model", MODEL]
    return site.run([*command, "--tracking_uri", tracking.url, *flags], ROOT, START_S)


def replicas(site: Site) -> dict[str, str]:
    """Return the node of each replica that runs, by its id."""
    app = site.get("/api/serve/applications/")["applications"].get(MODEL, {"deployments": {}})
    assert app.get("status") != "DEPLOY_FAILED", app
    return {
        replica["replica_id"]: replica["node_id"]
        for deployment in app["deployments"].values()
        for replica in deployment["replicas"]
        if replica["state"] == "RUNNING"
    }


def test_serve_deploy_brings_our_code_to_nodes_without_it(
    site: Site, tracking: Tracking, served: Served
) -> None:
    assert served.code.startswith("s3://bucket/code/clip-ray-")
    assert ask(f"{served.url}/v1/embeddings", body=BODIES[0])[0] == 401
    status, body = ask(f"{served.url}/v1/embeddings", served.key, BODIES[0])
    assert status == 200, body
    export = Encoder.load(str(tracking.storage / "seed-1/export"), "cpu")
    document = json.loads(body)
    assert document["clip"]["digest"] == export.digest and document["model"] == f"{MODEL}/1"
    # Only the file was written: nothing had been there to confirm it, so nothing was promoted.
    assert mlflow.MlflowClient(tracking.url).get_registered_model(MODEL).aliases == {}
    # A local directory is what Serve refuses, and why there is `make package`.
    declared = yaml.safe_load(served.file.read_text())
    declared["applications"][0]["runtime_env"]["working_dir"] = str(ROOT)
    status, body = ask(
        f"{site.dashboard}/api/serve/applications/", site.token, declared, method="PUT"
    )
    assert status >= 400 and "remote URIs in working_dir" in body


def test_under_load_it_scales_over_nodes_and_takes_a_new_version(
    site: Site, tracking: Tracking, served: Served
) -> None:
    assert len(replicas(site)) == 1
    with loaded(served.url, BODIES, clients=6, key=served.key) as end:
        begun = time.monotonic()
        wait_for(lambda: len(replicas(site)) == NODES, START_S, "three replicas")
        scaled_at = time.monotonic()
        spread = set(replicas(site).values())
        told = promote(
            site, tracking, "--version", "2", "--target", "file", "--file", str(served.file),
            "--address", site.state["address"],
        )  # fmt: skip
        promoted_at = time.monotonic()
        time.sleep(3)
        seen = end()
    assert len(spread) == NODES
    assert f"every replica ({NODES}) serves {MODEL}/2" in told
    assert seen.failures == []
    own = {
        f"{MODEL}/{seed}": Encoder.load(str(tracking.storage / f"seed-{seed}/export"), "cpu")
        for seed in (1, 2)
    }
    features = {name: encoder.encode_images(PICTURES) for name, encoder in own.items()}
    # The two are told apart by what they answer, not by what they say only.
    assert all(a @ b < 0.999 for a, b in zip(*features.values(), strict=True))
    for _, _, which, name, answer in seen.answers:
        assert answer[0] @ features[name][which] > 0.99999, name
    after = {a[3] for a in seen.answers if a[0] - a[1] > promoted_at}
    assert after == {f"{MODEL}/2"} and {a[3] for a in seen.answers} == set(features)
    assert len(seen.answers) > 100
    print(
        f"\n1 -> {NODES} replicas after {scaled_at - begun:.0f} s, promotion "
        f"{promoted_at - scaled_at:.0f} s, {len(seen.answers)} answers, none failed, "
        f"p99 {1000 * seen.percentile(99):.0f} ms"
    )
    where = ["--address", site.state["address"]]
    assert "all the same" in promote(site, tracking, "--check", *where)
    aliases = mlflow.MlflowClient(tracking.url).get_registered_model(MODEL).aliases
    assert aliases["champion"] == "2"
    assert yaml.safe_load(served.file.read_text())["applications"][0]["deployments"][0][
        "user_config"
    ]["version"] == "2"  # fmt: skip


# By the metric in a chart's legend: the steps and values it plots, its line's length, its place.
# textContent, because innerText lays the page out anew, each time that it is asked.
CHARTS = """Object.fromEntries([...document.querySelectorAll(".js-plotly-plot")].map((chart) => {
  const legend = /seed-1 \\((\\w+)\\)/;
  let card = chart;
  while (card.parentElement && !legend.test(card.textContent)) card = card.parentElement;
  const line = chart.querySelector("path.js-line");
  const {x, y} = chart.data?.[0] ?? {};
  const drawn = [Array.from(x ?? []), Array.from(y ?? []), line?.getTotalLength() ?? 0];
  const {left, top, right, bottom} = chart.getBoundingClientRect();
  return [legend.exec(card.textContent)?.[1], [...drawn, [left, top, right, bottom]]];
}))"""


def drawn(page: Page, metric: str, file: Path) -> bool:
    """Take a screenshot; tell whether a metric's chart has a line, in colour, in its place."""
    shot = Image.open(page.screenshot(file)).convert("RGB")
    # A chart is drawn anew with each change of the page, and turns a wheel meanwhile.
    place = page.evaluate(f"({CHARTS})[{metric!r}]?.[3]")
    colours = np.asarray(shot.crop(place)).astype(int) if place else np.zeros((1, 1, 3))
    return bool((np.ptp(colours, axis=2) > 60).sum() > 50)


def test_mlflow_shows_the_run_its_curves_and_the_model(
    browser: Browser, tracking: Tracking, trained: list[str], tmp_path: Path
) -> None:
    client = mlflow.MlflowClient(tracking.url)
    versions = [client.get_model_version(MODEL, number) for number in ("1", "2")]
    run = client.get_run(versions[0].run_id)
    page = browser.page(1400, 1600)
    of_run = f"{tracking.url}/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}"

    page.go(of_run)
    page.wait("document.body.innerText.includes('train.global_batch')", 60)
    text = page.text("body")
    for shown in (
        f"loss\n{run.data.metrics['loss']}\n",
        "run.name\nseed-1\n",
        "train.global_batch\n32\n",
    ):
        assert shown in text
    page.screenshot(tmp_path / "run.png")

    page.go(f"{of_run}/model-metrics")
    page.wait("document.querySelector('.js-plotly-plot path.js-line')", 60)
    page.wait(f"({CHARTS}).loss?.[2] > 50", 60)
    steps, losses, *_ = page.evaluate(f"({CHARTS}).loss")
    history = client.get_metric_history(run.info.run_id, "loss")
    assert steps == [point.step for point in history] == list(range(1, STEPS + 1))
    assert losses == [point.value for point in history] and losses[-1] < losses[0]
    wait_for(lambda: drawn(page, "loss", tmp_path / "curves.png"), 60, "the curve of the loss")

    page.go(f"{tracking.url}/#/models/{MODEL}")
    page.wait("document.body.innerText.includes('Version 2')", 60)
    text = page.text("body")
    for version in versions:
        assert f"Version {version.version}" in text and version.tags["digest"] in text
        assert all(alias in text for alias in version.aliases)
    page.screenshot(tmp_path / "model.png")
    # All of it comes from this server.
    assert {r for r in page.requests if not r.startswith(f"{tracking.url}/")} == set()
    page.close()


def test_mlflow_is_on_loopback_only(tracking: Tracking) -> None:
    server = psutil.Process(tracking.pid)
    family = {server.pid, *(child.pid for child in server.children(recursive=True))}
    port = int(tracking.url.rsplit(":", 1)[1])
    assert listeners(family) == {("127.0.0.1", port)}


def test_cluster_down_ends_this_one_alone(site: Site, served: Served, tmp_path: Path) -> None:
    port = int(served.url.rsplit(":", 1)[1])
    assert local._members(site.state)
    with ray_head(tmp_path, cpus=1) as other:
        make = ["make", f"VENV={site.programs.parent}", f"CLUSTER={site.folder}", "cluster-down"]
        assert f"ended {NODES} nodes" in site.run(make, ROOT, 120)
        assert not local._members(site.state)
        assert ask(site.dashboard)[0] == 0 and ask(f"http://127.0.0.1:{port}")[0] == 0
        assert not Path(site.state["temp"]).exists()
        # The other one goes on: its head answers, and its nodes still work.
        count = "import ray; ray.init(); print(ray.get(ray.remote(lambda: 41 + 1).remote()))"
        told = subprocess.run(
            [sys.executable, "-c", count], env=other.env, capture_output=True, text=True, timeout=90
        )
        assert told.stdout == "42\n", told.stderr
