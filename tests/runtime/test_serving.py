"""Deployments and rollouts on a real Serve with a fake application, through the jobs themselves.

One Serve of our own with two replicas serves all of it; the last test ends it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

from clip_ray.config import ModelConfig, TextConfig, VisionConfig
from clip_ray.model import build
from clip_ray.registry import Target, aliased, move_alias, register, write_export
from clip_ray.runtime import processes
from clip_ray.runtime.deployment import home
from clip_ray.runtime.serve_state import read_running
from clip_ray.storage import LocalStore
from clip_ray.tokenizer import Tokenizer
from clip_ray.tracking import mlflow_client
from tests.runtime import serving_driver as driver
from tests.runtime.fake_serving import BAD, SLOW
from tests.runtime.support import ROOT, wait_for

pytestmark = pytest.mark.ray

START_S = 90
TINY = ModelConfig(
    embed_dim=16,
    vision=VisionConfig(image_size=32, patch_size=16, width=32, layers=1, heads=2),
    text=TextConfig(context_length=12, vocab_size=514, width=32, layers=1, heads=2),
)
OTHER = {
    "name": "other",
    "route_prefix": "/other",
    "import_path": "tests.runtime.fake_serving:build_other",
    "runtime_env": {"env_vars": {"PYTHONPATH": str(ROOT), "MINE": "1"}},
    "args": {"b": "2", "a": "1"},
    "logging_config": {"log_level": "DEBUG", "encoding": "JSON"},
    "deployments": [
        {
            "name": "Other",
            "max_ongoing_requests": 7,
            "user_config": None,
            "ray_actor_options": {"num_cpus": 0.1, "resources": {}},
            "graceful_shutdown_timeout_s": 3.5,
        }
    ],
}


def target(digit: str, version: str, previous: Target | None = None) -> Target:
    digest = (digit * 64)[:64]
    return Target(name="clip", version=version, uri=f"/m/{digest}", digest=digest)


class Site:
    """A directory with a registry, and the Serve that runs on it."""

    def __init__(self, storage: Path) -> None:
        self.storage = storage
        self.uri = f"sqlite:///{storage}/mlflow.db"
        self.port = processes.free_port("127.0.0.1")
        self.log = storage / "foreground.log"
        self.digests: dict[str, str] = {}
        self.foreground: subprocess.Popen[bytes] | None = None
        self.driver: ProcessPoolExecutor | None = None

    def register(self) -> None:
        """Register two tiny models; the first is champion."""
        self.storage.mkdir(exist_ok=True)
        client = mlflow_client(self.uri)
        run_id = client.create_run(client.create_experiment("e")).info.run_id
        tokenizer = Tokenizer.train(["a cat", "a dog"], 514, 12)
        for seed in range(2):
            export = LocalStore(self.storage / f"run-{seed}" / "export")
            digest = write_export(export, build(TINY, seed=seed), tokenizer, {})
            self.digests[register(export, "clip", run_id, {}, self.uri)] = digest
        move_alias("clip", "1", self.digests["1"], self.uri)

    def deploy(self, *flags: str) -> list[str]:
        return [
            *(sys.executable, "-m", "tests.runtime.fake_serving", "--profile", "local"),
            *("--storage", str(self.storage), "--serve.min_replicas", "2"),
            *("--serve.max_replicas", "2", "--serve.cpus", "0.5", *flags),
        ]

    def start(self) -> None:
        with open(self.log, "wb") as output:
            self.foreground = subprocess.Popen(
                self.deploy("--serve.port", str(self.port)),
                cwd=ROOT, stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip
        process = self.foreground
        wait_for(
            lambda: "serving clip/1" in self.log.read_text() or process.poll() is not None,
            START_S,
            "the Serve's start",
        )
        assert process.poll() is None, self.log.read_text()
        self.driver = driver.start(home(str(self.storage)))

    def run(self, *command: str, code: int = 0) -> str:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def promote(self, *flags: str, code: int = 0) -> str:
        job = (sys.executable, "jobs/promote.py", "--model", "clip", "--storage", str(self.storage))
        return self.run(*job, *flags, code=code)

    def ask(self, function, *arguments):
        assert self.driver is not None
        return self.driver.submit(function, *arguments).result(120)

    def get(self, path: str) -> tuple[int, str]:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=30) as answer:
            return answer.status, answer.read().decode()

    def pids(self) -> set[int]:
        return {status["pid"] for status in self.ask(driver.served).values()}

    def versions(self) -> set[str]:
        return {status["model"]["version"] for status in self.ask(driver.served).values()}

    def close(self) -> None:
        if self.driver is not None:
            self.driver.shutdown(wait=False, cancel_futures=True)
        if self.foreground is not None and self.foreground.poll() is None:
            os.killpg(self.foreground.pid, signal.SIGTERM)
            try:
                self.foreground.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(self.foreground.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Iterator[Site]:
    made = Site(tmp_path_factory.mktemp("site"))
    try:
        made.register()
        made.start()
        made.ask(driver.add, OTHER)
        yield made
    finally:
        made.close()


class Load:
    """Asks as fast as it is answered, in two threads, as long as the block runs."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.answers: list[int | str] = []
        self.stop = threading.Event()
        self.pool = ThreadPoolExecutor(2)

    def _ask(self) -> None:
        while not self.stop.is_set():
            try:
                self.answers.append(self.site.get("/wait?seconds=0.05")[0])
            except OSError as error:
                self.answers.append(repr(error))

    def __enter__(self) -> Load:
        self.futures = [self.pool.submit(self._ask) for _ in range(2)]
        return self

    def __exit__(self, *error: object) -> None:
        self.stop.set()
        self.pool.shutdown()
        assert len(self.answers) > 10
        assert set(self.answers) == {200}


