"""The gathered loss and its step: gradients of W ranks against those of one plain process."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from clip_ray.contrastive import clip_loss, contrastive_step, reference_loss
from tests.distributed import run_ranks

ROWS = 12  # of the global batch: divisible by all world sizes and micro-batch counts below
WIDTHS = (6, 7)
E = 5


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


class Towers(nn.Module):
    """Two small towers and a logit scale, in float64."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)

        def weights(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))

        self.image, self.text = weights(WIDTHS[0], E), weights(WIDTHS[1], E)
        self.bias = weights(E)
        self.logit_scale = nn.Parameter(torch.tensor(1.3, dtype=torch.float64))
        self.dropout = dropout

    def forward(self, pixels: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        image, text = torch.tanh(pixels @ self.image + self.bias), ids @ self.text
        drop = nn.Dropout(self.dropout)
        return F.normalize(drop(image), dim=-1), F.normalize(drop(text), dim=-1)


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


Gradients = dict[str, Tensor]
Answer = tuple[Tensor, Gradients]
Loss = Callable[..., Tensor]


def gradients(model: nn.Module) -> Gradients:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def dumb_loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """The definition, pair by pair: Radford et al. 2021, figure 3."""
    logits = scale * image @ text.T
    terms = [
        torch.logsumexp(logits[i], 0) + torch.logsumexp(logits[:, i], 0) - 2 * logits[i, i]
        for i in range(len(logits))
    ]
    return torch.stack(terms).mean() / 2


def one_process(valid: Tensor | None = None) -> Answer:
    """Return loss and gradients of one process that only has the valid rows."""
    model = Towers()
    pixels, ids = batch() if valid is None else (t[valid] for t in batch())
    loss = dumb_loss(*model(pixels, ids), model.logit_scale.exp())
    loss.backward()
    return loss.detach(), gradients(model)


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


def local_only(image: Tensor, text: Tensor, scale: Tensor, valid: Any = None, **_: Any) -> Tensor:
    """A wrong loss: each worker contrasts its own rows, and the value alone is made global."""
    loss = dumb_loss(image, text, scale)
    value = clip_loss(image, text, scale).detach()
    return loss + (value - loss.detach())


def without_world_factor(image: Tensor, text: Tensor, scale: Tensor, valid: Any = None) -> Tensor:
    """A wrong loss: its gradient is each worker's part, which DDP's mean divides by W."""
    loss = clip_loss(image, text, scale, valid)
    part = loss / dist.get_world_size()
    return part + (loss - part).detach()


def towers_without_factor(image: Tensor, text: Tensor, scale: Tensor, valid: Any = None) -> Tensor:
    """A wrong loss: the scale's gradient is right, the towers' is divided by W."""
    world = dist.get_world_size()
    image, text = (x / world + (x - x / world).detach() for x in (image, text))
    return clip_loss(image, text, scale, valid)


def step_on_ranks(loss: Loss, valid: Tensor | None, options: list[dict[str, Any]]) -> list[Answer]:
    """Return this rank's loss and gradients through DDP, for each set of options of the loss."""
    answers = []
    for option in options:
        model = Towers()
        parallel = DistributedDataParallel(model, forward_sync_buffers=False)
        mine = None if valid is None else own(valid)
        image, text = parallel(*(own(t) for t in batch()))
        value = loss(image, text, model.logit_scale.exp(), mine, **option)
        value.backward()
        answers.append((value.detach(), gradients(model)))
    return answers


OPTIONS: list[dict[str, Any]] = [
    {"tile": tile, "keep_bytes": keep}
    for tile in [(1, 1), (5, 7), (50, 60), None]
    for keep in (0, 1 << 20)
]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_gradients_are_those_of_one_process(world_size: int) -> None:
    expected = one_process()
    by_rank = run_ranks(step_on_ranks, world_size, clip_loss, None, OPTIONS)
    for answers in zip(*by_rank, strict=True):
        check_exact(list(answers), expected)


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        (local_only, "factor of|direction of"),
        (without_world_factor, r"factor of \w+ is 0.500000"),
        (towers_without_factor, r"factor of \w+ is 0.500000"),
    ],
)
def test_the_check_rejects_a_wrong_loss(wrong: Loss, what: str) -> None:
    answers = [answer for (answer,) in run_ranks(step_on_ranks, 2, wrong, None, [{}])]
    with pytest.raises(AssertionError, match=what):
        check_exact(answers, one_process())


