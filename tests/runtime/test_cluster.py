"""How resources are shared out and paths are found; no Ray is started."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from clip_ray.config import ClusterConfig, Config, TrainConfig
from clip_ray.errors import ClusterError
from clip_ray.runtime import cluster
from clip_ray.runtime.cluster import absolute, fit_to_gpus, local_share, missing_readers, share_of
from clip_ray.runtime.train import resolve


def share(cpus: float, gpus: float = 0, wants_gpu: bool = False, **settings):
    return share_of({"CPU": cpus, "GPU": gpus}, [{}], ClusterConfig(**settings), wants_gpu)


def test_workers_take_a_cpu_each_and_data_the_rest():
    found, _ = share(96, num_workers=8)
    assert (found.worker_cpus, found.data_cpus) == (1, 88)
    assert share(96, num_workers=8, data_cpus=10)[0].data_cpus == 10


def test_on_a_small_machine_workers_take_less_than_a_cpu():
    found, _ = share(2, num_workers=2)
    assert (found.worker_cpus, found.data_cpus) == (0.5, 1)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(cpus=2, num_workers=5), "asked: 5 workers x 0.25 CPU, and 1 CPU for data; 2 CPUs"),
        (dict(cpus=4, num_workers=4, cpus_per_worker=1), "asked: 4 workers x 1 CPU"),
        (dict(cpus=9, gpus=1, num_workers=2, wants_gpu=True), "1 GPUs are free, on 1 nodes"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_numbers(settings, words):
    found, problem = share(**settings)
    assert found is None
    assert words in problem and "lower cluster.num_workers" in problem


@pytest.mark.parametrize(
    ("cpus", "gpus", "workers"),
    [(9, 8, 4), (9, 3, 3), (9, 2, 2), (3.5, 8, 2), (2, 8, 2)],
)
def test_a_range_takes_as_many_workers_as_there_is_room_for(cpus, gpus, workers):
    found, _ = share(cpus, gpus, wants_gpu=True, num_workers=(2, 4))
    assert found.num_workers == workers
    # Less than a CPU each is for the least number alone.
    assert found.worker_cpus == (1 if cpus > 3 else 0.5)


def test_less_than_the_least_of_a_range_is_refused():
    found, problem = share(9, 1, wants_gpu=True, num_workers=(2, 4))
    assert found is None and "asked: 2 workers" in problem


@pytest.mark.parametrize(
    ("nodes", "gpu", "workers", "tries"),
    [
        # 4 of 2 CPUs fit on four nodes of 3.9, though the sum is enough for 7.
        ([{"CPU": 3.9}] * 4, False, 4, [7, 4]),
        ([{"CPU": 8.0, "GPU": 2.0}] * 3 + [{"CPU": 3.0, "GPU": 8.0}], True, 7, [8, 7]),
        ([{"CPU": 20.0}], False, 8, [8]),
        ([{"CPU": 1.9}] * 8, False, None, [7]),
    ],
)
def test_room_is_looked_for_once_more_not_once_a_worker(monkeypatch, nodes, gpu, workers, tries):
    tried: list[int] = []

    def has_room(share: cluster.Share) -> bool:
        tried.append(share.num_workers)
        return share.num_workers <= cluster.taken_by_nodes(nodes, share)

    monkeypatch.setattr(cluster, "usable_nodes", lambda: [{}] * len(nodes))
    monkeypatch.setattr(cluster, "free_by_node", lambda: nodes)
    monkeypatch.setattr(cluster, "_has_room", has_room)
    config = ClusterConfig(num_workers=(2, 8), cpus_per_worker=2)
    found, problem = cluster._share_with_room(config, gpu)
    assert (found and found.num_workers, tried) == (workers, tries)
    assert bool(problem) == (workers is None)


@pytest.mark.parametrize(
    ("free", "given_back_s", "workers", "data_cpus"),
    [
        # Two of six CPUs come back after 3 s: another worker, or more reading.
        (lambda now: 4 if now < 3 else 6, 10.0, 3, 3),
        (lambda now: 4 if now < 3 else 6, 0.0, 3, 1),
        (lambda now: 2 if now < 3 else 6, 10.0, 3, 3),
        (lambda now: 2 if now < 3 else 6, 0.0, 1, 1),
        (lambda now: 2, 10.0, 1, 1),  # another job has the others, and keeps them
    ],
)
def test_the_next_group_waits_for_what_the_last_one_gives_back(
    monkeypatch, free, given_back_s, workers, data_cpus
):
    now = [0.0]
    monkeypatch.setattr(cluster.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(cluster.time, "sleep", lambda s: now.__setitem__(0, now[0] + s))
    monkeypatch.setattr(cluster, "usable_nodes", lambda: [{"Resources": {"CPU": 6.0}}])
    monkeypatch.setattr(cluster, "free_resources", lambda: {"CPU": float(free(now[0]))})
    monkeypatch.setattr(cluster, "_has_room", lambda share: True)
    config = ClusterConfig(num_workers=(1, 3), cpus_per_worker=1)
    found = cluster.wait_for_share(config, False, 60, given_back_s)
    assert (found.num_workers, found.data_cpus) == (workers, data_cpus)
    assert now[0] <= given_back_s


def test_with_a_label_the_run_waits_for_nodes_that_have_it():
    def node(name: str, gpus: float, **labels: str) -> dict[str, object]:
        resources = {"CPU": 32.0} | ({"GPU": gpus} if gpus else {})
        return {"NodeID": name, "Alive": True, "Resources": resources, "Labels": labels}

    config = ClusterConfig(num_workers=8, data_cpus=40, data_label="role=decode")
    found, _ = share_of({"CPU": 96, "GPU": 8}, [], config, True)
    nodes = [node("a", 8), node("b", 0, role="decode")]
    assert "asked: 40 CPU for data on nodes with the label role=decode; there are 32" in (
        missing_readers(found, config, nodes)
    )
    assert missing_readers(found, config, [*nodes, node("c", 0, role="other")]) != ""
    assert missing_readers(found, config, [*nodes, node("c", 0, role="decode")]) == ""
    free = config.model_copy(update={"data_label": None})
    assert missing_readers(found, free, []) == ""


def test_a_local_ray_is_told_what_it_needs():
    found = local_share(ClusterConfig(num_workers=3), wants_gpu=False)
    assert found.worker_cpus == 1 and found.data_cpus >= 1 and found.threads >= 1


@pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="Linux's")
@pytest.mark.parametrize("gpus", [0, 1])
def test_a_local_ray_waits_for_its_turn_unless_gpus_wait_for_it(monkeypatch, tmp_path, gpus):
    found: list[int] = []
    monkeypatch.setattr(cluster.ray, "init", lambda **given: found.append(os.sched_getscheduler(0)))
    for name in ("RAY_AUTH_TOKEN_PATH", "RAY_TMPDIR"):
        monkeypatch.setenv(name, "")  # put back afterwards
    cluster._start_local(cluster.Share(2, 1, gpus, 2, threads=1), 0.5, tmp_path)
    assert found == [os.SCHED_OTHER if gpus else os.SCHED_BATCH]
    assert os.sched_getscheduler(0) == os.SCHED_OTHER


def test_a_local_ray_inherits_its_settings_and_the_driver_keeps_none_of_them(monkeypatch, tmp_path):
    for name in ("RAY_AUTH_TOKEN_PATH", "RAY_TMPDIR", *cluster.LOCAL_ENVIRONMENT):
        monkeypatch.setenv(name, "")  # put back afterwards
    chosen, *others = cluster.LOCAL_ENVIRONMENT
    for name in others:
        monkeypatch.delenv(name)
    inherited: dict[str, str] = {}

    def init(**given: Any) -> None:
        inherited.update(os.environ)
        raise RuntimeError("no room")

    monkeypatch.setattr(cluster.ray, "init", init)
    with pytest.raises(ClusterError, match="no room"):
        cluster._start_local(cluster.Share(2, 1, 0, 2, threads=1), 0.5, tmp_path)
    wanted = cluster.LOCAL_ENVIRONMENT | {chosen: ""}  # what the user set stays
    assert {name: inherited[name] for name in wanted} == wanted
    assert os.environ[chosen] == "" and not set(others) & os.environ.keys()


@pytest.fixture
def config() -> Config:
    return Config(train=TrainConfig(steps=1), cluster=ClusterConfig(num_workers=2))


@pytest.mark.parametrize(("gpus", "workers", "takes"), [(0, 2, False), (1, 1, True), (4, 2, True)])
def test_gpus_are_used_where_they_are(monkeypatch, config, gpus, workers, takes):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(cluster, "_gpu_count", lambda _: gpus)
    said: list[str] = []
    fitted, takes_gpu = fit_to_gpus(config, said.append)
    assert (fitted.cluster.num_workers, takes_gpu) == (workers, takes)
    assert bool(said) == (workers != 2)


def test_gpus_that_are_not_there_are_refused(monkeypatch, config):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(cluster, "_gpu_count", lambda _: 1)
    train = config.train.model_copy(update={"device": "cuda"})
    with pytest.raises(ClusterError, match="2 workers take a GPU each, torch sees 1"):
        fit_to_gpus(config.model_copy(update={"train": train}), print)


def test_relative_paths_never_resolve_in_rays_package_directory(monkeypatch, tmp_path):
    package = tmp_path / "session" / "working_dir_files" / "_ray_pkg_1"
    package.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(package)
    assert absolute("runs") == str(tmp_path / "home" / "runs")
    assert absolute("/data/a.tar") == "/data/a.tar" and absolute("s3://b/x") == "s3://b/x"
    monkeypatch.chdir(tmp_path)
    assert absolute("runs") == str(tmp_path / "runs")


def test_every_path_of_a_config_is_made_absolute(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    config = Config.model_validate(
        {
            "train": {"steps": 1},
            "data": {"sources": [{"path": "a/*.tar", "select": "keys"}], "exclude": "gone"},
            "tokenizer": {"vocab": "t.json"},
            "eval": {"datasets": ["bundled:starter", "e"]},
            "tracking": {"uri": "sqlite:///m.db"},
        }
    )
    found = resolve(config)
    here = str(tmp_path)
    assert found.run.storage == f"{here}/runs"
    assert found.data.sources[0].path == f"{here}/a/*.tar"
    assert found.data.sources[0].select == f"{here}/keys" and found.data.exclude == f"{here}/gone"
    assert found.tokenizer.vocab == f"{here}/t.json"
    assert found.eval.datasets == (f"{here}/runs/bundled/starter", f"{here}/e")
    assert found.tracking.uri == f"sqlite:///{here}/m.db"
    assert (Path(found.eval.datasets[0]) / "classnames.txt").exists()
    assert resolve(found) == found
