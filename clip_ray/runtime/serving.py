"""A running Serve: what it was told, what its replicas answer, and telling it something else.

Everything goes through the controller's declarative config, read whole and written back whole:
what is not in the document that is applied is deleted, other people's applications included.
Left out: starting Serve (serve_local, deployment), rollouts, and files that own a config (owner).
"""

from __future__ import annotations

import contextlib
import copy
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import ray
from pydantic import ValidationError

from clip_ray.errors import ClusterError, ConfigError
from clip_ray.registry import ServedModel, Target
from clip_ray.runtime.serve_config import PLACEHOLDER

_OURS = {"name", "version", "uri", "digest"}
ASK_S = 5.0  # of one broadcast; status() reads memory, and a replica that is slower is busy


@dataclass(frozen=True)
class Place:
    """Where a target stands in a declarative config.

    Attributes:
        app: application.
        deployment: its deployment that has the target as `user_config`.
        target: the target.
        args: the application's builder arguments.
    """

    app: str
    deployment: str
    target: Target
    args: dict[str, Any] = field(default_factory=dict)


def places(config: dict[str, Any]) -> list[Place]:
    """Return the deployments of a declarative config that serve a model of ours."""
    found = []
    for app in config.get("applications") or []:
        for deployment in app.get("deployments") or []:
            user_config = deployment.get("user_config")
            if not isinstance(user_config, dict) or not _OURS <= user_config.keys():
                continue
            try:
                target = Target.model_validate(user_config)
            except ValidationError as error:
                raise ConfigError(
                    f"application {app.get('name')}: its user_config is no model's: "
                    f"{error.errors()[0]['msg']}"
                ) from error
            name = app.get("name", "default")
            found.append(Place(name, deployment["name"], target, app.get("args") or {}))
    return found


def find_place(config: dict[str, Any], app: str | None, where: str) -> Place:
    """Return the place of the model that is meant.

    Args:
        config: a declarative config.
        app: application; none = the only one that serves a model of ours.
        where: what the config is, for errors.

    Raises:
        ConfigError: there is none, or more than one.
    """
    found = [place for place in places(config) if app in (None, place.app)]
    if len(found) == 1:
        return found[0]
    names = ", ".join(a.get("name", "default") for a in config.get("applications") or []) or "none"
    if found:
        ours = ", ".join(place.app for place in found)
        raise ConfigError(f"{where}: several applications serve models ({ours}); name one: --app")
    which = "an application" if app is None else f"an application {app}"
    raise ConfigError(
        f"{where}: expected {which} with a model in a deployment's user_config; applications "
        f"there: {names}"
    )


def with_target(config: dict[str, Any], place: Place, target: Target) -> dict[str, Any]:
    """Return the config with another target at a place, and nothing else changed."""
    changed = copy.deepcopy(config)
    for app in changed["applications"]:
        for deployment in app.get("deployments") or []:
            if (app.get("name", "default"), deployment["name"]) == (place.app, place.deployment):
                deployment["user_config"] = target.model_dump(mode="json")
    return changed


def successor(model: ServedModel, current: Target | None, keep_previous: bool) -> Target:
    """Return the target after `current`, which stays answerable beside it where wanted."""
    previous = None
    if current is not None and current.digest != PLACEHOLDER and keep_previous:
        same = (current.id, current.digest) == (model.id, model.digest)
        previous = current.previous if same else current.plain()
    return Target(**model.plain().model_dump(), previous=previous)


def with_application(
    config: dict[str, Any], name: str, application: dict[str, Any] | None
) -> dict[str, Any]:
    """Return the config with one application put in, replaced or (None) taken out."""
    found = [app.get("name", "default") for app in config["applications"]]
    changed = {app_name: app for app_name, app in zip(found, config["applications"], strict=True)}
    if application is None:
        changed.pop(name, None)
    else:
        changed[name] = application
    return {**config, "applications": list(changed.values())}


def find_application(config: dict[str, Any], name: str) -> dict[str, Any] | None:
    """Return an application of a declarative config, None where it is not in it."""
    found = (app for app in config["applications"] if app.get("name", "default") == name)
    return next(found, None)


