"""Contrastive losses over the pairs of all workers, by tiles, with their exact gradients.

Softmax (Radford et al. 2021, section 2.3): cross-entropy over the N x N similarities, averaged
over rows and columns. With S = s I T^t, row and column log-sum-exps r and c, and n valid pairs:

    L     = 1/(2n) sum_i (r_i + c_i - 2 S_ii)
    G     = exp(S - r) + exp(S - c) - 2 Id              (dL/dS = G / 2n)
    dL/dI = s G T / 2n,  dL/dT = s G^t I / 2n,  dL/ds = sum_i <I_i, (G T)_i> / 2n

Sigmoid (Zhai et al. 2023, SigLIP): each pair is a yes or no of its own. With S = s I T^t + b and
z_ij = 1 on the diagonal and -1 elsewhere, L = 1/n sum_ij softplus(-z_ij S_ij).

The value is the global loss, equal on all workers. The gradient handed to worker w is W times
its part of the global one, so that the mean that DistributedDataParallel takes is the gradient
that one process with the whole batch would get, for the towers, the scale and the bias.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from clip_ray.contrastive.tiles import KEEP_BYTES, Columns, Logits, Settings, gather


def reference_loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """Return the softmax loss of one process by plain autograd: the oracle of the tests."""
    logits = scale * image @ text.T
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def reference_siglip_loss(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Return the sigmoid loss of one process by plain autograd: the oracle of the tests."""
    logits = scale * image @ text.T + bias
    signs = 2 * torch.eye(len(logits), dtype=logits.dtype, device=logits.device) - 1
    return -F.logsigmoid(signs * logits).sum() / len(logits)


