"""What a declarative config may not ask of the application; no Ray is started."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from ray import serve

from clip_ray.config.serving import AppSettings
from clip_ray.errors import ConfigError
from serve import app


@pytest.mark.parametrize(
    "args",
    [
        {"model": "models:/clip@champion"},
        {"uri": "/models/x"},
        {"alias": "champion"},
        {"text_cash": 5},
        {"limits": {"request": 3}},
        {"auth": "keys"},
    ],
)
def test_args_are_settings_and_the_model_is_none(args):
    assert app.build({"name": "clip"})
    with pytest.raises(ConfigError, match="args of import_path serve.app:build") as caught:
        app.build(args)
    assert next(iter(args)) in str(caught.value)


@pytest.mark.parametrize(
    ("host", "settings", "refused"),
    [
        ("0.0.0.0", {}, True),
        (None, {}, True),  # Serve's word for all interfaces
        ("192.0.2.7", {}, True),
        ("127.0.0.1", {}, False),
        ("::1", {}, False),
        ("0.0.0.0", {"auth": "keys", "keys_file": "/k"}, False),
        ("0.0.0.0", {"auth_off_on_network": True}, False),
    ],
)
def test_a_replica_does_not_serve_the_network_without_keys(host, settings, refused, monkeypatch):
    """Whatever applied the config: jobs/deploy.py is not asked here."""
    client = SimpleNamespace(http_config=SimpleNamespace(host=host))
    monkeypatch.setattr(serve.context, "_get_global_client", lambda: client)
    if not refused:
        app._refuse_open_door(AppSettings(**settings))
        return
    with pytest.raises(ConfigError, match="auth off while Serve listens on"):
        app._refuse_open_door(AppSettings(**settings))
