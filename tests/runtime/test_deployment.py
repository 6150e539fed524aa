"""Which model is deployed, and what a running Serve is told; no Ray is started."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from clip_ray.config.serving import ServeConfig
from clip_ray.errors import ConfigError, RegistryError
from clip_ray.registry import ServedModel, Target
from clip_ray.runtime import deployment
from clip_ray.runtime.deployment import OWNER, announcement, home, only_champion
from clip_ray.runtime.serve_config import declaration, located
from clip_ray.runtime.serving import places


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
        ("damaged", True, target("2")),
    ],
)
def test_the_model_before_outlives_a_restart(config, last, keep, expected):
    state = Path(config.state_uri)
    state.mkdir()
    if isinstance(last, Target):
        (state / OWNER).write_text(yaml.safe_dump(declaration(config, last)))
    elif last:
        (state / OWNER).write_text("applications: [")
    config = config.model_copy(update={"keep_previous": keep})
    assert deployment._remembered(config, model("2")) == expected


def test_what_is_said(config):
    text = announcement(config, target("2"), "http://127.0.0.1:8000", None)
    for words in ("clip/2", "2" * 64, "http://127.0.0.1:8000/docs", "--model clip --version N"):
        assert words in text
    assert "Authorization" not in text
    keys = config.model_copy(update={"auth": "keys"})
    assert "-H 'Authorization: Bearer KEY'" in announcement(keys, target("2"), "u", None)
    unregistered = target("2").model_copy(update={"version": "abc"})
    assert "promote.py" not in announcement(config, unregistered, "u", None)


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
        live.config = wanted

    monkeypatch.setattr(deployment, "exclusive", lambda app, doing: contextlib.nullcontext())
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
