"""The Ray Serve application: one deployment, whose replicas answer HTTP and encode.

One tier on purpose: an ingress deployment before an encoder deployment costs 5 ms of CPU a
request. Builder arguments hold settings only; the model comes in `user_config`, so a promotion
is a call of `reconfigure` and not a new process.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import ray
from pydantic import ValidationError
from ray import serve

from clip_ray.config.serving import AppSettings, check_auth
from clip_ray.errors import ConfigError
from clip_ray.storage import open_store


@serve.ingress()
class _ClipReplica:
    """A replica: one engine behind the HTTP routes.

    Args:
        settings: as the builder was given them.
    """

    def __init__(self, settings: AppSettings) -> None:
        # Here, because Serve imports this module in a process that only builds the application:
        # torch would cost it seconds of each deployment.
        from serve.classifiers import ClassifierStore
        from serve.engine import Engine
        from serve.metrics import RayMetrics

        _set_up_logs()
        context = serve.get_replica_context()
        _refuse_open_door(settings)
        resources = ray.get_runtime_context().get_assigned_resources()
        cpus = max(1, math.floor(resources.get("CPU", 1)))
        cache = Path(tempfile.gettempdir()) / f"clip-ray-{os.getuid()}" / "served"
        self._metrics = RayMetrics()
        self._settings = settings
        self._engine = Engine(settings, cpus, self._metrics, cache)
        self._engine.replica = context.replica_tag
        store = open_store(settings.state_uri, settings.s3)
        self._classifiers = ClassifierStore(store, self._engine.build, settings.limits)
        self._engine.prepare = self._classifiers.prepare
        self._started = False

    def __serve_build_asgi_app__(self) -> Any:
        """Return the ASGI app; Serve calls this once the constructor is through."""
        from clip_ray.keys import KeyRing
        from serve.fetch import Fetcher
        from serve.routes import create_app

        settings = self._settings
        keys = KeyRing(settings.keys_file) if settings.keys_file else None
        fetcher = Fetcher(settings.image_urls, int(settings.limits.image_mb * 1e6))
        return create_app(
            *(self._engine, settings, self._classifiers, keys, fetcher, self._metrics),
            echo_id=False,
        )

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Take a target: the first load blocks, so a new replica is ready when it can answer."""
        if self._started:
            self._engine.retarget(user_config)
            return
        await self._engine.start(user_config)
        self._started = True

    def status(self) -> dict[str, Any]:
        """Return what this replica serves (broadcast by promotions)."""
        return self._engine.status()

    async def check_health(self) -> None:
        """Fail where the model cannot answer any more; a target that cannot load is no reason."""
        if self._started:
            await asyncio.wait_for(self._engine.probe(), 20)


def build(args: dict[str, Any]) -> serve.Application:
    """Return the application of a declarative config's `args`, the fields of `AppSettings`.

    The model is not among them: it is the deployment's `user_config`.

    Raises:
        ConfigError: an argument that is not known, or a value that cannot be used.
    """
    try:
        settings = AppSettings.model_validate(args)
    except ValidationError as error:
        raise ConfigError(
            f"args of import_path serve.app:build: {error}; they hold settings only, the model is "
            "user_config and is written by jobs/deploy.py and jobs/promote.py"
        ) from error
    return serve.deployment(name=settings.name)(_ClipReplica).bind(settings)


def _set_up_logs() -> None:
    """Send the access log to the worker's stdout, a JSON object a line, and the rest to stderr.

    Ray keeps both in files of its session's log directory, and shows them in its dashboard.
    """
    for name, stream, form in (
        ("clip_ray.access", sys.stdout, "%(message)s"),
        ("clip_ray.serve", sys.stderr, "%(asctime)s %(levelname)s %(message)s"),
    ):
        logger = logging.getLogger(name)
        handler = logging.StreamHandler(stream)
        handler.setFormatter(logging.Formatter(form))
        logger.handlers = [handler]
        logger.setLevel(logging.INFO)
        logger.propagate = False


def _refuse_open_door(settings: AppSettings) -> None:
    """Refuse to serve without keys on an address that other machines reach.

    Here too, and not in jobs/deploy.py alone: `serve deploy` applies any file.
    """
    controller = serve.context._get_global_client()
    assert controller is not None
    problem = check_auth(settings, controller.http_config.host or "0.0.0.0")
    if problem:
        raise ConfigError(problem)
