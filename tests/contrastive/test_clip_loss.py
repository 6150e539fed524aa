"""The softmax loss: gradients of W ranks against those of one plain process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from clip_ray.contrastive import clip_loss, reference_loss
from clip_ray.contrastive.tiles import tile_shape
from tests.contrastive.support import (
    FEW_OPTIONS,
    IDENTITIES,
    OPTIONS,
    ROWS,
    VOID,
    E,
    Loss,
    check_exact,
    counted,
    dumb_loss,
    features,
    loss_and_gradients,
    one_process,
    own,
    step_on_ranks,
)
from tests.distributed import run_ranks


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


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


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_gradients_are_those_of_one_process(world_size: int) -> None:
    expected = one_process()
    by_rank = run_ranks(step_on_ranks, world_size, clip_loss, False, None, OPTIONS)
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
    answers = [answer for (answer,) in run_ranks(step_on_ranks, 2, wrong, False, None, [{}])]
    with pytest.raises(AssertionError, match=what):
        check_exact(answers, one_process())


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("name", VOID)
def test_void_rows_are_no_part_of_the_loss(name: str, world_size: int) -> None:
    valid = torch.tensor(VOID[name], dtype=torch.bool)
    by_rank = run_ranks(step_on_ranks, world_size, clip_loss, False, valid, FEW_OPTIONS)
    if name == "all but one":  # one pair has nothing to tell apart: loss and gradient are zero
        for value, grads in (answer for answers in by_rank for answer in answers):
            assert abs(value) < 1e-14 and all(g.abs().max() < 1e-14 for g in grads.values())
        return
    expected = one_process(valid=valid)
    for answers in zip(*by_rank, strict=True):
        check_exact(list(answers), expected)


def test_the_check_notices_a_void_row_that_counts() -> None:
    valid = torch.tensor(VOID["some"], dtype=torch.bool)
    (answer,) = run_ranks(step_on_ranks, 1, clip_loss, False, None, [{}])[0]
    with pytest.raises(AssertionError, match="value"):
        check_exact([answer], one_process(valid=valid))


@pytest.mark.parametrize("world_size", [1, 2])
def test_all_rows_void_is_zero_and_not_nan(world_size: int) -> None:
    valid = torch.zeros(ROWS, dtype=torch.bool)
    for answers in run_ranks(step_on_ranks, world_size, clip_loss, False, valid, FEW_OPTIONS):
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


def test_by_hand() -> None:
    """Two pairs with S = [[2, 0], [0, 2]]: loss = ln(1 + e^-2), dS_ii = -p/2, dS_ij = p/2.

    p = 1 / (1 + e^2) = 0.1192029220; dI = s dS T, ds = <dS, S / s> = -p.
    """
    unit = torch.eye(2, dtype=torch.float64)
    value, image, text, scale = loss_and_gradients(clip_loss, unit, unit, 2.0)
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
    _, image_grad, text_grad, scale_grad = loss_and_gradients(
        clip_loss, image, text, 7.0, tile=(5, 7)
    )
    expected = pytest.approx(7.0 * scale_grad.item(), rel=1e-12)
    assert (image * image_grad).sum().item() == expected
    assert (text * text_grad).sum().item() == expected


def test_swapping_image_and_text_swaps_the_gradients() -> None:
    image, text = features(23)
    value, image_grad, text_grad, scale_grad = loss_and_gradients(
        clip_loss, image, text, 7.0, tile=(5, 7)
    )
    swapped = loss_and_gradients(clip_loss, text, image, 7.0, tile=(5, 7))
    for a, b in zip(swapped, (value, text_grad, image_grad, scale_grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-16)
    assert not torch.allclose(image_grad, text_grad)


def test_permuting_pairs_permutes_the_gradients() -> None:
    image, text = features(23)
    order = torch.randperm(23, generator=torch.Generator().manual_seed(0))
    plain = loss_and_gradients(clip_loss, image, text, 7.0, tile=(5, 7))
    permuted = loss_and_gradients(clip_loss, image[order], text[order], 7.0, tile=(5, 7))
    expected = (plain[0], plain[1][order], plain[2][order], plain[3])
    for a, b in zip(permuted, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-16)


def share_of_permuted(order: list[int]) -> float:
    """Return the loss where this rank has its share of the pairs in that order."""
    image, text = (own(f.detach()[order]) for f in features(ROWS))
    return clip_loss(image, text, torch.tensor(5.0, dtype=torch.float64)).item()


def test_pairs_may_be_on_any_worker() -> None:
    generator = torch.Generator().manual_seed(1)
    order = torch.randperm(ROWS, generator=generator).tolist()
    (as_they_are, *_), (permuted, *_) = (
        run_ranks(share_of_permuted, 3, o) for o in (list(range(ROWS)), order)
    )
    assert permuted == pytest.approx(as_they_are, rel=1e-14)
    # Pairs torn apart are another batch.
    image, text = features(ROWS)
    torn = clip_loss(image, text[order], torch.tensor(5.0, dtype=torch.float64)).item()
    assert abs(torn - as_they_are) > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("keep_bytes", [0, 1 << 20])
def test_autocast_does_not_reach_inside(dtype: torch.dtype, keep_bytes: int) -> None:
    """Neither forward nor backward, which the train loop calls inside autocast too."""
    image, text = features(33, dtype=dtype)
    plain = loss_and_gradients(clip_loss, image, text, 30.0, keep_bytes=keep_bytes)
    with torch.autocast("cpu", torch.bfloat16):
        under = loss_and_gradients(clip_loss, image, text, 30.0, keep_bytes=keep_bytes)
        reached = loss_and_gradients(reference_loss, image, text, 30.0)
    assert plain[0].dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(plain, under, strict=True))
    assert not torch.equal(plain[1], reached[1])


def test_float32_is_near_float64() -> None:
    exact = loss_and_gradients(clip_loss, *features(200), 50.0)
    single = loss_and_gradients(clip_loss, *features(200, dtype=torch.float32), 50.0)
    for a, b in zip(single, exact, strict=True):
        assert (a - b).abs().max() / b.abs().max() < 1e-5


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("valid", [None, [False] + [True] * 7])
def test_extreme_logits_are_finite(sign: float, valid: list[bool] | None) -> None:
    """At s = 100 all pairs equal, or each pair opposed: logits of ±100, exp(100) is no float32."""
    row = F.normalize(torch.ones(1, E), dim=-1)
    image, text = row.repeat(8, 1), sign * row.repeat(8, 1)
    mask = None if valid is None else torch.tensor(valid)
    value, *grads = loss_and_gradients(clip_loss, image, text, 100.0, valid=mask, tile=(3, 3))
    count = 8 if valid is None else 7
    # All logits are equal, so each pair is guessed among `count`.
    assert value.item() == pytest.approx(torch.tensor(float(count)).log().item(), abs=1e-4)
    assert all(g.isfinite().all() for g in grads)


def test_a_converged_batch_gets_no_more_gradient_than_from_plain_autograd() -> None:
    image = torch.eye(8, E + 3)
    ours = loss_and_gradients(clip_loss, image, image, 100.0)
    plain = loss_and_gradients(reference_loss, image, image, 100.0)
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


def _counted_step() -> Any:
    image, text = (own(f.detach()).requires_grad_() for f in features(ROWS))
    scale = torch.tensor(5.0, requires_grad=True)
    return counted(lambda: clip_loss(image, text, scale, riders=torch.ones(10)))


def test_collectives_of_a_step_and_what_they_carry() -> None:
    """Text and a mark of validity are gathered, N maxima and N sums reduced, N E scattered."""
    expected = (
        {"all_gather_into_tensor": 1, "all_reduce": 2},
        {"reduce_scatter_tensor": 1},
        {
            "all_gather_into_tensor": ROWS // 2 * (E + 1),
            "all_reduce": ROWS + ROWS + 1 + 10,
            "reduce_scatter_tensor": ROWS * E,
        },
    )
    assert run_ranks(_counted_step, 2) == [expected] * 2
    assert run_ranks(_counted_step, 1) == [({}, {}, {})]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_duplicates_are_no_negatives(world_size: int) -> None:
    """Whatever the bits of an id: those of a NaN travel too."""
    options = [option | {"identities": IDENTITIES} for option in FEW_OPTIONS]
    expected = one_process(identities=IDENTITIES)
    by_rank = run_ranks(step_on_ranks, world_size, clip_loss, False, None, options)
    for answers in zip(*by_rank, strict=True):
        check_exact(list(answers), expected)
    with pytest.raises(AssertionError, match="value"):
        check_exact([by_rank[0][0]], one_process())


def test_duplicates_and_void_rows_together() -> None:
    valid = torch.tensor(VOID["some"], dtype=torch.bool)
    options = [{"identities": IDENTITIES, "tile": (5, 7)}]
    by_rank = run_ranks(step_on_ranks, 2, clip_loss, False, valid, options)
    check_exact(
        [answers[0] for answers in by_rank], one_process(valid=valid, identities=IDENTITIES)
    )


def test_a_batch_of_one_image_has_no_negatives() -> None:
    same = torch.zeros(6, 1, dtype=torch.int64)
    value, *grads = loss_and_gradients(clip_loss, *features(6), 9.0, identities=same, tile=(4, 4))
    assert abs(value) < 1e-14 and all(g.abs().max() < 1e-14 for g in grads)


@pytest.mark.parametrize("lock", ["image", "text"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_locked_tower_leaves_the_others_gradients_as_they_are(lock: str, world_size: int) -> None:
    expected = one_process(lock=lock)
    assert {"image": "text", "text": "image"}[lock] in expected[1] and lock not in expected[1]
    by_rank = run_ranks(step_on_ranks, world_size, clip_loss, False, None, FEW_OPTIONS, lock)
    for answers in zip(*by_rank, strict=True):
        check_exact(list(answers), expected)


@pytest.mark.slow
def test_fused_tiles_are_the_same_loss() -> None:
    """torch.compile of what is done to each tile; ragged tiles, a void row."""
    valid = torch.tensor([False] + [True] * 32)
    for dtype, bound in ((torch.float64, 1e-13), (torch.float32, 1e-5)):
        pairs = features(33, dtype=dtype)
        plain, fused = (
            loss_and_gradients(clip_loss, *pairs, 30.0, valid=valid, tile=(20, 16), fused=fused)
            for fused in (False, True)
        )
        for a, b in zip(fused, plain, strict=True):
            assert (a - b).abs().max() <= bound * b.abs().max()


def test_tiles_of_a_gpu_grow_with_the_batch() -> None:
    """Each is 64 million logits where the batch has them, and none is larger than the batch."""
    assert tile_shape("cuda", 256, 2048) == (256, 2048)
    assert tile_shape("cuda", 4096, 32768) == (4096, 8192)
    for rows, columns in ((32768, 32768), (131072, 1048576)):
        height, width = tile_shape("cuda", rows, columns)
        assert height * width == 64 << 20
    assert tile_shape("cpu", 10, 10) == (1024, 2048)
