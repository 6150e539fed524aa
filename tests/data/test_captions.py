"""Captions as the web has them, from a shard to token ids: none is fatal, each is counted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from clip_ray.config import Config
from clip_ray.data.blocks import read_batches
from clip_ray.data.manifest import build_manifest
from clip_ray.storage import LocalStore
from clip_ray.tokenizer import Tokenizer
from clip_ray.train.rundir import prepare
from tests.data.shard_files import Members, jpeg, write_tar

LONG = {  # of a megabyte, and of 100 kB what takes long to clean
    "words": b"a red square. " * 71_429,
    "one-word": b"x" * 1_000_000,
    "broken": b"\xff" * 1_000_000,
    "emoji": "🐈".encode() * 25_000,
    "accents": b"a" + "\u0301".encode() * 50_000,
    "entities": b"&amp;" * 20_000,
}
SHORT = {
    "good": b"two dogs",
    "broken-utf8": b"caf\xe9 at \xff night",
    "nul": b"a\0red\0square",
    "control": b"\x1b[31mred\x1b[0m \x07 \x7f",
    "reversed": "\u202eabc\u202c \ufeff \ud7ff".encode(),
    "huge-number": b"&#" + b"9" * 5000 + b";",
}
EMPTY = {"empty": b"", "blank": b" \t\r\n ", "wide-blank": "\u3000\u2003".encode()}


@pytest.mark.parametrize("vocabulary", ["clip", "trained"])
def test_odd_captions_are_rows_like_others(tmp_path: Path, vocabulary: str) -> None:
    members: Members = []
    for number, (key, caption) in enumerate({**LONG, **SHORT, **EMPTY}.items()):
        members += [(f"{key}.jpg", jpeg(number)), (f"{key}.txt", caption)]
    write_tar(tmp_path / "a.tar", members)
    samples = len(LONG) + len(SHORT)
    settings = {
        "data": {"sources": [{"path": str(tmp_path / "a.tar")}], "holdout": 0.0},
        "tokenizer": {"train_vocab": 600} if vocabulary == "trained" else {},
        "model": {"name": "ViT-micro-8-32"},
        "train": {"passes": 1, "global_batch": samples},
    }
    config = Config.model_validate(settings)
    run = prepare(
        LocalStore(tmp_path / "run"), config, lambda: build_manifest(config.data), lambda line: None
    )
    assert run.manifest.total == samples
    assert dict(run.manifest.skipped) == {"empty-caption": len(EMPTY)}
    assert sum(run.manifest.invalid_utf8) == 2  # "broken" and "broken-utf8"

    (batch,) = read_batches(run.reader(1), 0, 0, 1)
    assert batch.valid.all() and batch.bad == () and len(batch.ids) == samples
    ids, ends = batch.ids.numpy(), Tokenizer.load(run.tokenizer.to_bytes()).end_id
    assert ids.min() >= 0 and ids.max() < run.tokenizer.vocab_size
    assert (np.count_nonzero(ids == ends, axis=1) == 1).all()
    assert batch.truncated == len(LONG) == np.count_nonzero((ids != 0).all(axis=1))
