"""The deploy job: from settings to replicas that answer, on this machine or in a cluster.

An alias is resolved here, once. A Serve that runs already is updated in place, and keeps the model
that was promoted into it unless another is asked for.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from clip_ray.config.serving import ServeConfig, check_auth
from clip_ray.errors import ClusterError, ConfigError, RegistryError
from clip_ray.registry import ALIAS, ServedModel, Target, store_model
from clip_ray.runtime.cluster import absolute, check_storage
from clip_ray.runtime.owner import read_config
from clip_ray.runtime.rollout import exclusive, roll_out
from clip_ray.runtime.serve_config import (
    IMPORT_PATH,
    ROOT,
    as_yaml,
    check_declaration,
    declaration,
    located,
    placeholder,
)
from clip_ray.runtime.serve_local import PROBE_S, down, probe, serve_in_foreground, start_serve
from clip_ray.runtime.serve_state import OWNER, Running, attached, read_running, url_of
from clip_ray.runtime.serving import (
    Live,
    address_of_environment,
    connected,
    find_place,
    places,
    plain_config,
    successor,
)
from clip_ray.storage import open_store
from clip_ray.tracking import default_tracking_uri, mask, mlflow_client, require_tracking_uri

Say = Callable[[str], None]
Choose = Callable[[], ServedModel]


def home(storage: str) -> Path:
    """Return the directory of what this machine knows of its own Serve."""
    return Path(absolute("runs" if "://" in storage else storage)) / "serving"


def deploy(
    config: ServeConfig,
    storage: str,
    say: Say,
    tracking_uri: str | None = None,
    show: bool = False,
    import_path: str = IMPORT_PATH,
) -> int:
    """Deploy, or update what is deployed; return the exit status.

    Args:
        config: the deployment.
        storage: run.storage.
        say: prints a line for the user.
        tracking_uri: MLflow's address, for names of models; none = as `default_tracking_uri`.
        show: print the declarative config, and do nothing else.
        import_path: the application's builder.

    Raises:
        ClipRayError: why it is not served; what was served before still is.
    """
    config = located(config)

    def choose() -> ServedModel:
        uri, where = config.model, tracking_uri
        if uri is None or uri.startswith(("models:", "runs:")):
            where = default_tracking_uri(tracking_uri, storage)
            uri = uri or only_champion(where)
        if not show:
            say(f"storing {uri} in {config.model_store}")
        return store_model(uri, config.model_store, config.s3, where, copy=not show)

    if show:
        target = placeholder(config, config.name)
        if config.model is not None:
            target = successor(choose(), None, False)
        declared = declaration(config, target, import_path)
        check_declaration(declared)
        say(as_yaml(declared, config, " --print").rstrip("\n"))
        return 0
    _check_door(config, config.host)
    commands = Commands(storage, tracking_uri)
    if config.profile == "cluster":
        return _deploy_to_cluster(config, choose, import_path, commands, say)
    if config.keys_file is not None and not Path(config.keys_file).is_file():
        raise ConfigError(
            f"serve.keys_file {config.keys_file} is not there; make a key with "
            f"jobs/keys.py create --file {config.keys_file} --name me"
        )
    folder = home(storage)
    running = read_running(folder)
    if running is not None and running.alive():
        return _update(config, running, choose, import_path, commands, say)
    target = _remembered(config, choose())

    def ready(declared: dict[str, Any]) -> None:
        _save(config, declared)
        now = read_running(folder)
        assert now is not None
        say(announcement(config, target, now.url, commands, now))

    return serve_in_foreground(config, target, folder, say, ready, import_path)


def undeploy(storage: str, say: Say) -> int:
    """End what `deploy` started on this machine; return the exit status.

    Raises:
        ClipRayError: something of it still listens.
    """
    down(home(storage), say)
    return 0


def only_champion(tracking_uri: str) -> str:
    """Return the URI of the only registered model that has a champion.

    Raises:
        RegistryError: there is none, or more than one; the message lists them.
    """
    from mlflow.exceptions import MlflowException

    where = require_tracking_uri(tracking_uri)
    try:
        models = mlflow_client(where).search_registered_models(max_results=1000)
    except (MlflowException, OSError) as error:
        raise RegistryError(mask(f"MLflow at {where}: {error}")) from error
    names = sorted(model.name for model in models if ALIAS in model.aliases)
    if len(names) == 1:
        return f"models:/{names[0]}@{ALIAS}"
    if names:
        listed = ", ".join(f"models:/{name}@{ALIAS}" for name in names)
        raise RegistryError(f"several models have a champion; give one with --model: {listed}")
    raise RegistryError(
        f"MLflow at {where} has no model with the alias {ALIAS}; promote one (jobs/promote.py "
        "--model NAME), or give --model a directory"
    )


@dataclass(frozen=True)
class Commands:
    """What the commands that a user is told need to say again.

    Attributes:
        storage: as in `deploy`.
        tracking_uri: as in `deploy`.
    """

    storage: str = "runs"
    tracking_uri: str | None = None

    @property
    def bin(self) -> str:
        """Where the environment's programs lie, seen from the repository; "" = on PATH."""
        prefix = Path(sys.prefix)
        return f"{prefix.relative_to(ROOT)}/bin/" if prefix.is_relative_to(ROOT) else ""

    def promote(self, model: str, address: str | None) -> str:
        """Return the command that promotes a model's newest version into this Serve."""
        given = {
            "--storage": None if self.storage == "runs" else self.storage,
            "--tracking_uri": self.tracking_uri and mask(self.tracking_uri),
            "--address": address,
        }
        flags = [f" {flag} {shlex.quote(value)}" for flag, value in given.items() if value]
        name = shlex.quote(model)
        return f"{self.bin}python jobs/promote.py --model {name}{''.join(flags)}"

    @property
    def down(self) -> str:
        """The command that ends a Serve of ours."""
        more = "" if self.storage == "runs" else f" STORAGE={shlex.quote(self.storage)}"
        return f"make serve-down{more}"