def test_it_says_where_it_serves_and_how_to_end_it(site):
    text = site.log.read_text()
    url = f"http://127.0.0.1:{site.port}"
    for words in (url, f"digest {site.digests['1']}", f"curl {url}/v1/", "Ctrl-C", "serve-down"):
        assert words in text
    assert site.get("/ready")[0] == 200
    assert site.versions() == {"1"}


def test_a_target_reaches_every_replica_in_its_process(site):
    """And a second application and options of all kinds survive, byte for byte."""
    pids, before = site.pids(), site.ask(driver.config)
    assert len(pids) == 2
    with Load(site):
        replicas, error = site.ask(driver.promote, target("8", "8"))
    assert error is None
    assert set(replicas) == site.ask(driver.served).keys()
    assert site.versions() == {"8"} and site.pids() == pids
    after = site.ask(driver.config)
    deployments = [app["deployments"][0] for app in after["applications"] if app["name"] == "clip"]
    assert deployments[0].pop("user_config")["version"] == "8"
    ours = next(app for app in before["applications"] if app["name"] == "clip")
    ours["deployments"][0].pop("user_config")
    assert json.dumps(after) == json.dumps(before)
    assert after["target_capacity"] == 100.0
    assert site.get("/other") == (200, "other")


def test_a_broken_model_is_rolled_back_and_no_request_fails(site):
    before, pids = site.versions(), site.pids()
    with Load(site):
        replicas, error = site.ask(driver.promote, target(BAD, "66"))
    assert replicas == [] and "cannot serve clip/66: RegistryError: this model is broken" in error
    assert "rolled back: clip/8 is served, as before" in error
    assert site.versions() == before and site.pids() == pids


def test_a_model_that_never_loads_is_rolled_back_in_time(site):
    before = site.versions()
    replicas, error = site.ask(driver.promote, target(SLOW, "67"), 1.5)
    assert replicas == [] and "not every replica serves clip/67 after 1.5 s" in error
    assert site.versions() == before


