"""The blocks against torch's own modules."""

import pytest
import torch
from torch import nn

from clip_ray.model.transformer import MLP, Attention, quick_gelu


def test_quick_gelu_by_hand():
    """Compare with x / (1 + exp(-1.702 x)), worked out for 1, 0 and -2."""
    x = torch.tensor([1.0, 0.0, -2.0])
    torch.testing.assert_close(quick_gelu(x), torch.tensor([0.8457958, 0.0, -0.0643394]))


def test_mlp_switches_its_activation():
    x = torch.linspace(-2, 2, 8).view(1, 1, 8)
    for use_quick_gelu in (False, True):
        mlp = MLP(8, 2.0, use_quick_gelu)
        hidden = mlp.c_fc(x)
        expected = quick_gelu(hidden) if use_quick_gelu else nn.functional.gelu(hidden)
        torch.testing.assert_close(mlp(x), mlp.c_proj(expected))


@pytest.mark.parametrize("causal", [False, True])
def test_attention_equals_torchs_multihead_attention(causal):
    ours = Attention(24, heads=3, causal=causal).eval()
    theirs = nn.MultiheadAttention(24, 3, batch_first=True).eval()
    nn.init.normal_(ours.in_proj_bias)
    nn.init.normal_(ours.out_proj.bias)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(0))
    mask = torch.full((7, 7), float("-inf")).triu(1) if causal else None
    with torch.no_grad():
        expected, _ = theirs(x, x, x, attn_mask=mask, need_weights=False)
        torch.testing.assert_close(ours(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_the_key_biases_gradient_is_zero_without_rounding(causal):
    """Torch's own attention finds the same gradients in float64, and nearly zero for this one."""
    ours = Attention(24, heads=3, causal=causal).double()
    theirs = nn.MultiheadAttention(24, 3, batch_first=True).double()
    nn.init.normal_(ours.in_proj_bias)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mask = torch.full((7, 7), float("-inf"), dtype=torch.float64).triu(1) if causal else None
    weight = torch.randn(2, 7, 24, dtype=torch.float64)
    (ours(x) * weight).sum().backward()
    (theirs(x, x, x, attn_mask=mask, need_weights=False)[0] * weight).sum().backward()
    key = slice(24, 48)
    assert (ours.in_proj_bias.grad[key] == 0).all()
    assert theirs.in_proj_bias.grad[key].abs().max() < 1e-13
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-12)