class Live:
    """The Serve of the connected Ray.

    Args:
        controller: Serve's controller actor.
    """

    def __init__(self, controller: Any) -> None:
        self._controller = controller

    @classmethod
    def connect(cls) -> Live | None:
        """Return the Serve of the connected Ray, None where none runs."""
        from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

        try:
            return cls(ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE))
        except ValueError:
            return None

    def _get(self, ref: Any) -> Any:
        try:
            return ray.get(ref, timeout=30)
        except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError) as error:
            raise ClusterError(
                f"Serve's controller does not answer ({type(error).__name__}); look at it with "
                "`serve status`"
            ) from error

    def details(self) -> dict[str, Any]:
        """Return all that the controller tells: applications, replicas, proxies, options."""
        details: dict[str, Any] = self._get(self._controller.get_serve_instance_details.remote())
        return details

    def address(self) -> tuple[str, int]:
        """Return the host and port that Serve listens on; they cannot change while it runs."""
        options = self._get(self._controller.get_http_config.remote())
        return options.host or "0.0.0.0", options.port

    def read(self) -> dict[str, Any]:
        """Return the live declarative config, whole: every application that it holds.

        What the controller keeps elsewhere (HTTP options, logging, tracing) is not in it, and
        applying it changes none of that.
        """
        details = self.details()
        configs = self._get(self._controller.get_app_configs.remote())
        # The controller keeps the config of an application that was deleted or replaced through
        # the Python API since; applying that again would bring it back.
        alive = {
            name
            for name, app in details["applications"].items()
            if app["source"] == "declarative" and app["status"] != "DELETING"
        }
        config: dict[str, Any] = {
            "applications": [
                app.model_dump(exclude_unset=True) for name, app in configs.items() if name in alive
            ]
        }
        if details.get("target_capacity") is not None:
            config["target_capacity"] = details["target_capacity"]
        return config

    def write(self, config: dict[str, Any]) -> None:
        """Apply a declarative config; applications that it lacks are deleted.

        Raises:
            ConfigError: Serve refuses it.
        """
        from ray.serve.schema import ServeDeploySchema

        try:
            schema = ServeDeploySchema.model_validate(config)
            self._get(self._controller.apply_config.remote(schema))
        except (ValidationError, ray.exceptions.RayTaskError) as error:
            raise ConfigError(f"Serve refuses the config: {error}") from error

    def ask(self, place: Place) -> dict[str, dict[str, Any]]:
        """Return the `status()` of each replica that answers, by replica id."""
        from ray import serve

        try:
            handle = serve.get_deployment_handle(place.deployment, place.app)
            answers = handle.broadcast("status").results(timeout_s=ASK_S, return_exceptions=True)
        except Exception:  # no replica is there to be asked just now, said in many ways
            return {}
        return {answer["replica"]: answer for answer in answers if isinstance(answer, dict)}


def plain_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return a declarative config as plain data that a file can hold."""
    from ray.serve.schema import ServeDeploySchema

    schema = ServeDeploySchema.model_validate(config)
    return schema.model_dump(mode="json", exclude_unset=True)


def address_of_environment(say: Callable[[str], None]) -> str | None:
    """Return RAY_ADDRESS, None where it names no Ray to connect to."""
    address = os.environ.get("RAY_ADDRESS") or None
    if address is not None and address.startswith(("http://", "https://")):
        say(f"RAY_ADDRESS {address} is for `ray job submit`; it is not asked")
        return None
    return None if address == "local" else address


@contextlib.contextmanager
def connected(address: str) -> Iterator[Live | None]:
    """Connect to a Ray; yield its Serve, None where none runs, and disconnect.

    Raises:
        ClusterError: no Ray answers.
        ConfigError: that is no Ray's address.
    """
    if "://" in address and not address.startswith("ray://"):
        raise ConfigError(
            f"{address}: expected a Ray address (head:6379 or ray://head:10001); from outside the "
            "cluster run the command behind `ray job submit`"
        )
    quiet()
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:  # Ray raises many kinds here
        raise ClusterError(
            f"no Ray answers at {address!r} ({type(error).__name__}: {error})"
        ) from error
    try:
        yield Live.connect()
    finally:
        ray.shutdown()


def quiet() -> None:
    """Keep Ray's lines about connections and tokens off the terminal."""
    for name in ("ray.serve", "ray._private.authentication"):
        # A filter: Serve sets its logger's level when it is imported.
        logging.getLogger(name).addFilter(_is_error)


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR
