"""The contrastive loss over the global batch, and the step that takes its exact gradient.

Radford et al. 2021, section 2.3: cross-entropy over the N x N similarities, averaged over rows
and columns. Worker w owns the rows of its own images and computes each of those logits once, in
tiles; only the text features are gathered, and only their gradient is scattered back. With
S = s I T^t, row and column log-sum-exps r and c, and n valid pairs:

    L     = 1/(2n) sum_i (r_i + c_i - 2 S_ii)
    G     = exp(S - r) + exp(S - c) - 2 Id              (dL/dS = G / 2n)
    dL/dI = s G T / 2n,  dL/dT = s G^t I / 2n,  dL/ds = sum_i <I_i, (G T)_i> / 2n

The value is the global loss, equal on all workers. The gradient handed to worker w is W times
its part of the global one, so that the mean that DistributedDataParallel takes is the gradient
that one process with the whole batch would get, for the towers and for the scale.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

KEEP_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}  # logits smaller than this are kept for backward
TILE = {"cpu": (1024, 2048), "cuda": (8192, 8192)}  # CPU: stays in cache; CUDA: not launch-bound


def reference_loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """Return the loss of one process by plain autograd: the oracle of the tests."""
    logits = scale * image @ text.T
    target = torch.arange(len(logits), device=logits.device)
    cross_entropy = nn.functional.cross_entropy
    return (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2


def clip_loss(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    valid: Tensor | None = None,
    *,
    riders: Tensor | None = None,
    tile: tuple[int, int] | None = None,
    keep_bytes: int | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Return the symmetric contrastive loss over the pairs of all workers.

    Every worker of the group calls it, with equally many rows, and later runs its backward:
    forward costs one all-gather and two all-reduces, backward one reduce-scatter. Computed in at
    least float32 with autocast off; memory is O(N E) plus one tile. Differentiable once.

    Args:
        image: (B, E) L2-normalised image features of this worker.
        text: (B, E) L2-normalised text features of the same pairs.
        scale: 0-d, exp(logit_scale).
        valid: (B,) bool; a void row is no row and no column of the loss. None: all are valid.
        riders: (n,) float32 numbers that ride on an all-reduce; summed over workers in place.
            Integers stay exact below 2**24.
        tile: rows and columns of one tile of logits; by default by device.
        keep_bytes: keep the logits for backward when they fit in this; by default by device.
        group: process group; by default the whole world.

    Returns:
        The 0-d global loss, the same on every worker; 0 when no pair is valid anywhere.
    """
    kind = image.device.type
    if valid is None:
        valid = torch.ones(len(image), dtype=torch.bool, device=image.device)
    settings = _Settings(
        group=group,
        tile=tile or TILE.get(kind, TILE["cpu"]),
        keep_bytes=KEEP_BYTES.get(kind, 0) if keep_bytes is None else keep_bytes,
    )
    with torch.autocast(kind, enabled=False):
        dtype = torch.promote_types(image.dtype, torch.float32)
        loss: Tensor = _TiledClipLoss.apply(
            image.to(dtype), text.to(dtype), scale.to(dtype), valid, riders, settings
        )
    return loss


@dataclass(frozen=True)
class _Settings:
    group: dist.ProcessGroup | None
    tile: tuple[int, int]
    keep_bytes: int

    @property
    def world_size(self) -> int:
        return dist.get_world_size(self.group) if dist.is_initialized() else 1

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group) if dist.is_initialized() else 0

    def tiles(self, rows: int, columns: int) -> Iterator[tuple[slice, slice]]:
        height, width = self.tile
        for top in range(0, rows, height):
            for left in range(0, columns, width):
                yield (
                    slice(top, min(top + height, rows)),
                    slice(left, min(left + width, columns)),
                )


class _TiledClipLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        image_BE: Tensor,
        text_BE: Tensor,
        scale: Tensor,
        valid_B: Tensor,
        riders: Tensor | None,
        settings: _Settings,
    ) -> Tensor:
        B, world = len(image_BE), settings.world_size
        # Validity travels as one more column of the gathered text: no collective of its own.
        payload = torch.cat([text_BE, valid_B[:, None].to(text_BE.dtype)], dim=1)
        if world > 1:
            gathered = payload.new_empty(world * B, payload.shape[1])
            dist.all_gather_into_tensor(gathered, payload, group=settings.group)
        else:
            gathered = payload
        text_GE, valid_G = gathered[:, :-1].contiguous(), gathered[:, -1] > 0.5
        first = settings.rank * B
        logits = _Logits(image_BE, text_GE, scale, valid_B, valid_G, settings)

        row_max = image_BE.new_full((B,), -torch.inf)
        row_sum = image_BE.new_zeros(B)
        column_max = image_BE.new_full((world * B,), -torch.inf)
        column_sum = image_BE.new_zeros(world * B)
        for rows, columns in logits.tiles():
            tile = logits.tile(rows, columns)
            _accumulate(row_max[rows], row_sum[rows], tile)
            _accumulate(column_max[columns], column_sum[columns], tile.T)
        own_max = column_max.clone()
        if world > 1:
            dist.all_reduce(column_max, dist.ReduceOp.MAX, group=settings.group)
        column_max = torch.where(valid_G, column_max, 0.0)
        column_sum *= (own_max - column_max).exp()

        row_lse = torch.where(valid_B, row_max + row_sum.log(), 0.0)
        diagonal = scale * (image_BE * text_BE).sum(dim=1)
        rows_part = torch.where(valid_B, row_lse - 2 * diagonal, 0.0).sum()
        extra = riders.to(column_sum) if riders is not None else column_sum.new_empty(0)
        sums = torch.cat([column_sum, rows_part[None], extra])
        if world > 1:
            dist.all_reduce(sums, dist.ReduceOp.SUM, group=settings.group)
        column_sum, rows_total = sums[: world * B], sums[world * B]
        if riders is not None:
            riders.copy_(sums[world * B + 1 :])

        column_lse = torch.where(valid_G, column_max + column_sum.log(), 0.0)
        n_valid = valid_G.sum().clamp(min=1)
        ctx.save_for_backward(image_BE, text_GE, scale, valid_B, valid_G, row_lse, column_lse)
        ctx.kept, ctx.settings, ctx.first = logits.kept, settings, first
        return (rows_total + column_lse.sum()) / (2 * n_valid)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        image_BE, text_GE, scale, valid_B, valid_G, row_lse, column_lse = ctx.saved_tensors
        settings: _Settings = ctx.settings
        world = settings.world_size
        logits = _Logits(image_BE, text_GE, scale, valid_B, valid_G, settings, ctx.kept)
        image_grad, text_grad = torch.zeros_like(image_BE), torch.zeros_like(text_GE)
        # The caller may run backward inside autocast, which would reach these products.
        with torch.autocast(image_BE.device.type, enabled=False):
            for rows, columns in logits.tiles():
                tile = logits.tile(rows, columns)
                grad = (tile - row_lse[rows, None]).exp_() + (tile - column_lse[columns]).exp_()
                # Subtracted here and not after the product: a converged pair would otherwise get
                # rounding noise for a gradient.
                _subtract_positives(grad, rows, columns, ctx.first, valid_B)
                image_grad[rows] += grad @ text_GE[columns]
                text_grad[columns] += grad.T @ image_BE[rows]
        factor = world * upstream[0] / (2 * valid_G.sum().clamp(min=1))
        scale_grad = factor * (image_BE * image_grad).sum()
        image_grad *= factor * scale
        text_grad *= factor * scale
        if world > 1:
            own = torch.empty_like(image_BE)
            dist.reduce_scatter_tensor(own, text_grad, group=settings.group)
            text_grad = own
        return image_grad, text_grad, scale_grad.reshape(scale.shape), None, None, None


class _Logits:
    """The (B, G) logits of this worker's rows, by tiles: computed anew, or kept where small."""

    def __init__(
        self,
        image_BE: Tensor,
        text_GE: Tensor,
        scale: Tensor,
        valid_B: Tensor,
        valid_G: Tensor,
        settings: _Settings,
        kept: dict[tuple[int, int], Tensor] | None = None,
    ) -> None:
        self._image, self._text, self._scale = image_BE, text_GE, scale
        self._void_B, self._void_G = ~valid_B, ~valid_G
        self._any_void = bool(self._void_G.any())
        self._settings = settings
        size = len(image_BE) * len(text_GE) * image_BE.element_size()
        self.kept = kept if kept is not None else ({} if size <= settings.keep_bytes else None)

    def tiles(self) -> Iterator[tuple[slice, slice]]:
        return self._settings.tiles(len(self._image), len(self._text))

    def tile(self, rows: slice, columns: slice) -> Tensor:
        place = (rows.start, columns.start)
        if self.kept is not None and place in self.kept:
            return self.kept[place]
        tile = (self._scale * self._image[rows]) @ self._text[columns].T
        if self._any_void:
            tile.masked_fill_(self._void_B[rows, None] | self._void_G[columns], -torch.inf)
        if self.kept is not None:
            self.kept[place] = tile
        return tile


