"""The field's usual loader, written from its definition, to be compared with.

A torch DataLoader over tars: each worker walks its share of the shards, decodes the whole picture
with Pillow, takes torchvision's RandomResizedCrop (area and aspect drawn, ten tries, then the
centre) with bicubic resizing and open_clip's scale of 0.9 to 1, and normalises to float32. The
captions go through our own tokenizer, which is the faster one.
"""

from __future__ import annotations

import io
import math
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from clip_ray.model.clip import IMAGE_MEAN, IMAGE_STD
from clip_ray.tokenizer import Tokenizer

SCALE, RATIO = (0.9, 1.0), (3 / 4, 4 / 3)
WORKERS = 2


def loader(folder: Path, size: int, batch: int) -> DataLoader[tuple[Tensor, Tensor]]:
    """Return an endless loader of (b, 3, size, size) float32 pixels and (b, L) ids."""
    return DataLoader(_Tars(folder, size), batch_size=batch, num_workers=WORKERS)


class _Tars(IterableDataset[tuple[Tensor, Tensor]]):
    def __init__(self, folder: Path, size: int) -> None:
        self._paths, self._size = sorted(folder.glob("*.tar")), size
        self._tokenizer = Tokenizer.clip()

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        worker = get_worker_info()
        assert worker is not None
        rng = np.random.default_rng(worker.id)
        mean, std = (torch.tensor(x).view(3, 1, 1) for x in (IMAGE_MEAN, IMAGE_STD))
        while True:
            for path in self._paths[worker.id :: WORKERS]:
                for data, caption in _pairs(path):
                    image = Image.open(io.BytesIO(data)).convert("RGB")
                    box = _box(*image.size, rng)
                    image = image.crop(box).resize(
                        (self._size, self._size), Image.Resampling.BICUBIC
                    )
                    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
                    ids, _ = self._tokenizer([caption])
                    yield (pixels.to(torch.float32).div(255) - mean) / std, torch.from_numpy(ids[0])


def _pairs(path: Path) -> Iterator[tuple[bytes, str]]:
    with tarfile.open(path, "r|") as tar:
        image = b""
        for member in tar:
            file = tar.extractfile(member)
            assert file is not None
            if member.name.endswith(".jpg"):
                image = file.read()
            else:
                yield image, file.read().decode()


def _box(width: int, height: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Draw a crop as torchvision's RandomResizedCrop.get_params does."""
    for _ in range(10):
        area = width * height * rng.uniform(*SCALE)
        aspect = math.exp(rng.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1))
            return left, top, left + w, top + h
    ratio = width / height
    w = round(height * RATIO[1]) if ratio > RATIO[1] else width
    h = round(width / RATIO[0]) if ratio < RATIO[0] else height
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h
