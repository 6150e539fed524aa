"""Evaluating on the samples that were kept out of training: loss and retrieval."""

from __future__ import annotations

import numpy as np
import torch

from clip_ray.config import DataConfig
from clip_ray.contrastive import clip_loss, siglip_loss
from clip_ray.data.manifest import Manifest
from clip_ray.data.shards import Sample, read_ordinals
from clip_ray.errors import DataError
from clip_ray.eval.evaluate import SHOWN, Result
from clip_ray.eval.retrieval import RECALLS, retrieve
from clip_ray.images import decode
from clip_ray.inference import Encoder

MAX_SAMPLES = 5000  # as in the usual retrieval sets; recall at k depends on their number


def read_pairs(manifest: Manifest, data: DataConfig, limit: int) -> list[Sample]:
    """Return at most `limit` held-out samples that decode, in the manifest's order."""
    shards, ordinals = manifest.holdout_items(limit)
    pairs: list[Sample] = []
    for index in np.unique(shards):
        shard = manifest.shard(int(index))
        mine = np.sort(ordinals[shards == index])
        for sample in read_ordinals(shard, data.sources[shard.source], data.s3, mine):
            if isinstance(sample, Sample) and _decodes(sample, data.max_pixels):
                pairs.append(sample)
    return pairs


def _decodes(sample: Sample, max_pixels: int) -> bool:
    try:
        decode(sample.image, max_pixels)
    except DataError:
        return False
    return True


def evaluate_holdout(encoder: Encoder, manifest: Manifest, data: DataConfig) -> Result:
    """Return the `loss` of the held-out samples as one batch, and retrieval among them."""
    pairs = read_pairs(manifest, data, MAX_SAMPLES)
    if not pairs:
        return Result("holdout", {}, samples=0)
    images = encoder.encode_images([p.image for p in pairs])
    texts = encoder.encode_texts([p.caption for p in pairs])
    with torch.no_grad():
        features = torch.from_numpy(images), torch.from_numpy(texts)
        scale, bias = encoder.model.logit_scale.exp().cpu(), encoder.model.logit_bias
        if bias is None:
            loss = clip_loss(*features, scale)
        else:
            loss = siglip_loss(*features, scale, bias.cpu())
    scores = retrieve(images, texts, np.arange(len(pairs)))
    recalls = {
        f"retrieval.{direction}.r{k}": getattr(scores, direction)[k]
        for k in RECALLS
        for direction in ("image_to_text", "text_to_image")
    }
    shown = images[:SHOWN] @ texts[:SHOWN].T
    return Result("holdout", {"loss": float(loss), **recalls}, len(pairs), similarity=shown)
