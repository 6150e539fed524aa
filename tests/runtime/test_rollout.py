"""Confirming and taking back, against a controller that tells what the test wants."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest

from clip_ray.config.serving import ServeConfig
from clip_ray.errors import ClusterError, ConfigError
from clip_ray.registry import ServedModel, Target
from clip_ray.runtime import rollout
from clip_ray.runtime.rollout import OvertakenError, RolloutError, confirm, gist, roll_out
from clip_ray.runtime.serve_config import placeholder
from clip_ray.runtime.serving import Place, find_place, places, successor, with_target


def model(version: int, name: str = "clip") -> ServedModel:
    digest = f"{version}" * 64
    return ServedModel(name=name, version=str(version), uri=f"/m/{digest}", digest=digest)


def target(version: int, previous: int | None = None) -> Target:
    before = None if previous is None else model(previous)
    return Target(**model(version).model_dump(), previous=before)


OLD, NEW = target(1), target(2, previous=1)
PLACE = Place("clip", "clip", NEW)


def config(served: Target, **more: Any) -> dict[str, Any]:
    user_config = served.model_dump(mode="json")
    deployment = {"name": "clip", "num_replicas": 2, "user_config": user_config}
    app = {"name": "clip", "import_path": "serve.app:build", "deployments": [deployment]}
    other = {"name": "other", "import_path": "a:b", "args": {"x": 1}, "route_prefix": "/other"}
    return {"applications": [other, app], **more}


def says(served: Target, wanted: Target | None = None, state: str = "ready", error=None) -> dict:
    return {
        "model": served.model_dump(include=set(ServedModel.model_fields)),
        "previous": served.previous and served.previous.model_dump(),
        "target_digest": (wanted or served).digest,
        "state": state,
        "error": error,
    }


class Controller:
    """Answers as `Live` does; each `details()` is one tick, of which `script` decides."""

    def __init__(self, served: Target, script: Callable[[Controller], None]) -> None:
        self.live = config(served, target_capacity=50.0)
        self.written: list[dict[str, Any]] = []
        self.script = script
        self.ticks = 0
        self.app = "RUNNING"
        self.replicas: dict[str, str] = {"a": "RUNNING", "b": "RUNNING"}
        self.unplaced: list[str] = []
        self.given = {"a": says(served), "b": says(served)}

    def details(self) -> dict[str, Any]:
        self.ticks += 1
        self.script(self)
        listed = [{"replica_id": r, "state": s, "pid": 1} for r, s in self.replicas.items()]
        listed += [{"replica_id": r, "state": "STARTING", "pid": None} for r in self.unplaced]
        app = {
            "status": self.app,
            "message": "",
            "deployments": {"clip": {"replicas": listed, "message": "why: \nValueError: it"}},
            "deployed_app_config": self.live["applications"][-1],
        }
        return {"applications": {"clip": app}}

    def read(self) -> dict[str, Any]:
        return copy.deepcopy(self.live)

    def write(self, wanted: dict[str, Any]) -> None:
        self.written.append(wanted)
        self.live = copy.deepcopy(wanted)

    def ask(self, place: Place) -> dict[str, Any]:
        return self.given


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(rollout, "POLL_S", 0.001)
    monkeypatch.setattr(rollout, "ROLLBACK_S", 0.05)
    monkeypatch.setattr(rollout, "ray_logs", lambda: "LOGS")


def go(script, timeout_s: float = 5, **more) -> tuple[Controller, list[str]]:
    live = Controller(OLD, script)
    wanted = with_target(live.read(), PLACE, NEW)
    return live, roll_out(live, wanted, PLACE, timeout_s, **more)


def obeys(live: Controller) -> None:
    """Serve what is written, the replicas one after the other."""
    now = places(live.live)[0].target
    for tick, replica in enumerate(sorted(live.replicas), start=3):
        if live.ticks >= tick:
            live.given[replica] = says(now)


def test_it_is_confirmed_when_every_listed_replica_serves_it():
    live, replicas = go(obeys)
    assert replicas == ["a", "b"] and live.ticks == 4
    assert live.written == [with_target(config(OLD, target_capacity=50.0), PLACE, NEW)]


def test_a_replica_that_comes_meanwhile_is_waited_for():
    def script(live: Controller) -> None:
        obeys(live)
        if live.ticks >= 3:
            live.replicas["c"] = "STARTING" if live.ticks < 8 else "RUNNING"

    live, replicas = go(script)
    assert replicas == ["a", "b", "c"] and live.ticks == 8


def test_a_replica_that_goes_meanwhile_is_not():
    def script(live: Controller) -> None:
        if live.ticks < 3:
            live.given = {"a": says(NEW)}
        live.replicas["b"] = "STOPPING" if live.ticks < 5 else "STOPPED"

    live, replicas = go(script)
    assert replicas == ["a"]


def test_a_replica_without_a_place_does_not_hold_it_up():
    def script(live: Controller) -> None:
        obeys(live)
        live.unplaced = ["c"]

    assert go(script)[1] == ["a", "b"]


def test_an_updating_replica_is_not_confirmed_yet():
    """It may have answered before Serve gave it the new target."""

    def script(live: Controller) -> None:
        live.given = {"a": says(NEW), "b": says(NEW)}
        live.replicas["b"] = "UPDATING" if live.ticks < 6 else "RUNNING"

    assert go(script)[0].ticks == 6


def test_another_version_of_the_same_weights_is_another_model():
    again = model(2).model_copy(update={"version": "9"})

    def script(live: Controller) -> None:
        said = says(NEW if live.ticks >= 5 else Target(**again.model_dump(), previous=model(1)))
        live.given = {"a": said, "b": said}

    assert go(script)[0].ticks == 5


def test_a_dropped_previous_model_must_be_gone():
    wanted = Place("clip", "clip", target(2))

    def script(live: Controller) -> None:
        live.given = {r: says(NEW if live.ticks < 4 else target(2)) for r in "ab"}

    live = Controller(NEW, script)
    assert confirm(live, wanted, 5) == ["a", "b"] and live.ticks == 4


def test_settled_waits_for_the_application():
    def script(live: Controller) -> None:
        obeys(live)
        live.app = "DEPLOYING" if live.ticks < 9 else "RUNNING"

    assert go(script)[0].ticks == 4
    assert go(script, settled=True)[0].ticks == 9


def fails(live: Controller) -> None:
    if places(live.live)[0].target == NEW:
        live.given["b"] = says(OLD, NEW, "failed", "RegistryError: broken")
    else:
        live.given["b"] = says(OLD)


def test_a_replica_that_cannot_serve_it_brings_the_old_config_back():
    with pytest.raises(RolloutError, match="replica b cannot serve clip/2: .*broken") as caught:
        live, _ = go(fails)
    assert "rolled back: clip/1 is served, as before" in str(caught.value)


NEWCOMER = {"name": "newcomer", "import_path": "c:d", "route_prefix": "/newcomer"}


def others_change(live: Controller) -> None:
    """Somebody adds an application, changes another, and sets the capacity."""
    other, app = live.live["applications"]
    applications = [{**other, "args": {"x": 2}}, app, NEWCOMER]
    live.live = {"applications": applications, "target_capacity": 70.0}


@pytest.mark.parametrize("fail", [False, True])
def test_other_applications_are_left_as_they_are_by_then(fail):
    def script(live: Controller) -> None:
        if live.ticks == 2:
            others_change(live)
        elif live.ticks > 2:
            (fails if fail else obeys)(live)

    live = Controller(OLD, script)
    before = live.read()
    with pytest.raises(RolloutError, match="rolled back") if fail else contextlib.nullcontext():
        roll_out(live, with_target(before, PLACE, NEW), PLACE, 5)
    expected = with_target(before, PLACE, OLD if fail else NEW)
    expected["applications"][0]["args"] = {"x": 2}
    expected["applications"].append(NEWCOMER)
    assert live.live == {**expected, "target_capacity": 70.0}


def test_what_changed_since_the_config_was_read_is_left_as_it_is():
    live = Controller(OLD, obeys)
    wanted = with_target(live.read(), PLACE, NEW)
    others_change(live)
    assert roll_out(live, wanted, PLACE, 5) == ["a", "b"]
    assert live.live["target_capacity"] == 70.0
    other, app, newcomer = live.live["applications"]
    assert (other["args"], newcomer) == ({"x": 2}, NEWCOMER)
    assert places({"applications": [app]})[0].target == NEW


@pytest.mark.parametrize("theirs", [target(5), None])
def test_a_rollback_does_not_undo_what_somebody_else_did_to_ours(theirs):
    """Between the last look and the rollback."""

    def script(live: Controller) -> None:
        if live.ticks == 1:
            return
        if theirs is None:
            live.live["applications"].pop()
        else:
            live.live = with_target(live.live, PLACE, theirs)
        raise ClusterError("the controller does not answer")

    live = Controller(OLD, script)
    live.details()
    with pytest.raises(OvertakenError, match="by somebody else meanwhile"):
        roll_out(live, with_target(live.read(), PLACE, NEW), PLACE, 5)
    assert [place.target for place in places(live.live)] == ([theirs] if theirs else [])


def test_a_failure_of_an_earlier_target_is_none_of_this_one():
    def script(live: Controller) -> None:
        obeys(live)
        if live.ticks < 3:
            live.given["a"] = says(OLD, target(7), "failed", "of before")

    assert go(script)[1] == ["a", "b"]


def test_a_replica_that_never_ends_loading_is_rolled_back_and_named():
    def script(live: Controller) -> None:
        now = places(live.live)[0].target
        live.given["a"] = says(now)
        live.given["b"] = says(OLD, now, "loading" if now == NEW else "ready")
        live.replicas["c"] = "RUNNING" if now == NEW else "STOPPED"

    with pytest.raises(RolloutError) as caught:
        go(script, timeout_s=0.05)
    assert "not every replica serves clip/2 after 0.05 s" in str(caught.value)
    assert "replica b (RUNNING) serves clip/1, is loading" in str(caught.value)
    assert "replica c (RUNNING) does not answer" in str(caught.value)
    assert "rolled back: clip/1" in str(caught.value)


def test_a_rollback_that_is_not_confirmed_is_told():
    def script(live: Controller) -> None:
        live.given["b"] = says(OLD, NEW, "failed", "for good")

    with pytest.raises(RolloutError, match="the old config was written back, and is not confirmed"):
        go(script)


def test_a_failed_deployment_tells_the_error_and_where_its_logs_are():
    def script(live: Controller) -> None:
        live.app = "DEPLOY_FAILED" if places(live.live)[0].target == NEW else "RUNNING"

    with pytest.raises(
        RolloutError, match="failed to deploy: ValueError: it\nits logs: LOGS/serve"
    ):
        go(script)


def test_somebody_elses_config_stands():
    theirs = target(5)

    def script(live: Controller) -> None:
        if live.ticks == 2:
            live.live = with_target(live.live, PLACE, theirs)

    live = Controller(OLD, script)
    with pytest.raises(OvertakenError, match="given clip/5 by somebody else"):
        roll_out(live, with_target(live.read(), PLACE, NEW), PLACE, 5)
    assert places(live.live)[0].target == theirs


@pytest.mark.parametrize(
    ("error", "raised"), [(KeyboardInterrupt, RolloutError), (SystemExit, SystemExit)]
)
def test_an_interrupted_rollout_is_taken_back(error, raised):
    def script(live: Controller) -> None:
        if live.ticks == 2:
            raise error

    live = Controller(OLD, script)
    before = live.read()
    with pytest.raises(raised):
        roll_out(live, with_target(before, PLACE, NEW), PLACE, 5)
    assert live.live == before


def test_a_new_application_that_fails_is_removed_again():
    only_other = {"applications": config(OLD)["applications"][:1]}

    def script(live: Controller) -> None:
        live.given["a"] = says(OLD, NEW, "failed", "broken")

    live = Controller(OLD, script)
    live.live = only_other
    with pytest.raises(RolloutError, match="was removed again"):
        roll_out(live, config(NEW), PLACE, 5)
    assert live.live == only_other


# ---------------------------------------------------------------------- places and targets


def test_the_model_is_found_by_its_shape():
    declared = config(OLD)
    declared["applications"][0]["deployments"] = [{"name": "x", "user_config": {"digest": 1}}]
    assert find_place(declared, None, "here") == Place("clip", "clip", OLD)
    with pytest.raises(ConfigError, match="here: expected an application x .*other, clip"):
        find_place(declared, "x", "here")
    declared["applications"].append({**declared["applications"][1], "name": "clip2"})
    with pytest.raises(ConfigError, match="serve models .clip, clip2.; name one: --app"):
        find_place(declared, None, "here")
    assert find_place(declared, "clip2", "here").app == "clip2"


def test_only_one_user_config_changes():
    before = config(OLD, target_capacity=3.0)
    after = with_target(before, PLACE, NEW)
    assert before == config(OLD, target_capacity=3.0)
    assert after["applications"][1]["deployments"][0].pop("user_config") == NEW.model_dump()
    before["applications"][1]["deployments"][0].pop("user_config")
    assert after == before


@pytest.mark.parametrize(
    ("to", "current", "keep", "previous"),
    [
        (2, None, True, None),
        (2, target(1), True, 1),
        (2, target(1), False, None),
        (3, target(2, previous=1), True, 2),
        (2, target(2, previous=1), True, 1),  # again: nothing is lost
        (2, target(2, previous=1), False, None),  # --drop-previous
        (1, target(2, previous=1), True, 2),  # the way back
    ],
)
def test_the_model_before_stays_answerable(to, current, keep, previous):
    expected = None if previous is None else model(previous)
    assert successor(model(to), current, keep) == Target(
        **model(to).model_dump(), previous=expected
    )


def test_a_file_without_a_model_yet_has_no_model_before():
    settings = ServeConfig(profile="cluster", model_store="s3://b/models")
    assert successor(model(2), placeholder(settings, "clip"), True).previous is None


def test_the_gist_of_a_traceback_is_its_error():
    text = (
        "Deploying failed\nTraceback:\n  File x\n    y\nclip_ray.errors.ConfigError: no door\n  key"
    )
    assert gist(text) == "ConfigError: no door\n  key"
    assert gist("no capacity\nat all\n") == "no capacity\nat all"
