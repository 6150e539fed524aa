"""The promote job: verify, roll out, confirm, and only then move the alias.

The order is the point: `champion` moves to a model once every replica has confirmed it, and where
nobody could be asked it does not move. What fails before that leaves both as they were; where
MLflow fails after it, replicas serve what `champion` does not name yet, and the error and the
history say so.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from clip_ray import registry
from clip_ray.config.serving import AppSettings
from clip_ray.errors import (
    CheckpointError,
    ClipRayError,
    ClusterError,
    ConfigError,
    RegistryError,
)
from clip_ray.registry import Target, user
from clip_ray.runtime.owner import RayService, read_config, read_file, replace_target, write_file
from clip_ray.runtime.rollout import (
    OvertakenError,
    RolloutError,
    answers,
    confirm,
    exclusive,
    restored,
    roll_out,
)
from clip_ray.runtime.serve_config import with_head
from clip_ray.runtime.serve_state import OWNER, attached, read_running
from clip_ray.runtime.serving import (
    Live,
    Place,
    address_of_environment,
    connected,
    find_place,
    places,
    plain_config,
    successor,
    with_target,
)
from clip_ray.storage import Store, open_store
from clip_ray.train.lease import held_lease

HISTORY = "promotions.jsonl"
VERIFY_S = 600.0
Say = Callable[[str], None]


@dataclass(frozen=True)
class Request:
    """What is to be promoted, and where to.

    Attributes:
        model: registered model.
        tracking_uri: MLflow's address.
        home: directory of what this machine knows of its own Serve.
        version: the model's version; none = the latest, or with drop_previous the one that is
            served.
        target: serve, rayservice, file, or none (move the alias only). None: serve where a Serve
            runs that serves this model, else none.
        file: YAML file of target file.
        rayservice: [NAMESPACE/]NAME of target rayservice.
        address: of the Ray whose Serve is meant; none = this machine's own, else RAY_ADDRESS.
        app: application; none = the only one that serves a model.
        model_store: where the export is copied; none = beside the one that is served.
        drop_previous: the model before this one is not to stay answerable.
        timeout_s: seconds in which all replicas must serve it.
    """

    model: str
    tracking_uri: str
    home: Path
    version: str | None = None
    target: Literal["serve", "rayservice", "file", "none"] | None = None
    file: str | None = None
    rayservice: str | None = None
    address: str | None = None
    app: str | None = None
    model_store: str | None = None
    drop_previous: bool = False
    timeout_s: float = 300.0


@dataclass(frozen=True)
class Destination:
    """Where a promotion goes.

    Attributes:
        kind: serve, rayservice or file.
        where: names it in messages.
        read: returns the declarative config that it holds.
        apply: puts the place's target there, confirms it in time where that can be done, and
            returns the replicas; what fails is undone.
        live: the running Serve, where one can be asked; without it nothing is confirmed.
    """

    kind: str
    where: str
    read: Callable[[], dict[str, Any]]
    apply: Callable[[Place, float], list[str]]
    live: Live | None


def promote(request: Request, say: Say) -> int:
    """Promote a model version; return the exit status.

    Raises:
        ClipRayError: why it was not promoted. Alias and replicas are as before, unless the message
            says that the alias alone was not moved.
    """
    with _destination(request, say) as destination:
        version = _version(destination, request)
        if destination is None:
            done = registry.promote(request.model, version, request.tracking_uri)
            before = "none" if done.previous is None else f"version {done.previous}"
            say(
                f"{done.name} version {done.version} is {registry.ALIAS} (was {before}), "
                f"digest {done.digest}"
            )
            return 0
        _promote_to(destination, request, version, say)
    return 0


def _version(destination: Destination | None, request: Request) -> str:
    if request.drop_previous and destination is None:
        raise ConfigError(
            "--drop-previous frees memory of replicas, and no Serve of this model is there to be "
            "told; say where it runs: --address HEAD:6379"
        )
    if request.version is not None:
        return request.version
    if request.drop_previous and destination is not None:
        served = find_place(destination.read(), request.app, destination.where).target
        if served.name != request.model:
            raise ConfigError(
                f"{destination.where} serves {served.id}; which version of {request.model} is to "
                "take its place? Give --version"
            )
        return served.version
    return registry.latest_version(request.model, request.tracking_uri)


def check(request: Request, say: Say) -> int:
    """Compare the alias with what is served; return 0 where all are the same, else 1."""
    found = registry.aliased(request.model, tracking_uri=request.tracking_uri)
    alias = (f"{request.model}/{found[0]}", found[1] or "") if found else ("none", "")
    rows = [(f"alias {registry.ALIAS}", *alias, "")]
    wanted = dataclasses.replace(request, target=request.target or "serve")
    with _destination(wanted, say) as destination:
        if destination is None:
            raise ConfigError("--check compares with what is served; there is nothing to ask")
        place = find_place(destination.read(), request.app, destination.where)
        rows.append((destination.where, place.target.id, place.target.digest, ""))
        if destination.live is not None:
            rows += _replica_rows(destination.live, place)
    same = all(row[1:3] == alias and row[3] in ("", "ready") for row in rows)
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    for what, model, digest, state in rows:
        say(f"{what:<{widths[0]}}  {model:<{widths[1]}}  {digest[:12]:<12}  {state}".rstrip())
    say("all the same" if same else f"not all are what {registry.ALIAS} names")
    return 0 if same else 1


def _replica_rows(live: Live, place: Place) -> list[tuple[str, str, str, str]]:
    now = answers(live, place)
    rows = []
    for replica, state in sorted(now.listed.items()):
        status = now.given.get(replica)
        model = (status or {}).get("model") or {}
        name = f"{model['name']}/{model['version']}" if model else "nothing"
        said = state.lower() if status is None else status["state"]
        rows.append((f"replica {replica}", name, model.get("digest", ""), said))
    return rows


def _promote_to(destination: Destination, request: Request, version: str, say: Say) -> None:
    place = find_place(destination.read(), request.app, destination.where)
    settings = _settings(place)
    state = open_store(settings.state_uri, settings.s3)
    doing = f"promotion of {request.model}/{version}"
    with _exclusive(destination, state, doing, say):
        uri = f"models:/{request.model}/{version}"
        say(f"storing {uri}, and verifying it in a process of its own")
        store = _model_store(request, place)
        model = registry.store_model(uri, store, settings.s3, request.tracking_uri)
        # The stored bytes: those are what replicas load.
        registry.verify_in_process(model, settings.s3, VERIFY_S)
        place = find_place(destination.read(), place.app, destination.where)
        keep = settings.keep_previous and not request.drop_previous
        target = successor(model, place.target, keep)
        wanted = dataclasses.replace(place, target=target)
        say(f"{destination.where}: {place.target.id} -> {target.id}")
        entry = _entry(destination, place.target, target)
        try:
            replicas = destination.apply(wanted, request.timeout_s)
        except BaseException as error:  # an interrupt belongs into the history too
            reason = str(error) or type(error).__name__
            _record(state, {**entry, "outcome": "failed", "reason": reason}, say)
            raise
        if destination.live is None:
            _record(state, {**entry, "outcome": "written, not confirmed"}, say)
        else:
            _keep_owner_true(state, destination.live, say)
            entry["replicas"] = replicas
            try:
                _move_alias(destination.kind, request, target, len(replicas))
            except RegistryError as error:
                outcome = {"outcome": "served, alias not moved", "reason": str(error)}
                _record(state, entry | outcome, say)
                raise
            _record(state, entry | {"outcome": "promoted"}, say)
    _tell(destination, place.target, target, replicas, say)


def _move_alias(kind: str, request: Request, target: Target, replicas: int) -> None:
    tags = {"target": kind, "replicas": str(replicas)}
    try:
        registry.move_alias(
            request.model, target.version, target.digest, request.tracking_uri, tags
        )
    except RegistryError as error:
        raise RegistryError(
            f"every replica ({replicas}) serves {target.id}, and the alias {registry.ALIAS} was "
            f"not moved: {error}\nrun the same command again (with --version {target.version})"
        ) from error


def _settings(place: Place) -> AppSettings:
    try:
        return AppSettings.model_validate(place.args)
    except ValidationError as error:
        raise ConfigError(
            f"application {place.app}: its args are not those of our builder: {error}"
        ) from error


def _model_store(request: Request, place: Place) -> str:
    if request.model_store is not None:
        return request.model_store
    folder, _, last = place.target.uri.rpartition("/")
    if last != place.target.digest:
        raise ConfigError(
            f"{place.target.uri}, which is served, lies in no model store; say where the export "
            "is to be copied: --model_store DIRECTORY or s3://..."
        )
    return folder


@contextlib.contextmanager
def _exclusive(destination: Destination, state: Store, doing: str, say: Say) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        if destination.live is not None:
            stack.enter_context(exclusive(doing))
        if destination.kind != "serve":
            try:
                stack.enter_context(held_lease(state.child("promotion"), say))
            except CheckpointError as error:
                raise RolloutError(_lease_holder(state.child("promotion"))) from error
        yield


def _lease_holder(folder: Store) -> str:
    try:
        newest = [name for name in folder.files() if name.endswith(".json")][-1]
        holder = json.loads(folder.read(newest))
        who = f"by process {holder['pid']} on {holder['host']}"
    except (IndexError, FileNotFoundError, ValueError, KeyError):
        who = "by a process that ends just now"
    return f"another promotion is under way, {who}; wait for it"


def _entry(destination: Destination, old: Target, new: Target) -> dict[str, Any]:
    return {
        "at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "by": user(),
        "machine": socket.gethostname(),
        "target": destination.kind,
        "where": destination.where,
        "from": {"model": old.id, "digest": old.digest},
        "to": {"model": new.id, "digest": new.digest, "run_id": new.run_id},
        "previous": None if new.previous is None else new.previous.id,
    }


def _record(state: Store, entry: dict[str, Any], say: Say) -> None:
    """Add a line to the history; the promotion's lock keeps other writers out."""
    try:
        before = state.read(HISTORY) if state.exists(HISTORY) else b""
        state.write(HISTORY, before + json.dumps(entry).encode() + b"\n")
    except (OSError, ClipRayError) as error:
        say(f"! not written to {state.uri}/{HISTORY}: {error}")


