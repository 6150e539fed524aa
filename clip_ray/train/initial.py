"""The weights that a run begins from, where it does not begin from random ones."""

from __future__ import annotations

import json

from torch import Tensor

from clip_ray.config import Config, ModelConfig
from clip_ray.config.load import flatten
from clip_ray.errors import CheckpointError, ConfigError
from clip_ray.model.clip import IMAGE_MEAN, IMAGE_STD
from clip_ray.registry import load_export, resolve
from clip_ray.storage import Store
from clip_ray.tokenizer import Tokenizer

# What may differ: how the model is called, what its own scale and bias began from, and what
# follows from the tokenizer, which is compared itself.
_FREE = ("name", "init_logit_scale", "init_logit_bias", "text.vocab_size")
_PROBES = ("A photo of 2 CATS, isn't it?", "café naïve 北京 12,345", "")
_PIN = "initial.json"


def initial_weights(
    config: Config, tokenizer: Tokenizer, run: Store
) -> tuple[dict[str, Tensor], str]:
    """Return `init.weights` as a state dict of the run's model, and the model's digest.

    The logit scale and bias come with weights of the same loss; those of another loss are left
    out, and begin as the run's config says.

    Args:
        config: the run's.
        tokenizer: the run's.
        run: the run's directory, which remembers the digest: a start that is tried again begins
            from the same weights.

    Raises:
        ConfigError: another architecture, tokenizer or normalisation; all differences are named.
        CheckpointError: the run began from other weights.
        RegistryError: there is no model, or ours cannot reproduce it.
    """
    assert config.init.weights is not None
    resolved = resolve(config.init.weights, s3=config.run.s3)
    model, its_tokenizer, info = load_export(resolved.store, resolved.digest)
    assert info.digest is not None
    where = f"init.weights {config.init.weights}"
    ids, its_ids = (t(list(_PROBES))[0] for t in (tokenizer, its_tokenizer))
    if ids.shape == its_ids.shape and (ids != its_ids).any():
        raise ConfigError(
            f"{where} was trained with other token ids than this run's tokenizer makes; name that "
            "model's tokenizer.json or vocabulary as tokenizer.vocab"
        )
    if differences := _differences(model.config, config.model):
        raise ConfigError(f"{where} is of another architecture:\n" + "\n".join(differences))
    for name, own, usual in (
        ("mean", model.pixel_mean, IMAGE_MEAN),
        ("std", model.pixel_std, IMAGE_STD),
    ):
        if max(abs(a - b) for a, b in zip(own.flatten().tolist(), usual, strict=True)) > 1e-6:
            raise ConfigError(
                f"{where} takes pixels with {name} {own.flatten().tolist()}, training uses {usual}"
            )
    _pin(run, info.digest, where)
    weights = model.state_dict()
    if (model.logit_bias is None) != (config.model.init_logit_bias is None):
        weights.pop("logit_scale")
        weights.pop("logit_bias", None)
    return weights, info.digest


def _pin(run: Store, digest: str, where: str) -> None:
    if not run.exists(_PIN):
        run.write(_PIN, json.dumps({"digest": digest}).encode())
    pinned = json.loads(run.read(_PIN))["digest"]
    if pinned != digest:
        raise CheckpointError(
            f"{where} has digest {digest[:12]}, and run {run.uri} was begun from {pinned[:12]}; "
            "put the first one back, or give the run another name (--run.name)"
        )


def _differences(theirs: ModelConfig, ours: ModelConfig) -> list[str]:
    a, b = (flatten(config.model_dump(mode="json")) for config in (theirs, ours))
    return [
        f"  model.{key}: {a[key]!r} there, {b[key]!r} here"
        for key in a
        if key not in _FREE and a[key] != b[key]
    ]
