"""Small shards for the tests of the data layer."""

from __future__ import annotations

import functools
import io
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import simplejpeg

Members = list[tuple[str, bytes]]


@functools.cache
def jpeg(seed: int) -> bytes:
    rng = np.random.default_rng(seed)
    height, width = rng.integers(8, 40, 2)
    return simplejpeg.encode_jpeg(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def write_tar(path: Path, members: Members, format: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def pairs(count: int) -> Members:
    return [
        member
        for i in range(count)
        for member in ((f"{i:05d}.jpg", jpeg(i)), (f"{i:05d}.txt", f"caption {i}".encode()))
    ]


def cut(path: Path, length: int) -> Path:
    path.write_bytes(path.read_bytes()[:length])
    return path


def write_parquet(path: Path, columns: dict[str, pa.Array], rows: int = 4) -> Path:
    pq.write_table(pa.table(columns), path, row_group_size=rows)
    return path


def images(count: int) -> list[bytes]:
    return [jpeg(i) for i in range(count)]
