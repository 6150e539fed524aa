"""AdamW's parameter groups and the learning-rate schedule of the paper."""

from __future__ import annotations

import math

import torch
from torch import nn

from clip_ray.config import OptimConfig

MAX_LOGIT_SCALE = math.log(100)
"""Radford et al. 2021, section 2.5: above 100 the scaled logits make training unstable."""


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Return AdamW with decay on weights that are not gains or biases (section 2.5).

    Gains, biases, the class embedding and `logit_scale` are exactly the parameters with fewer
    than two dimensions.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    fused = all(p.device.type == "cuda" for p in trained)
    return torch.optim.AdamW(
        groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=fused
    )


def learning_rate(step: int, total_steps: int, config: OptimConfig) -> float:
    """Return the rate of a step counted from 0: linear warm-up, then a cosine to `final_lr`."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(total_steps - config.warmup, 1)
    cosine = (1 + math.cos(math.pi * min(progress, 1.0))) / 2
    return config.final_lr + (config.lr - config.final_lr) * cosine


@torch.no_grad()
def clamp_logit_scale(logit_scale: nn.Parameter) -> None:
    """Clamp in place to [0, ln 100]; called after the step.

    A clamp in the forward pass has no gradient beyond the bound: momentum would carry the
    parameter out and nothing would bring it back.
    """
    logit_scale.clamp_(0.0, MAX_LOGIT_SCALE)
