"""Warnings: each fires where it should, says the way out, and is silent where that is taken."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from clip_ray.config import Config
from clip_ray.sizing import Assumptions, plan
from clip_ray.sizing.advice import warnings
from clip_ray.sizing.gpus import GB, Cluster, parse_gpus

GOOD = {
    "model": {"name": "ViT-L-14"},
    "train": {"steps": 10_000, "global_batch": 32768, "precision": "bf16"},
}


def warned(
    gpus: str = "64xH100",
    sections: dict[str, Any] | None = None,
    assumed: dict[str, Any] | None = None,
    **machine: Any,
) -> list[str]:
    merged = {**GOOD, **(sections or {})}
    merged["train"] = {**GOOD["train"], **(sections or {}).get("train", {})}
    config = Config.model_validate(merged)
    count, gpu = parse_gpus(gpus)
    cluster = Cluster(count, gpu, replace(gpu.machine, **machine))
    return warnings(plan(config, cluster, Assumptions(**(assumed or {}))), config, cluster)


def test_a_sound_plan_has_no_warning() -> None:
    assert warned() == []
    assert warned("256xA100-40") == []
    assert warned("1xL40S", {"checkpoint": {"every_steps": 5}}) == []


def only(found: list[str], words: str) -> str:
    """Return the one warning that has the words."""
    matching = [line for line in found if words in line]
    assert len(matching) == 1, found
    return matching[0]


def test_a_micro_batch_that_does_not_fit() -> None:
    line = only(warned(sections={"train": {"micro_batch": 512}}), "memory: a micro-batch of 512")
    assert "an H100 has 80 GB" in line and "--train.grad_checkpointing true (then" in line
    assert "--train.micro_batch below 512" in line
    assert warned(sections={"train": {"micro_batch": 512, "grad_checkpointing": True}}) == []
    assert warned(sections={"train": {"micro_batch": 128}}) == []


def test_a_model_that_does_not_fit_at_all() -> None:
    vision = {"width": 4096, "layers": 48, "heads": 32}
    sections = {"model": {"name": "ViT-L-14", "vision": vision}}
    line = only(warned("64xA100-40", sections), "memory: a micro-batch of 1 ")
    assert "a GPU with more memory" in line and "below" not in line


def test_more_gpus_than_samples() -> None:
    found = warned("64xH100", {"train": {"global_batch": 48}})
    assert "16 of them get no sample" in only(found, "too small for 64 GPUs")
    assert not [w for w in warned("48xH100", {"train": {"global_batch": 48}}) if "no sample" in w]


def test_void_rows() -> None:
    line = only(warned("60xH100", {"train": {"global_batch": 610}}), "of the rows void")
    assert "8%" in line and "600 or 660" in line
    assert not [w for w in warned("60xH100", {"train": {"global_batch": 660}}) if "void" in w]
    assert not [w for w in warned("60xH100") if "void" in w]  # 32768 / 60: 0.2 %


B32 = {"model": {"name": "ViT-B-32"}}


def test_steps_too_short_for_the_world() -> None:
    """The published run that fell to a third of the rule is warned of; the others are not."""
    line = only(
        warned("824xA100-40", B32 | {"train": {"global_batch": 824 * 96}}), "0.13 s of work for one"
    )
    assert "raise --train.global_batch, or take" in line
    fewer = int(line.rsplit("take ", 1)[1].split()[0])
    assert not warned(f"{fewer}xA100-40", B32 | {"train": {"global_batch": 824 * 96}})
    assert not warned("344xA100-40", B32 | {"train": {"global_batch": 344 * 256}})
    assert not warned("1024xA100-40", {"train": {"global_batch": 1024 * 84}})


def test_precision() -> None:
    assert "V100 has no bfloat16" in only(warned("64xV100"), "bfloat16")
    assert not [w for w in warned("64xV100", {"train": {"precision": "fp32"}}) if "precision" in w]
    assert "bf16" in only(warned(sections={"train": {"precision": "fp32"}}), "twice as fast")


def test_decode_bound() -> None:
    line = only(warned("64xH100", B32, cpus=12), "decode-bound")
    assert "32 are there" in line and "nodes of 32 CPUs" in line and "jobs/prepare.py" in line
    assert not [w for w in warned("64xH100", B32, cpus=48) if "decode" in w]
    assert only(warned("64xH100", B32, {"decode_ms": 20}), "decode-bound")
    given = B32 | {"cluster": {"data_cpus": 8}}
    assert "8 are there" in only(warned("64xH100", given), "decode-bound")


def test_the_number_of_decode_nodes_is_enough() -> None:
    line = only(warned("64xH100", B32, cpus=12), "decode-bound")
    nodes = int(line.split("add ")[1].split()[0])
    enough = B32 | {"cluster": {"data_cpus": 32 + 32 * nodes}}
    assert not warned("64xH100", enough, cpus=12)
    fewer = B32 | {"cluster": {"data_cpus": 32 * nodes}}
    assert only(warned("64xH100", fewer, cpus=12), "decode-bound")


def test_an_object_store_that_is_too_small() -> None:
    line = only(warned(memory=100 * GB), "object store")
    assert "49.0 GB" in line and "30.0 GB" in line and "--object-store-memory" in line
    assert not [w for w in warned(memory=500 * GB) if "object store:" in w]
    few = {"cluster": {"data_cpus": 64}}
    assert not [w for w in warned(sections=few, memory=100 * GB) if "object store:" in w]


def test_main_memory() -> None:
    found = warned("8xH100", {"train": {"global_batch": 1 << 18}}, memory=700 * GB)
    assert "--data.window" in only(found, "main memory")
    smaller = {"train": {"global_batch": 1 << 18}, "data": {"slot": 64, "window": 2}}
    assert not [w for w in warned("8xH100", smaller, memory=700 * GB) if "main memory" in w]


def test_network_bound() -> None:
    line = only(warned("64xA100-40", B32 | {"train": {"global_batch": 16384}}, network_gbit=5),
                "network-bound")  # fmt: skip
    assert "5 Gbit/s" in line
    assert not [w for w in warned("64xA100-40", B32) if "network" in w]


def test_pixels_over_the_network() -> None:
    large = B32 | {"train": {"global_batch": 1 << 18}}
    assert only(warned("64xH200", large, network_gbit=25), "decoded pixels")
    assert not [w for w in warned("64xH200", large, network_gbit=100) if "pixels" in w]
    assert not [w for w in warned("8xH200", large, network_gbit=25) if "pixels" in w]  # one node


def test_commits_that_overlap_and_those_too_rare() -> None:
    often = {"checkpoint": {"every_steps": 5}}
    line = only(warned(sections=often), "a checkpoint takes 26 s to write")
    steps = int(line.split("at least ")[1].split(",")[0])
    assert not warned(sections={"checkpoint": {"every_steps": steps}})
    assert not warned(sections=often, assumed={"storage_rate": 5e9})
    seldom = {"checkpoint": {"every_steps": 5000}}
    line = only(warned(sections=seldom), "a crash costs up to 3.9 h")
    steps = int(line.split("every_steps ")[1].split()[0])
    assert not warned(sections={"checkpoint": {"every_steps": steps - 100}})
    assert not warned(sections={"checkpoint": {"every_steps": 1000}})
    short = seldom | {"train": {"steps": 4000}}  # it ends before the first commit is due
    assert only(warned(sections=short), "a crash costs up to 3.1 h")
    assert not warned(sections=seldom | {"train": {"steps": 1000}})


@pytest.mark.parametrize("gpus", ["1xT4", "3xL4", "1000xB200"])
def test_no_plan_fails(gpus: str) -> None:
    for batch in (1, 7, 100_000):
        assert all(warned(gpus, {"train": {"global_batch": batch}}))
