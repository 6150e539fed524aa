"""Small towers, batches, and the losses by their definitions, to hold the real ones against."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

ROWS = 12  # of the global batch: divisible by all world sizes and micro-batch counts of the tests
WIDTHS = (6, 7)
E = 5

Gradients = dict[str, Tensor]
Answer = tuple[Tensor, Gradients]
Loss = Callable[..., Tensor]


class Towers(nn.Module):
    """Two small towers, a logit scale and, for the sigmoid loss, a logit bias; in float64."""

    def __init__(self, dropout: float = 0.0, biased: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)

        def weights(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))

        self.image, self.text = weights(WIDTHS[0], E), weights(WIDTHS[1], E)
        self.bias = weights(E)
        self.logit_scale = nn.Parameter(torch.tensor(1.3, dtype=torch.float64))
        self.logit_bias = nn.Parameter(torch.tensor(-2.0, dtype=torch.float64)) if biased else None
        self.dropout = dropout

    def forward(self, pixels: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        image, text = torch.tanh(pixels @ self.image + self.bias), ids @ self.text
        drop = nn.Dropout(self.dropout)
        return F.normalize(drop(image), dim=-1), F.normalize(drop(text), dim=-1)

    def lock(self, towers: str) -> Towers:
        """Freeze "image" or "text", or nothing; returns itself."""
        for parameter in {"image": (self.image, self.bias), "text": (self.text,)}.get(towers, ()):
            parameter.requires_grad_(False)
        return self

    def scalars(self) -> list[Tensor]:
        return [self.logit_scale.exp(), *([] if self.logit_bias is None else [self.logit_bias])]


def batch(rows: int = ROWS) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return tuple(  # type: ignore[return-value]
        torch.randn(rows, width, generator=generator, dtype=torch.float64) for width in WIDTHS
    )


def own(tensor: Tensor) -> Tensor:
    """Return this rank's rows of a global tensor."""
    share = len(tensor) // dist.get_world_size()
    return tensor[dist.get_rank() * share : (dist.get_rank() + 1) * share]


