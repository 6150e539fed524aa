"""What a run needs of a cluster: memory, time, CPUs, network, storage and money.

Everything is arithmetic on the config that `jobs/pretrain.py` takes; nothing is measured here.
What is assumed stands in this module as a constant, or in `Assumptions` where a flag sets it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from clip_ray.config import Config
from clip_ray.contrastive.tiles import CUDA_TILE_LOGITS, KEEP_BYTES
from clip_ray.data.blocks import BLOCK_BYTES
from clip_ray.errors import ConfigError
from clip_ray.sizing.calibration import executed_flops, rate
from clip_ray.sizing.counts import Pair, count
from clip_ray.sizing.gpus import GB, Gpu, Machine

CONTEXT_BYTES = 2 * GB  # CUDA's context, its libraries' workspaces, NCCL's buffers; an assumption
FRAGMENTED = 0.06  # share of the memory that the allocator cannot hand out; an assumption
TILES = 4  # tiles of logits alive at once: the tile, its exponentials, their sum, one more
TENSOR_BYTES = 240  # of a checkpoint's two files beside the numbers, a tensor; measured: 229, 239
COPY_RATE = 4 * GB  # bytes/s from a GPU to unpinned host memory; an assumption
LOSS_SHARE = 0.5  # of the fp32 peak that the loss's products reach; an assumption
NETWORK_SHARE = 0.7  # of its nominal rate that a network reaches in collectives; an assumption
RAY_STORE_SHARE, RAY_STORE_LIMIT = 0.3, 200 * GB  # Ray's defaults of the object store's size
WINDOW = 8  # steps: data.window, where the config leaves it to the run
WORKER_BYTES = 4 * GB  # of main memory: a worker's process with torch and CUDA; an assumption


@dataclass(frozen=True)
class Assumptions:
    """What the config does not say.

    Attributes:
        utilization: share of the peak that the executed operations reach; None: the rule of
            `calibration`.
        decode_ms: milliseconds of one CPU for an image, read, decoded and cropped.
        storage_rate: bytes/s that one writer's checkpoint takes.
        price_per_gpu_hour: of anything; None: no cost is printed.
    """

    utilization: float | None = None
    decode_ms: float = 1.2
    storage_rate: float = 200e6
    price_per_gpu_hour: float | None = None


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU's memory.

    Attributes:
        weights: parameters, and their bf16 copies.
        gradients: of what learns; DistributedDataParallel's buckets are the same memory.
        moments: AdamW's two.
        samples: pixels and tokens of all the worker's rows, as they came.
        activations: kept for the backward pass of a micro-batch, and what that works with.
        loss: features of all rows, the text of all workers and its gradients, tiles of logits.
        reserve: what cannot be used.
        available: what the GPU has.
    """

    weights: float
    gradients: float
    moments: float
    samples: float
    activations: float
    loss: float
    reserve: float
    available: float

    @property
    def needed(self) -> float:
        """Bytes that the step takes, the reserve included."""
        return (
            self.weights + self.gradients + self.moments + self.samples
            + self.activations + self.loss + self.reserve
        )  # fmt: skip


@dataclass(frozen=True)
class Network:
    """Bytes that one GPU sends in a step, by ring algorithms, and what the step waits for.

    Attributes:
        gather: all-gather of the text features and what goes with them.
        statistics: all-reduces of one number a sample (softmax: maxima and sums; sigmoid: none).
        scatter: reduce-scatter of the text's gradient.
        gradients: all-reduce of the towers' gradient, float32.
        pixels: decoded samples that come to one GPU, most of them from other machines.
        loss_s: seconds of the loss's collectives, which nothing hides.
        gradients_s: seconds of the gradients' all-reduce, hidden behind the last backward pass as
            far as that lasts.
        exposed_s: seconds of both that the step waits for.
    """

    gather: float
    statistics: float
    scatter: float
    gradients: float
    pixels: float
    loss_s: float
    gradients_s: float
    exposed_s: float


@dataclass(frozen=True)
class Plan:
    """A run on a cluster; bytes, seconds and operations where nothing else is said.

    Attributes:
        model: name.
        parameters: that the model has.
        forward_flops: of one pair.
        gpu: name of the type.
        gpus: workers, one a GPU.
        machine: name of the machine that is assumed.
        nodes: machines.
        global_batch: G.
        rows: of G on one worker.
        micro_batch: samples of one forward pass.
        micro_batches: of a step on a worker.
        memory: of one GPU.
        utilization: share of the GPU's peak that the executed operations reach.
        mfu: the same without what is computed again, as the field states it.
        device_s: of a step's work on the GPU.
        decode_s: of a step's images on the CPUs that are there.
        step_s: of a step: the longer of both, and the network that nothing hides.
        samples_per_s: of all GPUs.
        decode_cpus: needed to keep up.
        data_cpus: there for it.
        network: of one GPU and step.
        object_store: bytes of Ray's object store that a node's blocks under way want.
        object_store_there: bytes of it that Ray gives a node by default.
        host: bytes of a node's main memory that the run takes.
        host_there: bytes that the node has.
        steps: of the run.
        checkpoint: bytes of one.
        snapshot_s: for which a commit holds the step up.
        write_s: for which it is written beside the training.
        commits: of the run.
        storage: bytes of all checkpoints that are kept.
        hours: of the run.
        cost: of the GPUs; None: no price was given.
    """

    model: str
    parameters: int
    forward_flops: int
    gpu: str
    gpus: int
    machine: str
    nodes: int
    global_batch: int
    rows: int
    micro_batch: int
    micro_batches: int
    memory: Memory
    utilization: float
    mfu: float
    device_s: float
    decode_s: float
    step_s: float
    samples_per_s: float
    decode_cpus: float
    data_cpus: float
    network: Network
    object_store: float
    object_store_there: float
    host: float
    host_there: float
    steps: int
    checkpoint: float
    snapshot_s: float
    write_s: float
    commits: int
    storage: float
    hours: float
    cost: float | None


