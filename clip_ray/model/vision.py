"""The image tower: a Vision Transformer whose class token is the image's feature.

As in Dosovitskiy et al. 2021, with one more layer norm in front of the blocks (Radford et al.
2021, section 2.4).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from clip_ray.config import VisionConfig
from clip_ray.model.transformer import Transformer


class VisionTransformer(nn.Module):
    """Image -> projected class token, not normalised.

    Args:
        config: sizes of the tower.
        embed_dim: dimension of the joint space.
        use_quick_gelu: QuickGELU in place of the exact GELU.
    """

    def __init__(self, config: VisionConfig, embed_dim: int, use_quick_gelu: bool = False) -> None:
        super().__init__()
        width, patch_size = config.width, config.patch_size
        num_patches = (config.image_size // patch_size) ** 2
        # openai/CLIP model.py: this tower sets these three; its blocks and its convolution keep
        # torch's defaults.
        std = width**-0.5
        self.conv1 = nn.Conv2d(3, width, patch_size, stride=patch_size, bias=False)
        self.class_embedding = nn.Parameter(std * torch.randn(width))
        self.positional_embedding = nn.Parameter(std * torch.randn(num_patches + 1, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(
            width, config.layers, config.heads, config.mlp_ratio, use_quick_gelu=use_quick_gelu
        )
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(std * torch.randn(width, embed_dim))

    def features(self, pixels: Tensor) -> Tensor:
        """Return the class token before the projection.

        Args:
            pixels: (B, 3, S, S) float, normalised.

        Returns:
            (B, width).
        """
        patch_BPD = self.conv1(pixels).flatten(2).transpose(1, 2)
        class_B1D = self.class_embedding.to(patch_BPD.dtype).expand(len(patch_BPD), 1, -1)
        x_BLD = torch.cat([class_B1D, patch_BPD], dim=1) + self.positional_embedding
        x_BLD = self.transformer(self.ln_pre(x_BLD))
        return self.ln_post(x_BLD[:, 0])

    def forward(self, pixels: Tensor) -> Tensor:
        """Return (B, E), not normalised, of normalised pixels (B, 3, S, S)."""
        return self.features(pixels) @ self.proj