FEW_OPTIONS = [OPTIONS[0], OPTIONS[3], OPTIONS[6]]
VOID = {
    "some": [0, 1, 1, 1, 1, 0, 1, 1, 0, 0, 1, 1],
    "a whole rank": [1, 1, 1, 0, 1, 1, 0, 0, 0, 0, 0, 0],
    "all but one": [0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0],
}


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("name", VOID)
def test_void_rows_are_no_part_of_the_loss(name: str, world_size: int) -> None:
    valid = torch.tensor(VOID[name], dtype=torch.bool)
    by_rank = run_ranks(step_on_ranks, world_size, clip_loss, valid, FEW_OPTIONS)
    if name == "all but one":  # one pair has nothing to tell apart: loss and gradient are zero
        for value, grads in (answer for answers in by_rank for answer in answers):
            assert abs(value) < 1e-14 and all(g.abs().max() < 1e-14 for g in grads.values())
        return
    expected = one_process(valid)
    for answers in zip(*by_rank, strict=True):
        check_exact(list(answers), expected)


def test_the_check_notices_a_void_row_that_counts() -> None:
    valid = torch.tensor(VOID["some"], dtype=torch.bool)
    (answer,) = run_ranks(step_on_ranks, 1, clip_loss, None, [{}])[0]
    with pytest.raises(AssertionError, match="value"):
        check_exact([answer], one_process(valid))


@pytest.mark.parametrize("world_size", [1, 2])
def test_all_rows_void_is_zero_and_not_nan(world_size: int) -> None:
    valid = torch.zeros(ROWS, dtype=torch.bool)
    for answers in run_ranks(step_on_ranks, world_size, clip_loss, valid, FEW_OPTIONS):
        for value, grads in answers:
            assert value == 0
            assert len(grads) == 4 and all((g == 0).all() for g in grads.values())


def float32_values(tiles: list[tuple[int, int]]) -> list[float]:
    """Return this rank's losses in float32, where a sum's order shows."""
    found = []
    for tile in tiles:
        image, text = (own(f.detach()).requires_grad_() for f in features(64, dtype=torch.float32))
        value = clip_loss(image, text, torch.tensor(20.0), tile=tile)
        found.append(value.item())
    return found


def test_value_is_the_same_bit_for_bit_on_all_ranks() -> None:
    """A decision taken from the loss (finite or not) must not differ between ranks."""
    by_rank = run_ranks(float32_values, 4, [(1, 1), (5, 7), (99, 99)])
    assert by_rank[1:] == by_rank[:1] * 3


def ride(numbers: list[list[float]]) -> tuple[list[float], float, float]:
    """Return this rank's riders after the loss, and the loss with and without them."""
    image, text = (own(f.detach()) for f in features(ROWS))
    riders = torch.tensor(numbers[dist.get_rank()], dtype=torch.float32)
    scale = torch.tensor(5.0)
    with_riders = clip_loss(image, text, scale, riders=riders)
    return riders.tolist(), with_riders.item(), clip_loss(image, text, scale).item()


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_riders_are_summed_exactly_and_change_nothing(world_size: int) -> None:
    """Four ranks' pieces stay below 2**24, where float32 holds every integer."""
    numbers = [[float(rank), 2.0**22 - 1 - rank, 7919.0 * rank, 0.0] for rank in range(world_size)]
    for riders, with_riders, without in run_ranks(ride, world_size, numbers):
        assert riders == [sum(column) for column in zip(*numbers, strict=True)]
        assert with_riders == without


def test_without_a_process_group_riders_are_untouched() -> None:
    riders = torch.tensor([3.0, 2.0**24 - 1, 0.0])
    clip_loss(*features(4), torch.tensor(2.0), riders=riders)
    assert riders.tolist() == [3.0, 2.0**24 - 1, 0.0]


