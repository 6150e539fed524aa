"""What a checkpoint holds of a training run: weights, optimizer moments and counters."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor, nn

from clip_ray.config import Config
from clip_ray.errors import CheckpointError
from clip_ray.model import CLIP, build
from clip_ray.optim import build_optimizer
from clip_ray.train.checkpoint import Fill

FORMAT = 1
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


@dataclass(frozen=True)
class Progress:
    """The counters of a run after `step` steps.

    Attributes:
        step: optimizer steps whose samples are consumed; the position in the plan.
        plan_digest: the plan that the position belongs to.
        bad: undecodable samples met so far.
        truncated: captions cut at the context length so far.
        skipped: steps that left the weights as they were, their loss or gradient not finite.
        loss: the last step's loss.
    """

    step: int
    plan_digest: str
    bad: int = 0
    truncated: int = 0
    skipped: int = 0
    loss: float | None = None

    def after(self, **changes: Any) -> Progress:
        """Return a copy with some counters changed."""
        return replace(self, **changes)

    def to_bytes(self) -> bytes:
        """Serialise as JSON."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Progress:
        """Read what `to_bytes` wrote. Raises CheckpointError on a newer format."""
        fields = json.loads(data)
        if fields.pop("format") > FORMAT:
            raise CheckpointError("the checkpoint's state has a newer format; upgrade clip-ray")
        return cls(**fields)


def build_state(
    config: Config, device: torch.device | str = "cpu", seed: int | None = None
) -> tuple[CLIP, torch.optim.AdamW]:
    """Return a run's model, as it is trained, and its optimizer.

    Args:
        config: the run's.
        device: where the model goes.
        seed: of the weights; none = the run's.
    """
    model = build(config.model, seed=config.run.seed if seed is None else seed).to(device)
    model.set_training(config.train.patch_dropout, config.train.grad_checkpointing)
    model.freeze(config.init.freeze)
    return model, build_optimizer(model, config.optim)


def snapshot(
    model: nn.Module, optimizer: torch.optim.Optimizer, part: int = 0, parts: int = 1
) -> dict[str, Fill]:
    """Copy weights and moments to host memory; return the functions that write them to files.

    Call it between steps, on the training thread; the functions may run on another.

    Args:
        model: the model.
        optimizer: its AdamW.
        part: which part of the tensors, where several ranks write one each.
        parts: their number.
    """
    moments = {
        f"{kind}.{name}": optimizer.state[p][kind]
        for name, p in model.named_parameters()
        if p in optimizer.state
        for kind in _MOMENTS
    }
    files: dict[str, Fill] = {}
    for kind, tensors in (("model", model.state_dict()), ("optimizer", moments)):
        sizes = {name: tensor.nbytes for name, tensor in tensors.items()}
        mine = {name: _to_host(tensors[name]) for name in dealt(sizes, parts)[part]}
        ending = f"-{part + 1:05d}-of-{parts:05d}" if parts > 1 else ""
        files[f"{kind}{ending}.safetensors"] = partial(_save, mine)
    return files


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a file of tensors. Raises OSError where the disk is full: safetensors does not."""
    try:
        safetensors.torch.save_file(tensors, path)
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from error


def dealt(sizes: Mapping[str, int], parts: int) -> list[list[str]]:
    """Deal named sizes into parts that are about equal, the same on every rank."""
    found: list[list[str]] = [[] for _ in range(parts)]
    filled = [0] * parts
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        least = filled.index(min(filled))
        found[least].append(name)
        filled[least] += sizes[name]
    return found


def _tensors(files: Mapping[str, bytes], kind: str) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint's file, or of its parts."""
    found: dict[str, Tensor] = {}
    for name, data in files.items():
        if re.fullmatch(rf"{kind}(-\d+-of-\d+)?\.safetensors", name):
            found |= safetensors.torch.load(data)
    return found


def _to_host(tensor: Tensor) -> Tensor:
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
    return copy.copy_(tensor.detach()).contiguous()


def restore(model: nn.Module, optimizer: torch.optim.Optimizer, files: Mapping[str, bytes]) -> None:
    """Load what `snapshot` wrote into a model and its optimizer, in place.

    Raises:
        CheckpointError: the tensors are not those of this model.
    """
    restore_weights(model, files)
    moments = _tensors(files, "optimizer")
    for name, p in model.named_parameters():
        if f"step.{name}" in moments:
            optimizer.state[p] = {
                # On the device too: the fused kernel reads it there.
                "step": moments[f"step.{name}"].to(p.device),
                "exp_avg": moments[f"exp_avg.{name}"].to(p.device),
                "exp_avg_sq": moments[f"exp_avg_sq.{name}"].to(p.device),
            }


def restore_weights(model: nn.Module, files: Mapping[str, bytes]) -> None:
    """Load a checkpoint's weights into a model, in place. Raises CheckpointError as `restore`."""
    weights = _tensors(files, "model")
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(f"the checkpoint's weights are of another model: {error}") from error


def broadcast(model: nn.Module, optimizer: torch.optim.Optimizer, restored: bool) -> None:
    """Send rank 0's weights, and its moments where it restored some, to all ranks, in place.

    Called by every rank at the same point; only rank 0 needs to have read a checkpoint.
    """
    for tensor in model.state_dict().values():
        dist.broadcast(tensor, src=0)
    if not restored:
        return
    for p in (p for p in model.parameters() if p.requires_grad):
        state = optimizer.state[p]
        for kind in _MOMENTS:
            if kind not in state:
                shape = () if kind == "step" else p.shape
                state[kind] = torch.zeros(shape, dtype=torch.float32)
            sent = state[kind].to(p.device)
            dist.broadcast(sent, src=0)
            state[kind] = sent.to("cpu") if kind == "step" and p.device.type == "cpu" else sent


@torch.no_grad()
def gathered_digests(model: nn.Module) -> list[int]:
    """Return a checksum of the weights and buffers of each rank, by rank; every rank calls it.

    The sum of their bits as integers: one that differs shows. A number a rank travels.
    """
    total = torch.zeros(1, dtype=torch.int64, device=next(model.parameters()).device)
    for number, tensor in enumerate([*model.parameters(), *model.buffers()], 1):
        flat = tensor.reshape(-1)
        bits = flat.view(torch.int32 if flat.element_size() == 4 else torch.uint8)
        # Weighted, so that what two tensors have exchanged shows.
        total += number * bits.sum(dtype=torch.int64)
    if not dist.is_initialized():
        return [int(total)]
    everyones = total.new_empty(dist.get_world_size())
    dist.all_gather_into_tensor(everyones, total)
    return [int(digest) for digest in everyones.tolist()]
