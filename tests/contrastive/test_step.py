"""The step: micro-batches against a plain step whose graphs are all kept."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from clip_ray.contrastive import clip_loss, contrastive_step, siglip_loss
from tests.contrastive.support import (
    Answer,
    Gradients,
    Towers,
    batch,
    check_exact,
    dumb_loss,
    dumb_siglip_loss,
    gradients,
    one_process,
    own,
)
from tests.distributed import run_ranks


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@dataclass(frozen=True)
class Step:
    value: Tensor
    gradients: Gradients
    loss_calls: int
    phases: list[str]


def _micro_batches(count: int) -> list[tuple[Tensor, Tensor]]:
    pixels, ids = (own(t) for t in batch())
    size = len(pixels) // count
    return list(zip(pixels.split(size), ids.split(size), strict=True))


def cached_steps(
    counts: list[int], dropout: float, biased: bool = False, lock: str = ""
) -> list[Step]:
    """Return this rank's contrastive_step for each number of micro-batches."""
    steps = []
    for count in counts:
        model, calls, phases = Towers(dropout, biased).lock(lock), [], []
        parallel = DistributedDataParallel(model, forward_sync_buffers=False)

        def loss(image: Tensor, text: Tensor, *scalars: Tensor, calls: list[int] = calls) -> Tensor:
            calls.append(len(image))
            return (siglip_loss if len(scalars) == 2 else clip_loss)(image, text, *scalars)

        torch.manual_seed(100 + dist.get_rank())
        value = contrastive_step(parallel, _micro_batches(count), loss, mark=phases.append)
        steps.append(Step(value, gradients(model), len(calls), phases))
    return steps


def kept_graph_steps(counts: list[tuple[int, int]], dropout: float) -> list[Answer]:
    """Return one plain process's step on the same masks: all graphs kept, one dumb loss.

    The masks are those of `cached_steps`: each rank's generator runs over its micro-batches in
    order, once.
    """
    answers = []
    for world_size, count in counts:
        model = Towers(dropout)
        pixels, ids = batch()
        share = len(pixels) // world_size
        images, texts = [], []
        for rank in range(world_size):
            torch.manual_seed(100 + rank)
            mine = slice(rank * share, (rank + 1) * share)
            for part in zip(
                pixels[mine].split(share // count), ids[mine].split(share // count), strict=True
            ):
                image, text = model(*part)
                images.append(image)
                texts.append(text)
        loss = dumb_loss(torch.cat(images), torch.cat(texts), model.logit_scale.exp())
        loss.backward()
        answers.append((loss.detach(), gradients(model)))
    return answers


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("world_size", [1, 2])
def test_micro_batches_have_the_gradient_of_the_whole_batch(
    world_size: int, dropout: float
) -> None:
    counts = [1, 2, 3]
    by_rank = run_ranks(cached_steps, world_size, counts, dropout)
    with torch.random.fork_rng(devices=[]):
        expected = kept_graph_steps([(world_size, count) for count in counts], dropout)
    for answer, steps in zip(expected, zip(*by_rank, strict=True), strict=True):
        check_exact([(step.value, step.gradients) for step in steps], answer)
        assert [step.loss_calls for step in steps] == [1] * world_size
        assert [step.phases for step in steps] == [["forward", "loss", "backward"]] * world_size


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_sigmoid_loss_and_its_bias(world_size: int) -> None:
    by_rank = run_ranks(cached_steps, world_size, [1, 2, 3], 0.0, True)
    expected = one_process(dumb_siglip_loss)
    for steps in zip(*by_rank, strict=True):
        check_exact([(step.value, step.gradients) for step in steps], expected)


@pytest.mark.parametrize("lock", ["image", "text"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_locked_tower(world_size: int, lock: str) -> None:
    by_rank = run_ranks(cached_steps, world_size, [1, 3], 0.0, False, lock)
    for steps in zip(*by_rank, strict=True):
        check_exact([(step.value, step.gradients) for step in steps], one_process(lock=lock))


def test_dropout_masks_matter_to_the_check() -> None:
    """With other masks the same comparison fails: that the test above passes is no accident."""
    (steps,) = run_ranks(cached_steps, 1, [2], 0.2)
    with torch.random.fork_rng(devices=[]):
        (other,) = kept_graph_steps([(1, 3)], 0.2)
    with pytest.raises(AssertionError):
        check_exact([(steps[0].value, steps[0].gradients)], other)


def test_accumulating_without_the_cache_is_rejected() -> None:
    """The usual accumulation (a loss per micro-batch) has another value and direction."""
    model = Towers()
    pixels, ids = batch()
    values = []
    for part in zip(pixels.split(6), ids.split(6), strict=True):
        value = dumb_loss(*model(*part), model.logit_scale.exp()) / 2
        value.backward()
        values.append(value.detach())
    with pytest.raises(AssertionError):
        check_exact([(torch.stack(values).sum(), gradients(model))], one_process())


def test_one_micro_batch_is_the_plain_step_bit_for_bit() -> None:
    plain, stepped = Towers(), Towers()
    value = clip_loss(*plain(*batch()), plain.logit_scale.exp())
    value.backward()
    stepped_value = contrastive_step(stepped, [batch()], clip_loss)
    assert torch.equal(value.detach(), stepped_value) and not stepped_value.requires_grad
    expected, found = gradients(plain), gradients(stepped)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_second_pass_leaves_the_random_state_as_the_first_did() -> None:
    """A step draws as much randomness with a replay as without."""
    states = []
    for parts in (3, 1):
        model = Towers(dropout=0.2)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            if parts == 1:
                for part in zip(*(t.split(4) for t in batch()), strict=True):
                    model(*part)
            else:
                micro_batches = list(zip(*(t.split(4) for t in batch()), strict=True))
                contrastive_step(model, micro_batches, clip_loss)
            states.append(torch.get_rng_state())
    assert torch.equal(*states)