def features(rows: int, seed: int = 3, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(2, rows, E, generator=generator, dtype=torch.float64)
    image, text = F.normalize(drawn, dim=-1).to(dtype)
    return image.requires_grad_(), text.requires_grad_()


def gradients(model: nn.Module) -> Gradients:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def twins(identities: Tensor | None, rows: int) -> Tensor:
    """Return which pairs of different rows share an image or a caption."""
    same = torch.zeros(rows, rows, dtype=torch.bool)
    if identities is not None:
        for i in range(rows):
            for j in range(rows):
                same[i, j] = i != j and bool((identities[i] == identities[j]).any())
    return same


def dumb_loss(
    image: Tensor, text: Tensor, scale: Tensor, identities: Tensor | None = None
) -> Tensor:
    """The definition, pair by pair: Radford et al. 2021, figure 3."""
    logits = (scale * image @ text.T).masked_fill(twins(identities, len(image)), -torch.inf)
    terms = [
        torch.logsumexp(logits[i], 0) + torch.logsumexp(logits[:, i], 0) - 2 * logits[i, i]
        for i in range(len(logits))
    ]
    return torch.stack(terms).mean() / 2


def dumb_siglip_loss(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, identities: Tensor | None = None
) -> Tensor:
    """The definition, pair by pair: Zhai et al. 2023, algorithm 1."""
    same, total = twins(identities, len(image)), torch.zeros((), dtype=torch.float64)
    for i in range(len(image)):
        for j in range(len(image)):
            if not same[i, j]:
                sign = 1 if i == j else -1
                total = total + torch.log1p(torch.exp(-sign * (scale * image[i] @ text[j] + bias)))
    return total / len(image)


def one_process(
    loss: Loss = dumb_loss,
    valid: Tensor | None = None,
    lock: str = "",
    identities: Tensor | None = None,
) -> Answer:
    """Return loss and gradients of one process that only has the valid rows."""
    model = Towers(biased=loss is dumb_siglip_loss).lock(lock)
    rows = torch.arange(ROWS) if valid is None else valid.nonzero()[:, 0]
    same = None if identities is None else identities[rows]
    value = loss(*model(*(t[rows] for t in batch())), *model.scalars(), same)
    value.backward()
    return value.detach(), gradients(model)


def step_on_ranks(
    loss: Loss, biased: bool, valid: Tensor | None, options: list[dict[str, Any]], lock: str = ""
) -> list[Answer]:
    """Return this rank's loss and gradients through DDP, for each set of options of the loss."""
    answers = []
    for option in options:
        model = Towers(biased=biased).lock(lock)
        parallel = DistributedDataParallel(model, forward_sync_buffers=False)
        mine = None if valid is None else own(valid)
        if "identities" in option:
            option = option | {"identities": own(option["identities"])}
        image, text = parallel(*(own(t) for t in batch()))
        value = loss(image, text, *model.scalars(), mine, **option)
        value.backward()
        answers.append((value.detach(), gradients(model)))
    return answers


def check_exact(answers: list[Answer], expected: Answer) -> None:
    """Fail unless every rank has the value and the gradients of one process, with factor 1."""
    for value, grads in answers:
        assert value == pytest.approx(expected[0].item(), rel=1e-12), "value"
        assert grads.keys() == expected[1].keys()
        for name, right in expected[1].items():
            factor = (grads[name] * right).sum() / (right * right).sum()
            assert abs(factor - 1) <= 1e-12, f"factor of {name} is {factor:.6f}"
            error = (grads[name] - right).abs().max() / right.abs().max()
            assert error <= 1e-12, f"direction of {name}"


def loss_and_gradients(
    loss: Loss, image: Tensor, text: Tensor, *scalars: float, **options: Any
) -> tuple[Tensor, ...]:
    """Return the value and the gradients of features and scalars."""
    leaves = [x.detach().clone().requires_grad_() for x in (image, text)]
    dtype = torch.promote_types(image.dtype, torch.float32)
    leaves += [torch.tensor(x, dtype=dtype, requires_grad=True) for x in scalars]
    value = loss(*leaves, **options)
    value.backward()
    return value.detach(), *(leaf.grad for leaf in leaves)  # type: ignore[return-value]


def counted(forward: Callable[[], Tensor]) -> tuple[Counter[str], Counter[str], Counter[str]]:
    """Return this rank's collectives of forward and of backward, and the numbers each was given."""
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()

    def counting(name: str, sent: int) -> Callable[..., Any]:
        original = getattr(dist, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            sizes[name] += args[sent].numel()
            return original(*args, **kwargs)

        return call

    # Where its input is among the arguments of each.
    names = {"all_gather_into_tensor": 1, "all_gather": 1, "all_reduce": 0, "broadcast": 0}
    names |= {"reduce_scatter_tensor": 1, "reduce_scatter": 1, "all_to_all_single": 1}
    with mock.patch.multiple(dist, **{n: counting(n, at) for n, at in names.items()}):
        value = forward()
        before = counts.copy()
        value.backward()
    return before, counts - before, sizes


OPTIONS: list[dict[str, Any]] = [
    {"tile": tile, "keep_bytes": keep}
    for tile in [(1, 1), (5, 7), (50, 60), None]
    for keep in (0, 1 << 20)
]
FEW_OPTIONS = [OPTIONS[0], OPTIONS[3], OPTIONS[6]]
VOID = {
    "some": [0, 1, 1, 1, 1, 0, 1, 1, 0, 0, 1, 1],
    "a whole rank": [1, 1, 1, 0, 1, 1, 0, 0, 0, 0, 0, 0],
    "all but one": [0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0],
}
# Rows 0, 3, 10 have one image, 2 and 5 one caption; the bits of some ids are those of a NaN.
IDENTITIES = torch.tensor(
    [
        [0x7F800001_FFC00001 if row in (0, 3, 10) else row for row in range(ROWS)],
        [-(1 << 40) - 1 if row in (2, 5) else 100 + row for row in range(ROWS)],
    ]
).T.contiguous()
