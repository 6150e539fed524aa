"""Named architectures: sizes from the paper, and who wins where a field is given."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from clip_ray.config import ModelConfig
from clip_ray.config.zoo import ARCHITECTURES, fill


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        # Radford et al. 2021, table 20: embedding; image side, layers, width, heads; text.
        ("ViT-B-32", (512, 224, 12, 768, 12, 12, 512, 8)),
        ("ViT-B-16", (512, 224, 12, 768, 12, 12, 512, 8)),
        ("ViT-L-14", (768, 224, 24, 1024, 16, 12, 768, 12)),
        ("ViT-L-14-336", (768, 336, 24, 1024, 16, 12, 768, 12)),
    ],
)
@pytest.mark.parametrize("suffix", ["", "-quickgelu"])
def test_sizes_of_the_paper(name: str, sizes: tuple[int, ...], suffix: str) -> None:
    config = ModelConfig(name=name + suffix)
    vision, text = config.vision, config.text
    assert (
        config.embed_dim,
        vision.image_size,
        vision.layers,
        vision.width,
        vision.heads,
        text.layers,
        text.width,
        text.heads,
    ) == sizes
    assert vision.patch_size == int(name.split("-")[2])
    assert (text.context_length, text.vocab_size) == (77, 49408)
    assert config.quick_gelu == bool(suffix)


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_every_entry_is_a_valid_model(name: str) -> None:
    assert ModelConfig(name=name).name == name


@pytest.mark.parametrize(
    ("given", "path", "expected"),
    [
        ({"name": "ViT-micro-8-32"}, "vision.width", 32),
        ({"name": "ViT-micro-8-32", "vision": {"width": 64}}, "vision.width", 64),
        ({"name": "ViT-micro-8-32", "vision": {"width": 64}}, "vision.heads", 2),
        ({"name": "ViT-micro-8-32", "vision": {"width": 64}}, "text.width", 32),
        ({"name": "ViT-micro-8-32", "embed_dim": 16}, "embed_dim", 16),
        ({"name": "ViT-B-32-quickgelu", "quick_gelu": False}, "quick_gelu", False),
        ({}, "name", "ViT-B-32"),
        ({"text": {"layers": 1}}, "vision.width", 768),
    ],
)
def test_given_fields_win_over_the_entry(given: dict[str, Any], path: str, expected: Any) -> None:
    found: Any = ModelConfig.model_validate(given)
    for part in path.split("."):
        found = getattr(found, part)
    assert found == expected


def test_filling_leaves_the_zoo_as_it_was() -> None:
    before = repr(ARCHITECTURES)
    filled = fill({"name": "ViT-L-14", "vision": {"width": 64}})
    filled["vision"]["layers"] = 1
    fill({"name": "ViT-L-14"})["text"]["heads"] = 99
    assert repr(ARCHITECTURES) == before


def test_an_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(ValidationError, match=r"'ViT-B-61'; nearest: .*ViT-B-16"):
        ModelConfig(name="ViT-B-61")


def test_a_name_like_none_gets_the_whole_list() -> None:
    with pytest.raises(ValidationError, match="ViT-micro-8-32"):
        ModelConfig(name="??")
