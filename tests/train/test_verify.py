"""The proof that a journal holds the plan's samples, and the passes that it counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from clip_ray.config import Config
from clip_ray.config.load import dump_config
from clip_ray.data.manifest import build_manifest
from clip_ray.data.plan import Plan, samples_digest
from clip_ray.storage import LocalStore
from clip_ray.train.rundir import build_plan, write_manifest
from clip_ray.train.verify import Proof, verify
from tests.data.shard_files import pairs, write_tar

G = 8
SIZES = (24, 40)


def journalled(folder: Path, sources: list[dict[str, Any]], steps: int) -> tuple[LocalStore, Plan]:
    """Return a run over two sources of 24 and 40 samples whose journal has that many steps."""
    for name, size in zip("ab", SIZES, strict=True):
        members = [(f"{name}{n}", data) for n, data in pairs(size)]
        write_tar(folder / f"{name}.tar", members)
    tree = {
        "data": {"sources": sources, "holdout": 0.0, "slot": 4, "window": 4},
        "train": {"steps": steps, "global_batch": G},
        "model": {"name": "ViT-micro-8-32"},
    }
    config = Config.model_validate(tree)
    store = LocalStore(folder / "run")
    store.write("config.yaml", dump_config(config).encode())
    plan = build_plan(write_manifest(store, build_manifest(config.data), config), config)
    lines = []
    for step in range(steps):
        rows = plan.step_rows(step)
        digest = f"{samples_digest(rows.shard, rows.place):016x}"
        lines.append(json.dumps({"step": step + 1, "attempt": 1, "samples_digest": digest}))
    store.write("metrics.jsonl", ("\n".join(lines) + "\n").encode())
    return store, plan


def sources(folder: Path, *options: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"path": str(folder / f"{name}.tar"), **given}
        for name, given in zip("ab", options, strict=True)
    ]


def lines_of(proof: Proof) -> list[str]:
    return proof.as_text().splitlines()


def test_passes_over_a_pool_of_all_sources(tmp_path: Path) -> None:
    # 64 samples in steps of 8: 20 steps are two passes and a half.
    run, _ = journalled(tmp_path, sources(tmp_path, {}, {}), 20)
    proof = verify(run)
    assert proof.holds and proof.passes == (2,) and proof.beyond == 0
    assert lines_of(proof)[-1].startswith("2 complete passes over all sources, each sample once")


def test_passes_of_each_source_with_weights(tmp_path: Path) -> None:
    given = sources(tmp_path, {"weight": 3.0, "max_passes": 9}, {"weight": 1.0})
    run, plan = journalled(tmp_path, given, 20)
    proof = verify(run)
    # Of 160 samples 120 are of the first source, 40 of the second.
    assert proof.holds and proof.passes == (5, 1)
    assert lines_of(proof)[-2:] == [
        f"{passes} complete passes over data.sources[{i}] {given[i]['path']}, "
        "each sample once in each of them"
        for i, passes in enumerate((5, 1))
    ]


def test_a_source_is_spent_after_its_last_pass(tmp_path: Path) -> None:
    given = sources(tmp_path, {"weight": 3.0, "max_passes": 2}, {"weight": 1.0, "max_passes": 2})
    run, _ = journalled(tmp_path, given, 16)
    proof = verify(run)
    assert proof.holds and proof.passes == (2, 2)


def test_more_passes_than_allowed_are_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = sources(tmp_path, {"weight": 3.0, "max_passes": 2}, {"weight": 1.0})
    run, _ = journalled(tmp_path, given, 16)
    endless = sources(tmp_path, {"weight": 3.0}, {"weight": 1.0})
    _, plan = journalled(tmp_path / "other", sources_in(tmp_path, endless), 16)
    # As if the plan went on with a source that is spent.
    monkeypatch.setattr("clip_ray.train.verify.build_plan", lambda *_: plan)
    proof = verify(run)
    assert not proof.holds and proof.beyond > 0
    assert any("beyond max_passes" in line for line in lines_of(proof))


def sources_in(folder: Path, given: list[dict[str, Any]]) -> list[dict[str, Any]]:
    (folder / "other").mkdir()
    return [{**one, "path": one["path"].replace(str(folder), f"{folder}/other")} for one in given]


def test_another_sample_in_a_step_is_wrong(tmp_path: Path) -> None:
    run, _ = journalled(tmp_path, sources(tmp_path, {}, {}), 5)
    text = run.read("metrics.jsonl").decode().splitlines()
    row = json.loads(text[2])
    text[2] = json.dumps({**row, "samples_digest": "0" * 16})
    run.write("metrics.jsonl", ("\n".join(text) + "\n").encode())
    proof = verify(run)
    assert not proof.holds and proof.wrong == (3,)
