"""Which model is deployed, and what a running Serve is told; no Ray is started."""

from __future__ import annotations

import contextlib
import copy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from clip_ray.config.serving import ServeConfig
from clip_ray.errors import ConfigError, RegistryError
from clip_ray.model import build
from clip_ray.registry import ServedModel, Target, write_export
from clip_ray.runtime import deployment
from clip_ray.runtime.deployment import (
    OWNER,
    Commands,
    announcement,
    deploy,
    home,
    only_champion,
)
from clip_ray.runtime.serve_config import ROOT, declaration, located
from clip_ray.runtime.serving import find_application, places, with_application
from clip_ray.storage import LocalStore
from tests.registry.test_served import TINY, TOKENIZER


def model(version: str) -> ServedModel:
    digest = version * 64
    return ServedModel(name="clip", version=version, uri=f"/m/{digest}", digest=digest)


def target(version: str, previous: str | None = None) -> Target:
    return Target(**model(version).model_dump(), previous=previous and model(previous))


@pytest.mark.parametrize(
    ("models", "answer"),
    [
        ({"a": ["champion"], "draft": [], "old": ["previous"]}, "models:/a@champion"),
        ({"a": ["champion"], "b": ["champion"]}, "several .*: models:/a@champion, models:/b@champ"),
        ({"a": ["previous"]}, "no model with the alias champion; promote one"),
    ],
)
def test_the_only_champion_is_served_unless_told(models, answer, monkeypatch, tmp_path):
    (tmp_path / "mlflow.db").touch()
    listed = [SimpleNamespace(name=n, aliases=dict.fromkeys(a, "1")) for n, a in models.items()]
    client = SimpleNamespace(search_registered_models=lambda max_results: listed)
    monkeypatch.setattr(deployment, "mlflow_client", lambda where: client)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    if answer.startswith("models:"):
        assert only_champion(uri) == answer
    else:
        with pytest.raises(RegistryError, match=answer):
            only_champion(uri)


def test_without_a_registry_nothing_is_made(tmp_path):
    with pytest.raises(RegistryError, match="mlflow.db does not exist"):
        only_champion(f"sqlite:///{tmp_path}/mlflow.db")
    assert list(tmp_path.iterdir()) == []