def clip_loss(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    valid: Tensor | None = None,
    *,
    identities: Tensor | None = None,
    riders: Tensor | None = None,
    tile: tuple[int, int] | None = None,
    keep_bytes: int | None = None,
    fused: bool = False,
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
        identities: (B, K) int64; pairs that share a value in one of the K columns (the image's
            id, the caption's id) are not each other's negatives. None: all others are negatives.
        riders: (n,) float32 numbers that ride on an all-reduce; summed over workers in place.
            Integers stay exact below 2**24.
        tile: rows and columns of one tile of logits; by default by device and size.
        keep_bytes: keep the logits for backward when they fit in this; by default by device.
        fused: torch.compile what is done to each tile.
        group: process group; by default the whole world.

    Returns:
        The 0-d global loss, the same on every worker; 0 when no pair is valid anywhere.
    """
    settings = _settings(image, tile, keep_bytes, fused, group)
    with torch.autocast(image.device.type, enabled=False):
        image, text, scale = _promoted(image, text, scale)
        loss: Tensor = _SoftmaxLoss.apply(
            image, text, scale, _all_or(valid, image), identities, riders, settings
        )
    return loss


def siglip_loss(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor,
    valid: Tensor | None = None,
    *,
    identities: Tensor | None = None,
    riders: Tensor | None = None,
    tile: tuple[int, int] | None = None,
    fused: bool = False,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Return the sigmoid loss over the pairs of all workers, per pair.

    No log-sum-exp ties a row together, so one pass over the tiles forms value and gradient:
    forward costs one all-gather and one all-reduce, backward one reduce-scatter.

    Args:
        image: as in `clip_loss`, like all that is not named here.
        text: likewise.
        scale: likewise.
        bias: 0-d, logit_bias.
        valid: likewise.
        identities: likewise.
        riders: likewise.
        tile: likewise.
        fused: likewise.
        group: likewise.

    Returns:
        The 0-d global loss, the same on every worker; 0 when no pair is valid anywhere.
    """
    settings = _settings(image, tile, 0, fused, group)
    # Asked here: inside a Function gradients are always off.
    wanted = torch.is_grad_enabled()
    with torch.autocast(image.device.type, enabled=False):
        image, text, scale, bias = _promoted(image, text, scale, bias)
        loss: Tensor = _SigmoidLoss.apply(
            image, text, scale, bias, _all_or(valid, image), identities, riders, settings, wanted
        )
    return loss


def _settings(
    image: Tensor,
    tile: tuple[int, int] | None,
    keep_bytes: int | None,
    fused: bool,
    group: dist.ProcessGroup | None,
) -> Settings:
    if keep_bytes is None:
        keep_bytes = KEEP_BYTES.get(image.device.type, 0)
    return Settings(group, tile, keep_bytes, fused)


def _promoted(*tensors: Tensor) -> tuple[Tensor, ...]:
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    return tuple(tensor.to(dtype) for tensor in tensors)


def _all_or(valid: Tensor | None, image: Tensor) -> Tensor:
    if valid is not None:
        return valid
    return torch.ones(len(image), dtype=torch.bool, device=image.device)


class _SoftmaxLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        image_BE: Tensor,
        text_BE: Tensor,
        scale: Tensor,
        valid_B: Tensor,
        identities_BK: Tensor | None,
        riders: Tensor | None,
        settings: Settings,
    ) -> Tensor:
        columns = gather(text_BE, valid_B, identities_BK, settings)
        G = len(columns.text)
        logits = Logits(image_BE, columns, valid_B, identities_BK, scale, None, settings)
        statistics = _body(_extremes, settings)
        row_max = image_BE.new_full((len(image_BE),), -torch.inf)
        row_sum = torch.zeros_like(row_max)
        column_max = image_BE.new_full((G,), -torch.inf)
        column_sum = torch.zeros_like(column_max)
        for rows, cols in logits.tiles():
            of_rows, of_columns = statistics(logits.tile(rows, cols))
            _merge(row_max[rows], row_sum[rows], *of_rows)
            _merge(column_max[cols], column_sum[cols], *of_columns)
        own_max = column_max.clone()
        settings.all_reduce(column_max, dist.ReduceOp.MAX)
        column_max = torch.where(columns.valid, column_max, 0.0)
        column_sum *= (own_max - column_max).exp()

        row_lse = torch.where(valid_B, row_max + row_sum.log(), 0.0)
        diagonal = scale * (image_BE * text_BE).sum(dim=1)
        rows_part = torch.where(valid_B, row_lse - 2 * diagonal, 0.0).sum()
        column_sum, rows_total = _share(column_sum, rows_part, riders, settings)

        column_lse = torch.where(columns.valid, column_max + column_sum.log(), 0.0)
        n_valid = columns.valid.sum().clamp(min=1)
        ctx.save_for_backward(
            image_BE, columns.text, scale, valid_B, columns.valid, row_lse, column_lse,
            identities_BK, columns.identities,
        )  # fmt: skip
        ctx.kept, ctx.settings = logits.kept, settings
        return (rows_total + column_lse.sum()) / (2 * n_valid)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        image_BE, text_GE, scale, valid_B, valid_G, row_lse, column_lse, own, everyones = (
            ctx.saved_tensors
        )
        settings: Settings = ctx.settings
        columns = Columns(text_GE, valid_G, everyones)
        logits = Logits(image_BE, columns, valid_B, own, scale, None, settings, ctx.kept)
        slope = _body(_softmax_slope, settings)
        sums = _Gradients(image_BE, text_GE, *ctx.needs_input_grad[:2])
        # The caller may run backward inside autocast, which would reach these products.
        with torch.autocast(image_BE.device.type, enabled=False):
            for rows, cols in logits.tiles():
                grad = slope(logits.tile(rows, cols), row_lse[rows], column_lse[cols])
                # Subtracted here and not after the product: a converged pair would otherwise get
                # rounding noise for a gradient.
                pairs, i, j = logits.positives(rows, cols)
                grad[i, j] -= 2 * valid_B[pairs].to(grad.dtype)
                sums.add(grad, rows, cols)
        factor = settings.world_size * upstream[0] / (2 * valid_G.sum().clamp(min=1))
        scale_grad = (factor * sums.of_scale()).reshape_as(scale)
        image_grad, text_grad = _times(factor * scale, sums.image, sums.text, settings)
        if not ctx.needs_input_grad[0]:
            image_grad = None
        return image_grad, text_grad, scale_grad, None, None, None, None


class _SigmoidLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        image_BE: Tensor,
        text_BE: Tensor,
        scale: Tensor,
        bias: Tensor,
        valid_B: Tensor,
        identities_BK: Tensor | None,
        riders: Tensor | None,
        settings: Settings,
        wanted: bool,
    ) -> Tensor:
        columns = gather(text_BE, valid_B, identities_BK, settings)
        logits = Logits(image_BE, columns, valid_B, identities_BK, scale, bias, settings)
        value_and_slope = _body(_sigmoid_value_and_slope, settings)
        sums = _Gradients(image_BE, columns.text, *(wanted and n for n in ctx.needs_input_grad[:2]))
        total = image_BE.new_zeros((), dtype=torch.float64)
        slope_total = image_BE.new_zeros((), dtype=torch.float64)
        for rows, cols in logits.tiles():
            tile = logits.tile(rows, cols)
            pairs, i, j = logits.positives(rows, cols)
            own = tile[i, j]
            tile[i, j] = -torch.inf  # no negatives; a void pair is none already
            value_R, grad = value_and_slope(tile)
            total += value_R.sum(dtype=torch.float64)
            total -= torch.where(valid_B[pairs], F.logsigmoid(own), 0.0).sum(dtype=torch.float64)
            grad[i, j] = torch.where(valid_B[pairs], -torch.sigmoid(-own), 0.0)
            if wanted:
                slope_total += grad.sum(dtype=torch.float64)
                sums.add(grad, rows, cols)
        (value,) = _share(None, total.to(image_BE.dtype), riders, settings)
        n_valid = columns.valid.sum().clamp(min=1)
        if wanted:
            factor = scale.new_tensor(settings.world_size) / n_valid
            ctx.settings = settings
            ctx.save_for_backward(
                sums.image, sums.text, factor * scale, (factor * sums.of_scale()).reshape_as(scale),
                (factor * slope_total).to(bias.dtype).reshape_as(bias),
            )  # fmt: skip
        return value / n_valid

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        image_sum, text_sum, factor, scale_grad, bias_grad = ctx.saved_tensors
        up = upstream[0]
        image_grad, text_grad = _times(up * factor, image_sum, text_sum, ctx.settings)
        return (
            image_grad if ctx.needs_input_grad[0] else None, text_grad, up * scale_grad,
            up * bias_grad, None, None, None, None, None,
        )  # fmt: skip


