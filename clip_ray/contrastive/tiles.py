"""The logits of a worker's rows against the text of all workers, by tiles.

Worker w owns the rows of its own images and computes each of those logits once. Only text is
gathered; what must be known of every column (is it valid, what is it equal to) travels with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

KEEP_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}  # logits smaller than this are kept for backward
CPU_TILE = (1024, 2048)  # stays in cache
CUDA_TILE_LOGITS = 64 << 20  # 256 MB of float32: fewer would be bound by kernel launches


def tile_shape(device_type: str, rows: int, columns: int) -> tuple[int, int]:
    """Return the rows and columns of one tile of a (rows, columns) matrix of logits."""
    if device_type != "cuda":
        return CPU_TILE
    # Wide before high: a row's products with all columns read each image feature once.
    width = min(columns, 8192)
    return max(min(rows, CUDA_TILE_LOGITS // width), 1), width


@dataclass(frozen=True)
class Settings:
    """How a loss is computed; the same on every worker.

    Attributes:
        group: process group; none = the whole world.
        tile: rows and columns of a tile; none = by device and size.
        keep_bytes: keep the logits for backward where they fit in this.
        fused: torch.compile what is done to each tile.
    """

    group: dist.ProcessGroup | None
    tile: tuple[int, int] | None
    keep_bytes: int
    fused: bool

    @property
    def world_size(self) -> int:
        """Return the number of workers, 1 without a process group."""
        return dist.get_world_size(self.group) if dist.is_initialized() else 1

    @property
    def rank(self) -> int:
        """Return this worker's number."""
        return dist.get_rank(self.group) if dist.is_initialized() else 0

    def all_reduce(self, tensor: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> None:
        """Reduce over the workers, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor, op, group=self.group)

    def scatter_sum(self, whole_GE: Tensor) -> Tensor:
        """Return this worker's (B, E) rows of the sum of all workers' (G, E)."""
        if self.world_size == 1:
            return whole_GE
        own_BE = whole_GE.new_empty(len(whole_GE) // self.world_size, whole_GE.shape[1])
        dist.reduce_scatter_tensor(own_BE, whole_GE, group=self.group)
        return own_BE


@dataclass(frozen=True)
class Columns:
    """What every worker knows of the text of all.

    Attributes:
        text: (G, E) features in rank order.
        valid: (G,) bool.
        identities: (G, K) int64, or None.
    """

    text: Tensor
    valid: Tensor
    identities: Tensor | None


def gather(
    text_BE: Tensor, valid_B: Tensor, identities_BK: Tensor | None, settings: Settings
) -> Columns:
    """Gather this worker's text, with what goes with it, in one collective."""
    E = text_BE.shape[1]
    parts = [text_BE, valid_B[:, None].to(text_BE.dtype)]
    if identities_BK is not None:
        # As bits: a collective copies them, and an int64 is two float32 (or one float64).
        parts.append(identities_BK.contiguous().view(text_BE.dtype))
    payload = torch.cat(parts, dim=1)
    gathered = payload
    if settings.world_size > 1:
        gathered = payload.new_empty(settings.world_size * len(payload), payload.shape[1])
        dist.all_gather_into_tensor(gathered, payload, group=settings.group)
    identities = None
    if identities_BK is not None:
        # A clone: what is contiguous already could begin in the middle of an int64.
        identities = gathered[:, E + 1 :].clone().view(torch.int64)
    return Columns(gathered[:, :E].contiguous(), gathered[:, E] > 0.5, identities)


class Logits:
    """The (B, G) logits of this worker's rows: computed anew for each use, or kept where small.

    A logit that takes no part (its row or column is void, or its pair is masked out of the
    negatives) is -inf.

    Args:
        image_BE: this worker's image features.
        columns: the text of all workers.
        valid_B: this worker's valid rows.
        identities_BK: of this worker's rows, or None.
        scale: 0-d.
        bias: 0-d, or None.
        settings: tiles, and whether to keep.
        kept: tiles that were kept before.
    """

    def __init__(
        self,
        image_BE: Tensor,
        columns: Columns,
        valid_B: Tensor,
        identities_BK: Tensor | None,
        scale: Tensor,
        bias: Tensor | None,
        settings: Settings,
        kept: dict[tuple[int, int], Tensor] | None = None,
    ) -> None:
        self._image, self._columns, self._scale, self._bias = image_BE, columns, scale, bias
        self._void_B, self._void_G = ~valid_B, ~columns.valid
        self._any_void = bool(self._void_G.any())
        self._identities = identities_BK
        self._first = settings.rank * len(image_BE)
        self._shape = settings.tile or tile_shape(
            image_BE.device.type, len(image_BE), len(columns.text)
        )
        size = len(image_BE) * len(columns.text) * image_BE.element_size()
        self.kept = kept if kept is not None else ({} if size <= settings.keep_bytes else None)

    def tiles(self) -> Iterator[tuple[slice, slice]]:
        """Yield the rows and columns of each tile."""
        height, width = self._shape
        B, G = len(self._image), len(self._columns.text)
        for top in range(0, B, height):
            for left in range(0, G, width):
                yield slice(top, min(top + height, B)), slice(left, min(left + width, G))

    def tile(self, rows: slice, columns: slice) -> Tensor:
        """Return one tile of logits; not to be changed where tiles are kept."""
        place = (rows.start, columns.start)
        if self.kept is not None and place in self.kept:
            return self.kept[place]
        text = self._columns.text[columns]
        tile = (self._scale * self._image[rows]) @ text.T
        if self._bias is not None:
            tile += self._bias
        if self._any_void:
            tile.masked_fill_(self._void_B[rows, None] | self._void_G[columns], -torch.inf)
        if self._identities is not None:
            tile.masked_fill_(self._twins(rows, columns), -torch.inf)
        if self.kept is not None:
            self.kept[place] = tile
        return tile

    def positives(self, rows: slice, columns: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Return the worker's own pairs in a tile: their rows, and where they are in the tile."""
        start = max(rows.start, columns.start - self._first)
        stop = max(min(rows.stop, columns.stop - self._first), start)
        own = torch.arange(start, stop, device=self._image.device)
        return own, own - rows.start, own + self._first - columns.start

    def _twins(self, rows: slice, columns: slice) -> Tensor:
        """Return which pairs of a tile are of different samples that share an identity."""
        assert self._identities is not None and self._columns.identities is not None
        twins = torch.zeros(
            rows.stop - rows.start, columns.stop - columns.start, dtype=torch.bool,
            device=self._image.device,
        )  # fmt: skip
        for k in range(self._identities.shape[1]):
            twins |= self._identities[rows, None, k] == self._columns.identities[columns, k]
        _, i, j = self.positives(rows, columns)
        twins[i, j] = False
        return twins
