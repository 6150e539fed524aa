"""What is wrong with a plan, each with the way out."""

from __future__ import annotations

import math
from collections.abc import Iterator

from clip_ray.config import Config
from clip_ray.sizing.counts import count
from clip_ray.sizing.gpus import GB, Cluster, Gpu
from clip_ray.sizing.memory import memory_of
from clip_ray.sizing.plan import Plan

SHORT_STEP_S = 0.2
"""Of the published runs of B/32, steps of 0.3 s held the rule (256 samples on each of 344 A100),
steps of 0.13 s reached a third of it (96 samples on each of 824)."""
NETWORK_LIMIT = 0.2  # share of a step that it may wait for the network
PIXELS_LIMIT = 0.5  # share of a machine's network that decoded pixels may fill
VOID_LIMIT = 0.05  # share of the rows that may be padding
LOST_H = 1.0  # hours of work that a crash may cost
DECODE_NODE_CPUS = 32  # of a node that only decodes, as in cluster/


def warnings(plan: Plan, config: Config, cluster: Cluster) -> list[str]:
    """Return what the user should know before money is spent, the worst first."""
    return [
        *_of_memory(plan, config, cluster),
        *_of_batch(plan),
        *_of_precision(config, cluster.gpu),
        *_of_data(plan, cluster),
        *_of_network(plan, cluster),
        *_of_checkpoints(plan, config),
    ]


def _of_memory(plan: Plan, config: Config, cluster: Cluster) -> Iterator[str]:
    memory, micro = plan.memory, plan.batch.micro_batch
    if memory.needed <= memory.available:
        return
    ways = []
    if not config.train.grad_checkpointing:
        train = config.train.model_copy(update={"grad_checkpointing": True})
        pair = count(config.model, train.patch_dropout)
        anew = memory_of(config.model_copy(update={"train": train}), pair, cluster, micro)
        ways.append(f"--train.grad_checkpointing true (then {anew.needed / GB:.0f} GB)")
    if micro > 1:
        ways.append(f"a --train.micro_batch below {micro}")
    yield (
        f"memory: a micro-batch of {micro} needs {memory.needed / GB:.0f} GB, "
        f"{_article(plan.gpu)} has {memory.available / GB:.0f} GB: "
        f"{', '.join([*ways, 'a GPU with more memory'])}"
    )


def _article(name: str) -> str:
    return f"{'an' if name[0] in 'AHLR' else 'a'} {name}"


def _of_batch(plan: Plan) -> Iterator[str]:
    G, W, rows = plan.global_batch, plan.gpus, plan.batch.rows
    if G < W:
        yield (
            f"global batch {G} is too small for {W} GPUs: {W - G} of them get no sample; raise "
            f"--train.global_batch, or take at most {G}"
        )
        return
    void = 1 - G / (rows * W)
    if void > VOID_LIMIT:
        yield (
            f"global batch {G} over {W} GPUs leaves {void:.0%} of the rows void; with "
            f"--train.global_batch {W * (rows - 1)} or {W * rows} none are"
        )
    work_s = plan.speed.device_s
    if work_s < SHORT_STEP_S and W > 1:
        fewer = max(math.floor(W * work_s / SHORT_STEP_S), 1)
        yield (
            f"global batch {G} is too small for {W} GPUs: {rows} samples are {work_s:.2f} s of "
            "work for one, and a published run with such steps reached a third of the speed that "
            f"is expected here; raise --train.global_batch, or take {fewer} GPUs"
        )


def _of_precision(config: Config, gpu: Gpu) -> Iterator[str]:
    if config.train.precision == "bf16" and gpu.bf16 is None:
        yield (
            f"{gpu.name} has no bfloat16 and emulates it slowly (fp32 is reckoned): take another "
            "type, or --train.precision fp32"
        )
    if config.train.precision == "fp32" and gpu.bf16 is not None:
        yield (
            f"--train.precision bf16 needs about half the activations and runs at least twice as "
            f"fast on {_article(gpu.name)}"
        )


def _of_data(plan: Plan, cluster: Cluster) -> Iterator[str]:
    if plan.speed.decode_cpus > plan.speed.data_cpus:
        short = plan.speed.decode_cpus - plan.speed.data_cpus
        nodes = math.ceil(short / DECODE_NODE_CPUS)
        slower = plan.speed.decode_cpus / plan.speed.data_cpus
        yield (
            f"decode-bound: the GPUs would take {plan.speed.decode_cpus:.0f} CPUs' images, "
            f"{plan.speed.data_cpus:.0f} are there, so steps take {slower:.1f} times as long; add "
            f"{nodes} nodes of {DECODE_NODE_CPUS} CPUs that decode, or shrink the pictures once "
            "(jobs/prepare.py --longest_side 256) and give their --decode_ms"
        )
    node, name = plan.node, cluster.machine.name
    if node.object_store > node.object_store_there:
        yield (
            f"object store: blocks under way want {node.object_store / GB:.1f} GB on a node, and "
            f"Ray takes {node.object_store_there / GB:.1f} GB of its memory by default: start Ray "
            "with a larger --object-store-memory, or lower --cluster.data_cpus"
        )
    if node.needed > node.available:
        yield (
            f"main memory: workers with their windows of decoded samples, Ray's object store and "
            f"a checkpoint's copy take {node.needed / GB:.0f} GB, {name} has "
            f"{node.available / GB:.0f} GB: lower --data.window, or take more nodes"
        )


def _of_network(plan: Plan, cluster: Cluster) -> Iterator[str]:
    exposed = plan.network.exposed_s / (plan.speed.device_s + plan.network.exposed_s)
    if exposed > NETWORK_LIMIT:
        yield (
            f"network-bound: a step waits {plan.network.exposed_s:.2f} s for collectives, "
            f"{exposed:.0%} of it; raise --train.global_batch, take a faster network between nodes "
            f"({cluster.machine.network_gbit:g} Gbit/s here), or fewer and larger nodes"
        )
    coming = plan.network.pixels * cluster.workers_of_node / plan.speed.step_s
    limit = PIXELS_LIMIT * cluster.machine.network_gbit / 8 * GB
    if plan.nodes > 1 and coming > limit:
        yield (
            f"decoded pixels are {coming / GB:.1f} GB/s to each node, over half of its network, "
            "where other nodes decode them: keep decoding on the GPUs' own nodes"
        )


def _of_checkpoints(plan: Plan, config: Config) -> Iterator[str]:
    every = config.checkpoint.every_steps
    between = every * plan.speed.step_s
    if plan.commits.write_s > between:
        steps = math.ceil(plan.commits.write_s / plan.speed.step_s)
        yield (
            f"a checkpoint takes {plan.commits.write_s:.0f} s to write and the next is due after "
            f"{between:.0f} s: --checkpoint.every_steps of at least {steps}, or faster storage"
        )
    lost = min(between, plan.steps * plan.speed.step_s)
    if lost > LOST_H * 3600:
        yield (
            f"a crash costs up to {lost / 3600:.1f} h of work: --checkpoint.every_steps "
            f"{_rounded(LOST_H * 3600 / plan.speed.step_s)} makes it about an hour"
        )


def _rounded(steps: float) -> int:
    """Return a number of steps with two digits that count, at least 1."""
    digits = math.floor(math.log10(max(steps, 1))) - 1
    return max(int(round(steps, -digits)) if digits > 0 else round(steps), 1)
