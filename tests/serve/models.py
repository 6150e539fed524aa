"""Tiny random models and pictures for the tests of serving."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from ray.serve import context
from ray.serve._private.common import DeploymentID, ReplicaID
from ray.serve._private.config import DeploymentConfig
from ray.serve.schema import ReplicaRank

from clip_ray.config import ModelConfig, TextConfig, VisionConfig
from clip_ray.model import build
from clip_ray.registry import ServedModel, write_export
from clip_ray.storage import LocalStore
from clip_ray.tokenizer import Tokenizer

TINY = ModelConfig(
    embed_dim=16,
    vision=VisionConfig(image_size=32, patch_size=16, width=32, layers=1, heads=2),
    text=TextConfig(context_length=12, vocab_size=514, width=32, layers=1, heads=2),
)


def picture(seed: int, kind: str = "PNG", size: tuple[int, int] = (60, 40)) -> bytes:
    """Return an image file of smooth noise, other for each seed."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), np.uint8)
    data = io.BytesIO()
    Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(data, kind)
    return data.getvalue()


def export(
    folder: Path, seed: int, version: str, scale: float = 3.0, bias: float | None = None
) -> ServedModel:
    """Write a random tiny model; `scale` spreads its features, so that models differ."""
    model = build(TINY.model_copy(update={"init_logit_bias": bias}), seed=seed)
    with torch.no_grad():
        for parameter in (model.visual.proj, model.text_projection):
            parameter.mul_(scale)
    tokenizer = Tokenizer.train(["a cat"], 514, 12)
    digest = write_export(LocalStore(folder), model, tokenizer, {"run_id": f"run{seed}"})
    return ServedModel(
        name="clip", version=version, uri=str(folder), digest=digest, run_id=f"run{seed}"
    )


def replica_context() -> None:
    """Pretend to be a Serve replica: @serve.batch asks for its settings, even without Ray."""
    context._set_internal_replica_context(
        replica_id=ReplicaID("test", DeploymentID("clip", "clip")),
        servable_object=None,
        _deployment_config=DeploymentConfig(max_ongoing_requests=128),
        rank=ReplicaRank(rank=0, node_rank=0, local_rank=0),
        world_size=1,
    )
