"""What is wrong with a plan, each with the way out."""

from __future__ import annotations

import math
from collections.abc import Iterator

from clip_ray.config import Config
from clip_ray.sizing.counts import count
from clip_ray.sizing.gpus import GB, Gpu, Machine
from clip_ray.sizing.plan import Plan, memory_of

SHORT_STEP_S = 0.2
"""Of the published runs of B/32, steps of 0.3 s held the rule (256 samples on each of 344 A100),
steps of 0.13 s reached a third of it (96 samples on each of 824)."""
NETWORK_LIMIT = 0.2  # share of a step that it may wait for the network
PIXELS_LIMIT = 0.5  # share of a machine's network that decoded pixels may fill
VOID_LIMIT = 0.05  # share of the rows that may be padding
LOST_H = 1.0  # hours of work that a crash may cost
DECODE_NODE_CPUS = 32  # of a node that only decodes, as in cluster/


def warnings(plan: Plan, config: Config, gpu: Gpu, machine: Machine) -> list[str]:
    """Return what the user should know before money is spent, the worst first."""
    return [
        *_of_memory(plan, config, gpu),
        *_of_batch(plan),
        *_of_precision(config, gpu),
        *_of_data(plan, machine),
        *_of_network(plan, machine),
        *_of_checkpoints(plan, config),
    ]


def _of_memory(plan: Plan, config: Config, gpu: Gpu) -> Iterator[str]:
    memory = plan.memory
    if memory.needed <= memory.available:
        return
    ways = []
    train = config.train.model_copy(update={"grad_checkpointing": True})
    anew = config.model_copy(update={"train": train})
    pair = count(config.model, train.patch_dropout)
    if not config.train.grad_checkpointing:
        needed = memory_of(anew, pair, plan.gpus, gpu, plan.micro_batch).needed
        ways.append(f"--train.grad_checkpointing true (then {needed / GB:.0f} GB)")
    if plan.micro_batch > 1:
        ways.append(f"a --train.micro_batch below {plan.micro_batch}")
    yield (
        f"memory: a micro-batch of {plan.micro_batch} needs {memory.needed / GB:.0f} GB of the "
        f"{memory.available / GB:.0f} GB of {_article(gpu.name)}: "
        f"{', '.join([*ways, 'a GPU with more memory'])}"
    )


def _article(name: str) -> str:
    return f"{'an' if name[0] in 'AHLR' else 'a'} {name}"


def _of_batch(plan: Plan) -> Iterator[str]:
    G, W = plan.global_batch, plan.gpus
    if G < W:
        yield (
            f"global batch {G} is too small for {W} GPUs: {W - G} of them get no sample; raise "
            f"--train.global_batch, or take at most {G}"
        )
        return
    void = 1 - G / (plan.rows * W)
    if void > VOID_LIMIT:
        whole = G // (plan.rows - 1) if plan.rows > 1 else G
        yield (
            f"global batch {G} over {W} GPUs leaves {void:.0%} of the rows void; "
            f"{W * plan.rows} or {W * (plan.rows - 1)} samples, or {min(whole, G)} GPUs, do not"
        )
    if plan.device_s < SHORT_STEP_S and W > 1:
        fewer = max(math.floor(W * plan.device_s / SHORT_STEP_S), 1)
        yield (
            f"global batch {G} is too small for {W} GPUs: {plan.rows} samples are "
            f"{plan.device_s:.2f} s of work for one, and a published run with such steps reached "
            f"a third of the speed that is expected here; raise --train.global_batch, or take {fewer}"
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


def _of_data(plan: Plan, machine: Machine) -> Iterator[str]:
    if plan.decode_cpus > plan.data_cpus:
        short = plan.decode_cpus - plan.data_cpus
        nodes = math.ceil(short / DECODE_NODE_CPUS)
        slower = plan.decode_cpus / max(plan.data_cpus, 1e-9)
        yield (
            f"decode-bound: the GPUs would take {plan.decode_cpus:.0f} CPUs' images, "
            f"{plan.data_cpus:.0f} are there, so steps take {slower:.1f} times as long; add "
            f"{nodes} nodes of {DECODE_NODE_CPUS} CPUs that decode, or shrink the pictures once "
            "(jobs/prepare.py --longest_side 256) and give their --decode_ms"
        )
    if plan.object_store > plan.object_store_there:
        yield (
            f"object store: blocks under way want {plan.object_store / GB:.1f} GB on a node, Ray "
            f"takes {plan.object_store_there / GB:.1f} GB of its memory by default: start it with "
            "--object-store-memory, lower cluster.data_cpus, or raise cluster.object_store_share"
        )
    if plan.host > plan.host_there:
        yield (
            f"main memory: workers with their windows of decoded samples, Ray's object store and a "
            f"checkpoint's copy take {plan.host / GB:.0f} GB of a node, {machine.name} has "
            f"{plan.host_there / GB:.0f} GB: lower data.window, or take more nodes"
        )


def _of_network(plan: Plan, machine: Machine) -> Iterator[str]:
    exposed = plan.network.exposed_s / (plan.device_s + plan.network.exposed_s)
    if exposed > NETWORK_LIMIT:
        yield (
            f"network-bound: a step waits {plan.network.exposed_s:.2f} s for collectives, "
            f"{exposed:.0%} of it; raise --train.global_batch, take a faster network between nodes "
            f"({machine.network_gbit:g} Gbit/s here), or fewer and larger nodes"
        )
    coming = plan.network.pixels * min(machine.gpus, plan.gpus) / plan.step_s
    limit = PIXELS_LIMIT * machine.network_gbit / 8 * GB
    if plan.nodes > 1 and coming > limit:
        yield (
            f"decoded pixels are {coming / GB:.1f} GB/s to each node, over half of its network, "
            "where other nodes decode them: keep decoding on the GPUs' own nodes"
        )


def _of_checkpoints(plan: Plan, config: Config) -> Iterator[str]:
    every = config.checkpoint.every_steps
    between = every * plan.step_s
    if plan.write_s > between:
        steps = math.ceil(plan.write_s / plan.step_s)
        yield (
            f"a checkpoint takes {plan.write_s:.0f} s to write and the next is due after "
            f"{between:.0f} s: --checkpoint.every_steps of at least {steps}, or faster storage"
        )
    if between > LOST_H * 3600 and plan.steps > every:
        steps = max(round(LOST_H * 3600 / plan.step_s, -2), 1)
        yield (
            f"a crash costs up to {between / 3600:.1f} h of work: --checkpoint.every_steps "
            f"{steps:.0f} makes it an hour"
        )