def _keep_owner_true(state: Store, live: Live, say: Say) -> None:
    """Write what is live into what jobs/deploy.py applied, so that applying it changes nothing.

    Whole: applying the file deletes applications that it lacks.
    """
    where = f"{state.uri}/{OWNER}"
    try:
        if state.exists(OWNER):
            text = state.read(OWNER).decode()
            config = {**read_config(text, where), **plain_config(live.read())}
            state.write(OWNER, with_head(text, config).encode())
    except (OSError, ValueError, ClipRayError) as error:
        say(f"! {where} still names the old model; applying it would bring that back: {error}")


def _tell(
    destination: Destination, old: Target, new: Target, replicas: list[str], say: Say
) -> None:
    if destination.live is None:
        say(
            f"{destination.where} names {new.id} now; no replica was asked whether it serves it.\n"
            f"The alias {registry.ALIAS} was not moved: once it is applied, run the same command "
            "again with --address HEAD:6379; that asks every replica, and moves it."
        )
    else:
        say(f"every replica ({len(replicas)}) serves {new.id}, digest {new.digest}")
        say(f"{new.name}@{registry.ALIAS} is version {new.version}")
    if old.digest != new.digest:
        say(
            f"The embedding space has changed: what {new.id} computes cannot be compared with "
            f"embeddings of {old.id} that callers stored."
        )
    if new.previous is not None:
        say(
            f"{new.previous.id} stays answerable by that name, until --drop-previous frees its "
            "memory."
        )
    gone = {model.id for model in (old, old.previous) if model} - {
        model.id for model in (new, new.previous) if model
    }
    if gone:
        say(f"Not answerable any more: {', '.join(sorted(gone))}")


