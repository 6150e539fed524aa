"""The weights that a run begins from, where it does not begin from random ones."""

from __future__ import annotations

from torch import Tensor

from clip_ray.config import Config, ModelConfig
from clip_ray.config.load import flatten
from clip_ray.errors import ConfigError
from clip_ray.registry import load_export, resolve
from clip_ray.tokenizer import Tokenizer

# What may differ: how the model is called, and what its own scale and bias began from.
_FREE = ("name", "init_logit_scale", "init_logit_bias")
_PROBES = ("A photo of 2 CATS, isn't it?", "café naïve 北京 12,345", "")


def initial_weights(config: Config, tokenizer: Tokenizer) -> tuple[dict[str, Tensor], str]:
    """Return `init.weights` as a state dict of the run's model, and the model's digest.

    A bias that the model has and the weights lack (or the other way round) follows the run.

    Raises:
        ConfigError: another architecture, tokenizer or normalisation; all differences are named.
        RegistryError: there is no model, or ours cannot reproduce it.
    """
    assert config.init.weights is not None
    resolved = resolve(config.init.weights, s3=config.run.s3)
    model, its_tokenizer, info = load_export(resolved.store, resolved.digest)
    where = f"init.weights {config.init.weights}"
    differences = _differences(model.config, config.model)
    if differences:
        raise ConfigError(f"{where} is of another architecture:\n" + "\n".join(differences))
    ids, its_ids = (t(list(_PROBES))[0] for t in (tokenizer, its_tokenizer))
    if ids.shape != its_ids.shape or (ids != its_ids).any():
        raise ConfigError(
            f"{where} was trained with other token ids than this run's tokenizer makes; give "
            f"--tokenizer.vocab {config.init.weights}/tokenizer.json"
        )
    from clip_ray.model.clip import IMAGE_MEAN, IMAGE_STD

    for name, own, usual in (
        ("mean", model.pixel_mean, IMAGE_MEAN),
        ("std", model.pixel_std, IMAGE_STD),
    ):
        if max(abs(a - b) for a, b in zip(own.flatten().tolist(), usual, strict=True)) > 1e-6:
            raise ConfigError(
                f"{where} takes pixels with {name} {own.flatten().tolist()}, training uses {usual}"
            )
    weights = model.state_dict()
    weights.pop("logit_bias", None)
    assert info.digest is not None
    return weights, info.digest


def _differences(theirs: ModelConfig, ours: ModelConfig) -> list[str]:
    a, b = (flatten(config.model_dump(mode="json")) for config in (theirs, ours))
    return [
        f"  model.{key}: {a[key]!r} there, {b[key]!r} here"
        for key in a
        if key not in _FREE and a[key] != b[key]
    ]
