"""A stand-in for serve.app: the shapes of its reconfigure and status, and no model.

What a target does is in its digest: bad... cannot be loaded, 510... (slow) never ends loading.
"""

from __future__ import annotations

import asyncio
import functools
import os
import runpy
import sys
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from ray import serve

from clip_ray.config.serving import AppSettings
from clip_ray.registry import Target

LOAD_S = 0.2
BAD, SLOW = "bad", "510"

api = FastAPI()


@serve.deployment
@serve.ingress(api)
class Fake:
    def __init__(self, settings: AppSettings) -> None:
        self.settings = settings
        self.current: Target | None = None
        self.previous: dict[str, Any] | None = None
        self.wanted, self.error = "", None
        self.task: asyncio.Task[None] | None = None

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        target = Target.model_validate(user_config)
        self.wanted, self.error = target.digest, None
        if self.task is not None:
            self.task.cancel()
        if self.current is None:
            await self._load(target)
            if self.error:
                raise RuntimeError(self.error)
        else:
            self.task = asyncio.create_task(self._load(target))

    async def _load(self, target: Target) -> None:
        if self.current is None or self.current.digest != target.digest:
            await asyncio.sleep(3600 if target.digest.startswith(SLOW) else LOAD_S)
        if target.digest.startswith(BAD):
            self.error = "RegistryError: this model is broken"
            return
        self.current = target
        self.previous = target.previous and target.previous.model_dump()
        self.task = None

    def status(self) -> dict[str, Any]:
        model = self.current and self.current.model_dump(exclude={"format", "previous"})
        loading = self.task is not None and self.error is None
        return {
            "replica": serve.get_replica_context().replica_tag,
            "pid": os.getpid(),
            "model": model,
            "previous": self.previous,
            "target_digest": self.wanted,
            "state": "failed" if self.error else "loading" if loading or not model else "ready",
            "error": self.error,
        }

    @api.get("/ready")
    async def ready(self) -> dict[str, Any]:
        return self.status()

    @api.get("/wait")
    async def wait(self, seconds: float) -> dict[str, Any]:
        await asyncio.sleep(seconds)
        return self.status()


def build(args: dict[str, Any]) -> serve.Application:
    settings = AppSettings.model_validate(args)
    return Fake.options(name=settings.name).bind(settings)


@serve.deployment
class Other:
    def __call__(self, request: Any) -> str:
        return "other"


def build_other(args: dict[str, str]) -> serve.Application:
    return Other.bind()


def main() -> int:
    """Run jobs/deploy.py with this application in the place of the real one."""
    from clip_ray.runtime import deployment

    deploy = functools.partial(deployment.deploy, import_path="tests.runtime.fake_serving:build")
    deployment.deploy = deploy  # type: ignore[assignment]
    sys.argv[0] = str(Path(__file__).parents[2] / "jobs/deploy.py")
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as ended:
        return int(ended.code or 0)
    raise AssertionError("a job ends with its status")


if __name__ == "__main__":
    raise SystemExit(main())
