"""What the data benchmarks read: shards of pictures that cost a decoder what photographs cost."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

from clip_ray.config import DataConfig, S3Options, SourceConfig
from clip_ray.data.blocks import BlockReader, Layout
from clip_ray.data.manifest import build_manifest
from clip_ray.data.plan import Plan
from clip_ray.tokenizer import Tokenizer
from tests.pictures import photo

IMAGE_SIZE = 224
GLOBAL_BATCH = 256
SLOT, WINDOW = 64, 8  # R and K as `default_sizes` gives them to a set of any size
CONSUMERS = 2
SHARD = 512  # samples


def write_shards(folder: Path, side: int, samples: int, distinct: int) -> Path:
    """Write tars of `samples` pairs; only `distinct` pictures are made, as that is slow."""
    pictures = [photo(seed, side) for seed in range(distinct)]
    folder.mkdir(parents=True)
    for first in range(0, samples, SHARD):
        with tarfile.open(folder / f"{first // SHARD:04d}.tar", "w") as tar:
            for number in range(first, min(first + SHARD, samples)):
                caption = f"a photo of thing number {number} beside another thing".encode()
                for suffix, data in (("jpg", pictures[number % distinct]), ("txt", caption)):
                    info = tarfile.TarInfo(f"{number:07d}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return folder


def build_reader(path: str, s3: S3Options | None = None) -> BlockReader:
    """Return the reader of the shards at a path, dealt to the consumers, with the shipped plan."""
    config = DataConfig(sources=(SourceConfig(path=path),), s3=s3 or S3Options(), holdout=0)
    manifest = build_manifest(config)
    plan = Plan(
        manifest.train_counts,
        manifest.source.astype("int64"),
        weights=None,
        seed=0,
        global_batch=GLOBAL_BATCH,
        slot=SLOT,
        window=WINDOW,
        manifest_digest=manifest.digest,
    )
    tokenizer = Tokenizer.clip()
    row_bytes = 3 * IMAGE_SIZE**2 + 4 * tokenizer.context_length
    layout = Layout.fit(plan, CONSUMERS, row_bytes)
    return BlockReader(plan, layout, manifest, config, tokenizer, IMAGE_SIZE)
