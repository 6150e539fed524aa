"""Reading the captions of a data set, for a vocabulary and for reports."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from clip_ray.config import DataConfig
from clip_ray.data.manifest import Manifest
from clip_ray.data.shards import Sample, read_ordinals

_CHUNK = 1024  # samples in memory at a time: their images are read along


def training_captions(manifest: Manifest, data: DataConfig, limit: int) -> Iterator[str]:
    """Yield the captions of at most `limit` training samples, spread evenly over the shards.

    All that a sample may be trained with: its first one, or with `caption_choice: random` each.
    """
    share = min(1.0, limit / max(manifest.total, 1))
    for index in range(len(manifest)):
        shard = manifest.shard(index)
        count = int(np.ceil(manifest.train_counts[index] * share))
        for start in range(0, count, _CHUNK):
            places = np.arange(start, min(start + _CHUNK, count))
            ordinals = manifest.train_ordinals(index, places)
            samples = read_ordinals(shard, data.sources[shard.source], data.s3, ordinals)
            for sample in samples:
                if isinstance(sample, Sample):
                    yield sample.caption
                    if data.caption_choice == "random":
                        yield from sample.others
