"""A run's directory: who may resume it, how long it is, what it is made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clip_ray.config import Config, SourceConfig
from clip_ray.config.load import field_paths
from clip_ray.data.manifest import Manifest, build_manifest
from clip_ray.errors import CheckpointError, ConfigError
from clip_ray.storage import LocalStore, Store
from clip_ray.train.checkpoint import Checkpoints
from clip_ray.train.rundir import (
    NOT_DEFINING,
    build_plan,
    claim,
    defining,
    prepare,
    read_summary,
    run_store,
    total_steps,
)
from tests.data.shard_files import pairs, write_tar


def config(changes: dict[str, Any] | None = None) -> Config:
    """Return a config with some dotted settings changed."""
    tree: dict[str, Any] = {"train": {"steps": 10, "global_batch": 8}}
    for path, value in (changes or {}).items():
        section = tree
        *parts, last = path.split(".")
        for part in parts:
            section = section.setdefault(part, {})
        section[last] = value
    return Config.model_validate(tree)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return LocalStore(tmp_path / "runs" / "clip")


def test_a_run_lives_under_its_storage_and_name(tmp_path: Path) -> None:
    found = run_store(config({"run.storage": str(tmp_path), "run.name": "a"}))
    assert found.uri == str(tmp_path / "a")
    assert run_store(config({"run.storage": "s3://b/x/"})).uri == "s3://b/x/clip"


def begin(store: Store, chosen: Config) -> None:
    """Claim the directory for a run and begin its first attempt."""
    assert claim(store, chosen) is False
    Checkpoints(store).begin_attempt({"driver": "test"})


def test_a_run_that_has_begun_is_found_again(store: Store) -> None:
    begin(store, config())
    assert claim(store, config()) is True


def test_a_run_that_never_began_may_be_called_anything(store: Store) -> None:
    """A mistyped path must not use up the name."""
    assert claim(store, config({"data.sources": [{"path": "typo.tar"}]})) is False
    store.write("tokenizer.json", b"of the wrong captions")
    assert claim(store, config({"data.sources": [{"path": "right.tar"}]})) is False
    assert b"right.tar" in store.read("config.yaml")
    assert not store.exists("tokenizer.json")


DIFFERENCES: list[dict[str, tuple[Any, Any]]] = [
    {"optim.lr": (5e-4, 1e-3)},
    {"run.seed": (0, 1)},
    {"train.steps": (10, 20)},
    {"train.global_batch": (8, 16)},
    {"train.precision": ("fp32", "bf16")},
    {"data.holdout": (0.01, 0.5)},
    {"data.slot": (None, 8)},
    {"model.vision.layers": (12, 3), "model.text.layers": (12, 2), "optim.clip_norm": (None, 1.0)},
    {"tokenizer.train_vocab": (None, 600)},
]


@pytest.mark.parametrize("difference", DIFFERENCES, ids=lambda d: "+".join(d))
def test_other_settings_are_refused_with_the_difference(
    store: Store, difference: dict[str, tuple[Any, Any]]
) -> None:
    begin(store, config())
    before = store.read("config.yaml")
    with pytest.raises(CheckpointError) as caught:
        claim(store, config({path: new for path, (_, new) in difference.items()}))
    first, *lines, last = str(caught.value).splitlines()
    assert store.uri in first and "--run.name clip-2" in last
    assert lines == [
        f"  {path}: was {old!r}, now {new!r}" for path, (old, new) in sorted(difference.items())
    ]
    assert store.read("config.yaml") == before


def test_other_sources_are_refused(store: Store) -> None:
    begin(store, config({"data.sources": [{"path": "a.tar"}]}))
    with pytest.raises(CheckpointError, match=r"data.sources.0.path: was .*a\.tar.*, now .*b\.tar"):
        claim(store, config({"data.sources": [{"path": "b.tar"}]}))


ALLOWED: dict[str, Any] = {
    "cluster.num_workers": 4,
    "cluster.address": "auto",
    "tracking.uri": "sqlite:///x.db",
    "checkpoint.every_steps": 7,
    "checkpoint.keep_last": 1,
    "eval.batch": 3,
    "run.storage": "elsewhere",
    "run.extend": 5,
    "run.s3.endpoint": "http://other",
    "data.s3.profile": "p",
    "train.micro_batch": 2,
    "train.device": "cpu",
    "train.compile": True,
    "train.grad_checkpointing": True,
    "train.profile_steps": [1, 2],
}


@pytest.mark.parametrize("path", ALLOWED)
def test_what_may_change_is_taken_and_recorded(store: Store, path: str) -> None:
    begin(store, config())
    changed = config({path: ALLOWED[path]})
    assert changed != config()
    assert claim(store, changed) is True
    assert claim(store, config()) is True  # and back
    claim(store, changed)
    key = path.rsplit(".", 1)[-1]
    assert f"{key}:" in store.read("config.yaml").decode()


def test_every_setting_is_defining_unless_it_is_listed() -> None:
    listed = {path for path in field_paths(Config) if path.startswith(NOT_DEFINING)}
    assert defining(config()).keys() == set(field_paths(Config)) - listed
    # Every entry of the list is for something, and none swallows a longer name by its start.
    for entry in NOT_DEFINING:
        own = {path for path in listed if path.startswith(entry)}
        assert own and (entry.endswith(".") or own == {entry})


def test_a_config_of_another_version_is_refused_in_words(store: Store) -> None:
    begin(store, config())
    store.write("config.yaml", store.read("config.yaml") + b"newsection: {a: 1}\n")
    with pytest.raises(CheckpointError, match="(?s)cannot be read by this version.*--run.name"):
        claim(store, config())


@pytest.mark.parametrize(
    ("train", "extend", "steps"),
    [
        ({"steps": 10}, 0, 10),
        ({"steps": 10}, 7, 17),
        ({"samples": 80}, 0, 10),
        ({"samples": 81}, 0, 11),  # rounded up
        ({"samples": 1}, 2, 3),
        ({"passes": 1}, 0, 13),  # 100 samples in steps of 8: 12.5
        ({"passes": 2}, 0, 25),
        ({"passes": 0.01}, 0, 1),
        ({"passes": 1.12}, 1, 15),  # 112 / 8 = 14; 1.12 * 100 is 112.00000000000001 in floats
    ],
)
def test_total_steps(train: dict[str, Any], extend: int, steps: int) -> None:
    tree = {"train": train | {"global_batch": 8}, "run": {"extend": extend}}
    assert total_steps(Config.model_validate(tree), 100) == steps


def manifest(folder: Path, samples: int = 20) -> tuple[Config, Manifest]:
    folder.mkdir(exist_ok=True)
    path = write_tar(folder / "a.tar", pairs(samples))
    made = config(
        {
            "data.sources": [{"path": str(path)}],
            "data.holdout": 0.0,
            "model.name": "ViT-micro-8-32",
            "tokenizer.train_vocab": 520,
        }
    )
    return made, build_manifest(made.data)


def test_prepare_makes_once_and_reads_later(store: Store, tmp_path: Path) -> None:
    made, whole = manifest(tmp_path / "data")
    said: list[str] = []
    first = prepare(store, made, lambda: whole, said.append)
    assert said == ["training a vocabulary of 520 on the captions"]
    assert first.config.model.text.vocab_size == first.tokenizer.vocab_size
    assert (first.total_steps, first.plan.samples_per_pass) == (10, 20)

    def never() -> Manifest:
        raise AssertionError("the manifest is there")

    second = prepare(store, made, never, said.append)
    assert len(said) == 1
    assert second.manifest.digest == first.manifest.digest
    assert second.plan.digest == first.plan.digest
    assert second.config == first.config
    assert second.tokenizer.to_bytes() == first.tokenizer.to_bytes()


def test_the_plan_belongs_to_manifest_seed_and_batch(tmp_path: Path) -> None:
    made, whole = manifest(tmp_path / "data")
    _, other = manifest(tmp_path / "data2", samples=21)
    digests = {
        build_plan(whole, made).digest,
        build_plan(other, made).digest,
        build_plan(whole, config({"run.seed": 1})).digest,
        build_plan(whole, config({"train.global_batch": 4})).digest,
        build_plan(whole, config({"data.slot": 8})).digest,
    }
    assert len(digests) == 5
    assert build_plan(whole, config({"cluster.num_workers": 9})).digest in digests


@pytest.mark.parametrize(
    ("slot", "window", "expected"),
    [
        (None, None, (4, 4)),
        (2, None, (2, 2)),  # not larger than the slot
        (8, None, (8, 4)),
        (None, 2, (4, 2)),
        (None, 8, (8, 8)),  # the slot grows to a multiple of the window
        (None, 3, (3, 3)),
        (8, 2, (8, 2)),
    ],
)
def test_sizes_that_are_not_given_fit_those_that_are(
    tmp_path: Path, slot: int | None, window: int | None, expected: tuple[int, int]
) -> None:
    _, whole = manifest(tmp_path / "data")
    plan = build_plan(whole, config({"data.slot": slot, "data.window": window}))
    assert (plan.slot, plan.window) == expected


def test_a_batch_larger_than_the_data_is_refused(tmp_path: Path) -> None:
    _, whole = manifest(tmp_path / "data")
    with pytest.raises(ConfigError, match="train.global_batch 32 is larger"):
        build_plan(whole, config({"train.global_batch": 32}))


def test_the_layout_deals_all_rows(store: Store, tmp_path: Path) -> None:
    made, whole = manifest(tmp_path / "data")
    run = prepare(store, made, lambda: whole, lambda text: None)
    assert [run.layout(world_size).rows for world_size in (1, 2, 3, 8)] == [8, 4, 3, 1]
    reader = run.reader(3)
    assert reader.layout == run.layout(3) and reader.image_size == 32


def test_the_summary_is_read_back(store: Store) -> None:
    assert read_summary(store) is None
    store.write("summary.json", b'{"steps": 3}')
    assert read_summary(store) == {"steps": 3}


def test_weights_reach_the_plan(tmp_path: Path) -> None:
    """Source weights 3 and 1 of equal sets: three quarters of the samples are of the first."""
    paths = [write_tar(tmp_path / f"{name}.tar", pairs(16)) for name in "ab"]
    sources = [{"path": str(path), "weight": w} for path, w in zip(paths, (3, 1), strict=True)]
    made = config({"data.sources": sources, "data.holdout": 0.0, "data.copies": True})
    assert made.data.sources == (
        SourceConfig(path=str(paths[0]), weight=3),
        SourceConfig(path=str(paths[1]), weight=1),
    )
    plan = build_plan(build_manifest(made.data), made)
    shards = np.concatenate([plan.step_rows(step).shard for step in range(512)])
    assert (shards == 0).mean() == pytest.approx(0.75, abs=0.01)


def test_a_run_that_outlasts_its_sources_is_refused_with_the_arithmetic(tmp_path: Path) -> None:
    """2 x 16 + 1 x 24 samples are 7 steps of 8; in windows of 4 steps the data ends after 4."""
    paths = [
        write_tar(tmp_path / f"{name}.tar", pairs(count)) for name, count in (("a", 16), ("b", 24))
    ]
    caps = (2, 1)
    sources = [
        {"path": str(path), "weight": 1, "max_passes": cap}
        for path, cap in zip(paths, caps, strict=True)
    ]
    made = config({"data.sources": sources, "data.holdout": 0.0, "train.steps": 5})
    whole = build_manifest(made.data)
    with pytest.raises(ConfigError) as caught:
        build_plan(whole, made)
    message = str(caught.value)
    assert "the run has 5 steps of 8 samples" in message and "ends after 4" in message
    assert f"{paths[0]} 2 x 16, {paths[1]} 1 x 24; whole windows of 4 steps" in message
    shorter = config({"data.sources": sources, "data.holdout": 0.0, "train.steps": 4})
    assert build_plan(whole, shorter).steps == 4
    one_free = [sources[0], {**sources[1], "max_passes": None}]
    endless = config({"data.sources": one_free, "data.holdout": 0.0, "train.steps": 500})
    assert build_plan(whole, endless).steps is None
    with pytest.raises(ValueError, match="max_passes 2 of .*: sources without weights are one"):
        config({"data.sources": [{"path": str(paths[0]), "max_passes": 2}]})


def test_a_sparse_selection_is_said_at_each_start(store: Store, tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", pairs(40))
    (tmp_path / "keys").write_text("\n".join(f"{i:05d}" for i in range(10)))
    source = {"path": str(path), "select": str(tmp_path / "keys")}
    made = config({"data.sources": [source], "data.holdout": 0.0})
    said: list[str] = []
    for _ in range(2):
        prepare(store, made, lambda: build_manifest(made.data), said.append)
    assert len(said) == 2 and said[0] == said[1]
    assert said[0].startswith("warning: data.sources[0]") and "leave 10 of 40 samples" in said[0]
