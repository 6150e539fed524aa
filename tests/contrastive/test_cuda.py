"""The losses and the step on CUDA devices: `pytest -m gpu`, on a machine that has one or more."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from clip_ray.contrastive import clip_loss, contrastive_step, siglip_loss
from tests.contrastive.support import (
    IDENTITIES,
    ROWS,
    VOID,
    Answer,
    Loss,
    Towers,
    batch,
    check_exact,
    dumb_loss,
    dumb_siglip_loss,
    features,
    gradients,
    loss_and_gradients,
    one_process,
)
from tests.distributed import run_ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
LOSSES: list[tuple[Loss, Loss]] = [(clip_loss, dumb_loss), (siglip_loss, dumb_siglip_loss)]


def steps(loss: Loss, biased: bool, options: list[dict[str, Any]], parts: int) -> list[Answer]:
    """Return this rank's loss and gradients on its own device, brought to the CPU."""
    rank, world = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    share, answers = ROWS // world, []
    for option in options:
        own = {
            name: value[rank * share : (rank + 1) * share].to(device)
            if isinstance(value, torch.Tensor)
            else value
            for name, value in option.items()
        }
        model = Towers(biased=biased).to(device)
        parallel = DistributedDataParallel(model, [rank], forward_sync_buffers=False)
        mine = [t[rank * share : (rank + 1) * share].to(device) for t in batch()]
        micro_batches = list(zip(*(t.split(share // parts) for t in mine), strict=True))
        value = contrastive_step(
            parallel, micro_batches, lambda *given, own=own: loss(*given, **own)
        )
        found = {name: grad.cpu() for name, grad in gradients(model).items()}
        answers.append((value.cpu(), found))
    return answers


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize(("loss", "oracle"), LOSSES)
def test_gradients_are_those_of_one_process(loss: Loss, oracle: Loss, parts: int) -> None:
    """With NCCL on as many devices as divide the batch."""
    world = max(w for w in (1, 2, 4) if w <= torch.cuda.device_count())
    valid = torch.tensor(VOID["some"], dtype=torch.bool)
    options: list[dict[str, Any]] = [{}, {"tile": (5, 7)}, {"valid": valid}]
    options += [{"identities": IDENTITIES}, {"fused": True, "tile": (5, 7)}]
    expected = [one_process(oracle), one_process(oracle), one_process(oracle, valid)]
    expected += [one_process(oracle, identities=IDENTITIES), one_process(oracle)]
    biased = loss is siglip_loss
    by_rank = run_ranks(steps, world, loss, biased, options, parts, backend="nccl")
    for answers, right in zip(zip(*by_rank, strict=True), expected, strict=True):
        check_exact(list(answers), right)


@pytest.mark.parametrize("keep_bytes", [0, 1 << 30])
@pytest.mark.parametrize("fused", [False, True])
def test_autocast_does_not_reach_inside(keep_bytes: int, fused: bool) -> None:
    image, text = (f.detach().cuda() for f in features(700, dtype=torch.bfloat16))
    options = {"keep_bytes": keep_bytes, "fused": fused, "tile": (256, 300)}

    def on_device(*leaves: torch.Tensor, **given: Any) -> torch.Tensor:
        return clip_loss(leaves[0], leaves[1], leaves[2].cuda(), **given)

    plain = loss_and_gradients(on_device, image, text, 30.0, **options)
    with torch.autocast("cuda", torch.bfloat16):
        under = loss_and_gradients(on_device, image, text, 30.0, **options)
    assert plain[0].dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(plain, under, strict=True))


def test_float32_is_near_float64() -> None:
    exact = loss_and_gradients(clip_loss, *features(3000), 50.0)
    pairs = [f.detach().cuda() for f in features(3000, dtype=torch.float32)]

    def on_device(*leaves: torch.Tensor) -> torch.Tensor:
        return clip_loss(leaves[0], leaves[1], leaves[2].cuda(), keep_bytes=0, tile=(1000, 1024))

    single = loss_and_gradients(on_device, *pairs, 50.0)
    for a, b in zip(single, exact, strict=True):
        assert (a.cpu() - b).abs().max() / b.abs().max() < 1e-5