class _Gradients:
    """Sums over tiles: `image` of dL/dS T (B, E), `text` of dL/dS^t I (G, E).

    What no one needs is None; but the scale's gradient follows from either, so one is there.
    """

    def __init__(self, image_BE: Tensor, text_GE: Tensor, of_image: bool, of_text: bool) -> None:
        self._features = (image_BE, text_GE)
        self.image = torch.zeros_like(image_BE) if of_image or not of_text else None
        self.text = torch.zeros_like(text_GE) if of_text else None

    def add(self, grad: Tensor, rows: slice, columns: slice) -> None:
        """Add a tile of dL/dS."""
        image_BE, text_GE = self._features
        if self.image is not None:
            self.image[rows].addmm_(grad, text_GE[columns])
        if self.text is not None:
            self.text[columns].addmm_(grad.T, image_BE[rows])

    def of_scale(self) -> Tensor:
        """Return this worker's part of the sum of dL/dS times the cosines."""
        image_BE, text_GE = self._features
        if self.image is not None:
            return (image_BE * self.image).sum()
        assert self.text is not None
        return (text_GE * self.text).sum()


def _times(
    factor: Tensor, image_BE: Tensor | None, text_GE: Tensor | None, settings: Settings
) -> tuple[Tensor | None, Tensor | None]:
    """Return this worker's gradients: those of the text summed over the workers."""
    image = None if image_BE is None else image_BE * factor
    text = None if text_GE is None else settings.scatter_sum(text_GE * factor)
    return image, text


def _share(
    of_columns: Tensor | None, part: Tensor, riders: Tensor | None, settings: Settings
) -> tuple[Tensor, ...]:
    """Sum columns, a scalar and the riders over the workers in one all-reduce."""
    columns = part.new_empty(0) if of_columns is None else of_columns
    extra = part.new_empty(0) if riders is None else riders.to(part)
    sums = torch.cat([columns, part[None], extra])
    settings.all_reduce(sums)
    if riders is not None:
        riders.copy_(sums[len(columns) + 1 :])
    total = sums[len(columns)]
    return (total,) if of_columns is None else (sums[: len(columns)], total)


# What is done to each tile: elementwise work and reductions, which torch.compile fuses.


def _extremes(tile: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return maximum and sum of exp(S - maximum), of rows and of columns."""
    return _exp_sum(tile, 1), _exp_sum(tile, 0)


def _exp_sum(tile: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    maximum = tile.amax(dim=dim)
    # A row without a valid logit has maximum -inf, and -inf - -inf is not a number.
    base = torch.where(maximum.isinf(), 0.0, maximum)
    return maximum, (tile - base.unsqueeze(dim)).exp_().sum(dim=dim)


def _softmax_slope(tile: Tensor, row_lse: Tensor, column_lse: Tensor) -> Tensor:
    return (tile - row_lse[:, None]).exp_().add_((tile - column_lse).exp_())


def _sigmoid_value_and_slope(tile: Tensor) -> tuple[Tensor, Tensor]:
    """Return each row's sum of softplus(S), and sigmoid(S): those of negatives."""
    # Not F.softplus, which is the identity from 20 on.
    return -F.logsigmoid(-tile).sum(dim=1), torch.sigmoid(tile)


def _body(function: Callable[..., Any], settings: Settings) -> Callable[..., Any]:
    return _compiled(function) if settings.fused else function


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    compiled: Callable[..., Any] = torch.compile(function)
    return compiled


def _merge(running_max: Tensor, running_sum: Tensor, maximum: Tensor, total: Tensor) -> None:
    """Add a tile's part to a log-sum-exp kept as maximum and scaled sum; both in place."""
    new_max = torch.maximum(running_max, maximum)
    base = torch.where(new_max.isinf(), 0.0, new_max)
    running_sum.mul_((running_max - base).exp()).add_(total * (maximum - base).exp())
    running_max.copy_(new_max)
