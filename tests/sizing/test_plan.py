"""A plan's arithmetic: by hand, by dumber computations, and against what the code really does."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from clip_ray.config import Config
from clip_ray.contrastive import clip_loss, siglip_loss
from clip_ray.errors import ConfigError
from clip_ray.sizing import Assumptions, Plan, plan
from clip_ray.sizing.calibration import executed_flops, rate
from clip_ray.sizing.counts import count
from clip_ray.sizing.gpus import GB, GPUS, Cluster, Gpu, parse_gpus
from clip_ray.sizing.memory import memory_of, row_bytes
from clip_ray.sizing.plan import checkpoint_bytes, loss_flops
from clip_ray.storage import open_store
from clip_ray.train.checkpoint import Checkpoints, Commit
from clip_ray.train.state import build_state, snapshot


def config_of(
    model: str = "ViT-B-32", sections: dict[str, Any] | None = None, **train: Any
) -> Config:
    length = {} if {"samples", "passes", "steps"} & train.keys() else {"steps": 1000}
    settings = {"global_batch": 32768, "precision": "bf16", **length, **train}
    return Config.model_validate({"model": {"name": model}, "train": settings, **(sections or {})})


def cluster_of(text: str, **machine: Any) -> Cluster:
    gpus, gpu = parse_gpus(text)
    return Cluster(gpus, gpu, replace(gpu.machine, **machine))


def planned(text: str, config: Config | None = None, **assumed: Any) -> Plan:
    return plan(config or config_of(), cluster_of(text), Assumptions(**assumed))


# Memory


def test_memory_by_hand() -> None:
    config = config_of("ViT-micro-8-32", global_batch=1024, precision="fp32")
    pair = count(config.model)
    memory = memory_of(config, pair, cluster_of("4xA100-40"), 256)
    P = pair.parameters
    assert (memory.weights, memory.gradients, memory.moments) == (4 * P, 4 * P, 8 * P)
    assert memory.samples == 256 * (3 * 32 * 32 + 4 * 16)
    # 17 positions of width 32 and 16 of width 32, hidden 128, 1 block, 2 heads, all in float32:
    # streams 2, linear inputs 6, hidden 2; log-sum-exps and statistics.
    block = (17 + 16) * (4 * (8 * 32 + 2 * 128) + 4 * 2 + 16)
    ends = 4 * 3 * 32 * 32 + 2 * 4 * 17 * 32
    working = 17 * (8 * 32 + 2 * 128 * 4)
    assert memory.activations == 256 * (block + ends + working)
    # Features, their gradients; text of all: gathered, cut out, two gradients. Logits are kept.
    features = 4 * 32 * (4 * 256 + 4 * 1024)
    assert memory.loss == features + 4 * 256 * 1024 * (1 + 4)
    assert memory.reserve == 2e9 + 0.06 * 40e9 and memory.available == 40e9
    assert memory.needed == pytest.approx(
        16 * P + memory.samples + memory.activations + memory.loss + memory.reserve
    )


def test_bf16_keeps_copies_of_the_weights_and_half_of_the_activations() -> None:
    config, cluster = config_of(), cluster_of("64xH100")
    pair = count(config.model)
    bf16 = memory_of(config, pair, cluster, 256)
    fp32 = memory_of(config_of(precision="fp32"), pair, cluster, 256)
    assert bf16.weights == 1.5 * fp32.weights
    assert 0.5 < bf16.activations / fp32.activations < 0.6  # the residual stream stays float32


def test_frozen_towers_hold_no_gradients_moments_and_activations() -> None:
    cluster = cluster_of("8xA100-80")
    pair = count(config_of().model)
    free = memory_of(config_of(), pair, cluster, 512)
    locked = memory_of(config_of(sections={"init": {"freeze": ["image"]}}), pair, cluster, 512)
    assert locked.weights == free.weights
    text = pair.text.parameters + 1
    assert (locked.gradients, locked.moments) == (4 * text, 8 * text)
    assert locked.activations < 0.6 * free.activations


def test_logits_are_tiled_beyond_what_is_kept() -> None:
    config, pair = config_of(global_batch=65536), count(config_of().model)
    memory = memory_of(config, pair, cluster_of("4xH200"), 16384)
    assert 4 * 16384 * 65536 > 1 << 30
    assert memory.loss - 16 * 512 * (16384 + 65536) == 4 * (256 << 20)


@pytest.mark.parametrize("gpus", ["8xA100-40", "16xL4", "64xH100", "3xV100", "2xT4"])
@pytest.mark.parametrize("model", ["ViT-B-32", "ViT-L-14"])
def test_the_micro_batch_is_the_largest_power_of_two_that_fits(gpus: str, model: str) -> None:
    config, cluster = config_of(model), cluster_of(gpus)
    made = plan(config, cluster, Assumptions())
    rows = math.ceil(32768 / cluster.gpus)
    pair = count(config.model)

    def fits(micro: int) -> bool:
        memory = memory_of(config, pair, cluster, micro)
        return memory.needed <= memory.available

    powers = [1 << i for i in range(20) if 1 << i < rows]
    expected = rows if fits(rows) else max(filter(fits, powers), default=1)
    assert made.batch.micro_batch == expected
    assert made.batch.micro_batches == math.ceil(rows / expected)
    assert made.memory == memory_of(config, pair, cluster, expected)
    assert made.memory.needed <= made.memory.available


def test_a_given_micro_batch_is_taken() -> None:
    made = planned("64xH100", config_of(micro_batch=100))
    assert (made.batch.micro_batch, made.batch.micro_batches, made.batch.padded) == (100, 6, 600)
    made = planned("64xH100", config_of(micro_batch=4096))
    assert (made.batch.micro_batch, made.batch.micro_batches) == (512, 1)


# Time


def test_a_step_by_hand() -> None:
    made = planned("64xH100", decode_ms=2.0, price_per_gpu_hour=3.0)
    pair = count(config_of().model)
    assert made.batch.micro_batches == 1
    work = 512 * executed_flops(pair) / rate(GPUS["H100"], pair.forward_flops, "bf16")
    work += 3 * 2 * 512 * 32768 * 512 / (0.5 * 67e12)
    assert made.speed.device_s == pytest.approx(work)
    assert made.speed.step_s == pytest.approx(work + made.network.exposed_s)
    assert made.speed.samples_per_s == pytest.approx(32768 / made.speed.step_s)
    assert made.speed.decode_cpus == pytest.approx(made.speed.samples_per_s * 0.002)
    assert made.speed.data_cpus == 8 * 192 - 64
    assert made.speed.mfu == pytest.approx(
        3 * pair.forward_flops * made.speed.samples_per_s / (64 * 989e12)
    )
    seconds = 1000 * made.speed.step_s + made.commits.size / 4e9
    assert made.hours == pytest.approx(seconds / 3600)
    assert made.cost == pytest.approx(3 * 64 * made.hours)


def test_micro_batches_and_checkpointing_cost_a_forward_pass() -> None:
    pair = count(config_of().model)
    one = planned("64xH100").speed.device_s
    loss = 3 * 2 * 512 * 32768 * 512 / (0.5 * 67e12)
    two = planned("64xH100", config_of(micro_batch=256)).speed.device_s
    again = planned("64xH100", config_of(grad_checkpointing=True)).speed.device_s
    plain = executed_flops(pair)
    assert (two - loss) / (one - loss) == pytest.approx(1 + pair.forward_flops / plain)
    assert 1.30 < (again - loss) / (one - loss) < 1.34


def test_a_given_utilization_is_taken() -> None:
    made = planned("64xH100", utilization=0.4)
    assert made.speed.utilization == 0.4
    assert 0.37 < made.speed.mfu <= 0.4  # the loss and the network take the rest
    assert made.speed.samples_per_s == pytest.approx(
        planned("64xH100", utilization=0.2).speed.samples_per_s * 2, rel=0.05
    )


def test_the_slower_of_gpus_and_decoding_sets_the_step() -> None:
    few = config_of(sections={"cluster": {"data_cpus": 16}})
    made = planned("64xH100", few)
    assert made.speed.step_s == made.speed.decode_s == pytest.approx(32768 * 1.2e-3 / 16)
    assert made.speed.decode_cpus > 16
    assert planned("64xH100").speed.step_s < made.speed.step_s / 2


def test_one_cpu_at_least_decodes() -> None:
    cluster = cluster_of("8xH100", cpus=8)  # as many as workers
    assert plan(config_of(), cluster, Assumptions()).speed.data_cpus == 1


def test_an_image_costs_a_cpu_about_what_is_assumed() -> None:
    """Decode and crop, the largest parts, within a factor of 4; 2 in tests/benchmarks/sizing."""
    from time import process_time

    from clip_ray.images import decode, train_crop
    from tests.pictures import photo

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        data, rng = photo(0, 256), np.random.default_rng(0)
        train_crop(decode(data, 1 << 26), 224, rng)
        begun = process_time()
        for _ in range(100):
            train_crop(decode(data, 1 << 26), 224, rng)
        measured_ms = (process_time() - begun) * 10
    finally:
        torch.set_num_threads(threads)
    assert Assumptions().decode_ms / 4 < measured_ms < Assumptions().decode_ms * 4


@pytest.mark.parametrize(
    ("length", "steps"),
    [({"steps": 7}, 7), ({"samples": 32768 * 3}, 3), ({"samples": 32768 * 3 + 1}, 4)],
)
def test_length(length: dict[str, int], steps: int) -> None:
    assert planned("8xH100", config_of(**length)).steps == steps


def test_a_length_in_passes_is_refused() -> None:
    with pytest.raises(ConfigError, match="train.passes 32.*give --samples"):
        planned("8xH100", config_of(passes=32))


# The loss, and the network


class Products(TorchDispatchMode):
    """Counts the operations of matrix products (torch's own counter misses those in place)."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = function.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_"):
            first, second = args[-2:]
            self.flops += 2 * first.shape[0] * first.shape[1] * second.shape[1]
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("loss", "keep_bytes", "products"), [("clip", None, 3), ("clip", 0, 4), ("siglip", None, 3)]
)
def test_operations_of_the_loss_are_those_that_it_does(
    loss: str, keep_bytes: int | None, products: int
) -> None:
    N, E = 96, 32
    image, text = (torch.randn(N, E, requires_grad=True) for _ in range(2))
    scale, bias = torch.tensor(10.0), torch.tensor(-1.0)
    with Products() as counter:
        if loss == "clip":
            clip_loss(image, text, scale, tile=(40, 96), keep_bytes=keep_bytes).backward()
        else:
            siglip_loss(image, text, scale, bias, tile=(40, 96)).backward()
    assert counter.flops == products * 2 * N * N * E
    model: dict[str, Any] = {"name": "ViT-micro-8-32"}
    if loss == "siglip":
        model["init_logit_bias"] = -10.0
    config = config_of(sections={"model": model}, global_batch=N, loss=loss)
    if keep_bytes is None:
        assert counter.flops == loss_flops(config, N, 1)
    # So many rows that their logits are not kept.
    rows = 20_000
    assert loss_flops(config, rows, 1) == (4 if loss == "clip" else 3) * 2 * rows * rows * E


