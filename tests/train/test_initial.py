"""Weights that a run begins from: ours, another's, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from clip_ray.config import Config, ModelConfig
from clip_ray.errors import CheckpointError, ConfigError, RegistryError
from clip_ray.model import CLIP, build
from clip_ray.registry import write_export
from clip_ray.storage import LocalStore, Store
from clip_ray.tokenizer import Tokenizer
from clip_ray.train.initial import initial_weights

MICRO = ModelConfig(name="ViT-micro-8-32", text={"vocab_size": 560})
SIGLIP = MICRO.model_copy(update={"init_logit_bias": -10.0})
CAPTIONS = ["a red square", "a blue disc on grass", "two dogs", "snow"] * 4


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(CAPTIONS, 560, MICRO.text.context_length)


def exported(folder: Path, tokenizer: Tokenizer, model: CLIP | None = None) -> str:
    write_export(LocalStore(folder), model or build(MICRO, seed=3), tokenizer, {})
    return str(folder)


def config(weights: str, **sections: Any) -> Config:
    tree = {"model": MICRO.model_dump(), "train": {"steps": 1}, "init": {"weights": weights}}
    return Config.model_validate(tree | sections)


@pytest.fixture
def run(tmp_path: Path) -> Store:
    """The directory of the run that begins."""
    return LocalStore(tmp_path / "run")


def test_the_weights_are_those_of_the_export(
    tmp_path: Path, tokenizer: Tokenizer, run: Store
) -> None:
    weights, digest = initial_weights(config(exported(tmp_path / "a", tokenizer)), tokenizer, run)
    expected = build(MICRO, seed=3).state_dict()
    assert weights.keys() == expected.keys() and len(digest) == 64
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


@pytest.mark.parametrize("theirs", [MICRO, SIGLIP])
@pytest.mark.parametrize("ours", [MICRO, SIGLIP])
def test_scale_and_bias_come_with_weights_of_the_same_loss_only(
    tmp_path: Path, tokenizer: Tokenizer, run: Store, theirs: ModelConfig, ours: ModelConfig
) -> None:
    model = build(theirs, seed=1)
    with torch.no_grad():
        model.logit_scale.fill_(4.5)
        if model.logit_bias is not None:
            model.logit_bias.fill_(-16.5)
    loss = "clip" if ours.init_logit_bias is None else "siglip"
    begun = config(
        exported(tmp_path / "a", tokenizer, model),
        model=ours.model_dump(),
        train={"steps": 1, "loss": loss},
    )
    weights, _ = initial_weights(begun, tokenizer, run)
    found = {
        name: weights[name].item() for name in ("logit_scale", "logit_bias") if name in weights
    }
    if theirs != ours:
        assert not found
    elif ours is SIGLIP:
        assert found == {"logit_scale": 4.5, "logit_bias": -16.5}
    else:
        assert found == {"logit_scale": 4.5}


def test_a_start_that_is_tried_again_begins_from_the_same_weights(
    tmp_path: Path, tokenizer: Tokenizer, run: Store
) -> None:
    begun = config(exported(tmp_path / "a", tokenizer))
    first = initial_weights(begun, tokenizer, run)[1]
    assert initial_weights(begun, tokenizer, run)[1] == first
    exported(tmp_path / "a", tokenizer, build(MICRO, seed=4))
    with pytest.raises(CheckpointError, match=f"was begun from {first[:12]}"):
        initial_weights(begun, tokenizer, run)


def test_another_architecture_is_refused_by_its_differences(
    tmp_path: Path, tokenizer: Tokenizer, run: Store
) -> None:
    wide = MICRO.model_copy(update={"embed_dim": 48})
    weights = exported(tmp_path / "a", tokenizer, build(wide, seed=0))
    with pytest.raises(
        ConfigError, match=r"another architecture:\n  model.embed_dim: 48 there, 32"
    ):
        initial_weights(config(weights), tokenizer, run)


def test_another_tokenizer_is_refused(tmp_path: Path, tokenizer: Tokenizer, run: Store) -> None:
    other = Tokenizer.train(["zwei hunde im schnee"] * 9, 560, MICRO.text.context_length)
    with pytest.raises(ConfigError, match="other token ids than this run's tokenizer"):
        initial_weights(config(exported(tmp_path / "a", tokenizer)), other, run)


def test_other_pixels_are_refused(tmp_path: Path, tokenizer: Tokenizer, run: Store) -> None:
    model = CLIP(MICRO, mean=(0.5, 0.5, 0.5))
    with pytest.raises(ConfigError, match=r"mean \[0.5, 0.5, 0.5\]"):
        initial_weights(config(exported(tmp_path / "a", tokenizer, model)), tokenizer, run)


def test_no_model_there_is_said(tmp_path: Path, tokenizer: Tokenizer, run: Store) -> None:
    with pytest.raises(RegistryError, match="no model there"):
        initial_weights(config(str(tmp_path)), tokenizer, run)
