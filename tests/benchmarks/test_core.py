"""Benchmarks of the parts below Ray: CPU time, side by side in one run. `make bench`."""

from __future__ import annotations

import io
import tarfile
import time
from collections.abc import Callable

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image

from clip_ray.config import DataConfig, SourceConfig
from clip_ray.data.blocks import BlockReader, Layout
from clip_ray.data.manifest import build_manifest
from clip_ray.data.plan import Plan
from clip_ray.tokenizer import Tokenizer

pytestmark = pytest.mark.bench


def cpu_seconds(run: Callable[[], object], repeats: int = 3) -> float:
    """Return the least CPU time of a few runs, on one thread."""
    torch.set_num_threads(1)
    best = float("inf")
    for _ in range(repeats):
        begun = time.process_time()
        run()
        best = min(best, time.process_time() - begun)
    return best


def test_seek_in_a_billion_samples():
    """Build the plan of 100,000 shards and ask for a step far in."""
    begun = time.process_time()
    plan = Plan(
        np.full(100_000, 10_000),
        np.zeros(100_000, int),
        weights=None,
        seed=0,
        global_batch=32768,
        slot=64,
        window=8,
    )
    rows = plan.step_rows(900_000)
    seconds = time.process_time() - begun
    print(f"\nplan of 1e9 samples, step 900,000: {seconds:.2f} s of CPU")
    assert len(rows.shard) == 32768
    assert seconds < 5


def test_tar_to_batches_against_the_usual_loader(tmp_path):
    """One process: our reader against PIL decoding, float32 and normalising on the CPU."""
    path, samples = tmp_path / "a.tar", 256
    rng = np.random.default_rng(0)
    with tarfile.open(path, "w") as tar:
        for i in range(samples):
            low = rng.integers(0, 255, (32, 42, 3), np.uint8)
            picture = np.asarray(Image.fromarray(low).resize((340, 256), Image.Resampling.BICUBIC))
            data = simplejpeg.encode_jpeg(np.ascontiguousarray(picture), quality=90)
            for suffix, content in (("jpg", data), ("txt", b"a photo of something")):
                info = tarfile.TarInfo(f"{i:05d}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    config = DataConfig(sources=(SourceConfig(path=str(path)),), holdout=0.0)
    manifest = build_manifest(config)
    plan = Plan(
        manifest.train_counts,
        manifest.source.astype(np.int64),
        weights=None,
        seed=0,
        global_batch=64,
        slot=4,
        window=4,
    )
    reader = BlockReader(plan, Layout(1, 64, 4, 1), manifest, config, Tokenizer.clip(), 224)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.48, 0.46, 0.41], [0.27, 0.26, 0.28]))

    def usual() -> None:
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".jpg"):
                    image = Image.open(tar.extractfile(member)).convert("RGB")
                    image = image.resize(
                        (224, 224), Image.Resampling.BICUBIC, box=(30, 0, 286, 256)
                    )
                    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
                    (pixels - mean) / std

    ours = cpu_seconds(lambda: reader.read(0, 0, 0)) / samples
    theirs = cpu_seconds(usual) / samples
    print(f"\ntar to 224 px: {1000 * ours:.2f} ms, usual {1000 * theirs:.2f} ms an image of CPU")
    assert ours <= 0.6 * theirs
