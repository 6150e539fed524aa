"""Rollouts: a target is applied, confirmed by every replica, and taken back where one fails."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ray

from clip_ray.errors import ClipRayError, ClusterError
from clip_ray.registry import Target, user
from clip_ray.runtime.cluster import ray_logs
from clip_ray.runtime.serving import Live, Place, find_application, places, with_application

POLL_S = 0.2
ROLLBACK_S = 120.0
_NAMESPACE = "clip-ray"
_LOCK = "promotion"
_ENDED = ("STOPPING", "STOPPED")
_ERROR = re.compile(r"[A-Za-z_][\w.]*(Error|Exception|Exit|Interrupt): ")


class RolloutError(ClipRayError):
    """A rollout that did not reach every replica; what was served before is served."""


class OvertakenError(RolloutError):
    """Somebody else changed the live config meanwhile; theirs stands."""


@dataclass(frozen=True)
class Answers:
    """What is served, replica by replica.

    Attributes:
        app: status of the application, such as RUNNING.
        message: what the controller has to say about it.
        listed: state by id of each replica that the controller lists and that has a process.
        waiting: ids of replicas that have no place yet.
        given: their `status()`.
    """

    app: str
    message: str
    listed: dict[str, str]
    waiting: list[str]
    given: dict[str, dict[str, Any]]

    def confirmed(self, target: Target) -> list[str]:
        """Return the replicas that serve exactly this target."""
        return [
            replica
            for replica, state in self.listed.items()
            if state == "RUNNING" and _serves(self.given.get(replica), target)
        ]

    def failure(self, target: Target) -> str | None:
        """Return why the target cannot be served, once a replica says so."""
        for replica, status in self.given.items():
            if status["state"] == "failed" and status["target_digest"] == target.digest:
                return f"replica {replica} cannot serve {target.id}: {status['error']}"
        return None

    def lag(self, target: Target) -> str:
        """Describe the replicas that do not serve the target yet."""
        done = set(self.confirmed(target))
        lines = []
        for replica, state in self.listed.items():
            if replica not in done:
                status = self.given.get(replica)
                said = "does not answer" if status is None else _said(status)
                lines.append(f"replica {replica} ({state}) {said}")
        lines += [f"replica {replica} waits for resources" for replica in self.waiting]
        return "; ".join(lines) or f"application {self.app.lower()}, no replica: {self.message}"


def _serves(status: dict[str, Any] | None, target: Target) -> bool:
    if status is None or status["state"] != "ready" or status["target_digest"] != target.digest:
        return False
    model = status["model"] or {}
    same = all(model.get(name) == getattr(target, name) for name in ("name", "version", "digest"))
    # A dropped previous model is gone; one that a new replica cannot load any more is no failure.
    return same and not (target.previous is None and status["previous"])


def _said(status: dict[str, Any]) -> str:
    model = status["model"]
    what = "nothing" if model is None else f"{model['name']}/{model['version']}"
    error = f" ({status['error']})" if status["error"] else ""
    return f"serves {what}, is {status['state']}{error}"


def answers(live: Live, place: Place) -> Answers:
    """Ask every replica of a deployment what it serves."""
    return _answers(live, place, live.details())


def _answers(live: Live, place: Place, details: dict[str, Any]) -> Answers:
    app = details["applications"].get(place.app)
    if app is None:
        return Answers("ABSENT", "the application is gone", {}, [], {})
    deployment = app["deployments"].get(place.deployment, {"replicas": [], "message": ""})
    replicas = [r for r in deployment["replicas"] if r["state"] not in _ENDED]
    message = " ".join(part for part in (app["message"], deployment["message"]) if part)
    return Answers(
        app=str(getattr(app["status"], "value", app["status"])),
        message=message,
        listed={r["replica_id"]: str(_plain(r["state"])) for r in replicas if r.get("pid")},
        waiting=[r["replica_id"] for r in replicas if not r.get("pid")],
        given=live.ask(place) if any(r.get("pid") for r in replicas) else {},
    )


def _plain(value: Any) -> Any:
    return getattr(value, "value", value)


def confirm(
    live: Live, place: Place, timeout_s: float, *, settled: bool = False, watch: bool = False
) -> list[str]:
    """Wait until every replica that the controller lists serves the target of a place.

    Replicas may come and go meanwhile. One that has no process yet is not waited for: it may wait
    for resources for ever, and takes the target as soon as it runs.

    Args:
        live: the running Serve.
        place: what is to be served, and where.
        timeout_s: seconds after which the rollout has failed.
        settled: also wait until the application runs as declared, replicas counted.
        watch: end where somebody else has given the application another target.

    Returns:
        The ids of the replicas.

    Raises:
        RolloutError: a replica cannot serve it, or not all do in time.
        OvertakenError: what `watch` looks for.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        details = live.details()
        if watch:
            _check_still_wanted(details, place)
        now = _answers(live, place, details)
        if (why := now.failure(place.target)) is not None:
            raise RolloutError(why)
        if now.app == "DEPLOY_FAILED":
            raise RolloutError(
                f"application {place.app} failed to deploy: {gist(now.message)}\n"
                f"its logs: {ray_logs()}/serve"
            )
        done = now.confirmed(place.target)
        if done and len(done) == len(now.listed) and (now.app == "RUNNING" or not settled):
            return sorted(done)
        if time.monotonic() > deadline:
            raise RolloutError(
                f"not every replica serves {place.target.id} after {timeout_s:g} s: "
                f"{now.lag(place.target)}"
            )
        time.sleep(POLL_S)


