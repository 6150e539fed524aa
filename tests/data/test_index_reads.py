"""What an index reads of a shard, and the image formats that it takes."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from clip_ray.config import S3Options, SourceConfig
from clip_ray.data import tar
from clip_ray.data.shards import IndexOptions, Sample, ShardIndex, index_shard, read_ordinals
from clip_ray.images import decode
from clip_ray.storage import LocalStore, S3Store, open_store, split_uri
from tests.data.shard_files import write_parquet, write_tar


def index(path: str, s3: S3Options | None = None) -> ShardIndex:
    folder, name = split_uri(path)
    file = open_store(folder, s3).info(name)
    return index_shard(file, SourceConfig(path=path), s3, IndexOptions())


def photographs(count: int, size: int) -> list[bytes]:
    """Bytes that no compression makes smaller, as of JPEGs."""
    rng = np.random.default_rng(0)
    return [rng.bytes(size) for _ in range(count)]


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The length of each read of a store."""
    lengths: list[int] = []

    def count(kind: type) -> None:
        plain = kind.read

        def counted(*given):
            data = plain(*given)
            lengths.append(len(data))
            return data

        monkeypatch.setattr(kind, "read", counted)

    count(LocalStore)
    count(S3Store)
    return lengths


def test_a_local_tar_is_walked_by_its_headers(tmp_path: Path, read: list[int]) -> None:
    members = [
        member
        for i, image in enumerate(photographs(40, 200_000))
        for member in ((f"{i:05d}.jpg", image), (f"{i:05d}.txt", b"a caption"))
    ]
    path = write_tar(tmp_path / "a.tar", members)
    assert index(str(path)).shard.samples == 40
    assert sum(read) < path.stat().st_size / 10


def test_a_tar_on_s3_is_streamed_once_in_large_ranges(
    tmp_path: Path, s3: S3Options, read: list[int]
) -> None:
    assert tar._S3_CHUNK >= 16 << 20
    store = open_store(f"s3://bucket/{tmp_path.name}", s3)
    members = [
        member
        for i, image in enumerate(photographs(20, 1_000_000))
        for member in ((f"{i:05d}.jpg", image), (f"{i:05d}.txt", b"a caption"))
    ]
    data = write_tar(tmp_path / "a.tar", members).read_bytes()
    store.write("a.tar", data)
    assert index(f"{store.uri}/a.tar", s3).shard.samples == 20
    assert sorted(read, reverse=True) == [16 << 20, len(data) - (16 << 20)]


def test_the_images_of_a_parquet_file_are_not_read(tmp_path: Path, read: list[int]) -> None:
    images = photographs(40, 200_000)
    columns = {"jpg": pa.array(images), "txt": pa.array([f"caption {i}" for i in range(40)])}
    path = write_parquet(tmp_path / "a.parquet", columns, rows=10)
    assert index(str(path)).shard.samples == 40
    assert sum(read) < len(images[0])


@pytest.mark.parametrize(
    ("suffix", "kind"),
    [("jpg", "JPEG"), ("jpeg", "JPEG"), ("png", "PNG"), ("webp", "WEBP"), ("gif", "GIF")]
    + [("JPG", "JPEG"), ("WebP", "WEBP")],
)
def test_each_image_format_in_a_tar(tmp_path: Path, suffix: str, kind: str) -> None:
    pictures = []
    for i in range(3):
        file = io.BytesIO()
        Image.new("RGB", (20 + i, 30), (200, 10, 60 * i)).save(file, kind)
        pictures.append(file.getvalue())
    members = [
        member
        for i, data in enumerate(pictures)
        for member in ((f"{i}.txt", f"caption {i}".encode()), (f"{i}.{suffix}", data))
    ]
    path = str(write_tar(tmp_path / "a.tar", members))
    found = index(path)
    assert found.skipped == {} and found.unknown_suffixes == {}
    samples = read_ordinals(found.shard, SourceConfig(path=path), None, np.arange(3))
    for i, sample in enumerate(samples):
        assert isinstance(sample, Sample)
        assert (sample.key, sample.caption, sample.image) == (f"{i}", f"caption {i}", pictures[i])
        pixels = decode(sample.image, 10**6)
        assert pixels.shape == (30, 20 + i, 3)
        assert np.abs(pixels.mean((0, 1)) - (200, 10, 60 * i)).max() < 3
