"""Zero-shot classification (Radford et al. 2021, section 3.1): the class names are the classifier.

Left out: reading images (eval.evaluate) and distribution (runtime.evaluate).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from clip_ray.eval.prompts import prompts
from clip_ray.eval.ranks import TIE, hit_rate

Floats = NDArray[np.float32]


class TextEncoder(Protocol):
    """The part of `inference.Encoder` that a classifier needs."""

    digest: str | None
    embed_dim: int

    def encode_texts(self, texts: Sequence[str]) -> Floats:
        """Return (N, E) text features of unit length."""


def classifier(encoder: TextEncoder, names: Sequence[str], templates: Sequence[str]) -> Floats:
    """Return the classifier's weights: one unit vector a class, (N, E) float32.

    Args:
        encoder: what encodes the prompts.
        names: N class names.
        templates: T prompt templates with `{c}` or `{}`.
    """
    rows = []
    # A class block at a time: ImageNet with 80 templates is 80,000 sentences.
    for start in range(0, len(names), 64):
        block = names[start : start + 64]
        rows.append(ensemble(encoder.encode_texts(prompts(block, templates)), len(block)))
    return np.concatenate(rows) if rows else np.empty((0, encoder.embed_dim), np.float32)


def ensemble(features: Floats, num_classes: int) -> Floats:
    """Return one unit vector a class, (N, E) float32.

    A class is the mean of its prompts' features, normalised again ("ensembling over the embedding
    space", Radford et al. 2021, section 3.1.4).

    Args:
        features: (N * T, E), the T prompts of a class together.
        num_classes: N.
    """
    mean_NE = features.reshape(num_classes, -1, features.shape[1]).mean(axis=1)
    norm_N1 = np.linalg.norm(mean_NE, axis=1, keepdims=True)
    result: Floats = (mean_NE / np.maximum(norm_N1, 1e-12)).astype(np.float32)
    return result


@dataclass(frozen=True)
class ZeroShotScores:
    """Fractions in [0, 1].

    Attributes:
        top1: images whose class has the highest score.
        top5: images whose class is among the five highest.
        mean_per_class: mean over the classes that occur of their own top1.
        confusion: (N, N) int64, images by (true class, predicted class).
    """

    top1: float
    top5: float
    mean_per_class: float
    confusion: NDArray[np.int64]


def score(image_features: Floats, labels: NDArray[np.int64], weights: Floats) -> ZeroShotScores:
    """Score image features against a classifier.

    Equal scores count as if drawn by lot, so a model that says the same of all has chance level.

    Args:
        image_features: (M, E) of unit length.
        labels: (M,) classes in [0, N).
        weights: (N, E), as `classifier` returns.
    """
    num_classes = len(weights)
    hit1_M, hit5_M = np.empty(len(labels)), np.empty(len(labels))
    confusion = np.zeros((num_classes, num_classes), np.int64)
    block = max(1, (1 << 24) // max(1, num_classes))
    for start in range(0, len(labels), block):
        rows = slice(start, start + block)
        label_B = labels[rows]
        score_BN = image_features[rows] @ weights.T
        own_B1 = score_BN[np.arange(len(label_B)), label_B][:, None]
        above_B = (score_BN > own_B1 + TIE).sum(axis=1)
        tied_B = (score_BN >= own_B1 - TIE).sum(axis=1) - above_B - 1
        hit1_M[rows] = hit_rate(above_B, tied_B, np.ones_like(above_B), 1)
        hit5_M[rows] = hit_rate(above_B, tied_B, np.ones_like(above_B), 5)
        np.add.at(confusion, (label_B, score_BN.argmax(axis=1)), 1)
    count_N = np.bincount(labels, minlength=num_classes)
    hits_N = np.bincount(labels, weights=hit1_M, minlength=num_classes)
    occurs_N = count_N > 0
    return ZeroShotScores(
        top1=float(hit1_M.mean()),
        top5=float(hit5_M.mean()),
        mean_per_class=float((hits_N[occurs_N] / count_N[occurs_N]).mean()),
        confusion=confusion,
    )
