"""When a group of workers makes way for another; the cluster is made up."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from clip_ray.config import ClusterConfig
from clip_ray.runtime import cluster as sharing
from clip_ray.runtime import room
from clip_ray.runtime.cluster import Share
from clip_ray.runtime.room import AGAIN_S, LOOK_S, SETTLE_S, TRY_S, Room


class Cluster:
    """A cluster of nodes of 2 CPUs, its clock, and the placement groups that were asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.nodes, self.leaving, self.now, self.free = ["a", "b"], set(), 0.0, True
        self.at_ms = 0
        self.dealing: set[str] = set()
        self.asked: list[int] = []
        self.held = 0
        monkeypatch.setattr(room.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(room, "leaving_nodes", lambda: dict.fromkeys(self.leaving, self.at_ms))
        monkeypatch.setattr(room, "job_actors", lambda *of: [(n, 7) for n in self.dealing])
        monkeypatch.setattr(room.time, "time", lambda: 1000.0)
        context = SimpleNamespace(get_node_id=lambda: "driver")
        monkeypatch.setattr(room.ray, "get_runtime_context", lambda: context)
        monkeypatch.setattr(room.ray, "nodes", self.all)
        monkeypatch.setattr(sharing, "usable_nodes", self.usable)
        monkeypatch.setattr(room, "placement_group", self.place)
        monkeypatch.setattr(room, "remove_placement_group", self.remove)

    def all(self):
        return [
            {"NodeID": name, "NodeManagerAddress": f"host-{name}", "Resources": {"CPU": 2.0}}
            for name in self.nodes
        ]

    def usable(self):
        return [node for node in self.all() if node["NodeID"] not in self.leaving]

    def place(self, bundles):
        self.asked.append(len(bundles))
        self.held += 1
        return self

    def wait(self, timeout):
        return self.free

    def remove(self, group):
        self.held -= 1


@pytest.fixture
def cluster(monkeypatch) -> Cluster:
    monkeypatch.setenv("RAY_ADDRESS", "somewhere:6379")
    return Cluster(monkeypatch)


def made(workers: int, most: int) -> Room:
    # 2 nodes of 2 CPUs are room for 3 workers and 1 CPU of reading.
    return Room(ClusterConfig(num_workers=(1, most)), Share(workers, 1, 0, 1, threads=1))


def until(found: Room, cluster: Cluster, seconds: float, nodes: set[str]) -> str:
    end = cluster.now + seconds
    while cluster.now < end:
        cluster.now += LOOK_S
        why = found.why_yield(nodes)
        if why:
            return why
    return ""


def test_a_group_that_fills_the_cluster_stays(cluster):
    assert until(made(3, 8), cluster, 100, {"a", "b"}) == ""
    assert until(made(2, 2), cluster, 100, {"a", "b"}) == ""
    assert cluster.asked == []


def test_room_that_stays_is_taken(cluster):
    found = made(3, 8)
    cluster.nodes += ["c", "d"]
    begun = cluster.now
    assert until(found, cluster, 100, {"a", "b"}) == "there is room for 7 workers"
    assert cluster.now - begun > SETTLE_S
    assert cluster.asked == [4] and cluster.held == 0


def test_a_node_that_comes_and_goes_changes_nothing(cluster):
    found = made(3, 8)
    cluster.nodes.append("c")
    assert until(found, cluster, SETTLE_S - 2, {"a"}) == ""
    cluster.nodes.remove("c")
    assert until(found, cluster, 100, {"a"}) == "" and cluster.asked == []


def test_room_that_others_take_is_tried_for_seldom_and_with_fewer(cluster):
    found = made(3, 8)
    cluster.nodes += ["c", "d"]
    cluster.free = False
    assert until(found, cluster, SETTLE_S + TRY_S + 6, {"a"}) == ""
    assert cluster.asked == [4] and cluster.held == 0
    assert until(found, cluster, AGAIN_S / 2, {"a"}) == "" and cluster.asked == [4]
    cluster.free = True
    assert until(found, cluster, 2 * AGAIN_S, {"a"}) == "there is room for 5 workers"
    assert cluster.asked == [4, 2] and cluster.held == 0


def test_a_node_that_is_to_go_is_left_if_a_worker_is_on_it(cluster):
    cluster.leaving = {"b"}
    assert until(made(3, 3), cluster, 100, {"a"}) == ""
    assert until(made(3, 3), cluster, 100, {"a", "b"}) == "node host-b is to be taken away"


def test_a_node_that_deals_the_data_is_left_too(cluster):
    cluster.leaving = cluster.dealing = {"b"}
    why = until(made(3, 3), cluster, 100, {"a"})
    assert why == "node host-b, which deals the data, is to be taken away"
    cluster.dealing = {"a"}
    assert until(made(3, 3), cluster, 100, {"a"}) == ""


@pytest.mark.parametrize(("at_ms", "left"), [(0, None), (1_030_000, 30.0)])
def test_the_time_that_is_left_is_known_where_somebody_said_it(cluster, at_ms, left):
    found = made(3, 3)
    cluster.leaving, cluster.at_ms = {"b"}, at_ms
    assert until(found, cluster, 10, {"b"}) and found.left_s == left


def test_that_the_jobs_own_node_goes_is_said_once(cluster):
    found = made(3, 3)
    assert until(found, cluster, 5, {"a", "b"}) == found.driver_goes() == ""
    cluster.nodes.append("driver")
    cluster.leaving, cluster.at_ms = {"driver"}, 1_030_000
    assert until(found, cluster, 5, {"a", "b"}) == ""
    assert found.driver_goes() == "node host-driver, which this job runs on, is to be taken away"
    assert found.left_s == 30 and found.driver_goes() == ""
    assert until(found, cluster, 100, {"a", "b"}) == ""


def test_a_ray_of_our_own_does_not_change(cluster, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS")
    cluster.leaving = {"b"}
    assert until(made(3, 8), cluster, 100, {"a", "b"}) == ""
