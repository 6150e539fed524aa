from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from clip_ray.config import DataConfig, SourceConfig
from clip_ray.data import report as reports
from clip_ray.data.manifest import build_manifest
from clip_ray.data.report import report
from tests.data.shard_files import jpeg, write_tar


class Words:
    """A tokenizer of one token a word."""

    context_length = 6

    def __call__(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        ids = np.zeros((len(texts), self.context_length), np.int32)
        lengths = np.array([len(text.split()) + 2 for text in texts])
        for row, length in enumerate(lengths.clip(max=self.context_length)):
            ids[row, : length - 1] = 1
            ids[row, length - 1] = 9
        return ids, lengths > self.context_length


def data_of(path: Path) -> DataConfig:
    return DataConfig(sources=(SourceConfig(path=str(path)),), holdout=0.0)


def test_a_report_counts_what_it_reads(tmp_path: Path) -> None:
    captions = [b"one", b"two words", b"one", b"a caption of six words exactly", b"caf\xe9", b"$x$"]
    members = [
        member
        for i, caption in enumerate(captions)
        for member in ((f"{i}.jpg", jpeg(i) if i != 1 else b"no image"), (f"{i}.txt", caption))
    ]
    data = data_of(write_tar(tmp_path / "a.tar", [*members, ("x.jpg", jpeg(0))]))
    calls = []
    found = report(build_manifest(data), data, Words(), progress=lambda *now: calls.append(now))
    assert (found.read, found.duplicates, found.invalid_utf8, found.truncated) == (6, 1, 1, 1)
    assert found.bad == {"not-an-image": 1} and calls == [(6, 6)]
    assert found.distributions["caption tokens"] == [3, 4, 3, 6, 3, 3]
    assert found.distributions["caption characters"] == [3, 9, 3, 30, 4, 3]
    assert len(found.distributions["image width"]) == 5
    text = found.as_text()
    assert "skipped 1 x missing-caption" in text and "captions beyond 6 tokens" in text
    assert "16.67 %" in text and "unreadable: not-an-image" in text
    found.figure(tmp_path / "pairs.png")
    assert Image.open(tmp_path / "pairs.png").size == (1200, 1400)


def test_a_limited_report_is_spread_over_all_shards(tmp_path: Path) -> None:
    for shard, count in enumerate((50, 10, 40)):
        members = [
            member
            for i in range(count)
            for member in ((f"{shard}-{i}.jpg", jpeg(i)), (f"{shard}-{i}.txt", b"x"))
        ]
        write_tar(tmp_path / f"{shard}.tar", members)
    data = data_of(tmp_path)
    manifest = build_manifest(data)
    for limit in (1, 9, 30, 99, 100, 1000):
        spread = list(reports._spread(manifest.train_counts, min(limit, 100)))
        places = [(shard, p) for shard, some in spread for p in some.tolist()]
        assert len(places) == len(set(places)) == min(limit, 100)
    found = report(manifest, data, limit=30)
    assert found.read == 30 and found.truncated == 0 and "tokens" not in found.as_text()
    assert len(found.pairs) == 16
    shards = {sample.key.split("-")[0] for sample in found.pairs}
    assert shards == {"0", "1", "2"}
