"""Corrupt bytes in every kind of file that is read: no crash, no hang, every loss counted.

Seeded, so that a failure can be run again: the message names the case.
"""

from __future__ import annotations

import io
import json
import os
import signal
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from clip_ray.config import DataConfig, SourceConfig
from clip_ray.data import shards
from clip_ray.data.blocks import Arrays, BlockReader, Layout
from clip_ray.data.manifest import build_manifest
from clip_ray.data.plan import Plan
from clip_ray.data.samples import JSON_KEYS, Caption, caption_in_json, caption_of
from clip_ray.data.shards import BadSample, IndexOptions, Sample
from clip_ray.errors import DataError
from clip_ray.images import ImageError, decode
from clip_ray.storage import LocalStore
from clip_ray.tokenizer import Tokenizer
from tests.corpus import pixels, saved
from tests.data.shard_files import images, pairs, write_parquet, write_tar

SOURCE = SourceConfig(path="unused")
SAMPLES = 24
CASE_S = 5.0  # a case takes milliseconds


@contextmanager
def bounded(case: object) -> Iterator[None]:
    """Fail, naming the case, where it takes too long."""

    def late(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"case {case} takes more than {CASE_S:g} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, CASE_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def corrupt(data: bytes, rng: np.random.Generator) -> bytes:
    """Return a file with some bytes changed, cut out, doubled, or its end missing."""
    kind = rng.integers(5)
    bad = bytearray(data)
    if kind == 0:
        return data[: int(rng.integers(len(data)))]
    if kind == 1:
        for at in rng.integers(0, len(data), rng.integers(1, 20)):
            bad[at] = rng.integers(256)
    elif kind == 2:
        at = int(rng.integers(len(data)))
        bad[at] ^= 1 << int(rng.integers(8))
    else:
        first, last = sorted(rng.integers(0, len(data), 2).tolist())
        last = min(last, first + 600)
        piece = rng.bytes(last - first) if kind == 3 else bytes(last - first)
        bad[first:last] = piece
    return bytes(bad)


def wrong_headers(data: bytes, rng: np.random.Generator) -> bytes:
    """Return a tar with a byte of one header changed and the checksum made right again."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        at = int(rng.choice([member.offset for member in tar.getmembers()]))
    header = bytearray(data[at : at + 512])
    field = [(0, 100), (124, 136), (156, 157), (257, 263), (345, 500)][int(rng.integers(5))]
    for place in rng.integers(*field, rng.integers(1, 4)):
        header[place] = int(rng.choice(list(b"-0179./ \0xLKg\x80\xff")))
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return data[:at] + bytes(header) + data[at + 512 :]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF"])
def test_a_corrupt_image_is_a_picture_or_an_image_error(kind: str) -> None:
    noise = np.random.default_rng(1).integers(0, 60, (48, 64, 3), dtype=np.uint8)
    whole = saved(Image.fromarray(pixels() - noise), kind)
    fates = {"picture": 0, "error": 0}
    for case in range(700):
        data = corrupt(whole, np.random.default_rng(case))
        with bounded((kind, case)):
            try:
                found = decode(data, 1_000_000)
            except ImageError as error:
                assert error.reason and len(str(error)) < 1000
                fates["error"] += 1
            else:
                assert found.dtype == np.uint8 and found.ndim == 3 and found.shape[2] == 3
                fates["picture"] += 1
    assert fates["error"] > 100  # the corruption corrupts


def texts(count: int) -> Iterator[tuple[int, bytes]]:
    """Yield captions, JSON and what has become of them."""
    whole = [
        "A photo of a dog, \U0001f436 &amp; æøå — “quoted”\tand\u0000 more".encode(),
        json.dumps({"caption": ["one", "zwei", None, 3], "text": "x", "url": "u"}).encode(),
        b'{"caption": ' + b"[" * 1200 + b"]" * 1200 + b"}",
        b'{"caption": "\\ud800 lone \\udfff", "n": 1e999, "m": NaN}',
        "Ἀ\u0301\u200d\ufeff ＦＵＬＬ ﬁ ‮ right".encode("utf-16"),
        b'{"caption": ' + b"9" * 6000 + b"}",
    ]
    for case in range(count):
        rng = np.random.default_rng(case)
        data = whole[case % len(whole)]
        yield case, data if case < len(whole) else corrupt(data, rng)


def test_a_corrupt_caption_is_text_or_a_reason() -> None:
    tokenizer = Tokenizer.clip()
    usable: list[str] = []
    for case, data in texts(1500):
        with bounded(case):
            for found in (caption_of(data), caption_in_json(data, JSON_KEYS)):
                assert isinstance(found, Caption) and bool(found.texts) != bool(found.reason)
                assert all(text.strip() == text != "" for text in found.texts)
                usable += found.texts
    assert len(usable) > 1000
    for text in usable[::4]:
        with bounded(text):
            ids, _ = tokenizer([text])
        assert ids.shape == (1, 77) and (ids >= 0).all() and (ids < tokenizer.vocab_size).all()


def write_source(path: Path, kind: str) -> bytes:
    if kind == "tar":
        write_tar(path, pairs(SAMPLES))
    else:
        captions = [f"caption {i}" for i in range(SAMPLES)]
        columns = {"key": [f"{i:05d}" for i in range(SAMPLES)], "txt": captions}
        write_parquet(
            path, {**{k: pa.array(v) for k, v in columns.items()}, "jpg": pa.array(images(SAMPLES))}
        )
    return path.read_bytes()


CORRUPTIONS: list[tuple[str, Callable[[bytes, np.random.Generator], bytes]]] = [
    ("tar", corrupt),
    ("tar", wrong_headers),
    ("parquet", corrupt),
]


@pytest.mark.parametrize(("kind", "change"), CORRUPTIONS)
def test_a_shard_that_is_corrupt_is_refused_or_each_loss_is_counted(
    tmp_path: Path, kind: str, change: Callable[[bytes, np.random.Generator], bytes]
) -> None:
    """Indexed as it is: refused, named truncated, or samples + skipped is what was written."""
    path = tmp_path / f"a.{kind}"
    whole = write_source(path, kind)
    fates = {"refused": 0, "truncated": 0, "indexed": 0}
    for case in range(400):
        path.write_bytes(change(whole, np.random.default_rng(case)))
        with bounded((kind, change, case)):
            try:
                found = shards.index_shard(
                    LocalStore(tmp_path).info(path.name), SOURCE, None, IndexOptions()
                )
            except DataError as error:
                assert str(path) in str(error), case
                fates["refused"] += 1
                continue
            if found.truncated:
                fates["truncated"] += 1
            elif found.skipped.get("zero-byte-shard") is None:
                # A member that lost its name is counted as what it was, and as what it is now.
                lost = sum(found.skipped.values()) + sum(found.unknown_suffixes.values())
                assert found.shard.samples + lost >= SAMPLES, case
                fates["indexed"] += 1
            read = shards.read_samples(found.shard, SOURCE, None, 0, found.shard.samples)
            assert len(read) == found.shard.samples, case
            assert all(isinstance(sample, Sample | BadSample) for sample in read), case
    assert fates["indexed"] > 20 and fates["refused"] + fates["truncated"] > 20, fates


@pytest.mark.parametrize(("kind", "change"), CORRUPTIONS)
def test_what_rots_after_it_was_indexed_is_void_and_counted(
    tmp_path: Path, kind: str, change: Callable[[bytes, np.random.Generator], bytes]
) -> None:
    """Same size, same time of change: valid + bad is all that the plan asks for, in its place."""
    path = tmp_path / f"a.{kind}"
    whole = write_source(path, kind)
    stamp = path.stat()
    data = DataConfig(sources=(SourceConfig(path=str(path)),), holdout=0)
    manifest = build_manifest(data)
    plan = Plan(
        manifest.train_counts,
        manifest.source.astype(np.int64),
        weights=None,
        seed=0,
        global_batch=SAMPLES,
        slot=SAMPLES,
        window=1,
    )
    layout = Layout(1, SAMPLES, 1, 1)
    tokenizer: Any = Tokenizer.clip()
    reader = BlockReader(plan, layout, manifest, data, tokenizer, 8)
    sound = reader.read(0, 0, 0)
    assert sound["valid"].all()
    void, arrays, memory = 0, Arrays(), set()
    for case in range(200):
        bad = change(whole, np.random.default_rng(case))[: len(whole)].ljust(len(whole), b"\0")
        path.write_bytes(bad)
        os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
        with bounded((kind, change, case)):
            block = reader.read(0, 0, 0, arrays)
        memory.add(block["pixels"].ctypes.data)
        assert not block["pixels"][~block["valid"]].any()  # nor what was there before
        named = [json.loads(line) for line in block["bad"] if line]
        assert int(block["valid"].sum()) + len(named) == SAMPLES, case
        assert all(row["reason"] for row in named)
        assert (block["place"] == sound["place"]).all()
        void += len(named)
    assert void > 100
    assert len(memory) <= 2


@pytest.mark.parametrize("size", [b"-0000001000\0", b"-1\0".rjust(12, b" ")])
def test_a_member_of_negative_size_does_not_turn_the_walk_back(tmp_path: Path, size: bytes) -> None:
    """At -512 bytes a header is followed by itself."""
    path = write_tar(tmp_path / "a.tar", pairs(6))
    whole = path.read_bytes()
    header = bytearray(whole[1024:1536])
    header[124:136] = size
    header[156:157] = b"5"  # a directory: no sample of it is found twice
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    at = whole.index(b"00001.jpg")
    path.write_bytes(whole[:at] + bytes(header) + whole[at + 512 :])
    with bounded(size), pytest.raises(DataError, match="no tar, or damaged: no header"):
        shards.index_shard(LocalStore(tmp_path).info("a.tar"), SOURCE, None, IndexOptions())


def test_keys_that_are_no_utf8_are_spelled_out(tmp_path: Path) -> None:
    keys = pa.Array.from_buffers(
        pa.string(),
        2,
        [None, pa.array([0, 3, 6], pa.int32()).buffers()[1], pa.py_buffer(b"abc\xffde")],
    )
    path = write_parquet(
        tmp_path / "a.parquet",
        {"key": keys, "txt": pa.array(["x", "y"]), "jpg": pa.array(images(2))},
    )
    found = shards.index_shard(LocalStore(tmp_path).info(path.name), SOURCE, None, IndexOptions())
    read = shards.read_samples(found.shard, SOURCE, None, 0, 2)
    assert [sample.key for sample in read] == ["abc", "\\xffde"]
