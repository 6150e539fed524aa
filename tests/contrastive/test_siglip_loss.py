"""The sigmoid loss: gradients of W ranks against those of one plain process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clip_ray.contrastive import reference_siglip_loss, siglip_loss
from tests.contrastive.support import (
    IDENTITIES,
    VOID,
    E,
    check_exact,
    counted,
    dumb_siglip_loss,
    features,
    loss_and_gradients,
    one_process,
    own,
    step_on_ranks,
)
from tests.distributed import run_ranks

OPTIONS: list[dict[str, Any]] = [{"tile": tile} for tile in [(1, 1), (5, 7), (50, 60), None]]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def own_rows_only(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, valid: Any) -> Tensor:
    """A wrong loss: right in value, but each worker contrasts its own rows."""
    loss = dumb_siglip_loss(image, text, scale, bias)
    value = siglip_loss(image, text, scale, bias).detach()
    return loss + (value - loss.detach())


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_gradients_are_those_of_one_process(world_size: int) -> None:
    expected = one_process(dumb_siglip_loss)
    assert "logit_bias" in expected[1]
    by_rank = run_ranks(step_on_ranks, world_size, siglip_loss, True, None, OPTIONS)
    for answers in zip(*by_rank, strict=True):
        check_exact(list(answers), expected)


def test_the_check_rejects_a_wrong_loss() -> None:
    answers = [answer for (answer,) in run_ranks(step_on_ranks, 2, own_rows_only, True, None, [{}])]
    with pytest.raises(AssertionError, match="factor of|direction of"):
        check_exact(answers, one_process(dumb_siglip_loss))


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("name", VOID)
def test_void_rows_are_no_part_of_the_loss(name: str, world_size: int) -> None:
    valid = torch.tensor(VOID[name], dtype=torch.bool)
    expected = one_process(dumb_siglip_loss, valid)
    by_rank = run_ranks(step_on_ranks, world_size, siglip_loss, True, valid, OPTIONS)
    for answers in zip(*by_rank, strict=True):
        check_exact(list(answers), expected)


def test_all_rows_void_is_zero_and_not_nan() -> None:
    valid = torch.zeros(12, dtype=torch.bool)
    for answers in run_ranks(step_on_ranks, 2, siglip_loss, True, valid, OPTIONS):
        for value, grads in answers:
            assert value == 0
            assert len(grads) == 5 and all((g == 0).all() for g in grads.values())


@pytest.mark.parametrize("lock", ["image", "text"])
def test_a_locked_tower_leaves_the_others_gradients_as_they_are(lock: str) -> None:
    expected = one_process(dumb_siglip_loss, lock=lock)
    by_rank = run_ranks(step_on_ranks, 2, siglip_loss, True, None, OPTIONS, lock)
    for answers in zip(*by_rank, strict=True):
        check_exact(list(answers), expected)


@pytest.mark.parametrize("world_size", [1, 2])
def test_duplicates_are_no_negatives(world_size: int) -> None:
    options = [option | {"identities": IDENTITIES} for option in OPTIONS]
    expected = one_process(dumb_siglip_loss, identities=IDENTITIES)
    by_rank = run_ranks(step_on_ranks, world_size, siglip_loss, True, None, options)
    for answers in zip(*by_rank, strict=True):
        check_exact(list(answers), expected)
    with pytest.raises(AssertionError, match="value"):
        check_exact([by_rank[0][0]], one_process(dumb_siglip_loss))


def test_gradcheck() -> None:
    scale, bias = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (3.0, -2.0))
    assert torch.autograd.gradcheck(
        lambda *leaves: siglip_loss(*leaves, tile=(4, 5)), (*features(6), scale, bias)
    )


def test_reference_loss_is_the_definition() -> None:
    scalars = [torch.tensor(x, dtype=torch.float64) for x in (4.0, -3.0)]
    torch.testing.assert_close(
        reference_siglip_loss(*features(9), *scalars),
        dumb_siglip_loss(*features(9), *scalars),
        rtol=1e-14,
        atol=0,
    )


def test_by_hand() -> None:
    """Two pairs, S = [[1, -1], [-1, 1]]: four terms of ln(1 + e^-1) over n = 2; ds = <G, cos>/2.

    G = -sigmoid(-1) on the diagonal, +sigmoid(-1) elsewhere; cos is the identity, so that the
    scale's gradient is -sigmoid(-1) = -0.2689414214 and the bias's is 0.
    """
    unit = torch.eye(2, dtype=torch.float64)
    value, image, text, scale, bias = loss_and_gradients(siglip_loss, unit, unit, 2.0, -1.0)
    assert value.item() == pytest.approx(2 * 0.3132616875)
    p = 0.2689414214
    expected = torch.tensor([[-p, p], [p, -p]], dtype=torch.float64)
    torch.testing.assert_close(image, expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(text, expected, rtol=1e-9, atol=0)
    assert scale.item() == pytest.approx(-p) and abs(bias.item()) < 1e-15


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_extreme_logits_are_finite(sign: float) -> None:
    row = F.normalize(torch.ones(1, E), dim=-1)
    found = loss_and_gradients(siglip_loss, row.repeat(8, 1), sign * row.repeat(8, 1), 100.0, -10.0)
    assert all(x.isfinite().all() for x in found)
    # Seven negatives a row at S = 90, or one positive at S = -110.
    assert found[0].item() == pytest.approx(7 * 90 if sign > 0 else 110, rel=1e-5)


def test_a_converged_batch_gets_no_more_gradient_than_from_plain_autograd() -> None:
    image = torch.eye(8, E + 3)
    ours = loss_and_gradients(siglip_loss, image, image, 100.0, -50.0)
    plain = loss_and_gradients(reference_siglip_loss, image, image, 100.0, -50.0)
    assert ours[1].abs().max() <= plain[1].abs().max() * (1 + 1e-6)
    assert ours[0].item() == pytest.approx(plain[0].item(), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_autocast_does_not_reach_inside(dtype: torch.dtype) -> None:
    image, text = features(33, dtype=dtype)
    plain = loss_and_gradients(siglip_loss, image, text, 10.0, -10.0)
    with torch.autocast("cpu", torch.bfloat16):
        under = loss_and_gradients(siglip_loss, image, text, 10.0, -10.0)
        reached = loss_and_gradients(reference_siglip_loss, image, text, 10.0, -10.0)
    assert plain[0].dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(plain, under, strict=True))
    assert not torch.equal(plain[1], reached[1])


def test_fused_tiles_are_the_same_loss() -> None:
    plain, fused = (
        loss_and_gradients(siglip_loss, *features(33), 10.0, -10.0, tile=(20, 16), fused=fused)
        for fused in (False, True)
    )
    for a, b in zip(fused, plain, strict=True):
        assert (a - b).abs().max() <= 1e-13 * b.abs().max()


def test_without_gradients_only_the_value_is_computed() -> None:
    """As evaluation asks for it; the value is the same."""
    image, text = features(20)
    scalars = [torch.tensor(x, dtype=torch.float64) for x in (10.0, -10.0)]
    with torch.no_grad():
        alone = siglip_loss(image, text, *scalars)
    assert alone.grad_fn is None
    assert torch.equal(alone, siglip_loss(image, text, *scalars).detach())


def _counted_step() -> Any:
    image, text = (own(f.detach()).requires_grad_() for f in features(12))
    scalars = [torch.tensor(x, requires_grad=True) for x in (5.0, -5.0)]
    return counted(lambda: siglip_loss(image, text, *scalars, riders=torch.ones(10)))


def test_collectives_of_a_step_and_what_they_carry() -> None:
    expected = (
        {"all_gather_into_tensor": 1, "all_reduce": 1},
        {"reduce_scatter_tensor": 1},
        {
            "all_gather_into_tensor": 6 * (E + 1),
            "all_reduce": 1 + 10,
            "reduce_scatter_tensor": 12 * E,
        },
    )
    assert run_ranks(_counted_step, 2) == [expected] * 2


def test_float32_is_near_float64() -> None:
    exact = loss_and_gradients(siglip_loss, *features(200), 50.0, -20.0)
    single = loss_and_gradients(siglip_loss, *features(200, dtype=torch.float32), 50.0, -20.0)
    for a, b in zip(single, exact, strict=True):
        assert (a - b).abs().max() / b.abs().max() < 1e-5
