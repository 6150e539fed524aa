"""The order of a promotion and what each destination is told; Ray, MLflow and kubectl are fakes."""

from __future__ import annotations

import contextlib
import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from clip_ray import registry
from clip_ray.errors import ClusterError, ConfigError, RegistryError
from clip_ray.registry import Promotion, ServedModel, Target
from clip_ray.runtime import promotion, serving
from clip_ray.runtime.owner import read_config
from clip_ray.runtime.promotion import HISTORY, Request, check, promote
from clip_ray.runtime.rollout import RolloutError
from clip_ray.runtime.serving import places
from clip_ray.storage import LocalStore
from clip_ray.train.lease import held_lease


def model(version: str, name: str = "clip") -> ServedModel:
    digest = version * 64
    return ServedModel(name=name, version=version, uri=f"/store/{digest}", digest=digest)


def target(version: str, previous: str | None = None, name: str = "clip") -> Target:
    before = None if previous is None else model(previous, name)
    return Target(**model(version, name).model_dump(), previous=before)


def config(served: Target, state: Path, **args: Any) -> dict[str, Any]:
    app = {
        "name": "clip",
        "import_path": "serve.app:build",
        "args": {"name": "clip", "state_uri": str(state), **args},
        "deployments": [{"name": "clip", "user_config": served.model_dump(mode="json")}],
    }
    return {"applications": [app]}


class Live:
    """A Serve with two replicas that do as they are told."""

    def __init__(self, declared: dict[str, Any]) -> None:
        self.config = declared

    def read(self) -> dict[str, Any]:
        return copy.deepcopy(self.config)


