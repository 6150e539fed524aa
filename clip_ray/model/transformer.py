"""The pre-norm transformer that both towers are made of.

Parameter names are those of `torch.nn.MultiheadAttention` and of OpenAI's CLIP, so that weights
move without renaming; the attention itself is a fused scaled dot product. There is no dropout:
CLIP trains without it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def quick_gelu(x: Tensor) -> Tensor:
    """Return x * sigmoid(1.702 x), the approximation OpenAI's weights were trained with."""
    return x * torch.sigmoid(1.702 * x)


class Attention(nn.Module):
    """Multi-head self-attention with the query, key and value projections packed in one matrix."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads = heads
        self.causal = causal
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        # As torch.nn.MultiheadAttention starts, which OpenAI's image tower keeps.
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Attend within each row of `x_BLD`; returns the same shape."""
        B, L, D = x_BLD.shape
        # A key bias adds the same to all logits of a query, so its gradient is zero. What rounding
        # leaves of it is not: Adam would make steps of that noise.
        query, key, value = self.in_proj_bias.chunk(3)
        bias = torch.cat([query, key.detach(), value])
        qkv_BL3D = F.linear(x_BLD, self.in_proj_weight, bias)
        qkv_3BHLK = qkv_BL3D.view(B, L, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        q_BHLK, k_BHLK, v_BHLK = qkv_3BHLK.unbind(0)
        mixed_BHLK = F.scaled_dot_product_attention(q_BHLK, k_BHLK, v_BHLK, is_causal=self.causal)
        return self.out_proj(mixed_BHLK.transpose(1, 2).reshape(B, L, D))


class MLP(nn.Module):
    """Two linear maps with a GELU between them."""

    def __init__(self, width: int, mlp_ratio: float, use_quick_gelu: bool) -> None:
        super().__init__()
        hidden = int(width * mlp_ratio)
        self.c_fc = nn.Linear(width, hidden)
        self.c_proj = nn.Linear(hidden, width)
        self.activation = quick_gelu if use_quick_gelu else F.gelu

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Map each position on its own; returns the same shape."""
        return self.c_proj(self.activation(self.c_fc(x_BLD)))


class ResidualBlock(nn.Module):
    """Attention and MLP, each after a layer norm and added to the residual stream."""

    def __init__(
        self, width: int, heads: int, mlp_ratio: float, *, causal: bool, use_quick_gelu: bool
    ) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads, causal)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = MLP(width, mlp_ratio, use_quick_gelu)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Return the residual stream after this block, the same shape."""
        x_BLD = x_BLD + self.attn(self.ln_1(x_BLD))
        return x_BLD + self.mlp(self.ln_2(x_BLD))


class Transformer(nn.Module):
    """A stack of residual blocks.

    Args:
        width: channels of the residual stream.
        layers: number of blocks.
        heads: attention heads; divides `width`.
        mlp_ratio: hidden width of the MLP / `width`.
        causal: each position sees itself and the ones before it only.
        use_quick_gelu: QuickGELU in place of the exact GELU.

    Attributes:
        grad_checkpointing: keep each block's input alone for the backward pass, and compute what
            is inside the block again.
    """

    def __init__(
        self,
        width: int,
        layers: int,
        heads: int,
        mlp_ratio: float = 4.0,
        *,
        causal: bool = False,
        use_quick_gelu: bool = False,
    ) -> None:
        super().__init__()
        self.width = width
        self.grad_checkpointing = False
        self.resblocks = nn.ModuleList(
            ResidualBlock(width, heads, mlp_ratio, causal=causal, use_quick_gelu=use_quick_gelu)
            for _ in range(layers)
        )

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Return the residual stream after the last block, the same shape."""
        again = self.grad_checkpointing and torch.is_grad_enabled()
        for block in self.resblocks:
            x_BLD = checkpoint(block, x_BLD, use_reentrant=False) if again else block(x_BLD)
        return x_BLD
