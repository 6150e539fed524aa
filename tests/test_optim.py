"""Parameter groups and the schedule, by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from clip_ray import model as models
from clip_ray.config import OptimConfig
from clip_ray.optim import build_optimizer, clamp_logit_scale, learning_rate


def test_groups_of_a_model() -> None:
    """Written out by name: matrices and embeddings decay, gains, biases and vectors do not."""
    model = models.build("ViT-micro-8-32", seed=0)
    decayed = {
        "positional_embedding",
        "text_projection",
        "token_embedding.weight",
        "visual.conv1.weight",
        "visual.positional_embedding",
        "visual.proj",
    } | {
        f"{tower}resblocks.0.{name}"
        for tower in ("transformer.", "visual.transformer.")
        for name in (
            "attn.in_proj_weight",
            "attn.out_proj.weight",
            "mlp.c_fc.weight",
            "mlp.c_proj.weight",
        )
    }
    config = OptimConfig(lr=3e-4, beta1=0.8, beta2=0.95, eps=1e-7, weight_decay=0.3)
    optimizer = build_optimizer(model, config)
    names = {p: name for name, p in model.named_parameters()}
    found = {
        group["weight_decay"]: {names[p] for p in group["params"]}
        for group in optimizer.param_groups
    }
    assert found == {0.3: decayed, 0.0: set(names.values()) - decayed}
    assert {"logit_scale", "visual.class_embedding", "ln_final.weight"} <= found[0.0]
    assert all(
        (group["lr"], group["betas"], group["eps"]) == (3e-4, (0.8, 0.95), 1e-7)
        for group in optimizer.param_groups
    )


def test_frozen_parameters_are_in_no_group() -> None:
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    groups = build_optimizer(model, OptimConfig()).param_groups
    assert [len(group["params"]) for group in groups] == [1, 0]


def test_decay_moves_matrices_alone() -> None:
    """AdamW with a zero gradient multiplies a weight by 1 - lr·decay: 1 - 0.1·0.5 = 0.95."""
    model = nn.Linear(2, 2)
    nn.init.ones_(model.weight)
    nn.init.ones_(model.bias)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    build_optimizer(model, OptimConfig(lr=0.1, weight_decay=0.5)).step()
    torch.testing.assert_close(model.weight.data, torch.full((2, 2), 0.95))
    assert (model.bias == 1).all()


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 0.25),  # (0 + 1) / 4
        (1, 0.5),
        (3, 1.0),
        (4, 1.0),  # the cosine begins at its top
        (6, 0.2 + 0.8 * (1 + math.sqrt(0.5)) / 2),  # a quarter of 4..12: cos(pi / 4)
        (8, 0.6),  # half-way: the mean of 1.0 and 0.2
        (10, 0.2 + 0.8 * (1 - math.sqrt(0.5)) / 2),
        (12, 0.2),  # the end
        (99, 0.2),
    ],
)
def test_warm_up_then_cosine(step: int, expected: float) -> None:
    config = OptimConfig(lr=1.0, warmup=4, final_lr=0.2)
    assert learning_rate(step, 12, config) == pytest.approx(expected, rel=1e-12)


def test_without_warm_up_the_first_step_has_the_peak() -> None:
    assert learning_rate(0, 10, OptimConfig(lr=0.5, warmup=0)) == 0.5


def test_a_run_shorter_than_its_warm_up_only_warms_up() -> None:
    config = OptimConfig(lr=1.0, warmup=100)
    assert [learning_rate(step, 2, config) for step in range(2)] == [0.01, 0.02]


@pytest.mark.parametrize(
    ("value", "expected"), [(9.0, math.log(100)), (-0.5, 0.0), (2.6592, 2.6592)]
)
def test_logit_scale_is_clamped_in_place(value: float, expected: float) -> None:
    parameter = nn.Parameter(torch.tensor(value))
    address = parameter.data_ptr()
    clamp_logit_scale(parameter)
    assert parameter.item() == pytest.approx(expected, rel=1e-6)
    assert parameter.data_ptr() == address and parameter.requires_grad


def test_a_clamped_scale_comes_back_down() -> None:
    """The clamp is no part of the graph: at the bound the gradient is still there."""
    parameter = nn.Parameter(torch.tensor(9.0))
    clamp_logit_scale(parameter)
    parameter.exp().backward()
    assert parameter.grad is not None and parameter.grad.item() == pytest.approx(100, rel=1e-5)
