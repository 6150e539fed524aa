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

    Attributes:
        patch_dropout: share of the patches that training leaves out.
    """

    def __init__(self, config: VisionConfig, embed_dim: int, use_quick_gelu: bool = False) -> None:
        super().__init__()
        self.patch_dropout = 0.0
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

    def features(self, pixels: Tensor, keys: Tensor | None = None) -> Tensor:
        """Return the class token before the projection.

        Args:
            pixels: (B, 3, S, S) float, normalised.
            keys: (B,) int64, each row's randomness; needed in training with patch dropout.

        Returns:
            (B, width).
        """
        patch_BPD = self.conv1(pixels).flatten(2).transpose(1, 2)
        class_B1D = self.class_embedding.to(patch_BPD.dtype).expand(len(patch_BPD), 1, -1)
        patch_BPD = patch_BPD + self.positional_embedding[1:]
        if self.training and self.patch_dropout:
            assert keys is not None, "patch dropout needs the rows' keys"
            kept_BK = kept_patches(keys, patch_BPD.shape[1], self.patch_dropout)
            patch_BPD = patch_BPD.take_along_dim(kept_BK[:, :, None], dim=1)
        x_BLD = torch.cat([class_B1D + self.positional_embedding[0], patch_BPD], dim=1)
        x_BLD = self.transformer(self.ln_pre(x_BLD))
        return self.ln_post(x_BLD[:, 0])

    def forward(self, pixels: Tensor, keys: Tensor | None = None) -> Tensor:
        """Return (B, E), not normalised, of normalised pixels (B, 3, S, S)."""
        return self.features(pixels, keys) @ self.proj


def kept_patches(keys_B: Tensor, patches: int, dropout: float) -> Tensor:
    """Return the patches that patch dropout keeps of each row, a function of the row's key alone.

    Not drawn from a generator: a row keeps the same patches on whichever worker it is, and in
    both passes of a step with micro-batches.

    Args:
        keys_B: (B,) int64.
        patches: P.
        dropout: share that is left out, in [0, 1).

    Returns:
        (B, max(1, round((1 - dropout) P))) indices, ascending.
    """
    place_P = torch.arange(1, patches + 1, device=keys_B.device)
    scores_BP = mix(mix(keys_B)[:, None] + place_P * _GOLDEN)
    count = max(1, round((1 - dropout) * patches))
    return scores_BP.topk(count, dim=1, sorted=False).indices.sort(dim=1).values


_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_FACTORS = (0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64))


def mix(x: Tensor) -> Tensor:
    """Return int64 numbers, each bit of which depends on all of `x` (SplitMix64, Steele 2014)."""
    # `>>` copies the sign; the mask makes it a shift of unsigned numbers.
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * _FACTORS[0]
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * _FACTORS[1]
    return x ^ ((x >> 31) & ((1 << 33) - 1))
