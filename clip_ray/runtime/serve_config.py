"""From settings to the declarative config that Serve is given (`ServeDeploySchema`), as plain data.

One document says everything, and only the declarative way changes a deployment's `user_config` in
place: an application started by `serve run` is built anew and restarted by any later change.
"""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import yaml

from clip_ray.config.serving import AppSettings, ServeConfig
from clip_ray.errors import ConfigError
from clip_ray.registry import Target
from clip_ray.runtime.cluster import absolute

IMPORT_PATH = "serve.app:build"
ROOT = Path(__file__).resolve().parents[2]
# Beyond our own deadline, at which the app answers 408 as JSON; Serve's is its net.
SPARE_S = 10
PLACEHOLDER = "0" * 64
# Serve's own exporter of spans, which writes files: in the environment it has to be named.
FILES = "ray.serve._private.tracing_utils:default_tracing_exporter"


def located(config: ServeConfig) -> ServeConfig:
    """Return the config with paths that mean the same in every process."""
    places: dict[str, str | None] = {
        "state_uri": absolute(config.state_uri),
        "model_store": absolute(config.model_store),
        "keys_file": absolute(config.keys_file) if config.keys_file else None,
    }
    return config.model_copy(update=places)


def declaration(
    config: ServeConfig, target: Target, import_path: str = IMPORT_PATH
) -> dict[str, Any]:
    """Return the declarative config of a deployment that serves `target`.

    Args:
        config: the deployment, `located`.
        target: the model; it is nowhere but in `user_config`.
        import_path: the application's builder.
    """
    options: dict[str, Any] = {"host": config.host, "port": config.port}
    traced = {"tracing_config": tracing_config(config)} if config.tracing.enabled else {}
    return {
        # On one machine there is one proxy; in a cluster a load balancer is before them all.
        "proxy_location": "EveryNode" if config.profile == "cluster" else "HeadOnly",
        "http_options": options | {"request_timeout_s": config.limits.request_s + SPARE_S},
        **traced,
        "applications": [application(config, target, import_path)],
    }


def tracing_config(config: ServeConfig) -> dict[str, Any]:
    """Return what Serve is told of tracing."""
    tracing = config.tracing
    return {
        "enabled": tracing.enabled,
        "exporter_import_path": tracing.exporter,
        "sampling_ratio": tracing.sampling_ratio,
    }


def application(config: ServeConfig, target: Target, import_path: str) -> dict[str, Any]:
    """Return the application's part of the declarative config."""
    runtime_env: dict[str, Any] = {}
    if config.profile != "cluster":
        runtime_env["env_vars"] = {"PYTHONPATH": str(ROOT)}
    elif config.working_dir is not None:
        runtime_env["working_dir"] = config.working_dir
    return {
        "name": config.name,
        "route_prefix": "/",
        "import_path": import_path,
        "runtime_env": runtime_env,
        "args": _arguments(config),
        # The app logs each request itself, with what Serve does not know.
        "logging_config": {"enable_access_log": False},
        "deployments": [_deployment(config, target)],
    }


def _arguments(config: ServeConfig) -> dict[str, Any]:
    """Return the builder's arguments: what differs from the defaults, and what must be seen.

    Not all of them: code of an earlier version would refuse a setting that it does not know.
    """
    settings = config.app_settings()
    always = {"name", "state_uri", "auth"}
    return settings.model_dump(mode="json", include=always) | settings.model_dump(
        mode="json", exclude_defaults=True
    )


def _deployment(config: ServeConfig, target: Target) -> dict[str, Any]:
    limits = config.limits
    return {
        "name": config.name,
        **_replicas(config),
        # More than the app takes (ongoing + queued): its own limiter must see a request to refuse
        # it as JSON; what Serve refuses beyond that is plain text.
        "max_ongoing_requests": limits.ongoing + 2 * limits.queued,
        "max_queued_requests": limits.queued,
        "backpressure_config": {"status_code": 429, "retry_after_s": 1},
        "ray_actor_options": {"num_cpus": config.cpus, "num_gpus": config.gpus},
        "health_check_period_s": 5,
        "health_check_timeout_s": 30,
        # A replica that goes away answers what it has begun.
        "graceful_shutdown_wait_loop_s": 1,
        "graceful_shutdown_timeout_s": math.ceil(limits.request_s) + SPARE_S,
        # New settings start beside the old replica; a GPU cannot be counted on to be free twice.
        "max_surge_percent": 0 if config.gpus else 100,
        "user_config": target.model_dump(mode="json"),
    }