@contextlib.contextmanager
def _destination(request: Request, say: Say) -> Iterator[Destination | None]:
    """Yield where the promotion goes, connected; None: only the alias moves."""
    if request.target == "none":
        yield None
        return
    with _live(request, say) as live:
        if request.target == "file":
            yield _to_file(Path(_required(request.file, "--file FILE")), live)
        elif request.target == "rayservice":
            name = _required(request.rayservice, "--rayservice [NAMESPACE/]NAME")
            yield _to_rayservice(RayService(name), live)
        elif request.target == "serve":
            if live is None:
                raise ClusterError(
                    "no Serve runs here; start one (make serve), or say where it runs: "
                    "--address HEAD:6379"
                )
            yield _to_serve(live)
        else:
            yield _to_serve(live) if live is not None and _serves(live, request, say) else None


def _required(value: str | None, flag: str) -> str:
    if value is None:
        raise ConfigError(f"this target needs {flag}")
    return value


@contextlib.contextmanager
def _live(request: Request, say: Say) -> Iterator[Live | None]:
    """Yield the running Serve that is meant, None where there is none to be asked."""
    running = None if request.address else read_running(request.home)
    if running is not None and running.alive():
        with attached(running) as live:
            yield live
    elif (address := request.address or address_of_environment(say)) is not None:
        with connected(address) as found:
            if found is None and request.address:
                raise ClusterError(f"no Serve runs on the Ray at {address}")
            yield found
    else:
        yield None


