"""The step: forward and backward over a worker's rows, in micro-batches without approximation."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

LossFunction = Callable[..., Tensor]
"""(image features (B, E), text features (B, E), scale[, bias]) -> global loss."""


def contrastive_step(
    model: nn.Module,
    micro_batches: Sequence[tuple[Tensor, ...]],
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
        micro_batches: the model's arguments, each; equally many and long on every worker.
        loss: called once: with the features of all rows in order, the scale, and the bias of a
            model that has one.
        mark: told the phase that ends: "forward", "loss" or "backward".

    Returns:
        The detached global loss.
    """
    bare: Any = getattr(model, "module", model)
    if len(micro_batches) == 1:
        image_BE, text_BE = model(*micro_batches[0])
        mark("forward")
        value = loss(image_BE, text_BE, *_scalars(bare))
        mark("loss")
        value.backward()
        mark("backward")
        return value.detach()

    device = micro_batches[0][0].device
    features, random_states = [], []
    with torch.no_grad():
        for micro_batch in micro_batches:
            random_states.append(_random_state(device))
            features.append(model(*micro_batch))
    images, texts = ([f[side].requires_grad_() for f in features] for side in (0, 1))
    scalars = _scalars(bare)
    leaves = [scalar.detach().requires_grad_() for scalar in scalars]
    mark("forward")
    value = loss(torch.cat(images), torch.cat(texts), *leaves)
    mark("loss")
    value.backward()
    last = len(micro_batches) - 1
    for number, micro_batch in enumerate(micro_batches):
        no_sync = getattr(model, "no_sync", contextlib.nullcontext)
        with contextlib.nullcontext() if number == last else no_sync():
            with _replayed(random_states[number], device):
                image_BE, text_BE = model(*micro_batch)
            pairs = [(image_BE, images[number].grad), (text_BE, texts[number].grad)]
            if number == last:
                # Once: every backward of the scale would add its whole gradient again.
                pairs += [(s, leaf.grad) for s, leaf in zip(scalars, leaves, strict=True)]
            # A locked tower's features need none.
            needed = [pair for pair in pairs if pair[0].requires_grad]
            if needed:
                torch.autograd.backward([p[0] for p in needed], [p[1] for p in needed])
    mark("backward")
    return value.detach()


def _scalars(model: Any) -> list[Tensor]:
    """Return what the loss needs of the model beside features, as non-leaf tensors."""
    bias = getattr(model, "logit_bias", None)
    return [model.logit_scale.exp()] + ([] if bias is None else [bias * 1])


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