def announcement(
    config: ServeConfig, target: Target, url: str, commands: Commands, running: Running | None
) -> str:
    """Return what a user wants to know once it serves."""
    key = " -H 'Authorization: Bearer KEY'" if config.auth == "keys" else ""
    body = f'{{"model": "{target.name}", "input": ["a photo of a cat"]}}'
    lines = [
        "",
        f"serving {target.id}  (digest {target.digest})",
        f"  demo page  {url}/",
        f"  API docs   {url}/docs",
        f"  try        curl {url}/v1/embeddings{key} -H 'Content-Type: application/json' "
        f"-d '{body}'",
    ]
    if target.version.isdigit():  # in the registry
        address = config.address if running is None else None
        lines.append(f"  new model  {commands.promote(target.name, address)}")
    if running is None:
        lines.append(f"  stop       {commands.bin}serve shutdown --address http://HEAD:8265")
    else:
        lines += [
            f"  status     RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH={running.token} "
            f"{commands.bin}serve status -a {running.dashboard}",
            f"  stop       Ctrl-C, or from elsewhere: {commands.down}",
        ]
    return "\n".join(lines)


def _check_door(config: ServeConfig, host: str) -> None:
    problem = check_auth(config, host)
    if problem is not None:
        raise ConfigError(problem)


def _remembered(config: ServeConfig, model: ServedModel) -> Target:
    """Return the target of a fresh start: the model before this one outlives a restart too."""
    state = open_store(config.state_uri, config.s3)
    text = state.read(OWNER).decode(errors="replace") if state.exists(OWNER) else ""
    # A damaged file costs the memory of what was served, and is written anew.
    with contextlib.suppress(ConfigError):
        last = find_place(read_config(text, OWNER), config.name, OWNER)
        return successor(model, last.target, config.keep_previous)
    return successor(model, None, False)


def _save(config: ServeConfig, declared: dict[str, Any]) -> None:
    open_store(config.state_uri, config.s3).write(OWNER, as_yaml(declared, config).encode())


