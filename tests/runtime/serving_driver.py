"""Functions that a process connected to a running Serve executes for the tests.

A process of its own: pytest's must not be connected to a Ray that other tests do not know.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import ray
import yaml
from ray import serve
from ray.serve._private.logging_utils import get_serve_logs_dir
from ray.util.state import get_actor

from clip_ray.registry import Target
from clip_ray.runtime.rollout import RolloutError, answers, exclusive, roll_out
from clip_ray.runtime.serve_state import attached, read_running
from clip_ray.runtime.serving import Live, Place, connected, find_place, plain_config, with_target

_CONNECTION = contextlib.ExitStack()
_LIVE: list[Live] = []


def start(folder: Path) -> ProcessPoolExecutor:
    """Return a process that is connected to the Serve that `folder` tells of."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(1, context, initializer=_connect, initargs=(folder,))


def start_at(address: str) -> ProcessPoolExecutor:
    """Return a process that is connected to the Serve of the Ray at `address`."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(1, context, initializer=_connect_at, initargs=(address,))


def _connect(folder: Path) -> None:
    running = read_running(folder)
    assert running is not None
    _LIVE.append(_CONNECTION.enter_context(attached(running)))


def _connect_at(address: str) -> None:
    live = _CONNECTION.enter_context(connected(address))
    assert live is not None
    _LIVE.append(live)


def _place() -> Place:
    return find_place(_LIVE[0].read(), "clip", "the test's Serve")


def config() -> dict[str, Any]:
    """Return the live config as plain data."""
    return plain_config(_LIVE[0].read())


def served() -> dict[str, dict[str, Any]]:
    """Return each replica's status."""
    return answers(_LIVE[0], _place()).given


def confirmed() -> dict[str, int]:
    """Return the pid of each replica that the controller lists and that serves the target."""
    now = answers(_LIVE[0], _place())
    return {name: now.given[name]["pid"] for name in now.confirmed(_place().target)}


def target() -> Target:
    """Return what the live config says is to be served."""
    return _place().target


def held(resource: str) -> tuple[list[float], float]:
    """Return how much of a resource each replica's actor holds, and how much is free.

    The replicas are those that the controller lists, what they hold is Ray's own account.
    """
    place = _place()
    deployments = _LIVE[0].details()["applications"][place.app]["deployments"]
    replicas = deployments[place.deployment]["replicas"]
    # Without an address it refuses to choose where another Ray runs on the machine.
    here = ray.get_runtime_context().gcs_address
    actors = [get_actor(replica["actor_id"], address=here, timeout=30) for replica in replicas]
    free = ray.available_resources().get(resource, 0.0)
    return [actor.required_resources.get(resource, 0.0) for actor in actors], free


def shut_down() -> None:
    """End the Serve, with its proxies."""
    serve.shutdown()


def metrics_urls() -> list[str]:
    """Return where the agents of the Ray's nodes answer Prometheus."""
    nodes = ray.nodes()
    return [f"http://{n['NodeManagerAddress']}:{n['MetricsExportPort']}/metrics" for n in nodes]


def spans() -> dict[str, list[dict[str, Any]]]:
    """Return the spans that each process of the Serve has written, by its file's name."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path in (Path(get_serve_logs_dir()) / "spans").glob("*"):
        text, at = path.read_text(), 0
        found[path.name] = []
        # One indented object after the other; the last may be half written.
        with contextlib.suppress(json.JSONDecodeError):
            while at < len(text.rstrip()):
                span, at = json.JSONDecoder().raw_decode(text, at)
                found[path.name].append(span)
                at += len(text[at:]) - len(text[at:].lstrip())
    return found


def promote(target: Target, timeout_s: float = 30) -> tuple[list[str], str | None]:
    """Roll a target out; return the replicas that confirmed it, or the error."""
    place = _place()
    wanted = with_target(_LIVE[0].read(), place, target)
    place = Place(place.app, place.deployment, target, place.args)
    try:
        return roll_out(_LIVE[0], wanted, place, timeout_s), None
    except RolloutError as error:
        return [], str(error)


def apply(path: Path) -> None:
    """Apply a config file, as `serve deploy` does."""
    _LIVE[0].write(yaml.safe_load(path.read_text()))


def add(app: dict[str, Any]) -> None:
    """Add somebody else's application, with options that ours does not set."""
    live = _LIVE[0]
    before = live.read()
    live.write({**before, "applications": [*before["applications"], app], "target_capacity": 100.0})
    deadline = time.monotonic() + 30
    while live.details()["applications"][app["name"]]["status"] != "RUNNING":
        assert time.monotonic() < deadline
        time.sleep(0.1)


def take_lock() -> str | None:
    """Take the lock of promotions, and give it back; return why that is refused."""
    try:
        with exclusive("a test"):
            return None
    except RolloutError as error:
        return str(error)


def hold_lock(folder: Path) -> None:
    """Hold the lock of promotions until this process is killed; says so on standard output."""
    _connect(folder)
    with exclusive("promotion of clip/77"):
        print("held", flush=True)
        time.sleep(600)
