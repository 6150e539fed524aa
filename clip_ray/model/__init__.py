"""The CLIP model: Vision Transformer and causal text transformer, as in Radford et al. 2021."""

from clip_ray.model.clip import CLIP, build

__all__ = ["CLIP", "build"]