def _update(
    config: ServeConfig,
    running: Running,
    choose: Choose,
    import_path: str,
    commands: Commands,
    say: Say,
) -> int:
    """Update the Serve in the foreground of another process, and leave it there."""
    if config.name != running.name:
        raise ConfigError(
            f"application {running.name} is served by process {running.pid}; end it first (make "
            f"serve-down), or update it: --serve.name {running.name}"
        )
    say(f"application {config.name} runs on {running.url} (process {running.pid}): updating it")
    port = config.port or running.port
    with attached(running) as live:
        target = _apply(live, config.model_copy(update={"port": port}), choose, import_path, say)
        probe(running.url, PROBE_S)
    say(announcement(config, target, running.url, commands, running))
    return 0


def _deploy_to_cluster(
    config: ServeConfig, choose: Choose, import_path: str, commands: Commands, say: Say
) -> int:
    address = config.address or address_of_environment(say)
    if not address:
        raise ConfigError(
            "profile cluster needs a Ray that runs: give serve.address (or RAY_ADDRESS), such as "
            "head:6379"
        )
    with connected(address) as live:
        for name, uri in (("state_uri", config.state_uri), ("model_store", config.model_store)):
            check_storage(uri, "", f"serve.{name}")
        if live is None:
            say("starting Serve on the cluster")
            live = start_serve(declaration(config, placeholder(config, config.name), import_path))
        target = _apply(live, config, choose, import_path, say)
        urls = _probe_nodes(live, config, say)
    say(announcement(config, target, urls[0], commands, None))
    return 0


def _apply(live: Live, config: ServeConfig, choose: Choose, import_path: str, say: Say) -> Target:
    """Bring a running Serve to the config; return what it serves then.

    Without serve.model that is what it serves already.
    """
    host, port = live.address()
    if (host, port) != (config.host, config.port):
        raise ConfigError(
            f"Serve listens on {host}:{port}, and cannot change that while it runs; the config "
            f"says {config.host}:{config.port}: set serve.host and serve.port to what they are, or "
            "shut Serve down first"
        )
    _check_door(config, host)
    chosen = choose() if config.model is not None else None
    with exclusive(f"deployment of {config.name}"):
        before = live.read()
        mine = [place for place in places(before) if place.app == config.name]
        current = mine[0].target if mine else None
        if chosen is None and current is not None:
            say(f"keeping {current.id}, which is served; another: --model")
            target = current
        else:
            target = successor(chosen or choose(), current, config.keep_previous)
        declared = declaration(config, target, import_path)
        check_declaration(declared)
        place = find_place(declared, config.name, "the config")
        roll_out(live, declared, place, config.start_timeout_s, settled=True)
        # Whole, with other people's applications: `serve deploy` deletes what a file lacks.
        _save(config, {**declared, **plain_config(live.read())})
    return target


def _probe_on_node(url: str, timeout_s: float) -> bool:
    """Probe a proxy on its own node; tell whether that node's environment asks for HAProxy."""
    probe(url, timeout_s)
    return os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1"


def _probe_nodes(live: Live, config: ServeConfig, say: Say) -> list[str]:
    """Ask every proxy for an answer, on its own node; return their URLs.

    Raises:
        ClusterError: one that Serve calls healthy does not answer.
    """
    host, port = live.address()
    runtime_env = {"working_dir": config.working_dir} if config.working_dir else {}
    task: Any = ray.remote(num_cpus=0, runtime_env=runtime_env)(_probe_on_node)
    proxies = [
        p for p in (live.details().get("proxies") or {}).values() if p["status"] == "HEALTHY"
    ]
    found = {
        proxy["node_ip"]: task.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(proxy["node_id"], soft=False)
        ).remote(url_of(host, port), PROBE_S)
        for proxy in proxies
    }
    if not found:
        raise ClusterError("Serve has no healthy proxy; look at it with `serve status`")
    without = []
    for node, answer in found.items():
        try:
            if not ray.get(answer, timeout=PROBE_S + 60):
                without.append(node)
        except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError) as error:
            raise ClusterError(
                f"the proxy on node {node}, which Serve calls healthy: {error}"
            ) from error
    if without:
        say(
            f"! HAProxy is off on {', '.join(without)}, Ray's slower Python proxy answers there: "
            "set RAY_SERVE_ENABLE_HA_PROXY=1 in every node's environment before Ray starts"
        )
    return [url_of(node, port) for node in found]
