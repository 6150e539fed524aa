"""The text tower's forward pass and initial weights.

Functions, not a module: OpenAI's state dict has the text tower's parameters at the top level
(`token_embedding.weight`, not `text.token_embedding.weight`), so `CLIP` owns them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from clip_ray.model.transformer import ResidualBlock, Transformer


def eot_features(
    ids: Tensor,
    token_embedding: nn.Embedding,
    positional_embedding: Tensor,
    transformer: Transformer,
    ln_final: nn.LayerNorm,
) -> Tensor:
    """Return the transformer's output at each row's end-of-text token.

    The end token has the highest id of the vocabulary, so argmax finds it (the first one, where
    a caption holds several). What follows it is padding, which a causal transformer never shows
    to it.

    Args:
        ids: (B, L) int32 or int64 token ids; L is at most the context length.
        token_embedding: (V, D).
        positional_embedding: (context_length, D).
        transformer: causal, of width D.
        ln_final: over D.

    Returns:
        (B, D), before the projection.
    """
    x_BLD = token_embedding(ids) + positional_embedding[: ids.shape[1]]
    x_BLD = transformer(x_BLD)
    # The norm works position by position: one position a row is enough.
    return ln_final(x_BLD[torch.arange(len(ids), device=ids.device), ids.argmax(dim=1)])


def init_text_tower(
    token_embedding: nn.Embedding,
    positional_embedding: Tensor,
    transformer: Transformer,
    text_projection: Tensor,
) -> None:
    """Draw the initial weights in place, as openai/CLIP model.py `initialize_parameters`."""
    width, layers = transformer.width, len(transformer.resblocks)
    nn.init.normal_(token_embedding.weight, std=0.02)
    nn.init.normal_(positional_embedding, std=0.01)
    for block in transformer.resblocks:
        assert isinstance(block, ResidualBlock)
        nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
        # The two maps that write to the residual stream: 2 * layers of them add up in it.
        nn.init.normal_(block.attn.out_proj.weight, std=width**-0.5 * (2 * layers) ** -0.5)
        nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
        nn.init.normal_(block.mlp.c_proj.weight, std=width**-0.5 * (2 * layers) ** -0.5)
    nn.init.normal_(text_projection, std=width**-0.5)
