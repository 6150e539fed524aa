"""What is counted, against torch's own counts and open_clip's table of published models."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from clip_ray.config import ModelConfig, zoo
from clip_ray.model import build
from clip_ray.sizing.calibration import MODELS
from clip_ray.sizing.counts import ResNet, count

# open_clip, docs/model_profile.csv: millions of parameters and GFLOP of both towers.
PUBLISHED = {
    "ViT-B-32": (87.85, 63.43, 8.82, 5.96),
    "ViT-B-16": (86.19, 63.43, 35.13, 5.96),
    "ViT-L-14": (303.97, 123.65, 162.03, 13.3),
    "ViT-H-14": (632.08, 354.03, 334.59, 47.09),
    "ViT-g-14": (1012.65, 354.03, 534.06, 47.09),
    "ViT-bigG-14": (1844.91, 694.66, 967.5, 97.86),
}
RESNETS = {
    "RN50": (ResNet((3, 4, 6, 3), 64, 224, 1024), 38.32, 12.22),
    "RN101": (ResNet((3, 4, 23, 3), 64, 224, 512), 56.26, 19.54),
    "RN50x4": (ResNet((4, 6, 10, 6), 80, 288, 640), 87.14, 42.56),
    "RN50x16": (ResNet((6, 8, 18, 8), 96, 384, 768), 167.33, 149.39),
    "RN50x64": (ResNet((3, 15, 36, 10), 128, 448, 1024), 420.38, 529.11),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_transformers_of_the_published_table(name: str) -> None:
    pair = count(MODELS[name])
    found = (
        pair.image.parameters / 1e6,
        pair.text.parameters / 1e6,
        pair.image.forward_flops / 1e9,
        pair.text.forward_flops / 1e9,
    )
    assert found == pytest.approx(PUBLISHED[name], abs=0.00501)  # the table has two digits


@pytest.mark.parametrize("name", RESNETS)
def test_resnets_of_the_published_table(name: str) -> None:
    resnet, parameters, gflops = RESNETS[name]
    found = resnet.parameters_and_flops()
    assert (found[0] / 1e6, found[1] / 1e9) == pytest.approx((parameters, gflops), abs=0.00501)


@pytest.mark.parametrize("name", zoo.ARCHITECTURES)
@pytest.mark.parametrize("bias", [None, -10.0])
def test_parameters_are_those_of_the_model(name: str, bias: float | None) -> None:
    config = ModelConfig(name=name, init_logit_bias=bias)
    with torch.device("meta"):
        model = build(config)
    parameters = list(model.parameters())
    pair = count(config)
    assert pair.parameters == sum(p.numel() for p in parameters)
    assert pair.tensors == len(parameters)
    image = sum(p.numel() for p in model.visual.parameters())
    assert pair.image.parameters == image


def inputs(config: ModelConfig, samples: int) -> tuple[torch.Tensor, ...]:
    side, length = config.vision.image_size, config.text.context_length
    pixels = torch.randint(0, 255, (samples, 3, side, side), dtype=torch.uint8)
    ids = torch.randint(0, config.text.vocab_size, (samples, length), dtype=torch.int32)
    return pixels, ids, torch.arange(samples)


@pytest.mark.parametrize("patch_dropout", [0.0, 0.5])
@pytest.mark.parametrize("changes", [{}, {"vision": {"mlp_ratio": 4.3637}}])
def test_operations_are_those_that_torch_counts(changes: dict, patch_dropout: float) -> None:
    config = ModelConfig(name="ViT-tiny-8-64", **changes)
    model = build(config)
    model.set_training(patch_dropout)
    pair = count(config, patch_dropout)
    # Not a fused kernel: its backward computes the attention again, which is no part of the count.
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward:
            features = model(*inputs(config, 2))
        with FlopCounterMode(display=False) as backward:
            (features[0].sum() + features[1].sum()).backward()
    assert forward.get_total_flops() == 2 * pair.forward_flops
    training = 2 * (pair.image.training_flops + pair.text.training_flops)
    assert forward.get_total_flops() + backward.get_total_flops() == training


def saved(config: ModelConfig, samples: int, bf16: bool, checkpointing: bool, drop: float) -> int:
    """Return the bytes of the storages that autograd keeps, the weights' own excluded."""
    model = build(config)
    model.set_training(drop, checkpointing)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, int] = {}
    alive = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # no address is used a second time
        return tensor

    autocast = torch.autocast("cpu", torch.bfloat16) if bf16 else contextlib.nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast:
        features = model(*inputs(config, samples))
    assert features[0].requires_grad
    return sum(storages.values())


def counted(config: ModelConfig, precision: str, checkpointing: bool, drop: float) -> int:
    pair = count(config, drop)
    total = 0
    for tower in (pair.image, pair.text):
        total += tower.saved_bytes(precision, config.quick_gelu, checkpointing)
        if checkpointing:  # the block that is computed again is not yet there
            total -= tower.block_bytes(precision, config.quick_gelu)
    return total


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("quick_gelu", [False, True])
@pytest.mark.parametrize(("checkpointing", "drop"), [(False, 0.0), (False, 0.5), (True, 0.0)])
def test_saved_activations_are_those_that_autograd_keeps(
    precision: str, quick_gelu: bool, checkpointing: bool, drop: float
) -> None:
    config = ModelConfig(name="ViT-tiny-8-64", quick_gelu=quick_gelu)
    bf16 = precision == "bf16"
    # The difference of two batches: what does not grow with it (copies of weights) is not meant.
    few, many = (saved(config, n, bf16, checkpointing, drop) for n in (2, 6))
    measured = (many - few) / 4
    # Left out are token ids, indices and the heads.
    assert counted(config, precision, checkpointing, drop) == pytest.approx(measured, abs=4000)
    assert measured > 200_000
    other = ModelConfig(name="ViT-tiny-8-64", quick_gelu=not quick_gelu)
    if not checkpointing:
        assert abs(counted(other, precision, False, drop) - measured) > 50_000


def test_the_count_holds_for_a_real_size() -> None:
    """ViT-B/32's widths and lengths, with fewer layers and words: those cost time, not insight."""
    sizes: dict[str, Any] = {"vision": {"layers": 3}, "text": {"layers": 3, "vocab_size": 1000}}
    config = ModelConfig(name="ViT-B-32", **sizes)
    few, many = (saved(config, n, True, False, 0.0) for n in (1, 3))
    assert counted(config, "bf16", False, 0.0) == pytest.approx((many - few) / 2, rel=0.005)