class World:
    """Everything outside, and the order in which it was used."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state = folder / "state"
        self.events: list[str] = []
        self.said: list[str] = []
        self.live: Live | None = None
        self.refuse: str | None = None

    def request(self, **more: Any) -> Request:
        fields: dict[str, Any] = {"model": "clip", "tracking_uri": "x", "home": self.folder}
        return Request(**fields | {"version": "2"} | more)

    def serve(self, served: Target, **args: Any) -> None:
        self.live = Live(config(served, self.state, **args))

    @property
    def served(self) -> Target:
        assert self.live is not None
        return places(self.live.config)[0].target

    def promote(self, **more: Any) -> int:
        return promote(self.request(**more), self.said.append)

    def history(self) -> list[dict[str, Any]]:
        text = (self.state / HISTORY).read_text()
        return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def world(tmp_path, monkeypatch) -> World:
    made = World(tmp_path)

    def store_model(uri, store, s3, tracking_uri):
        made.events.append(f"store {uri} {store}")
        return model(uri.rsplit("/", 1)[1])

    def verify(stored, s3, timeout_s):
        made.events.append(f"verify {stored.id}")
        if made.refuse == "verify":
            raise RegistryError("not usable")

    def roll_out(live, wanted, place, timeout_s):
        made.events.append(f"roll out {place.target.id}")
        if made.refuse == "roll out":
            raise RolloutError("replica b cannot serve it\nrolled back: clip/1 is served")
        if made.refuse == "controller":
            raise ClusterError("Serve's controller does not answer")
        live.config = wanted
        return ["a", "b"]

    def move_alias(name, version, digest, tracking_uri, tags):
        if made.refuse == "alias":
            raise RegistryError("MLflow at x: database is locked")
        made.events.append(f"alias {name}/{version} {tags['target']} {tags['replicas']}")
        return Promotion(name, version, digest, "1")

    @contextlib.contextmanager
    def exclusive(doing):
        made.events.append(f"lock: {doing}")
        yield

    @contextlib.contextmanager
    def connected(address):
        made.events.append(f"connect {address}")
        yield made.live

    for name, fake in {
        "store_model": store_model, "verify_in_process": verify, "move_alias": move_alias,
        "aliased": lambda name, tracking_uri: ("2", "2" * 64),
        "latest_version": lambda name, uri: "9",
        "promote": lambda name, version, uri: Promotion(name, version, "2" * 64, None),
    }.items():  # fmt: skip
        monkeypatch.setattr(registry, name, fake)
    for name, fake in {
        "roll_out": roll_out, "exclusive": exclusive, "connected": connected,
        "answers": lambda live, place: _answers(made),
    }.items():  # fmt: skip
        monkeypatch.setattr(promotion, name, fake)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return made


def _answers(world: World):
    from clip_ray.runtime.rollout import Answers

    said = {
        "model": world.served.model_dump(),
        "target_digest": world.served.digest,
        "state": "ready",
        "error": None,
    }
    return Answers("RUNNING", "", {"a": "RUNNING", "b": "RUNNING"}, [], {"a": said, "b": said})


def test_the_order(world):
    """Verify, roll out, confirm; only then the alias and the line."""
    world.serve(target("1"))
    assert world.promote(address="head:1") == 0
    assert world.events == [
        "connect head:1",
        "lock: promotion of clip/2",
        "store models:/clip/2 /store",
        "verify clip/2",
        "roll out clip/2",
        "alias clip/2 serve 2",
    ]
    assert world.served == target("2", previous="1")
    (line,) = world.history()
    assert (line["outcome"], line["target"], line["replicas"]) == ("promoted", "serve", ["a", "b"])
    assert line["from"] == {"model": "clip/1", "digest": "1" * 64}
    assert line["to"] == {"model": "clip/2", "digest": "2" * 64, "run_id": None}
    assert line["by"] and line["at"]


def test_what_changes_for_callers_is_told(world):
    world.serve(target("1"))
    world.promote(address="head:1")
    text = "\n".join(world.said)
    assert "embedding space has changed" in text and "embeddings of clip/1" in text
    assert "clip/1 stays answerable by that name, until --drop-previous" in text
    world.said.clear()
    assert world.promote(address="head:1", drop_previous=True) == 0
    assert world.served == target("2")
    assert "Not answerable any more: clip/1" in world.said
    assert not any("embedding space" in line for line in world.said)


def test_a_model_that_cannot_be_verified_touches_nothing(world):
    world.serve(target("1"))
    world.refuse = "verify"
    with pytest.raises(RegistryError):
        world.promote(address="head:1")
    assert world.events[-1] == "verify clip/2"
    assert world.served == target("1") and not (world.state / HISTORY).exists()


def test_a_failed_rollout_leaves_the_alias_and_is_remembered(world):
    world.serve(target("1"))
    world.refuse = "roll out"
    with pytest.raises(RolloutError, match="rolled back"):
        world.promote(address="head:1")
    assert world.events[-1] == "roll out clip/2"  # no alias
    (line,) = world.history()
    assert line["outcome"] == "failed" and "replica b" in line["reason"]
    world.refuse = None
    world.promote(address="head:1")
    assert [line["outcome"] for line in world.history()] == ["failed", "promoted"]


@pytest.mark.parametrize("refuse", ["roll out", "controller"])
def test_every_failure_is_in_the_history(world, refuse):
    world.serve(target("1"))
    world.refuse = refuse
    with pytest.raises((RolloutError, ClusterError)) as caught:
        world.promote(address="head:1")
    (line,) = world.history()
    assert (line["outcome"], line["reason"]) == ("failed", str(caught.value))


def test_where_mlflow_fails_at_the_end_it_is_said_and_the_same_command_mends_it(world):
    world.serve(target("1"))
    world.refuse = "alias"
    with pytest.raises(RegistryError) as caught:
        world.promote(address="head:1")
    text = str(caught.value)
    assert "every replica (2) serves clip/2, and the alias champion was not moved" in text
    assert "database is locked\nrun the same command again" in text
    assert world.served == target("2", previous="1")
    (line,) = world.history()
    assert (line["outcome"], line["replicas"]) == ("served, alias not moved", ["a", "b"])
    assert "database is locked" in line["reason"]
    world.refuse = None
    world.promote(address="head:1")
    assert world.events[-1] == "alias clip/2 serve 2"
    assert world.served == target("2", previous="1")  # the way back is not lost
    assert world.history()[-1]["outcome"] == "promoted"


def test_dropping_the_previous_promotes_nothing_else(world):
    """The newest version is 9."""
    world.serve(target("3", "1"))
    world.promote(version=None, drop_previous=True, address="head:1")
    assert world.served == target("3")
    world.promote(version=None, address="head:1")
    assert world.served.id == "clip/9"
    world.serve(target("3", name="birds"))
    with pytest.raises(ConfigError, match="serves birds/3; which version of clip"):
        world.promote(version=None, drop_previous=True, address="head:1", target="serve")
    with pytest.raises(ConfigError, match="no Serve of this model is there"):
        world.promote(drop_previous=True, target="none")


def test_keep_previous_is_the_deployments(world):
    world.serve(target("1"), keep_previous=False)
    world.promote(address="head:1")
    assert world.served == target("2")


def test_where_the_export_goes(world):
    elsewhere = target("1").model_copy(update={"uri": "/home/me/export"})
    world.serve(elsewhere)
    with pytest.raises(ConfigError, match="/home/me/export, which is served, .*--model_store"):
        world.promote(address="head:1")
    assert world.promote(address="head:1", model_store="s3://b/models") == 0
    assert "store models:/clip/2 s3://b/models" in world.events


def test_what_deploy_applied_is_kept_true(world):
    world.serve(target("1"))
    owner = world.state / "serve.yaml"
    world.state.mkdir()
    owner.write_text("# mine\n" + yaml.safe_dump(config(target("1"), world.state)))
    world.promote(address="head:1")
    text = owner.read_text()
    assert text.startswith("# mine\n")
    assert places(yaml.safe_load(text))[0].target == target("2", previous="1")


def test_what_deploy_applied_gets_the_applications_of_others(world):
    """Applying a file deletes the applications that it lacks."""
    world.serve(target("1"))
    other = {"name": "other", "import_path": "a:b", "route_prefix": "/other"}
    gone = {**other, "name": "gone", "route_prefix": "/gone"}
    declared = config(target("1"), world.state)
    declared["applications"].append(gone)
    world.live.config["applications"].append(other)
    owner = world.state / "serve.yaml"
    world.state.mkdir()
    owner.write_text("# mine\n" + yaml.safe_dump({**declared, "proxy_location": "HeadOnly"}))
    world.promote(address="head:1")
    written = yaml.safe_load(owner.read_text())
    assert [app["name"] for app in written["applications"]] == ["clip", "other"]
    assert written["applications"][1] == other
    assert written["proxy_location"] == "HeadOnly"


def test_a_damaged_file_of_deploy_is_told_and_stops_nothing(world):
    world.serve(target("1"))
    world.state.mkdir()
    (world.state / "serve.yaml").write_bytes(b"\xff\xfe")
    assert world.promote(address="head:1") == 0
    assert any("serve.yaml still names the old model" in line for line in world.said)
    assert world.events[-1] == "alias clip/2 serve 2"


# ---------------------------------------------------------------------- where it goes


def test_without_a_serve_only_the_alias_moves(world):
    assert world.promote() == 0 == world.promote(target="none", address="head:1")
    assert world.events == []
    assert "clip version 2 is champion (was none)" in world.said[0]


def test_a_serve_of_another_model_keeps_it_unless_told(world, monkeypatch):
    world.serve(target("1", name="birds"))
    monkeypatch.setenv("RAY_ADDRESS", "head:2")
    assert world.promote() == 0
    assert world.events == ["connect head:2"]
    monkeypatch.delenv("RAY_ADDRESS")
    assert "application clip serves birds/1 and keeps it" in world.said[0]
    assert world.promote(target="serve", address="head:2") == 0
    assert world.served.id == "clip/2" and world.served.previous == model("1", "birds")


def test_an_address_for_ray_job_submit_is_not_asked(world, monkeypatch):
    """It is in the environment of whoever uses `ray job submit`."""
    monkeypatch.setenv("RAY_ADDRESS", "http://head:8265")
    monkeypatch.setattr(promotion, "connected", serving.connected)
    assert world.promote() == 0
    assert world.said[0] == "RAY_ADDRESS http://head:8265 is for `ray job submit`; it is not asked"
    with pytest.raises(ConfigError, match="http://head:8265: expected a Ray address"):
        world.promote(address="http://head:8265")


@pytest.mark.parametrize(
    ("more", "error", "message"),
    [
        ({"target": "serve"}, ClusterError, "no Serve runs here; start one .make serve."),
        ({"target": "serve", "address": "h:1"}, ClusterError, "no Serve runs on the Ray at h:1"),
        ({"target": "file"}, ConfigError, "needs --file FILE"),
        ({"target": "rayservice"}, ConfigError, "needs --rayservice"),
        ({"target": "file", "file": "/nowhere.yaml"}, ConfigError, "/nowhere.yaml: cannot read"),
    ],
)
def test_a_destination_that_is_not_there(world, more, error, message):
    with pytest.raises(error, match=message):
        world.promote(**more)
    assert not any(event.startswith(("alias", "roll")) for event in world.events)


@pytest.fixture
def file(world) -> Path:
    path = world.folder / "mine.yaml"
    path.write_text("# mine\n" + yaml.safe_dump(config(target("1"), world.state)))
    return path


def test_without_a_serve_to_ask_a_file_is_rewritten_and_the_alias_waits(world, file):
    assert world.promote(target="file", file=str(file)) == 0
    assert file.read_text().startswith("# mine\n")
    assert places(read_config(file.read_text(), ""))[0].target == target("2", previous="1")
    assert not any(event.startswith("alias") for event in world.events)
    text = "\n".join(world.said)
    assert "no replica was asked whether it serves it" in text
    assert "alias champion was not moved" in text and "again with --address HEAD:6379" in text
    assert "champion is version" not in text
    assert world.history()[-1]["outcome"] == "written, not confirmed"
    assert not (world.state / "promotion/lease").exists() or not os.listdir(
        world.state / "promotion/lease"
    )


def test_the_same_command_with_an_address_confirms_it_and_moves_the_alias(world, file):
    world.promote(target="file", file=str(file))
    text = file.read_text()
    world.serve(places(yaml.safe_load(text))[0].target)  # somebody has applied it
    assert world.promote(target="file", file=str(file), address="head:1") == 0
    assert file.read_text() == text
    assert world.served == target("2", previous="1")
    assert world.events[-2:] == ["roll out clip/2", "alias clip/2 file 2"]
    outcomes = [line["outcome"] for line in world.history()]
    assert outcomes == ["written, not confirmed", "promoted"]


def test_a_file_goes_to_the_running_serve_too(world, file):
    world.serve(target("1"))
    assert world.promote(target="file", file=str(file), address="head:1") == 0
    assert "roll out clip/2" in world.events and world.served.id == "clip/2"
    assert "version: '2'" in file.read_text()


def test_a_file_is_left_alone_where_the_rollout_fails(world, file):
    world.serve(target("1"))
    world.refuse = "roll out"
    before = file.read_bytes()
    with pytest.raises(RolloutError):
        world.promote(target="file", file=str(file), address="head:1")
    assert file.read_bytes() == before


def test_two_at_once_without_a_ray(world, file):
    with (
        held_lease(LocalStore(world.state / "promotion")),
        pytest.raises(
            RolloutError, match=f"another promotion is under way, by process {os.getpid()}"
        ),
    ):
        world.promote(target="file", file=str(file))
    assert "version: '1'" in file.read_text()
    assert world.promote(target="file", file=str(file)) == 0


class Service:
    """A RayService whose operator applies what is written, or does not."""

    def __init__(self, world: World, obeys: bool = True) -> None:
        self.where = "RayService clip"
        self.text = "# in the cluster\n" + yaml.safe_dump(config(target("1"), world.state))
        self.version, self.world, self.obeys = 1, world, obeys

    def read(self) -> tuple[str, str]:
        return self.text, str(self.version)

    def write(self, text: str, version: str | None) -> None:
        assert version in (None, str(self.version))
        self.text, self.version = text, self.version + 1
        self.world.events.append(f"patch {places(yaml.safe_load(text))[0].target.id}")
        if self.obeys and self.world.live:
            self.world.live.config = yaml.safe_load(text)


@pytest.fixture
def service(world, monkeypatch) -> Service:
    made = Service(world)

    def confirm(live, place, timeout_s):
        world.events.append(f"confirm {place.target.id}")
        if places(live.config)[0].target != place.target:
            raise RolloutError("not every replica serves it")
        return ["a", "b"]

    monkeypatch.setattr(promotion, "RayService", lambda name: made)
    monkeypatch.setattr(promotion, "confirm", confirm)
    monkeypatch.setattr(promotion, "restored", lambda live, before, place: "rolled back")
    return made


def test_a_rayservice_is_patched_and_confirmed(world, service):
    world.serve(target("1"))
    assert world.promote(target="rayservice", rayservice="clip", address="h:1") == 0
    assert world.events[-3:] == ["patch clip/2", "confirm clip/2", "alias clip/2 rayservice 2"]
    assert service.text.startswith("# in the cluster\n")


def test_a_rayservice_gets_its_old_config_back(world, service):
    world.serve(target("1"))
    service.obeys = False
    before = service.text
    with pytest.raises(RolloutError, match="not every replica serves it\nrolled back"):
        world.promote(target="rayservice", rayservice="clip", address="h:1")
    assert service.text == before
    assert not any(event.startswith("alias") for event in world.events)


def test_a_rayservice_without_an_address_is_only_patched(world, service):
    assert world.promote(target="rayservice", rayservice="clip") == 0
    assert world.events[-1] == "patch clip/2"
    assert world.history()[-1]["outcome"] == "written, not confirmed"
    world.serve(target("2", previous="1"))  # the operator has applied it
    assert world.promote(target="rayservice", rayservice="clip", address="h:1") == 0
    assert world.events[-2:] == ["confirm clip/2", "alias clip/2 rayservice 2"]


# ---------------------------------------------------------------------- --check


@pytest.mark.parametrize(("version", "status"), [("2", 0), ("1", 1)])
def test_check_compares_the_alias_with_every_replica(world, version, status):
    world.serve(target(version))
    assert check(world.request(address="h:1"), world.said.append) == status
    digest = version * 12
    assert world.said[:4] == [
        "alias champion     clip/2  222222222222",
        f"the running Serve  clip/{version}  {digest}",
        f"replica a          clip/{version}  {digest}  ready",
        f"replica b          clip/{version}  {digest}  ready",
    ]
    assert world.said[4] == ("all the same" if status == 0 else "not all are what champion names")


def test_check_of_a_file(world, file):
    assert check(world.request(target="file", file=str(file)), world.said.append) == 1
    assert world.promote(target="file", file=str(file)) == 0
    # The fake's alias names version 2 in any case.
    assert check(world.request(target="file", file=str(file)), world.said.append) == 0


def test_check_without_anything_to_ask(world):
    with pytest.raises(ClusterError, match="no Serve runs here"):
        check(world.request(), world.said.append)