class Wire:
    """Collectives that write down what they would send, for a world of `size`."""

    def __init__(self, size: int, patch: pytest.MonkeyPatch) -> None:
        self.size, self.sent = size, {"gather": 0.0, "reduce": 0.0, "scatter": 0.0}
        patch.setattr(dist, "is_initialized", lambda: True)
        patch.setattr(dist, "get_world_size", lambda group=None: size)
        patch.setattr(dist, "get_rank", lambda group=None: 0)
        patch.setattr(dist, "all_gather_into_tensor", self.all_gather)
        patch.setattr(dist, "all_reduce", self.all_reduce)
        patch.setattr(dist, "reduce_scatter_tensor", self.reduce_scatter)

    def _count(self, kind: str, rounds: int, tensor: torch.Tensor) -> None:
        self.sent[kind] += rounds * (self.size - 1) / self.size * tensor.nbytes

    def all_gather(self, out: torch.Tensor, mine: torch.Tensor, group: Any = None) -> None:
        out.copy_(mine.repeat(self.size, *[1] * (mine.ndim - 1)))
        self._count("gather", 1, out)

    def all_reduce(self, tensor: torch.Tensor, op: Any = None, group: Any = None) -> None:
        self._count("reduce", 2, tensor)

    def reduce_scatter(self, out: torch.Tensor, whole: torch.Tensor, group: Any = None) -> None:
        out.copy_(whole[: len(out)])
        self._count("scatter", 1, whole)


