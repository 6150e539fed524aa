"""What a run needs of a cluster: memory, time, CPUs, network, storage and money.

Everything is arithmetic on the config that `jobs/pretrain.py` takes; nothing is measured here.
What is assumed stands in this module as a constant, or in `Assumptions` where a flag sets it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from clip_ray.config import Config
from clip_ray.contrastive.tiles import KEEP_BYTES
from clip_ray.data.blocks import store_bytes
from clip_ray.errors import ConfigError
from clip_ray.sizing.calibration import executed_flops, rate
from clip_ray.sizing.counts import Pair, count
from clip_ray.sizing.gpus import GB, Cluster
from clip_ray.sizing.memory import Memory, largest_micro_batch, learned, memory_of, row_bytes

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
class Network:
    """Bytes that one GPU sends in a step, by ring algorithms, and what the step waits for.

    Attributes:
        gather: all-gather of the text features and what goes with them.
        statistics: all-reduces of one number a sample (softmax: maxima and sums; sigmoid: none).
        scatter: reduce-scatter of the text's gradient.
        gradients: all-reduce of the towers' gradient, float32.
        pixels: decoded samples that come to one GPU, from its own machine or from others.
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
class Batch:
    """How a step's samples are dealt.

    Attributes:
        rows: of G on one worker.
        micro_batch: samples of one forward pass.
        micro_batches: of a step on a worker; beyond one, GradCache passes forward twice.
    """

    rows: int
    micro_batch: int
    micro_batches: int

    @property
    def padded(self) -> int:
        """Rows that a worker computes, void ones included."""
        return self.micro_batch * self.micro_batches


@dataclass(frozen=True)
class Speed:
    """What a step takes.

    Attributes:
        utilization: share of the GPU's peak that the executed operations reach.
        mfu: the same without what is computed again, as the field states it.
        device_s: seconds of work on the GPU.
        decode_s: seconds of the CPUs that are there, for the step's images.
        step_s: the longer of the GPU, with the network that nothing hides, and of decoding.
        samples_per_s: of all GPUs.
        decode_cpus: needed to keep up with the GPUs.
        data_cpus: there for it.
    """

    utilization: float
    mfu: float
    device_s: float
    decode_s: float
    step_s: float
    samples_per_s: float
    decode_cpus: float
    data_cpus: float


@dataclass(frozen=True)
class Node:
    """Bytes of a machine's main memory.

    Attributes:
        object_store: what blocks under way want of Ray's object store.
        object_store_there: what Ray gives it by default.
        needed: what the run takes, the object store included.
        available: what the machine has.
    """

    object_store: float
    object_store_there: float
    needed: float
    available: float


@dataclass(frozen=True)
class Commits:
    """Checkpoints.

    Attributes:
        size: bytes of one.
        snapshot_s: seconds for which one holds the step up.
        write_s: seconds for which it is written beside the training.
        number: of the run.
        kept: bytes of all that are kept, and of the one being written.
    """

    size: float
    snapshot_s: float
    write_s: float
    number: int
    kept: float


@dataclass(frozen=True)
class Plan:
    """A run on a cluster; in bytes, seconds and operations where nothing else is said.

    Attributes:
        model: name.
        parameters: that the model has.
        forward_flops: of one pair.
        gpu: name of the type.
        gpus: workers, one a GPU.
        nodes: machines.
        global_batch: G.
        steps: of the run.
        batch: how G is dealt.
        memory: of one GPU.
        speed: of a step.
        network: of one GPU and step.
        node: of one machine.
        commits: of the run.
        hours: of the run.
        cost: of the GPUs; None: no price was given.
    """

    model: str
    parameters: int
    forward_flops: int
    gpu: str
    gpus: int
    nodes: int
    global_batch: int
    steps: int
    batch: Batch
    memory: Memory
    speed: Speed
    network: Network
    node: Node
    commits: Commits
    hours: float
    cost: float | None


def plan(config: Config, cluster: Cluster, assumptions: Assumptions) -> Plan:
    """Return the plan of a run.

    Args:
        config: of the run; `train.samples` or `train.steps` gives its length.
        cluster: what it runs on.
        assumptions: what the config does not say.

    Raises:
        ConfigError: the length is in passes over data that is not known here.
    """
    steps = _steps(config)
    pair = count(config.model, config.train.patch_dropout)
    batch = _batch(config, pair, cluster)
    data_cpus = _data_cpus(config, cluster)
    device_s, utilization = _device(config, pair, cluster, batch, assumptions)
    network = _network(config, pair, cluster, device_s / batch.micro_batches)
    speed = _speed(config, pair, cluster, assumptions, device_s, utilization, network, data_cpus)
    commits = _commits(config, pair, steps, assumptions)
    hours = (steps * speed.step_s + commits.number * commits.snapshot_s) / 3600
    price = assumptions.price_per_gpu_hour
    return Plan(
        model=config.model.name,
        parameters=pair.parameters,
        forward_flops=pair.forward_flops,
        gpu=cluster.gpu.name,
        gpus=cluster.gpus,
        nodes=cluster.nodes,
        global_batch=config.train.global_batch,
        steps=steps,
        batch=batch,
        memory=memory_of(config, pair, cluster, batch.micro_batch),
        speed=speed,
        network=network,
        node=_node(config, cluster, batch, data_cpus, commits.size),
        commits=commits,
        hours=hours,
        cost=None if price is None else price * cluster.gpus * hours,
    )


