"""The formulation that tiles are held against, and batches of features; torch alone.

By its definition: every worker contrasts its own rows with the features of all, once as images
against texts and once as texts against images; cross-entropies and gradients by autograd.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def plain_loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """Return the local loss against gathered features, of one worker (all features are its own)."""
    per_image, per_text = scale * image @ text.T, scale * text @ image.T
    target = torch.arange(len(image), device=image.device)
    return (F.cross_entropy(per_image, target) + F.cross_entropy(per_text, target)) / 2


def leaves(rows: int, width: int, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Return image features, text features (rows, width) and a scale, all to be differentiated."""
    generator = torch.Generator().manual_seed(0)
    image, text = (
        F.normalize(torch.randn(rows, width, generator=generator), dim=1).to(device)
        for _ in range(2)
    )
    scale = torch.tensor(14.3, device=device)
    return image.requires_grad_(), text.requires_grad_(), scale.requires_grad_()
