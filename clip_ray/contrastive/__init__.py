"""Losses over the global batch, and the step that takes their exact gradient. torch alone.

- `losses`: `clip_loss`, `siglip_loss`, and the plain formulations that tests hold them against.
- `tiles`: what both share: the gathered text, and the logits of a worker's rows by tiles.
- `step`: `contrastive_step`, micro-batches without approximation (GradCache).
"""

from clip_ray.contrastive.losses import (
    clip_loss,
    reference_loss,
    reference_siglip_loss,
    siglip_loss,
)
from clip_ray.contrastive.step import contrastive_step

__all__ = [
    "clip_loss",
    "contrastive_step",
    "reference_loss",
    "reference_siglip_loss",
    "siglip_loss",
]