def _serves(live: Live, request: Request, say: Say) -> bool:
    """Tell whether a running Serve serves the model that is promoted."""
    found = [place for place in places(live.read()) if request.app in (None, place.app)]
    if any(place.target.name == request.model for place in found):
        return True
    for place in found:
        say(
            f"application {place.app} serves {place.target.id} and keeps it; to serve "
            f"{request.model} instead: --target serve"
        )
    return False


def _to_serve(live: Live) -> Destination:
    def apply(place: Place, timeout_s: float) -> list[str]:
        return roll_out(live, with_target(live.read(), place, place.target), place, timeout_s)

    return Destination("serve", "the running Serve", live.read, apply, live)


def _to_file(path: Path, live: Live | None) -> Destination:
    where = str(path)

    def read() -> dict[str, Any]:
        return read_config(read_file(path), where)

    def apply(place: Place, timeout_s: float) -> list[str]:
        text = read_file(path)
        changed = replace_target(text, place.app, place.target, where)
        replicas = []
        if served is not None:
            config = served.read()
            there = find_place(config, place.app, "the running Serve")
            place = dataclasses.replace(there, target=place.target)
            replicas = roll_out(served, with_target(config, place, place.target), place, timeout_s)
        if read_file(path) != text:
            raise OvertakenError(f"{where} was changed by somebody else meanwhile; theirs stands")
        write_file(path, changed)
        return replicas

    # A file for another Serve than the one that runs here is only written.
    app_names = {place.app for place in places(read())}
    is_for_live = live is not None and app_names & {p.app for p in places(live.read())}
    served = live if is_for_live else None
    return Destination("file", where, read, apply, served)


def _to_rayservice(service: RayService, live: Live | None) -> Destination:
    def read() -> dict[str, Any]:
        return read_config(service.read()[0], service.where)

    def apply(place: Place, timeout_s: float) -> list[str]:
        text, version = service.read()
        changed = replace_target(text, place.app, place.target, service.where)
        try:
            service.write(changed, version)
            # The operator applies it to the Serve, a few seconds later.
            return [] if live is None else confirm(live, place, timeout_s)
        except BaseException as error:
            now, version = service.read()
            if now == changed and now != text:
                service.write(text, version)
            if live is None or not isinstance(error, RolloutError):
                raise
            back = restored(live, read_config(text, service.where), place)
            raise RolloutError(f"{error}\n{back}") from error

    return Destination("rayservice", service.where, read, apply, live)