@pytest.mark.parametrize("keep_bytes", [0, 1 << 20])
@pytest.mark.parametrize("valid", [None, [True, True, False, True, True, True]])
def test_gradcheck(keep_bytes: int, valid: list[bool] | None) -> None:
    mask = None if valid is None else torch.tensor(valid)
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda i, t, s: clip_loss(i, t, s, mask, tile=(4, 5), keep_bytes=keep_bytes),
        (*features(6), scale),
    )


def loss_and_gradients(
    image: Tensor, text: Tensor, scale: float, loss: Loss = clip_loss, **options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    image, text = (x.detach().clone().requires_grad_() for x in (image, text))
    dtype = torch.promote_types(image.dtype, torch.float32)
    leaf = torch.tensor(scale, dtype=dtype, requires_grad=True)
    value = loss(image, text, leaf, **options)
    value.backward()
    return value.detach(), image.grad, text.grad, leaf.grad


def test_by_hand() -> None:
    """Two pairs with S = [[2, 0], [0, 2]]: loss = ln(1 + e^-2), dS_ii = -p/2, dS_ij = p/2.

    p = 1 / (1 + e^2) = 0.1192029220; dI = s dS T, ds = <dS, S / s> = -p.
    """
    unit = torch.eye(2, dtype=torch.float64)
    value, image, text, scale = loss_and_gradients(unit, unit, 2.0)
    assert value.item() == pytest.approx(0.1269280110)
    p = 0.1192029220
    expected = torch.tensor([[-p, p], [p, -p]], dtype=torch.float64)
    torch.testing.assert_close(image, expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(text, expected, rtol=1e-9, atol=0)
    assert scale.item() == pytest.approx(-p)


def test_reference_loss_is_the_definition() -> None:
    pairs, scale = features(9), torch.tensor(4.0, dtype=torch.float64)
    torch.testing.assert_close(
        reference_loss(*pairs, scale), dumb_loss(*pairs, scale), rtol=1e-14, atol=0
    )


def test_homogeneity() -> None:
    """The loss depends on s·I·T alone, so <I, dI> = <T, dT> = s ds: no reference is needed."""
    image, text = features(40)
    _, image_grad, text_grad, scale_grad = loss_and_gradients(image, text, 7.0, tile=(5, 7))
    expected = pytest.approx(7.0 * scale_grad.item(), rel=1e-12)
    assert (image * image_grad).sum().item() == expected
    assert (text * text_grad).sum().item() == expected


def test_swapping_image_and_text_swaps_the_gradients() -> None:
    image, text = features(23)
    value, image_grad, text_grad, scale_grad = loss_and_gradients(image, text, 7.0, tile=(5, 7))
    swapped = loss_and_gradients(text, image, 7.0, tile=(5, 7))
    for a, b in zip(swapped, (value, text_grad, image_grad, scale_grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-16)
    assert not torch.allclose(image_grad, text_grad)


def test_permuting_pairs_permutes_the_gradients() -> None:
    image, text = features(23)
    order = torch.randperm(23, generator=torch.Generator().manual_seed(0))
    plain = loss_and_gradients(image, text, 7.0, tile=(5, 7))
    permuted = loss_and_gradients(image[order], text[order], 7.0, tile=(5, 7))
    expected = (plain[0], plain[1][order], plain[2][order], plain[3])
    for a, b in zip(permuted, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("keep_bytes", [0, 1 << 20])
def test_autocast_does_not_reach_inside(dtype: torch.dtype, keep_bytes: int) -> None:
    """Neither forward nor backward, which the train loop calls inside autocast too."""
    image, text = features(33, dtype=dtype)
    plain = loss_and_gradients(image, text, 30.0, keep_bytes=keep_bytes)
    with torch.autocast("cpu", torch.bfloat16):
        under = loss_and_gradients(image, text, 30.0, keep_bytes=keep_bytes)
        reached = loss_and_gradients(image, text, 30.0, loss=reference_loss)
    assert plain[0].dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(plain, under, strict=True))
    assert not torch.equal(plain[1], reached[1])


def test_float32_is_near_float64() -> None:
    exact = loss_and_gradients(*features(200), 50.0)
    single = loss_and_gradients(*features(200, dtype=torch.float32), 50.0)
    for a, b in zip(single, exact, strict=True):
        assert (a - b).abs().max() / b.abs().max() < 1e-5


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("valid", [None, [False] + [True] * 7])
def test_extreme_logits_are_finite(sign: float, valid: list[bool] | None) -> None:
    """At s = 100 all pairs equal, or each pair opposed: logits of ±100, exp(100) is no float32."""
    row = F.normalize(torch.ones(1, E), dim=-1)
    image, text = row.repeat(8, 1), sign * row.repeat(8, 1)
    mask = None if valid is None else torch.tensor(valid)
    value, *grads = loss_and_gradients(image, text, 100.0, valid=mask, tile=(3, 3))
    count = 8 if valid is None else 7
    # All logits are equal, so each pair is guessed among `count`.
    assert value.item() == pytest.approx(torch.tensor(float(count)).log().item(), abs=1e-4)
    assert all(g.isfinite().all() for g in grads)


def test_a_converged_batch_gets_no_more_gradient_than_from_plain_autograd() -> None:
    image = torch.eye(8, E + 3)
    ours = loss_and_gradients(image, image, 100.0)
    plain = loss_and_gradients(image, image, 100.0, loss=reference_loss)
    assert ours[1].abs().max() <= plain[1].abs().max()
    assert ours[0].item() == pytest.approx(plain[0].item(), abs=1e-6)


def saved_floats(keep_bytes: int, rows: int, width: int) -> int:
    """Return how many numbers wait for the backward pass, each storage counted once."""
    image, text = torch.randn(2, rows, width).unbind()
    image, text = F.normalize(image).requires_grad_(), F.normalize(text).requires_grad_()
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes() // 4
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = clip_loss(image, text, torch.tensor(10.0), keep_bytes=keep_bytes)
    kept = loss.grad_fn.kept or {}  # type: ignore[union-attr]
    return sum(saved.values()) + sum(t.numel() for t in kept.values())


def test_memory_is_linear_in_the_batch() -> None:
    rows, width = 512, 16
    assert saved_floats(0, rows, width) <= 3 * rows * width
    # The counter itself sees logits that are kept.
    assert saved_floats(rows * rows * 4, rows, width) > rows * rows
    assert saved_floats(rows * rows * 4 - 1, rows, width) <= 3 * rows * width


COLLECTIVES = (
    "all_gather_into_tensor",
    "all_gather",
    "all_reduce",
    "reduce_scatter_tensor",
    "broadcast",
    "all_to_all_single",
)


def count_collectives() -> tuple[Counter[str], Counter[str]]:
    """Return this rank's collectives of forward and of backward."""
    counts: Counter[str] = Counter()

    def counting(name: str) -> Callable[..., Any]:
        original = getattr(dist, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return original(*args, **kwargs)

        return call

    image, text = (own(f.detach()).requires_grad_() for f in features(ROWS))
    scale = torch.tensor(5.0, requires_grad=True)
    with mock.patch.multiple(dist, **{name: counting(name) for name in COLLECTIVES}):
        value = clip_loss(image, text, scale, riders=torch.ones(10))
        forward = counts.copy()
        value.backward()
    return forward, counts - forward


def test_collectives_of_a_step() -> None:
    expected = (
        {"all_gather_into_tensor": 1, "all_reduce": 2},
        {"reduce_scatter_tensor": 1},
    )
    assert run_ranks(count_collectives, 2) == [expected] * 2
    assert run_ranks(count_collectives, 1) == [({}, {})]


# contrastive_step


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


def cached_steps(counts: list[int], dropout: float) -> list[Step]:
    """Return this rank's contrastive_step for each number of micro-batches."""
    steps = []
    for count in counts:
        model, calls, phases = Towers(dropout), [], []
        parallel = DistributedDataParallel(model, forward_sync_buffers=False)

        def loss(image: Tensor, text: Tensor, scale: Tensor, calls: list[int] = calls) -> Tensor:
            calls.append(len(image))
            return clip_loss(image, text, scale)

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
