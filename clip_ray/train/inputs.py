"""A step's tensors on the device; on CUDA the next step's travel while this one is computed.

Pinning and copying a large batch takes as long as many a step's launch: a thread does both on a
stream of its own, one step ahead. On the CPU there is nothing to copy, and no thread.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from clip_ray.config import Config
from clip_ray.data.blocks import Batch
from clip_ray.data.pipe import Pipe
from clip_ray.model.vision import mix

AHEAD = 1  # steps whose tensors lie on the device beside those of the step that is computed


@dataclass(frozen=True)
class Inputs:
    """What a step computes with.

    Attributes:
        micro_batches: pixels, ids and, with patch dropout, (m,) int64 keys of the rows; m equal
            rows in each, the last ones padding.
        valid: (rows with padding,) bool.
        identities: (rows with padding, 2) int64, or None where duplicates are not told.
    """

    micro_batches: list[tuple[Tensor, ...]]
    valid: Tensor
    identities: Tensor | None

    def tensors(self) -> Iterator[Tensor]:
        """Yield all tensors."""
        for micro_batch in self.micro_batches:
            yield from micro_batch
        yield self.valid
        if self.identities is not None:
            yield self.identities


@dataclass(frozen=True)
class Arrival:
    """A batch, and its tensors as soon as they are asked for.

    Attributes:
        batch: as it was read, on the host.
        inputs: returns the tensors; the device waits for them, not the caller.
    """

    batch: Batch
    inputs: Callable[[], Inputs]


def arrivals(
    batches: Iterator[Batch], first_step: int, config: Config, device: torch.device
) -> Iterator[Arrival]:
    """Yield this rank's batches with their tensors on the device; called by every rank.

    Args:
        batches: the first one is for step `first_step`.
        first_step: which rows drop which patches depends on it.
        config: the run's configuration.
        device: where the model is.
    """
    if device.type == "cuda":
        yield from _ahead(batches, first_step, config, device)
        return
    for step, batch in enumerate(batches, first_step):
        yield Arrival(batch, functools.partial(_inputs, batch, step, config, device))


def _ahead(
    batches: Iterator[Batch], first_step: int, config: Config, device: torch.device
) -> Iterator[Arrival]:
    left = threading.Event()
    pipe: Pipe[tuple[Batch, Inputs, Any]] = Pipe(AHEAD, left)
    copying = torch.cuda.Stream(device)

    def moved() -> Iterator[tuple[Batch, Inputs, Any]]:
        with torch.cuda.device(device), torch.cuda.stream(copying):
            for step, batch in enumerate(batches, first_step):
                yield batch, _inputs(batch, step, config, device), copying.record_event()

    def arrive(inputs: Inputs, event: Any) -> Inputs:
        computing = torch.cuda.current_stream(device)
        computing.wait_event(event)
        for tensor in inputs.tensors():
            tensor.record_stream(computing)  # or their memory were given away too early
        return inputs

    thread = threading.Thread(target=pipe.fill, args=(moved,), name="to device", daemon=True)
    thread.start()
    try:
        # What the batches are waited for has a bound of its own.
        for batch, inputs, event in pipe.take(float("inf")):
            yield Arrival(batch, functools.partial(arrive, inputs, event))
    finally:
        left.set()


def _inputs(batch: Batch, step: int, config: Config, device: torch.device) -> Inputs:
    rows = len(batch.valid)
    size = min(config.train.micro_batch or rows, rows)
    moved = functools.partial(_moved, size=size, device=device)
    inputs = [batch.pixels, batch.ids]
    if config.train.patch_dropout:
        # By position, as the crop: a row drops the same patches on whichever worker it is.
        rank = dist.get_rank() if dist.is_initialized() else 0
        first = step * config.train.global_batch + rank * rows
        inputs.append(mix(torch.tensor(config.run.seed)) ^ torch.arange(first, first + rows))
    micro_batches = list(zip(*(moved(tensor).split(size) for tensor in inputs), strict=True))
    identities = moved(_identities(batch)) if config.train.mask_duplicates else None
    return Inputs(micro_batches, moved(batch.valid), identities)


def _moved(tensor: Tensor, size: int, device: torch.device) -> Tensor:
    """Return a tensor on the device, with rows of zeros added until `size` divides their number."""
    short = -len(tensor) % size
    tensor = nn.functional.pad(tensor, (0, 0) * (tensor.ndim - 1) + (0, short))
    cuda = device.type == "cuda"
    moved = (tensor.pin_memory() if cuda else tensor).to(device, non_blocking=cuda)
    return moved.contiguous()  # pixels travel channels last: cheap to turn here


def _identities(batch: Batch) -> Tensor:
    """Return (b, 2): the image file's hash and the caption's, of its token ids."""
    assert batch.image_id is not None
    generator = torch.Generator().manual_seed(0)
    odd_L = torch.randint(-(1 << 62), 1 << 62, batch.ids.shape[1:], generator=generator) * 2 + 1
    captions_B = (batch.ids.long() * odd_L).sum(dim=1)
    return torch.stack([torch.from_numpy(batch.image_id), captions_B], dim=1)