def _batch(config: Config, pair: Pair, cluster: Cluster) -> Batch:
    rows = math.ceil(config.train.global_batch / cluster.gpus)
    micro = config.train.micro_batch or largest_micro_batch(config, pair, cluster)
    micro = min(micro, rows)
    return Batch(rows, micro, math.ceil(rows / micro))


def _data_cpus(config: Config, cluster: Cluster) -> float:
    """Return the CPUs that read and decode: given, or what the workers leave of the machines."""
    left = cluster.nodes * cluster.machine.cpus
    left -= math.ceil(cluster.gpus * (config.cluster.cpus_per_worker or 1))
    # A worker on a small machine takes less than a CPU: one is always left to the data.
    return config.cluster.data_cpus or max(left, 1)


def _device(
    config: Config, pair: Pair, cluster: Cluster, batch: Batch, assumptions: Assumptions
) -> tuple[float, float]:
    """Return the seconds that a step's operations take a GPU, and the share of its peak."""
    train, gpu = config.train, cluster.gpu
    flops = executed_flops(
        pair,
        grad_checkpointing=train.grad_checkpointing,
        two_passes=batch.micro_batches > 1,
        freeze=config.init.freeze,
    )
    peak = gpu.peak(train.precision)
    share = assumptions.utilization or rate(gpu, pair.forward_flops, train.precision) / peak
    loss_s = loss_flops(config, batch.padded, cluster.gpus) / (gpu.fp32 * LOSS_SHARE)
    return batch.padded * flops / (peak * share) + loss_s, share


def _speed(
    config: Config,
    pair: Pair,
    cluster: Cluster,
    assumptions: Assumptions,
    device_s: float,
    utilization: float,
    network: Network,
    data_cpus: float,
) -> Speed:
    G = config.train.global_batch
    decode_cpu_s = G * assumptions.decode_ms / 1000
    gpu_s = device_s + network.exposed_s
    decode_s = decode_cpu_s / data_cpus
    step_s = max(gpu_s, decode_s)
    peak = cluster.gpu.peak(config.train.precision)
    return Speed(
        utilization=utilization,
        mfu=3 * pair.forward_flops * G / (cluster.gpus * step_s * peak),
        device_s=device_s,
        decode_s=decode_s,
        step_s=step_s,
        samples_per_s=G / step_s,
        decode_cpus=decode_cpu_s / gpu_s,
        data_cpus=data_cpus,
    )


def _node(
    config: Config, cluster: Cluster, batch: Batch, data_cpus: float, checkpoint: float
) -> Node:
    workers, memory = cluster.workers_of_node, cluster.machine.memory
    there = min(RAY_STORE_SHARE * memory, RAY_STORE_LIMIT)
    window = config.data.window or WINDOW
    # A window is assembled while the half of another waits. The snapshot lies on rank 0's node.
    worker = WORKER_BYTES + 1.5 * window * batch.rows * row_bytes(config)
    return Node(
        object_store=store_bytes(
            data_cpus / cluster.nodes, workers, config.cluster.object_store_share
        ),
        object_store_there=there,
        needed=workers * worker + there + checkpoint,
        available=memory,
    )


def _commits(config: Config, pair: Pair, steps: int, assumptions: Assumptions) -> Commits:
    size = checkpoint_bytes(pair, config)
    keep_every = config.checkpoint.keep_every
    kept = config.checkpoint.keep_last + 1 + (steps // keep_every if keep_every else 0)
    number = math.ceil(steps / config.checkpoint.every_steps)
    return Commits(
        size=size,
        snapshot_s=size / COPY_RATE,
        write_s=size / assumptions.storage_rate,
        number=number,
        kept=min(kept, number + 1) * size,
    )


def _steps(config: Config) -> int:
    train = config.train
    if train.passes is not None:
        raise ConfigError(
            f"train.passes {train.passes:g}: how many samples the data has is not known here; "
            "give --samples, such as 12.8e9 for 32 passes over 400 million"
        )
    return train.steps or math.ceil((train.samples or 0) / train.global_batch)


def loss_flops(config: Config, rows: int, gpus: int) -> int:
    """Return the operations of the loss on one worker: (rows, G) logits and two gradients.

    The softmax computes the logits again for the backward pass where they are not kept.
    """
    product = 2 * rows * rows * gpus * config.model.embed_dim
    kept = config.train.loss == "siglip" or 4 * rows * rows * gpus <= KEEP_BYTES["cuda"]
    return (3 if kept else 4) * product


def _network(config: Config, pair: Pair, cluster: Cluster, micro_s: float) -> Network:
    gpus, machine = cluster.gpus, cluster.machine
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
        speed = NETWORK_SHARE * cluster.gpu.link
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
