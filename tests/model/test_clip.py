"""CLIP: the keys of its state dict, its numbers against a dumber model, its random state."""

import math

import pytest
import torch
import torch.nn.functional as F

from clip_ray.config import ModelConfig
from clip_ray.errors import ConfigError
from clip_ray.model import CLIP, build
from clip_ray.model.clip import IMAGE_MEAN, IMAGE_STD

MICRO = ModelConfig(
    name="ViT-micro-8-32",
    vision={"layers": 2},
    text={"layers": 2, "vocab_size": 100, "context_length": 10},
)
END = 99


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def model() -> CLIP:
    model = build(MICRO, seed=0).eval()
    # Biases and gains that start at 0 and 1 would hide a bias or a gain that is not applied.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=_rng(len(parameter))))
    return model


def _rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _pixels(count: int = 3) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=_rng(1))


def _ids() -> torch.Tensor:
    return torch.tensor(
        [
            [98, 5, 6, 7, END, 0, 0, 0, 0, 0],
            [98, 8, 9, 3, 2, 1, 40, 41, 42, END],
            [98, END, 0, 0, 0, 0, 0, 0, 0, 0],
        ],
        dtype=torch.int32,
    )


def _normalized(pixels: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGE_MEAN, IMAGE_STD))
    return (pixels.float() / 255 - mean) / std


