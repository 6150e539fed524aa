"""Weights that a run begins from: ours, another's, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from clip_ray.config import Config, ModelConfig
from clip_ray.errors import ConfigError, RegistryError
from clip_ray.model import CLIP, build
from clip_ray.registry import write_export
from clip_ray.storage import LocalStore
from clip_ray.tokenizer import Tokenizer
from clip_ray.train.initial import initial_weights

MICRO = ModelConfig(name="ViT-micro-8-32", text={"vocab_size": 560})
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


def test_the_weights_are_those_of_the_export(tmp_path: Path, tokenizer: Tokenizer) -> None:
    weights, digest = initial_weights(config(exported(tmp_path / "a", tokenizer)), tokenizer)
    expected = build(MICRO, seed=3).state_dict()
    assert weights.keys() == expected.keys() and len(digest) == 64
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_a_sigmoid_run_begins_from_softmax_weights(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Its bias begins as the config says; and a model's own bias is left behind."""
    biased = MICRO.model_copy(update={"init_logit_bias": -10.0})
    own = config(
        exported(tmp_path / "a", tokenizer),
        model=biased.model_dump(),
        train={"steps": 1, "loss": "siglip"},
    )
    assert "logit_bias" not in initial_weights(own, tokenizer)[0]
    other = exported(tmp_path / "b", tokenizer, build(biased, seed=1))
    assert "logit_bias" not in initial_weights(config(other), tokenizer)[0]


def test_another_architecture_is_refused_by_its_differences(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    wide = MICRO.model_copy(update={"embed_dim": 48})
    weights = exported(tmp_path / "a", tokenizer, build(wide, seed=0))
    with pytest.raises(
        ConfigError, match=r"another architecture:\n  model.embed_dim: 48 there, 32"
    ):
        initial_weights(config(weights), tokenizer)


def test_another_tokenizer_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    other = Tokenizer.train(["zwei hunde im schnee"] * 9, 560, MICRO.text.context_length)
    with pytest.raises(ConfigError, match=r"give --tokenizer.vocab .*/a/tokenizer.json"):
        initial_weights(config(exported(tmp_path / "a", tokenizer)), other)


def test_other_pixels_are_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    model = CLIP(MICRO, mean=(0.5, 0.5, 0.5))
    with pytest.raises(ConfigError, match=r"mean \[0.5, 0.5, 0.5\]"):
        initial_weights(config(exported(tmp_path / "a", tokenizer, model)), tokenizer)


def test_no_model_there_is_said(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(RegistryError, match="no model there"):
        initial_weights(config(str(tmp_path)), tokenizer)
