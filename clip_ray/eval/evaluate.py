"""One model on one data set: what the files allow is measured, with the endpoints' encode path.

Runs in one process; clip_ray.runtime.evaluate spreads it over workers.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from clip_ray.config import S3Options
from clip_ray.errors import DataError
from clip_ray.eval.datasets import CLASSNAMES, EvalDataset, Sample, open_dataset
from clip_ray.eval.prompts import DEFAULT_TEMPLATES
from clip_ray.eval.retrieval import RECALLS, retrieve
from clip_ray.eval.zero_shot import classifier, score
from clip_ray.images import ImageError

if TYPE_CHECKING:
    from clip_ray.inference import Encoder

SHOWN = 32  # pairs in the similarity figure


@dataclass(frozen=True)
class Result:
    """What an evaluation found.

    Attributes:
        dataset: name of the data set.
        metrics: fractions in [0, 1] by key: zero_shot.top1, zero_shot.top5,
            zero_shot.mean_per_class, zero_shot.chance_top1, zero_shot.chance_top5,
            retrieval.image_to_text.r1 | r5 | r10, retrieval.text_to_image.r1 | r5 | r10.
        samples: images that were encoded.
        skipped: images that could not be, by reason.
        classnames: by label; empty without classification.
        confusion: (N, N) images by (true class, predicted class), or None.
        similarity: cosines of the first images (rows) and their first captions, or None.
    """

    dataset: str
    metrics: dict[str, float]
    samples: int
    skipped: dict[str, int] = field(default_factory=dict)
    classnames: tuple[str, ...] = ()
    confusion: NDArray[np.int64] | None = None
    similarity: NDArray[np.float32] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return what summary.json and `jobs/evaluate.py --json` hold of it."""
        return {**self.metrics, "samples": self.samples, "skipped": dict(self.skipped)}


@dataclass
class _Read:
    """What is kept of the samples: features, never pixels."""

    images: list[NDArray[np.float32]] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    labelled: list[int] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    image_of_caption: list[int] = field(default_factory=list)
    samples: int = 0
    skipped: Counter[str] = field(default_factory=Counter)


def evaluate(
    encoder: Encoder,
    dataset_uri: str,
    batch: int = 256,
    limit: int | None = None,
    progress: Callable[[int], None] | None = None,
    s3: S3Options | None = None,
) -> Result:
    """Evaluate a model on a data set in CLIP_benchmark's layout.

    Zero-shot classification where samples have classes and the data set names them; retrieval
    where samples have captions. An image that cannot be used is skipped and counted.

    Args:
        encoder: the model.
        dataset_uri: directory or s3:// prefix.
        batch: images held and encoded at once.
        limit: take the first samples only.
        progress: called with the number of samples of each batch.
        s3: access to the data set.

    Raises:
        DataError: the data set is missing, damaged, or allows no evaluation.
    """
    dataset = open_dataset(dataset_uri, s3)
    read = _encode(encoder, itertools.islice(dataset.samples(), limit), batch, progress)
    if not read.samples:
        raise DataError(
            f"{dataset.store.uri}: no usable image in {len(dataset.shards)} shards"
            + (f" (skipped: {dict(read.skipped)})" if read.skipped else "")
        )
    image_IE = np.concatenate(read.images)
    metrics: dict[str, float] = {}
    confusion = similarity = None
    if read.labels and dataset.classnames is not None:
        metrics, confusion = _zero_shot(encoder, dataset, image_IE, read)
    if read.captions:
        found, similarity = _retrieval(encoder, image_IE, read)
        metrics |= found
    if not metrics:
        lacks = (
            f"samples have .cls, but {CLASSNAMES} is missing"
            if read.labels
            else "samples have neither .cls nor .txt"
        )
        raise DataError(f"{dataset.store.uri}: nothing to evaluate, {lacks}")
    return Result(
        dataset=dataset.name,
        metrics=metrics,
        samples=read.samples,
        skipped=dict(read.skipped),
        classnames=dataset.classnames or (),
        confusion=confusion,
        similarity=similarity,
    )


def _encode(
    encoder: Encoder,
    samples: Iterator[Sample],
    batch: int,
    progress: Callable[[int], None] | None,
) -> _Read:
    read = _Read()
    while chunk := list(itertools.islice(samples, batch)):
        pixels = []
        for sample in chunk:
            try:
                pixels.append(encoder.preprocess(sample.image))
            except ImageError as error:
                read.skipped[error.reason] += 1
                continue
            if sample.label is not None:
                read.labels.append(sample.label)
                read.labelled.append(read.samples)
            read.captions.extend(sample.captions)
            read.image_of_caption.extend([read.samples] * len(sample.captions))
            read.samples += 1
        if pixels:
            read.images.append(encoder.encode_pixels(np.stack(pixels)))
        if progress is not None:
            progress(len(chunk))
    return read


def _zero_shot(
    encoder: Encoder, dataset: EvalDataset, image_IE: NDArray[np.float32], read: _Read
) -> tuple[dict[str, float], NDArray[np.int64]]:
    names = dataset.classnames
    assert names is not None
    weights = classifier(encoder, names, dataset.templates or DEFAULT_TEMPLATES)
    scores = score(image_IE[read.labelled], np.array(read.labels, np.int64), weights)
    metrics = {
        "zero_shot.top1": scores.top1,
        "zero_shot.top5": scores.top5,
        "zero_shot.mean_per_class": scores.mean_per_class,
        "zero_shot.chance_top1": 1 / len(names),
        "zero_shot.chance_top5": min(1.0, 5 / len(names)),
    }
    return metrics, scores.confusion


def _retrieval(
    encoder: Encoder, image_IE: NDArray[np.float32], read: _Read
) -> tuple[dict[str, float], NDArray[np.float32]]:
    text_TE = encoder.encode_texts(read.captions)
    image_of_text = np.array(read.image_of_caption, np.int64)
    # An image without a caption is no query and no candidate.
    kept, image_of_text = np.unique(image_of_text, return_inverse=True)
    scores = retrieve(image_IE[kept], text_TE, image_of_text)
    metrics = {}
    for k in RECALLS:
        metrics[f"retrieval.image_to_text.r{k}"] = scores.image_to_text[k]
        metrics[f"retrieval.text_to_image.r{k}"] = scores.text_to_image[k]
    first = np.unique(image_of_text, return_index=True)[1][:SHOWN]
    return metrics, image_IE[kept[:SHOWN]] @ text_TE[first].T