def test_where_this_machine_keeps_what_it_knows(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert home("runs") == tmp_path / "runs/serving" == home("s3://b/runs")
    assert home("/data") == Path("/data/serving")


@pytest.fixture
def config(tmp_path) -> ServeConfig:
    return located(ServeConfig(state_uri=str(tmp_path / "state")))


@pytest.mark.parametrize(
    ("last", "keep", "expected"),
    [
        (None, True, target("2")),
        (target("2", "1"), True, target("2", "1")),
        (target("1"), True, target("2", "1")),
        (target("2", "1"), False, target("2")),
        (b"applications: [", True, target("2")),
        (b"\xff\xfe\x00", True, target("2")),
        (b"applications: [1]", True, target("2")),
        (b"applications: [{name: clip, deployments: [{user_config: 7}]}]", True, target("2")),
        (b"when: 2026-13-45", True, target("2")),
    ],
)
def test_the_model_before_outlives_a_restart(config, last, keep, expected):
    state = Path(config.state_uri)
    state.mkdir()
    if isinstance(last, Target):
        (state / OWNER).write_text(yaml.safe_dump(declaration(config, last)))
    elif last:
        (state / OWNER).write_bytes(last)
    config = config.model_copy(update={"keep_previous": keep})
    assert deployment._remembered(config, model("2")) == expected


def test_what_is_said(config):
    runs = Commands()
    text = announcement(config, target("2"), "http://127.0.0.1:8000", runs, None)
    for words in ("clip/2", "2" * 64, "http://127.0.0.1:8000/docs", "promote.py --model clip"):
        assert words in text
    assert "Authorization" not in text
    keys = config.model_copy(update={"auth": "keys"})
    assert "-H 'Authorization: Bearer KEY'" in announcement(keys, target("2"), "u", runs, None)
    unregistered = target("2").model_copy(update={"version": "abc"})
    assert "promote.py" not in announcement(config, unregistered, "u", runs, None)


def test_its_commands_work_as_they_are(config, monkeypatch):
    """In a shell in the repository, whether or not the environment is active there."""
    running = SimpleNamespace(token="/t", dashboard="http://127.0.0.1:1")

    def lines(commands: Commands, running: Any = running) -> dict[str, str]:
        text = announcement(config, target("2"), "u", commands, running)
        return {line[2:11].strip(): line[13:] for line in text.splitlines() if line[:2] == "  "}

    monkeypatch.setattr(sys, "prefix", str(ROOT / ".venv"))
    said = lines(Commands())
    assert said["new model"] == ".venv/bin/python jobs/promote.py --model clip"
    assert " .venv/bin/serve status -a http://127.0.0.1:1" in said["status"]
    assert said["stop"].endswith(": make serve-down")
    said = lines(Commands("/my runs", "http://mlflow:5000"))
    own = " --storage '/my runs' --tracking_uri http://mlflow:5000"
    assert said["new model"] == f".venv/bin/python jobs/promote.py --model clip{own}"
    assert said["stop"].endswith(": make serve-down STORAGE='/my runs'")
    monkeypatch.setattr(sys, "prefix", "/usr")
    assert lines(Commands())["new model"] == "python jobs/promote.py --model clip"
    config = config.model_copy(update={"address": "head:6379"})
    assert lines(Commands(), None)["new model"].endswith("--model clip --address head:6379")


def test_printing_writes_nothing(config, monkeypatch, tmp_path):
    export = LocalStore(tmp_path / "run" / "export")
    digest = write_export(export, build(TINY, seed=0), TOKENIZER, {})
    store = tmp_path / "store"
    given = {"model": str(tmp_path / "run"), "model_store": str(store)}
    said: list[str] = []
    assert deploy(config.model_copy(update=given), str(tmp_path), said.append, show=True) == 0
    declared = yaml.safe_load(said[0])
    assert places(declared)[0].target.uri == f"{store}/{digest}"
    assert "Printing stored nothing" in said[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


@pytest.mark.parametrize("on", ["1", "0", None])
def test_a_node_without_haproxy_is_told(config, monkeypatch, on):
    """The profile is made for it, and Serve falls back to its Python proxy without a word."""
    if on is None:
        monkeypatch.delenv("RAY_SERVE_ENABLE_HA_PROXY", raising=False)
    else:
        monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", on)
    probed: list[str] = []
    monkeypatch.setattr(deployment, "probe", lambda url, timeout_s: probed.append(url))

    def remote(**options: Any) -> Any:
        def task(function: Any) -> Any:
            return SimpleNamespace(options=lambda **more: SimpleNamespace(remote=function))

        return task

    monkeypatch.setattr(deployment.ray, "remote", remote)
    monkeypatch.setattr(deployment.ray, "get", lambda answer, timeout: answer)
    proxy = {"status": "HEALTHY", "node_ip": "10.0.0.1", "node_id": "a" * 56}
    live = SimpleNamespace(address=lambda: ("0.0.0.0", 80), details=lambda: {"proxies": {1: proxy}})
    said: list[str] = []
    assert deployment._probe_nodes(live, config, said.append) == ["http://10.0.0.1:80"]
    assert probed == ["http://127.0.0.1:80"]
    assert [line[:27] for line in said] == (
        [] if on == "1" else ["! HAProxy is off on 10.0.0.1"[:27]]
    )


class Live:
    """A Serve that runs already, with somebody else's application."""

    def __init__(self, served: Target | None, config: ServeConfig) -> None:
        self.listens = (config.host, config.port)
        other = {"name": "other", "import_path": "a:b", "route_prefix": "/other"}
        ours = declaration(config, served)["applications"] if served else []
        self.config: dict[str, Any] = {"applications": [other, *ours], "target_capacity": 50.0}

    def address(self) -> tuple[str, int]:
        return self.listens

    def read(self) -> dict[str, Any]:
        return copy.deepcopy(self.config)


@pytest.fixture
def apply(monkeypatch):
    def roll_out(live, wanted, place, timeout_s, settled):
        assert settled and place.target == places(wanted)[0].target
        ours = find_application(wanted, place.app)
        live.config = with_application(live.config, place.app, ours)

    monkeypatch.setattr(deployment, "exclusive", lambda doing: contextlib.nullcontext())
    monkeypatch.setattr(deployment, "roll_out", roll_out)

    def run(live: Live, config: ServeConfig) -> Target:
        choose = lambda: model("3")  # noqa: E731
        return deployment._apply(live, config, choose, "serve.app:build", lambda line: None)

    return run


def test_a_promoted_model_is_kept(apply, config):
    live = Live(target("2", "1"), config)
    before = live.read()
    more = config.model_copy(update={"text_cache": 5})
    assert apply(live, more) == target("2", "1")
    assert live.config["applications"][0] == before["applications"][0]  # the other one
    assert live.config["target_capacity"] == 50.0
    assert live.config["applications"][1]["args"]["text_cache"] == 5
    saved = yaml.safe_load((Path(config.state_uri) / OWNER).read_text())
    assert [app["name"] for app in saved["applications"]] == ["other", "clip"]
    assert saved["http_options"]["port"] == config.port


def test_another_model_is_deployed_when_asked_for(apply, config):
    live = Live(target("2", "1"), config)
    assert apply(live, config.model_copy(update={"model": "/x"})) == target("3", "2")


def test_a_new_application_gets_the_champion(apply, config):
    live = Live(None, config)
    assert apply(live, config) == target("3")
    assert [app["name"] for app in live.config["applications"]] == ["other", "clip"]


def test_what_cannot_change_while_it_runs_is_told(apply, config):
    live = Live(target("2"), config)
    with pytest.raises(ConfigError, match="listens on 127.0.0.1:8000, and cannot change that"):
        apply(live, config.model_copy(update={"port": 8001}))


def test_auth_off_is_refused_by_the_live_host(apply, config):
    open_to_all = config.model_copy(update={"host": "0.0.0.0"})
    live = Live(target("2"), open_to_all)
    with pytest.raises(ConfigError, match="auth off while Serve listens on 0.0.0.0"):
        apply(live, open_to_all)
    assert apply(live, open_to_all.model_copy(update={"auth_off_on_network": True}))