def plan(config: Config, gpus: int, gpu: Gpu, machine: Machine, assumptions: Assumptions) -> Plan:
    """Return the plan of a run.

    Args:
        config: of the run; `train.samples` or `train.steps` gives its length.
        gpus: number of workers, each with one.
        gpu: their type.
        machine: what they are in.
        assumptions: what the config does not say.

    Raises:
        ConfigError: the length is in passes over data that is not known here.
    """
    pair = count(config.model, config.train.patch_dropout)
    rows = math.ceil(config.train.global_batch / gpus)
    micro = config.train.micro_batch or _largest_micro_batch(config, pair, gpus, gpu)
    micro = min(micro, rows)
    micro_batches = math.ceil(rows / micro)
    nodes = math.ceil(gpus / machine.gpus)
    train = config.train
    flops = executed_flops(
        pair,
        grad_checkpointing=train.grad_checkpointing,
        two_passes=micro_batches > 1,
        freeze=config.init.freeze,
    )
    peak = gpu.peak(train.precision)
    utilization = assumptions.utilization or (rate(gpu, pair.forward_flops, train.precision) / peak)
    device_s = micro * micro_batches * flops / (peak * utilization)
    device_s += loss_flops(config, rows, gpus) / (gpu.fp32 * LOSS_SHARE)
    network = _network(config, pair, gpus, gpu, machine, device_s / micro_batches)
    worker_cpus = config.cluster.cpus_per_worker or 1
    data_cpus = config.cluster.data_cpus or max(nodes * machine.cpus - gpus * worker_cpus, 0)
    decode_s = train.global_batch * assumptions.decode_ms / 1000 / max(data_cpus, 1e-9)
    step_s = max(device_s + network.exposed_s, decode_s)
    steps = _steps(config)
    checkpoint = checkpoint_bytes(pair, config)
    snapshot_s = checkpoint / COPY_RATE
    commits = max(steps // config.checkpoint.every_steps, 1)
    kept = config.checkpoint.keep_last + 1
    if config.checkpoint.keep_every:
        kept += steps // config.checkpoint.keep_every
    hours = (steps * step_s + commits * snapshot_s) / 3600
    store_there = min(RAY_STORE_SHARE * machine.memory, RAY_STORE_LIMIT)
    workers, node_cpus = min(machine.gpus, gpus), data_cpus / nodes
    window = config.data.window or WINDOW
    store = (16 + 4 * (node_cpus + workers)) * BLOCK_BYTES / config.cluster.object_store_share
    return Plan(
        model=config.model.name,
        parameters=pair.parameters,
        forward_flops=pair.forward_flops,
        gpu=gpu.name,
        gpus=gpus,
        machine=machine.name,
        nodes=nodes,
        global_batch=train.global_batch,
        rows=rows,
        micro_batch=micro,
        micro_batches=micro_batches,
        memory=memory_of(config, pair, gpus, gpu, micro),
        utilization=utilization,
        mfu=3 * pair.forward_flops * rows / device_s / peak,
        device_s=device_s,
        decode_s=decode_s,
        step_s=step_s,
        samples_per_s=train.global_batch / step_s,
        decode_cpus=train.global_batch * assumptions.decode_ms / 1000
        / (device_s + network.exposed_s),
        data_cpus=data_cpus,
        network=network,
        object_store=store,
        object_store_there=store_there,
        # A window is assembled while the half of another waits; a snapshot lies on rank 0's node.
        host=workers * (WORKER_BYTES + 1.5 * window * rows * row_bytes(config))
        + store_there + checkpoint,
        host_there=machine.memory,
        steps=steps,
        checkpoint=checkpoint,
        snapshot_s=snapshot_s,
        write_s=checkpoint / assumptions.storage_rate,
        commits=commits,
        storage=kept * checkpoint,
        hours=hours,
        cost=None
        if assumptions.price_per_gpu_hour is None
        else assumptions.price_per_gpu_hour * gpus * hours,
    )  # fmt: skip


def _steps(config: Config) -> int:
    train = config.train
    if train.passes is not None:
        raise ConfigError(
            f"train.passes {train.passes:g}: how many samples the data has is not known here; "
            "give --samples, such as 12.8e9 for 32 passes over 400 million"
        )
    return train.steps or math.ceil((train.samples or 0) / train.global_batch)


def row_bytes(config: Config) -> int:
    """Return the bytes of one decoded sample: uint8 pixels and int32 tokens."""
    return 3 * config.model.vision.image_size**2 + 4 * config.model.text.context_length


def learned(pair: Pair, config: Config) -> int:
    """Return the number of parameters that are not frozen."""
    towers = (("image", pair.image), ("text", pair.text))
    return pair.scalars + sum(t.parameters for name, t in towers if name not in config.init.freeze)


def memory_of(config: Config, pair: Pair, gpus: int, gpu: Gpu, micro: int) -> Memory:
    """Return what a GPU's memory holds in a step with micro-batches of `micro` samples."""
    train = config.train
    G, rows = train.global_batch, math.ceil(train.global_batch / gpus)
    micro = min(micro, rows)
    padded = micro * math.ceil(rows / micro)
    E = config.model.embed_dim
    trained = learned(pair, config)
    saved, working = 0, 0
    for name, tower in (("image", pair.image), ("text", pair.text)):
        if name not in config.init.freeze:
            saved += tower.saved_bytes(train.precision, pair.quick_gelu, train.grad_checkpointing)
            working = max(working, tower.working_bytes(train.precision))
    # Both sides' features and their gradients; of everyone's text: what was gathered, the features
    # cut out of it, and their gradient twice (the sum over tiles, and that times a factor).
    features = 4 * (4 * padded * E + 4 * padded * gpus * E)
    logits = 4 * padded * padded * gpus
    tiles = logits if logits <= KEEP_BYTES["cuda"] else 0
    tiles += TILES * min(logits, 4 * CUDA_TILE_LOGITS)
    activations = micro * (saved + working)
    if padded > micro:
        # With micro-batches no activations are kept while the loss is taken.
        activations, tiles = max(activations, tiles), 0
    return Memory(
        weights=pair.parameters * (6 if train.precision == "bf16" else 4),
        gradients=4 * trained,
        moments=8 * trained,
        samples=padded * row_bytes(config),
        activations=activations,
        loss=features + tiles,
        reserve=CONTEXT_BYTES + FRAGMENTED * gpu.memory,
        available=gpu.memory,
    )


def _largest_micro_batch(config: Config, pair: Pair, gpus: int, gpu: Gpu) -> int:
    """Return all of a worker's rows where they fit, else the largest power of two that does."""
    rows = math.ceil(config.train.global_batch / gpus)

    def fits(micro: int) -> bool:
        memory = memory_of(config, pair, gpus, gpu, micro)
        return memory.needed <= memory.available

    if fits(rows):
        return rows
    micro = 1 << max((rows - 1).bit_length() - 1, 0)  # the largest power of two below
    while micro > 1 and not fits(micro):
        micro //= 2
    return micro


def loss_flops(config: Config, rows: int, gpus: int) -> int:
    """Return the operations of the loss on one worker: (rows, G) logits and two gradients.

    The softmax computes the logits again for the backward pass where they are not kept.
    """
    product = 2 * rows * rows * gpus * config.model.embed_dim
    kept = config.train.loss == "siglip" or 4 * rows * rows * gpus <= KEEP_BYTES["cuda"]
    return (3 if kept else 4) * product


def _network(
    config: Config, pair: Pair, gpus: int, gpu: Gpu, machine: Machine, micro_s: float
) -> Network:
    G, E = config.train.global_batch, config.model.embed_dim
    rows = math.ceil(G / gpus)
    padded = rows * gpus
    once = (gpus - 1) / gpus  # what each of a ring sends of a whole that goes round once
    identities = 4 if config.train.mask_duplicates else 0  # two int64, as float32
    softmax = config.train.loss == "clip"
    gather = once * padded * (E + 1 + identities) * 4
    statistics = 2 * 2 * once * padded * 4 if softmax else 0.0
    scatter = once * padded * E * 4
    gradients = 2 * once * learned(pair, config) * 4
    if gpus > machine.gpus:
        # A ring crosses from each machine to the next once, through all of its network.
        speed = NETWORK_SHARE * machine.network_gbit / 8 * GB
    else:
        speed = NETWORK_SHARE * gpu.link
    loss_s = (gather + statistics + scatter) / speed
    gradients_s = gradients / speed
    # A backward pass is two thirds of a micro-batch's time, or a little less.
    hidden_s = micro_s * 2 / 3
    return Network(
        gather=gather,
        statistics=statistics,
        scatter=scatter,
        gradients=gradients,
        pixels=rows * row_bytes(config),
        loss_s=loss_s,
        gradients_s=gradients_s,
        exposed_s=loss_s + max(gradients_s - hidden_s, 0.0),
    )


def checkpoint_bytes(pair: Pair, config: Config) -> int:
    """Return the size of a commit: float32 weights, and two moments of what learns."""
    towers = (("image", pair.image), ("text", pair.text))
    tensors = pair.tensors + sum(t.tensors for n, t in towers if n not in config.init.freeze)
    return 4 * pair.parameters + 8 * learned(pair, config) + TENSOR_BYTES * tensors
