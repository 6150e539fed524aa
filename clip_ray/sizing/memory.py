"""What a step holds of a GPU's memory, and the micro-batch that fits.

Activations are counted (`counts`); what the loss holds follows from `clip_ray.contrastive`. What
cannot be counted without a GPU (CUDA's own, what the allocator wastes) is the reserve.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from clip_ray.config import Config
from clip_ray.contrastive.tiles import CUDA_TILE_LOGITS, KEEP_BYTES
from clip_ray.sizing.counts import Pair
from clip_ray.sizing.gpus import GB, Cluster

CONTEXT_BYTES = 2 * GB  # CUDA's context, its libraries' workspaces, NCCL's buffers; an assumption
FRAGMENTED = 0.06  # share of the memory that the allocator cannot hand out; an assumption
TILES = 4  # tiles of logits alive at once: the tile, its exponentials, their sum, one more


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


def row_bytes(config: Config) -> int:
    """Return the bytes of one decoded sample: uint8 pixels and int32 tokens."""
    return 3 * config.model.vision.image_size**2 + 4 * config.model.text.context_length


def learned(pair: Pair, config: Config) -> int:
    """Return the number of parameters that are not frozen."""
    towers = (("image", pair.image), ("text", pair.text))
    return pair.scalars + sum(t.parameters for name, t in towers if name not in config.init.freeze)


def memory_of(config: Config, pair: Pair, cluster: Cluster, micro: int) -> Memory:
    """Return what a GPU's memory holds in a step with micro-batches of `micro` samples."""
    train, gpus = config.train, cluster.gpus
    rows = math.ceil(train.global_batch / gpus)
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
        reserve=CONTEXT_BYTES + FRAGMENTED * cluster.gpu.memory,
        available=cluster.gpu.memory,
    )


def largest_micro_batch(config: Config, pair: Pair, cluster: Cluster) -> int:
    """Return all of a worker's rows where they fit, else the largest power of two that does."""
    rows = math.ceil(config.train.global_batch / cluster.gpus)

    def fits(micro: int) -> bool:
        memory = memory_of(config, pair, cluster, micro)
        return memory.needed <= memory.available

    if fits(rows):
        return rows
    micro = 1 << max((rows - 1).bit_length() - 1, 0)  # the largest power of two below
    while micro > 1 and not fits(micro):
        micro //= 2
    return micro