def test_the_job_promotes_and_the_alias_follows(site):
    """And what owns the config is kept true: applying it again reverts nothing."""
    # The fake's target lies in no store.
    store = str(home(str(site.storage)) / "models")
    text = site.promote("--version", "2", "--model_store", store)
    assert "every replica (2) serves clip/2" in text and "embedding space has changed" in text
    assert site.versions() == {"2"}
    assert aliased("clip", tracking_uri=site.uri) == ("2", site.digests["2"])
    tags = mlflow_client(site.uri).get_model_version("clip", "2").tags
    assert (tags["promoted.from"], tags["promoted.to"]) == ("1", "2")
    assert tags["promoted.by"] and tags["promoted.at"] and tags["promoted.replicas"] == "2"
    state = home(str(site.storage)) / "state"
    line = json.loads((state / "promotions.jsonl").read_text().splitlines()[-1])
    assert line["outcome"] == "promoted" and len(line["replicas"]) == 2

    pids = site.pids()
    owner = yaml.safe_load((state / "serve.yaml").read_text())
    apps = {app["name"]: app for app in owner["applications"]}
    assert apps.keys() == {"clip", "other"}
    served = apps["clip"]["deployments"][0]["user_config"]
    assert (served["version"], served["digest"]) == ("2", site.digests["2"])
    site.ask(driver.apply, state / "serve.yaml")
    time.sleep(1)
    assert site.versions() == {"2"} and site.pids() == pids
    assert site.get("/other") == (200, "other")


def test_deploying_again_keeps_the_promoted_model(site):
    pids = site.pids()
    with ThreadPoolExecutor(1) as pool:  # the two take as long as one
        checked = pool.submit(site.promote, "--check")
        text = site.run(*site.deploy("--serve.port", str(site.port)))
    said = checked.result()
    assert "alias champion     clip/2" in said and "the running Serve  clip/2" in said
    assert said.count("ready") == 2 and "all the same" in said
    assert "updating it" in text and "keeping clip/2, which is served" in text
    assert site.versions() == {"2"} and site.pids() == pids


def test_two_promotions_at_once(site):
    """The second is refused and told whose the first is; a killed one does not block the next."""
    script = "from pathlib import Path; from tests.runtime import serving_driver as d; "
    script += f"d.hold_lock(Path({str(home(str(site.storage)))!r}))"
    holder = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        text = site.ask(driver.take_lock)
        assert "is being changed already: promotion of clip/77, by " in text
        assert f"process {holder.pid}" in text
    finally:
        holder.kill()
        holder.wait()
    # Ray has to notice the death first.
    wait_for(lambda: site.ask(driver.take_lock) is None, 15, "the killed promotion's lock")


def test_a_new_replica_serves_the_promoted_model(site):
    before = site.ask(driver.served)
    victim = next(iter(before.values()))["pid"]
    os.kill(victim, signal.SIGKILL)
    wait_for(lambda: len(site.pids() - {victim}) == 2, 30, "a replica in the place of the killed")
    assert site.versions() == {"2"}


def test_down_answers_what_has_begun_and_leaves_no_listener(site):
    running = read_running(home(str(site.storage)))
    assert running is not None and running.alive()
    site.driver.shutdown()
    with ThreadPoolExecutor(1) as pool:
        begun = pool.submit(site.get, "/wait?seconds=2")
        time.sleep(0.3)
        # Nothing is installed, and the environment is this one.
        make = ("make", "-o", "install", f"BIN={Path(sys.executable).parent}")
        down = (*make, "serve-down", f"STORAGE={site.storage}")
        assert "nothing of it listens any more" in site.run(*down)
        assert begun.result(10)[0] == 200
    assert site.foreground.wait(10) == 128 + signal.SIGTERM
    assert not processes.listens("127.0.0.1", site.port)
    assert read_running(home(str(site.storage))) is None
    assert not [p for p, since in running.children.items() if processes.started(p) == since]