@pytest.mark.parametrize("loss", ["clip", "siglip"])
@pytest.mark.parametrize("masked", [False, True])
def test_bytes_of_the_loss_are_those_that_it_sends(
    loss: str, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    W, rows, E = 4, 50, 32
    wire = Wire(W, monkeypatch)
    image, text = (torch.randn(rows, E, requires_grad=True) for _ in range(2))
    identities = torch.arange(2 * rows).view(rows, 2) if masked else None
    if loss == "clip":
        clip_loss(image, text, torch.tensor(9.0), identities=identities).backward()
    else:
        siglip_loss(
            image, text, torch.tensor(9.0), torch.tensor(-1.0), identities=identities
        ).backward()
    model = {"name": "ViT-micro-8-32"}
    if loss == "siglip":
        model["init_logit_bias"] = -10.0
    config = config_of(
        sections={"model": model}, global_batch=W * rows, loss=loss, mask_duplicates=masked
    )
    network = planned("4xH100", config).network
    assert network.gather == wire.sent["gather"]
    assert network.scatter == wire.sent["scatter"]
    # Beside them one scalar, and what rides along.
    assert network.statistics == pytest.approx(wire.sent["reduce"], abs=2 * 4 * 4)


def test_network_by_hand() -> None:
    config = config_of()
    P = count(config.model).parameters
    network = planned("64xH100").network
    once = 63 / 64
    assert network.gradients == pytest.approx(2 * once * 4 * P)
    assert network.pixels == 512 * (3 * 224 * 224 + 4 * 77) == 512 * row_bytes(config)
    speed = 0.7 * 400e9  # 3,200 Gbit/s
    sent = once * 32768 * (4 * 513 + 4 * 512 + 16)
    assert network.loss_s == pytest.approx(sent / speed)
    assert network.gradients_s == pytest.approx(network.gradients / speed)
    assert network.exposed_s == network.loss_s  # the backward pass hides the rest
    # On one machine its links carry it all.
    inside = planned("8xH100").network
    assert inside.gradients_s == pytest.approx(2 * 7 / 8 * 4 * P / (0.7 * 450e9))
    alone = planned("1xH100").network
    assert alone.gather == alone.scatter == alone.gradients == alone.exposed_s == 0


def test_gradients_that_the_backward_pass_does_not_hide_are_waited_for() -> None:
    slow = plan(config_of(global_batch=512), cluster_of("64xH100", network_gbit=10), Assumptions())
    hidden = slow.speed.device_s * 2 / 3
    assert slow.network.gradients_s > hidden
    assert slow.network.exposed_s == pytest.approx(
        slow.network.loss_s + slow.network.gradients_s - hidden
    )


# Nodes and commits


def test_a_node_by_hand() -> None:
    made = planned("64xA100-40")
    cpus = (8 * 96 - 64) / 8
    assert made.node.object_store == (8 + 3 * (cpus + 8)) * (40 << 20) / 0.5
    assert made.node.object_store_there == 200 * GB < 0.3 * 1237 * GB
    windows = 8 * (4e9 + 1.5 * 8 * 512 * row_bytes(config_of()))
    assert made.node.needed == pytest.approx(windows + 200e9 + made.commits.size)
    small = plan(config_of(), cluster_of("64xA100-40", memory=100 * GB), Assumptions())
    assert small.node.object_store_there == 30 * GB


def folder_bytes(folder: Path) -> int:
    return sum(os.path.getsize(Path(top, f)) for top, _, files in os.walk(folder) for f in files)


@pytest.mark.parametrize("freeze", [[], ["image"]])
def test_a_checkpoint_is_as_large_as_a_real_one(freeze: list[str], tmp_path: Path) -> None:
    config = config_of("ViT-tiny-8-64", sections={"init": {"freeze": freeze}})
    model, optimizer = build_state(config)
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    optimizer.step()
    checkpoints = Checkpoints(open_store(str(tmp_path)))
    attempt = checkpoints.begin_attempt({})
    checkpoints.write(Commit(1, attempt), snapshot(model, optimizer))
    real = folder_bytes(tmp_path / "checkpoints")
    pair = count(config.model)
    assert checkpoint_bytes(pair, config) == pytest.approx(real, rel=3e-4)
    assert real != pytest.approx(12.1 * pair.parameters, rel=3e-4)  # it could tell


def test_commits_by_hand() -> None:
    sections = {"checkpoint": {"every_steps": 300, "keep_last": 2, "keep_every": 500}}
    made = planned("8xH100", config_of(sections=sections), storage_rate=1e9)
    assert made.commits.number == 4  # after 300, 600, 900 steps and at the end
    assert made.commits.kept == 5 * made.commits.size  # 2, the one being written, and 500 and 1000
    assert made.commits.write_s == made.commits.size / 1e9


# GPU types


@pytest.mark.parametrize(
    ("text", "count_of", "name"),
    [
        ("64xH100", 64, "H100"),
        ("8xa100-80", 8, "A100-80"),
        ("8xA100-80GB", 8, "A100-80"),
        ("2xrtx4090", 2, "RTX-4090"),
        ("H200", 1, "H200"),
    ],
)
def test_gpus_are_read(text: str, count_of: int, name: str) -> None:
    found = parse_gpus(text)
    assert (found[0], found[1].name) == (count_of, name)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("8xA100", "no GPU type 'A100' is known; known: B200, H200, H100"),
        ("8xTPUv4", "known: "),
        ("8 H100", "known: "),
        ("0xH100", "at least 1 GPU"),
        ("", "known: "),
        ("16xCPU", "a plan is of GPUs"),
        ("cpu", "a plan is of GPUs"),
    ],
)
def test_other_gpus_are_refused(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_gpus(text)


@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)
def test_types_are_plausible(gpu: Gpu) -> None:
    """Units: a figure that is off by a thousand shows, and so does a peak 'with sparsity'."""
    assert 10 * GB < gpu.memory < 300 * GB
    assert 0.2e12 < gpu.bandwidth < 10e12 and 10 * GB < gpu.link <= 900 * GB
    assert gpu.fp32 < (gpu.bf16 or gpu.fp16)
    assert 60 < gpu.fp16 / gpu.bandwidth < 450  # operations for each byte
    assert gpu.machine.gpus in (4, 8) and 8 <= gpu.machine.cpus / gpu.machine.gpus <= 24