def openai_shapes(
    *, embed, side, patch, v_width, v_layers, vocab=49408, length=77, width=512, layers=12
) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of OpenAI's released state dicts, written down by hand."""

    def blocks(prefix: str, d: int, count: int) -> dict[str, tuple[int, ...]]:
        return {
            f"{prefix}.resblocks.{n}.{key}": shape
            for n in range(count)
            for key, shape in {
                "ln_1.weight": (d,),
                "ln_1.bias": (d,),
                "attn.in_proj_weight": (3 * d, d),
                "attn.in_proj_bias": (3 * d,),
                "attn.out_proj.weight": (d, d),
                "attn.out_proj.bias": (d,),
                "ln_2.weight": (d,),
                "ln_2.bias": (d,),
                "mlp.c_fc.weight": (4 * d, d),
                "mlp.c_fc.bias": (4 * d,),
                "mlp.c_proj.weight": (d, 4 * d),
                "mlp.c_proj.bias": (d,),
            }.items()
        }

    return {
        "visual.conv1.weight": (v_width, 3, patch, patch),
        "visual.class_embedding": (v_width,),
        "visual.positional_embedding": ((side // patch) ** 2 + 1, v_width),
        "visual.ln_pre.weight": (v_width,),
        "visual.ln_pre.bias": (v_width,),
        **blocks("visual.transformer", v_width, v_layers),
        "visual.ln_post.weight": (v_width,),
        "visual.ln_post.bias": (v_width,),
        "visual.proj": (v_width, embed),
        "token_embedding.weight": (vocab, width),
        "positional_embedding": (length, width),
        **blocks("transformer", width, layers),
        "ln_final.weight": (width,),
        "ln_final.bias": (width,),
        "text_projection": (width, embed),
        "logit_scale": (),
    }


@pytest.mark.parametrize(
    ("name", "sizes", "millions"),
    [
        (
            "ViT-B-32",
            {"embed": 512, "side": 224, "patch": 32, "v_width": 768, "v_layers": 12},
            151.3,
        ),
        (
            "ViT-B-16",
            {"embed": 512, "side": 224, "patch": 16, "v_width": 768, "v_layers": 12},
            149.6,
        ),
        (
            "ViT-L-14",
            {"embed": 768, "side": 224, "patch": 14, "v_width": 1024, "v_layers": 24, "width": 768},
            427.6,
        ),
    ],
)
def test_state_dict_is_openais(name, sizes, millions):
    with torch.device("meta"):
        model = build(name)
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert shapes == openai_shapes(**sizes)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == millions


def reference_features(model: CLIP, pixels, ids) -> tuple[torch.Tensor, torch.Tensor]:
    """The same model in loops over samples, positions and heads, from its state dict alone."""
    weights = model.state_dict()
    config = model.config

    def norm(x, key):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return x * weights[f"{key}.weight"] + weights[f"{key}.bias"]

    def attention(x_LD, key, heads, causal):
        length, width = x_LD.shape
        q, k, v = (
            x_LD @ weights[f"{key}.in_proj_weight"].T + weights[f"{key}.in_proj_bias"]
        ).split(width, dim=1)
        mixed = torch.zeros_like(x_LD)
        size = width // heads
        for head in range(heads):
            part = slice(head * size, (head + 1) * size)
            for i in range(length):
                seen = i + 1 if causal else length
                scores = torch.stack([q[i, part] @ k[j, part] for j in range(seen)])
                shares = (scores / math.sqrt(size)).exp()
                mixed[i, part] = (shares / shares.sum()) @ v[:seen, part]
        return mixed @ weights[f"{key}.out_proj.weight"].T + weights[f"{key}.out_proj.bias"]

    def blocks(x, prefix, tower, causal):
        for n in range(tower.layers):
            key = f"{prefix}.resblocks.{n}"
            x = x + attention(norm(x, f"{key}.ln_1"), f"{key}.attn", tower.heads, causal)
            hidden = norm(x, f"{key}.ln_2") @ weights[f"{key}.mlp.c_fc.weight"].T
            hidden = hidden + weights[f"{key}.mlp.c_fc.bias"]
            if config.quick_gelu:
                hidden = hidden * torch.sigmoid(1.702 * hidden)
            else:
                hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
            x = x + hidden @ weights[f"{key}.mlp.c_proj.weight"].T
            x = x + weights[f"{key}.mlp.c_proj.bias"]
        return x

    images, texts = [], []
    patch, side = config.vision.patch_size, config.vision.image_size
    for image in _normalized(pixels):
        tokens = [weights["visual.class_embedding"]]
        for top in range(0, side, patch):
            for left in range(0, side, patch):
                tile = image[:, top : top + patch, left : left + patch]
                tokens.append(weights["visual.conv1.weight"].flatten(1) @ tile.flatten())
        x = norm(torch.stack(tokens) + weights["visual.positional_embedding"], "visual.ln_pre")
        x = blocks(x, "visual.transformer", config.vision, causal=False)
        images.append(norm(x, "visual.ln_post")[0] @ weights["visual.proj"])
    for row in ids.tolist():
        x = weights["token_embedding.weight"][row] + weights["positional_embedding"]
        x = norm(blocks(x, "transformer", config.text, causal=True), "ln_final")
        texts.append(x[row.index(END)] @ weights["text_projection"])
    return tuple(torch.stack([f / (f @ f).sqrt() for f in rows]) for rows in (images, texts))


@pytest.mark.parametrize("use_quick_gelu", [False, True])
def test_features_equal_a_dumber_model(model, use_quick_gelu):
    other = build(MICRO.model_copy(update={"quick_gelu": use_quick_gelu})).eval()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        ours = other(_pixels(), _ids())
        reference = reference_features(other, _pixels(), _ids())
    for mine, theirs in zip(ours, reference, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_quick_gelu_changes_the_features(model):
    other = build(MICRO.model_copy(update={"quick_gelu": True})).eval()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert (other.encode_text(_ids()) - model.encode_text(_ids())).abs().max() > 1e-4


def test_text_after_the_end_is_not_seen(model):
    changed = _ids()
    changed[0, 5:] = torch.tensor([3, 7, 9, 11, 13])
    with torch.no_grad():
        torch.testing.assert_close(
            model.encode_text(changed)[0], model.encode_text(_ids())[0], rtol=0, atol=1e-6
        )


@pytest.mark.parametrize("place", [1, 2, 3])
def test_text_before_the_end_is_seen(model, place):
    changed = _ids()
    changed[0, place] = 50
    with torch.no_grad():
        assert (model.encode_text(changed)[0] - model.encode_text(_ids())[0]).abs().max() > 1e-4


def test_shorter_rows_give_the_same_features(model):
    with torch.no_grad():
        torch.testing.assert_close(
            model.encode_text(_ids()[:1, :5]), model.encode_text(_ids()[:1]), rtol=0, atol=1e-6
        )


def test_int64_ids_give_the_same_features(model):
    with torch.no_grad():
        assert torch.equal(model.encode_text(_ids().long()), model.encode_text(_ids()))


def test_features_have_unit_length(model):
    with torch.no_grad():
        for features in model(_pixels(), _ids()):
            assert features.shape == (3, 32) and features.dtype == torch.float32
            torch.testing.assert_close(features.norm(dim=1), torch.ones(3))


def test_uint8_and_normalized_pixels_give_the_same_features(model):
    with torch.no_grad():
        torch.testing.assert_close(
            model.encode_image(_pixels()),
            model.encode_image(_normalized(_pixels())),
            rtol=0,
            atol=1e-5,
        )


def test_tower_features_are_before_the_projection(model):
    with torch.no_grad():
        tower = model.image_tower_features(_pixels())
        assert tower.shape == (3, 32)
        torch.testing.assert_close(
            F.normalize(tower @ model.visual.proj, dim=1), model.encode_image(_pixels())
        )


def test_bf16_autocast_is_close_and_normalises_in_fp32(model):
    with torch.no_grad():
        exact = model(_pixels(), _ids())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough = model(_pixels(), _ids())
    for a, b in zip(exact, rough, strict=True):
        assert b.dtype == torch.float32
        torch.testing.assert_close(b.norm(dim=1), torch.ones(3))
        assert (a * b).sum(1).min() > 0.999
        assert not torch.equal(a, b)


def test_every_parameter_of_the_towers_gets_a_gradient(model):
    image_features, text_features = model(_pixels(), _ids())
    target = torch.randn(3, 32, generator=_rng(2))
    ((image_features * target).sum() + (text_features * target).sum()).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None]
    assert without == ["logit_scale"]


def test_seed_fixes_the_weights_and_leaves_the_global_state():
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first, again, other = build(MICRO, seed=3), build(MICRO, seed=3), build(MICRO, seed=4)
    assert torch.equal(torch.get_rng_state(), before)
    for a, b in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first.visual.proj, other.visual.proj)


def test_without_a_seed_the_global_state_decides():
    torch.manual_seed(3)
    model = build(MICRO)
    seeded = build(MICRO, seed=3)
    for a, b in zip(model.parameters(), seeded.parameters(), strict=True):
        assert torch.equal(a, b)


def test_initial_weights_have_the_published_spread():
    model = build(ModelConfig(name="ViT-tiny-8-64", text={"vocab_size": 2000}), seed=0)
    width, layers = 128, 2
    block = model.transformer.resblocks[1]
    expected = {
        model.token_embedding.weight: 0.02,
        model.positional_embedding: 0.01,
        block.attn.in_proj_weight: width**-0.5,
        block.attn.out_proj.weight: width**-0.5 * (2 * layers) ** -0.5,
        block.mlp.c_fc.weight: (2 * width) ** -0.5,
        block.mlp.c_proj.weight: width**-0.5 * (2 * layers) ** -0.5,
        model.text_projection: width**-0.5,
        model.visual.positional_embedding: 192**-0.5,
        model.visual.proj: 192**-0.5,
    }
    for parameter, std in expected.items():
        assert parameter.std().item() == pytest.approx(std, rel=0.05)
    for tower in (model.transformer, model.visual.transformer):
        for block in tower.resblocks:
            assert not block.attn.in_proj_bias.any() and not block.attn.out_proj.bias.any()
    assert model.logit_scale.item() == pytest.approx(math.log(1 / 0.07))


def test_image_tower_blocks_start_as_torchs_own_attention():
    """openai/CLIP leaves them at torch's defaults: Xavier and Kaiming uniform, bounded."""
    attn = build("ViT-tiny-8-64", seed=0).visual.transformer.resblocks[0].attn
    bound = math.sqrt(6 / (192 + 3 * 192))
    assert 0.99 * bound < attn.in_proj_weight.abs().max() <= bound
    assert attn.out_proj.weight.abs().max() <= 192**-0.5


def test_a_meta_model_is_whole_after_assigning_weights(model):
    with torch.device("meta"):
        empty = build(MICRO).eval()
    empty.load_state_dict(model.state_dict(), assign=True)
    with torch.no_grad():
        for a, b in zip(empty(_pixels(), _ids()), model(_pixels(), _ids()), strict=True):
            assert torch.equal(a, b)


def test_an_unknown_name_lists_the_nearest():
    with pytest.raises(ConfigError, match="ViT-B-32"):
        build("ViT-B32")


def test_towers_are_one_graph_each(model):
    """Traced, not compiled to machine code, which would need a C++ compiler and half a minute."""
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for a, b in zip(compiled(_pixels(), _ids()), model(_pixels(), _ids()), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