def _replicas(config: ServeConfig) -> dict[str, Any]:
    if config.min_replicas == config.max_replicas:
        return {"num_replicas": config.min_replicas}
    return {
        "autoscaling_config": {
            "min_replicas": config.min_replicas,
            "max_replicas": config.max_replicas,
            "target_ongoing_requests": config.target_ongoing,
            "upscale_delay_s": config.upscale_delay_s,
            "downscale_delay_s": config.downscale_delay_s,
            # A mean over longer than the delay would be the delay; replicas report every 10 s.
            "look_back_period_s": max(11.0, config.upscale_delay_s),
        }
    }


def haproxy_environment(settings: AppSettings) -> dict[str, str]:
    """Return what every node's environment must hold before Ray starts there, for HAProxy."""
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        # A client that stops in the middle of its body or of reading the answer is let go.
        "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": str(math.ceil(settings.limits.request_s) + SPARE_S),
    }


def node_environment(config: ServeConfig) -> dict[str, str]:
    """Return what every node's environment must hold before Ray starts there."""
    environment = {} if config.profile == "local" else haproxy_environment(config)
    if config.tracing.enabled:
        # Serve 2.60 hands `tracing_config` to replicas alone; its Python proxies look here.
        environment |= {
            "RAY_SERVE_TRACING_EXPORTER_IMPORT_PATH": config.tracing.exporter or FILES,
            "RAY_SERVE_TRACING_SAMPLING_RATIO": str(config.tracing.sampling_ratio),
        }
    return environment


def placeholder(config: ServeConfig, name: str) -> Target:
    """Return a target that names no model yet, for a declarative config without one."""
    uri = f"{config.model_store}/{PLACEHOLDER}"
    return Target(name=name, version="0", uri=uri, digest=PLACEHOLDER)


def as_yaml(declared: dict[str, Any], config: ServeConfig, flag: str = "") -> str:
    """Return the declarative config as a file for `serve deploy`, with what it needs said first."""
    lines = [
        f"# Made by: python jobs/deploy.py --profile {config.profile}{flag}",
        "# Deploy with jobs/deploy.py, or `serve deploy` this file: the model is in user_config,",
        "# which jobs/promote.py --target file --file FILE rewrites, here and in a running Serve.",
        "# Applying it makes the Serve what it says: an application that it lacks is deleted.",
    ]
    text = dump(declared)
    if PLACEHOLDER in text:
        lines.append("# It names no model yet: promote one into it, or give --model.")
    elif flag:
        lines += [
            "# Printing stored nothing: jobs/deploy.py or jobs/promote.py puts the model into the",
            "# model store, from which replicas load it.",
        ]
    if env := node_environment(config):
        lines.append("# Every node's environment, before Ray starts there:")
        lines += [f"#   {name}={value}" for name, value in env.items()]
    if config.profile != "local":
        lines += [
            "# Beside the port below, on all interfaces: HAProxy's statistics (8404) and metrics",
            "# (9101), without authentication; the fallback proxy (8500) and each replica (30000",
            "# to 31000), with our keys. Only behind a firewall or a network policy.",
        ]
    return "\n".join(lines) + "\n" + text


def with_head(old: str, declared: dict[str, Any]) -> str:
    """Return a declarative config as YAML, under the comments at the head of an earlier text."""
    lines = old.splitlines(keepends=True)
    return "".join(itertools.takewhile(lambda line: line.startswith("#"), lines)) + dump(declared)


def dump(declared: dict[str, Any]) -> str:
    """Return a declarative config as YAML."""
    return yaml.safe_dump(declared, sort_keys=False, allow_unicode=True)


def check_declaration(declared: dict[str, Any]) -> None:
    """Refuse what Serve's own schema refuses.

    Raises:
        ConfigError: with the schema's words.
    """
    from pydantic import ValidationError
    from ray.serve.schema import ServeDeploySchema

    try:
        ServeDeploySchema.model_validate(declared)
    except ValidationError as error:
        raise ConfigError(f"the declarative config is not one that Serve takes: {error}") from error