def _accumulate(running_max: Tensor, running_sum: Tensor, tile: Tensor) -> None:
    """Add a tile's rows to a log-sum-exp kept as maximum and scaled sum; both in place."""
    new_max = torch.maximum(running_max, tile.amax(dim=1))
    # A row that is void so far has maximum -inf, and -inf - -inf is not a number.
    base = torch.where(new_max.isinf(), 0.0, new_max)
    running_sum.mul_((running_max - base).exp()).add_((tile - base[:, None]).exp().sum(dim=1))
    running_max.copy_(new_max)


def _subtract_positives(
    grad: Tensor, rows: slice, columns: slice, first: int, valid_B: Tensor
) -> None:
    """Subtract 2 at each valid row's own pair; `first` is the column of the worker's row 0."""
    start = max(rows.start, columns.start - first)
    stop = min(rows.stop, columns.stop - first)
    if start < stop:
        own = torch.arange(start, stop, device=grad.device)
        grad[own - rows.start, own + first - columns.start] -= 2 * valid_B[own].to(grad.dtype)


LossFunction = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(image features (B, E), text features (B, E), scale) -> global loss."""


def contrastive_step(
    model: nn.Module,
    micro_batches: Sequence[tuple[Tensor, Tensor]],
    loss: LossFunction,
    *,
    mark: Callable[[str], None] = lambda phase: None,
) -> Tensor:
    """Run forward and backward over a worker's rows; gradients are left on the parameters.

    With one micro-batch this is the plain step. With more, GradCache (Gao et al. 2021): all
    features without a graph, one loss on all of them, then each micro-batch again with a graph
    and the cached gradient of its features; randomness is replayed, so both passes agree. The
    gradient is that of the whole batch. Models with BatchNorm are exempt: it sees micro-batches.

    Args:
        model: a CLIP, or one in DistributedDataParallel; its forward returns the features.
        micro_batches: (pixels, ids) pairs; equally many and equally long on every worker.
        loss: called once, on the features of all rows in order.
        mark: told the phase that ends: "forward", "loss" or "backward".

    Returns:
        The detached global loss.
    """
    bare: Any = getattr(model, "module", model)
    if len(micro_batches) == 1:
        image_BE, text_BE = model(*micro_batches[0])
        mark("forward")
        value = loss(image_BE, text_BE, bare.logit_scale.exp())
        mark("loss")
        value.backward()
        mark("backward")
        return value.detach()

    device = micro_batches[0][0].device
    features, random_states = [], []
    with torch.no_grad():
        for pixels, ids in micro_batches:
            random_states.append(_random_state(device))
            features.append(model(pixels, ids))
    images, texts = ([f[side].requires_grad_() for f in features] for side in (0, 1))
    scale = bare.logit_scale.exp()
    scale_leaf = scale.detach().requires_grad_()
    mark("forward")
    value = loss(torch.cat(images), torch.cat(texts), scale_leaf)
    mark("loss")
    value.backward()
    last = len(micro_batches) - 1
    for number, (pixels, ids) in enumerate(micro_batches):
        no_sync = getattr(model, "no_sync", contextlib.nullcontext)
        with contextlib.nullcontext() if number == last else no_sync():
            with _replayed(random_states[number], device):
                image_BE, text_BE = model(pixels, ids)
            outputs = [image_BE, text_BE]
            grads = [images[number].grad, texts[number].grad]
            if number == last:
                # Once: every backward of the scale would add its whole gradient again.
                outputs, grads = [*outputs, scale], [*grads, scale_leaf.grad]
            torch.autograd.backward(outputs, grads)
    mark("backward")
    return value.detach()


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return torch.get_rng_state(), on_device


@contextlib.contextmanager
def _replayed(state: tuple[Tensor, Tensor | None], device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.set_rng_state(state[0])
        if state[1] is not None:
            torch.cuda.set_rng_state(state[1], device)
        yield
