"""A loss that goes astray is told of in time; one that learns, wavers or spikes is not."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import pytest
import torch

from clip_ray.contrastive import clip_loss, siglip_loss
from clip_ray.train.divergence import STEPS, Diverged, Divergence, chance_loss

G = 256
CHANCE = math.log(G)


def told(losses: Iterable[float | None], chance: float = CHANCE) -> list[Diverged]:
    made = Divergence(chance)
    found = (made.took(step, loss) for step, loss in enumerate(losses, 1))
    return [one for one in found if one is not None]


def learning(steps: int, seed: int = 0, noise: float = 0.1, to: float = 1.5) -> np.ndarray:
    """A curve as CLIP's: chance for a while, then down, with the noise of single batches."""
    at = np.arange(steps)
    curve = to + (CHANCE - to) * np.exp(-np.maximum(at - 100, 0) / 300)
    return curve + np.random.default_rng(seed).normal(0, noise, steps)


@pytest.mark.parametrize("seed", range(20))
def test_a_run_that_learns_raises_no_alarm(seed):
    assert told(learning(2000, seed, noise=0.3)) == []


@pytest.mark.parametrize("seed", range(20))
def test_a_run_that_has_not_learnt_yet_raises_none(seed):
    rng = np.random.default_rng(seed)
    # Warm-up: above chance at first, by as much as untrained features with a large scale are.
    begin = CHANCE + 0.4 * np.exp(-np.arange(500) / 50) + rng.normal(0, 0.1, 500)
    assert told(begin) == []
    # SigLIP begins far above chance: its bias of -10 makes each right pair unlikely.
    siglip = chance_loss("siglip", G)
    assert told(siglip + 4 * np.exp(-np.arange(500) / 50) + rng.normal(0, 0.2, 500), siglip) == []


@pytest.mark.parametrize("after", [400, 1500])
def test_a_run_that_falls_back_to_chance_is_told_of_within_the_window(after):
    losses = [*learning(after), *learning(200)[:100]]
    (found,) = told(losses)
    assert after < found.step <= after + STEPS
    assert found.best < found.loss and found.best_step <= after and found.chance == CHANCE


def test_a_learning_rate_that_is_too_high_from_the_start_is_told_of():
    losses = [*np.full(60, CHANCE), *np.linspace(CHANCE, 3 * CHANCE, 200)]
    (found,) = told(losses)
    assert found.step < 60 + 200 * 0.1 + STEPS


def test_spikes_that_pass_are_none():
    losses = learning(1500)
    for at in range(300, 1500, 60):
        losses[at : at + 9] = 3 * CHANCE
    assert told(losses) == []


def test_it_is_told_once_and_again_after_it_had_come_back():
    astray, fine = [CHANCE] * 300, [1.5] * 300
    assert len(told([*fine, *astray])) == 1
    assert len(told([*fine, *astray, *fine, *astray])) == 2


def test_steps_that_are_not_finite_are_the_loops_affair():
    assert told([*[1.5] * 100, *[None] * 100]) == []


def test_chance_is_the_loss_of_features_that_say_nothing():
    same = torch.nn.functional.normalize(torch.ones(G, 8), dim=1)
    clip = clip_loss(same, same, torch.tensor(14.0))
    assert chance_loss("clip", G) == pytest.approx(clip.item(), rel=1e-5)
    # All logits are scale + bias: as likely as a right pair among G.
    bias = torch.tensor(math.log(1 / (G - 1)) - 10.0)
    siglip = siglip_loss(same, same, torch.tensor(10.0), bias)
    assert chance_loss("siglip", G) == pytest.approx(siglip.item(), rel=1e-5)