def gist(message: str) -> str:
    """Return the error at the end of a traceback, or a message without one as it is."""
    lines = message.strip().splitlines()
    last = max((i for i, line in enumerate(lines) if _ERROR.match(line)), default=0)
    return "\n".join(lines[last:]).removeprefix("clip_ray.errors.")


def _check_still_wanted(details: dict[str, Any], place: Place) -> None:
    app = details["applications"].get(place.app)
    config = (app or {}).get("deployed_app_config")
    if config is None:
        return
    for found in places({"applications": [config]}):
        if found.deployment == place.deployment and found.target != place.target:
            raise _overtaken(found)


def roll_out(
    live: Live, config: dict[str, Any], place: Place, timeout_s: float, *, settled: bool = False
) -> list[str]:
    """Apply an application and confirm its target on every replica, or bring the old one back.

    Other applications stay as they are at each moment of writing, whatever happens to them
    meanwhile.

    Args:
        live: the running Serve.
        config: a declarative config; the application of `place` is taken from it.
        place: the target in it.
        timeout_s: as in `confirm`.
        settled: as in `confirm`.

    Returns:
        The ids of the replicas that serve the target.

    Raises:
        RolloutError: as `confirm`; the message says what is served now.
        OvertakenError: somebody else changed or deleted the application.
    """
    before = live.read()
    try:
        live.write(with_application(before, place.app, find_application(config, place.app)))
        return confirm(live, place, timeout_s, settled=settled, watch=True)
    except OvertakenError:
        raise
    except BaseException as error:
        # Ctrl-C too: what nobody has confirmed must not stay.
        _take_back(live, before, place)
        if isinstance(error, KeyboardInterrupt):
            raise RolloutError("interrupted; the config of before was written back") from error
        if not isinstance(error, RolloutError):
            raise
        raise RolloutError(f"{error}\n{restored(live, before, place)}") from error


def _take_back(live: Live, before: dict[str, Any], place: Place) -> None:
    """Write the application back as it was, into what the live config is by now.

    Raises:
        OvertakenError: somebody else has changed or deleted it meanwhile.
    """
    now = live.read()
    was = find_application(before, place.app)
    is_now = find_application(now, place.app)
    if is_now == was:
        return
    if is_now is None:
        raise OvertakenError(f"application {place.app} was deleted by somebody else meanwhile")
    for found in places({"applications": [is_now]}):
        if found.deployment == place.deployment and found.target != place.target:
            raise _overtaken(found)
    live.write(with_application(now, place.app, was))


def _overtaken(theirs: Place) -> OvertakenError:
    return OvertakenError(
        f"application {theirs.app} was given {theirs.target.id} by somebody else meanwhile; "
        "theirs stands"
    )


def restored(live: Live, before: dict[str, Any], place: Place) -> str:
    """Wait until the config of before the rollout is served again; say so, or what is not."""
    old = [p for p in places(before) if (p.app, p.deployment) == (place.app, place.deployment)]
    if not old:
        return f"application {place.app} was removed again; nothing was served before it"
    try:
        confirm(live, old[0], ROLLBACK_S)
    except ClipRayError as error:
        return f"the old config was written back, and is not confirmed: {error}"
    return f"rolled back: {old[0].target.id} is served, as before"


@contextlib.contextmanager
def exclusive(doing: str) -> Iterator[None]:
    """Keep every other promotion and deployment out during the block.

    One lock for the whole Serve, because all of them read, change and write one document. It is a
    named actor that the connected process owns, and ends with that process.

    Raises:
        RolloutError: another one is under way; the message says whose.
    """

    # Defined here, so that it travels by value: the cluster needs none of our code for it.
    class Holder:
        def __init__(self, who: str) -> None:
            self._who = who

        def who(self) -> str:
            return self._who

    who = f"{doing}, by {user()} on {socket.gethostname()}, process {os.getpid()}, "
    who += f"since {time.strftime('%H:%M:%S')}"
    try:
        actor: Any = ray.remote(num_cpus=0)(Holder)
        actor = actor.options(name=_LOCK, namespace=_NAMESPACE).remote(who)
    except ValueError:
        raise RolloutError(
            f"this Serve is being changed already: {_holder()}; wait for it"
        ) from None
    try:
        try:
            ray.get(actor.who.remote(), timeout=60)
        except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError) as error:
            raise ClusterError(f"the cluster cannot start a small actor: {error}") from error
        yield
    finally:
        ray.kill(actor)


def _holder() -> str:
    try:
        handle = ray.get_actor(_LOCK, namespace=_NAMESPACE)
        return str(ray.get(handle.who.remote(), timeout=10))
    except (ValueError, ray.exceptions.RayError, ray.exceptions.GetTimeoutError):
        return "by a process that ends just now"
