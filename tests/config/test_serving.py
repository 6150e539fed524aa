"""Settings of serving: from profile and flags to one tree, by the same way as training's."""

from __future__ import annotations

from pathlib import Path

import pytest

from clip_ray.config.load import dump_config, field_paths, load_config
from clip_ray.config.serving import (
    AppSettings,
    ServeConfig,
    ServeRecipe,
    check_auth,
    is_loopback,
    stored_in,
)
from clip_ray.errors import ConfigError

PROFILES = Path(__file__).parents[2] / "serve/profiles"


def load(*argv: str, recipe: Path | None = None, **more) -> ServeConfig:
    return load_config(
        list(argv), default_recipe=recipe, program="test", schema=ServeRecipe, **more
    ).serve


def test_flags_are_typed_and_win() -> None:
    config = load(
        *("--serve.port", "8123", "--serve.limits.items=3", "--serve.image_urls.hosts", "[a.org]"),
        recipe=PROFILES / "local.yaml",
    )
    assert (config.port, config.limits.items, config.image_urls.hosts) == (8123, 3, ("a.org",))
    assert config.host == "127.0.0.1"


@pytest.mark.parametrize("word", ["off", "'off'", "false"])
def test_auth_off_is_a_word_in_yaml_too(tmp_path: Path, word: str) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"serve: {{auth: {word}}}")
    assert load(recipe=recipe).auth == "off" == load("--serve.auth", "off").auth


def test_where_runs_are_stored_is_below_the_recipe(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("serve: {state_uri: s3://b/state}")
    config = load(recipe=recipe, defaults=stored_in("/data/"))
    assert (config.state_uri, config.model_store) == ("s3://b/state", "/data/serving/models")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--serve.prot 1", "serve.prot: no such setting; did you mean serve.port"),
        ("--train.steps 1", "train.steps: no such setting"),
        ("--serve.port 99999", "serve.port: 99999: .*less than or equal to 65535"),
        ("--serve.auth keys", "auth keys needs keys_file"),
        ("--serve.min_replicas 2", "min_replicas 2 is above max_replicas 1"),
        ("--serve.limits.body_mb 200", "body_mb 200 is above a quarter of limits.memory_mb 512"),
        ("--config /nowhere.yaml", "recipes lie in serve/profiles/"),
        ("--serve.model_store s3://me:secret@b/x", "holds credentials"),
    ],
)
def test_what_cannot_be_used_is_explained(flags: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(*flags.split(), recipe=PROFILES / "local.yaml")


def test_help_lists_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load("--help")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert [path for path in field_paths(ServeRecipe) if f"--{path}" not in text] == []


@pytest.mark.parametrize("name", ["local", "gpu", "cluster"])
def test_the_profiles_load_and_read_back(name: str, tmp_path: Path) -> None:
    config = load(recipe=PROFILES / f"{name}.yaml")
    assert config.profile == name
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump_config(ServeRecipe(serve=config)))
    assert load(recipe=copy) == config


@pytest.mark.parametrize(
    ("host", "answer"),
    [
        *[(host, True) for host in ("127.0.0.1", "127.9.9.9", "::1", "localhost")],
        *[(host, False) for host in ("0.0.0.0", "::", "192.168.0.3", "example.org", "")],
    ],
)
def test_who_reaches_a_listener(host: str, answer: bool) -> None:
    assert is_loopback(host) is answer
    assert (check_auth(AppSettings(), host) is None) is answer
    assert check_auth(AppSettings(auth_off_on_network=True), host) is None
    assert check_auth(AppSettings(auth="keys", keys_file="k"), host) is None


def test_the_profiles_that_listen_to_others_need_keys() -> None:
    for path in PROFILES.glob("*.yaml"):
        config = load(recipe=path)
        assert check_auth(config, config.host) is None, path
        assert config.auth == "keys" or config.host == "127.0.0.1"
