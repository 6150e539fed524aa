from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import simplejpeg

from clip_ray.config import DataConfig, S3Options, SourceConfig
from clip_ray.data import prepare as prepares
from clip_ray.data.manifest import build_manifest
from clip_ray.data.prepare import PrepareOptions, prepare
from clip_ray.data.shards import Sample, read_ordinals
from clip_ray.errors import DataError
from clip_ray.images import decode
from clip_ray.storage import LocalStore, open_store
from tests.data.shard_files import jpeg


def read_back(out: Path | str, s3: S3Options | None = None) -> list[Sample]:
    data = DataConfig(sources=(SourceConfig(path=str(out)),), holdout=0, s3=s3 or S3Options())
    manifest = build_manifest(data)
    assert manifest.skipped == {}
    found: list[Sample] = []
    for number in range(len(manifest)):
        ordinals = np.arange(manifest.samples[number])
        found += read_ordinals(manifest.shard(number), data.sources[0], s3, ordinals)  # type: ignore[arg-type]
    assert all(isinstance(sample, Sample) for sample in found)
    return found


def folder_of(path: Path, count: int) -> Path:
    (path / "sub.dir").mkdir(parents=True)
    for i in range(count):
        stem = path / ("sub.dir" if i % 2 else "") / f"pic.{i:03d}"
        Path(f"{stem}.{'JPG' if i % 3 else 'jpg'}").write_bytes(jpeg(i))
        Path(f"{stem}.txt").write_text(f"caption {i}")
    return path


def test_a_folder_becomes_shards_that_read_back(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "in", 25)
    calls = []
    done = prepare(
        source,
        tmp_path / "out",
        PrepareOptions(samples_per_shard=10),
        progress=lambda *now: calls.append(now),
    )
    assert (done.rows, done.written, dict(done.skipped)) == (25, 25, {})
    assert [s["samples"] for s in done.shards] == [10, 10, 5] and calls[-1] == (25, 25)
    samples = read_back(tmp_path / "out")
    assert {(s.caption, s.image) for s in samples} == {(f"caption {i}", jpeg(i)) for i in range(25)}
    assert len({s.key for s in samples}) == 25


def test_every_row_is_written_or_counted(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "in", 6)
    (source / "pic.000.txt").unlink()
    (source / "pic.002.txt").write_text(" \n")
    (source / "pic.004.jpg").unlink(missing_ok=True)
    (source / "pic.004.JPG").unlink(missing_ok=True)
    broken = next(source.glob("sub.dir/pic.001.[jJ]*"))
    broken.write_bytes(jpeg(1)[:-20])
    next(source.glob("sub.dir/pic.003.[jJ]*")).write_bytes(b"<html>")
    done = prepare(source, tmp_path / "out")
    assert done.skipped == {
        "empty-caption": 1,
        "missing-caption": 1,
        "missing-image": 1,
        "not-an-image": 1,
        "truncated": 1,
    }
    assert done.written == 1 and done.rows == done.written + sum(done.skipped.values())
    assert done.examples["truncated"] == [str(broken)]
    assert "1 skipped: truncated, such as" in done.as_text()


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_tables_of_paths(tmp_path: Path, kind: str) -> None:
    for i in range(4):
        (tmp_path / f"{i}.jpg").write_bytes(jpeg(i))
    paths = ["0.jpg", str(tmp_path / "1.jpg"), "2.jpg", "gone.jpg"]
    titles = ["zero, with comma", "one", "", "three"]
    table = tmp_path / f"list.{kind}"
    if kind == "parquet":
        pq.write_table(pa.table({"filepath": paths, "title": titles, "n": [1, 2, 3, 4]}), table)
    elif kind == "jsonl":
        rows = [json.dumps({"file_name": p, "text": t}) for p, t in zip(paths, titles, strict=True)]
        table.write_text("\n".join(rows) + "\n")
    else:
        sep = "," if kind == "csv" else "\t"
        quoted = [f'"{t}"' for t in titles]
        rows = [f"{p}{sep}{t}" for p, t in zip(paths, quoted, strict=True)]
        table.write_text("\ufeff" + "\n".join([f"image{sep}caption", *rows]))
    done = prepare(table, tmp_path / "out")
    assert done.skipped == {"empty-caption": 1, "missing-file": 1}
    assert [(s.caption, s.image) for s in read_back(tmp_path / "out")] == [
        ("zero, with comma", jpeg(0)),
        ("one", jpeg(1)),
    ]


def test_larger_images_are_shrunk_and_smaller_ones_kept(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    big = simplejpeg.encode_jpeg(np.full((300, 200, 3), 90, np.uint8))
    for name, data in (("big", big), ("small", jpeg(1))):
        (tmp_path / "in" / f"{name}.jpg").write_bytes(data)
        (tmp_path / "in" / f"{name}.txt").write_text(name)
    prepare(tmp_path / "in", tmp_path / "out", PrepareOptions(longest_side=150))
    found = {sample.caption: sample.image for sample in read_back(tmp_path / "out")}
    assert decode(found["big"], 10**6).shape == (150, 100, 3)
    assert abs(int(decode(found["big"], 10**6).mean()) - 90) <= 1
    assert found["small"] == jpeg(1)


def test_an_interrupted_run_goes_on_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = folder_of(tmp_path / "in", 23)
    next(source.glob("pic.012.*[gG]")).write_bytes(b"broken")
    options = PrepareOptions(samples_per_shard=5)
    whole = prepare(source, tmp_path / "whole", options)
    plain = LocalStore.write
    written: list[str] = []

    def dies(self: LocalStore, name: str, data: bytes) -> None:
        if len(written) == 5:
            raise OSError(28, "No space left on device")
        written.append(name)
        plain(self, name, data)

    with monkeypatch.context() as patch:
        patch.setattr(LocalStore, "write", dies)
        with pytest.raises(OSError, match="No space"):
            prepare(source, tmp_path / "out", options)
    assert written == ["00000.tar", "prepare.json", "00001.tar", "prepare.json", "00002.tar"]
    before = (tmp_path / "out" / "00000.tar").stat().st_mtime_ns
    assert prepare(source, tmp_path / "out", options) == whole
    assert (tmp_path / "out" / "00000.tar").stat().st_mtime_ns == before
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    assert prepare(source, tmp_path / "out", options) == whole  # finished: nothing to do


def test_bytes_end_a_shard_too(tmp_path: Path) -> None:
    done = prepare(
        folder_of(tmp_path / "in", 8), tmp_path / "out", PrepareOptions(bytes_per_shard=1)
    )
    assert [s["samples"] for s in done.shards] == [1] * 8


def test_what_cannot_be_prepared_says_why(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "in", 2)
    with pytest.raises(DataError, match="nothing to pack; expected a folder of images"):
        prepare(tmp_path / "nowhere", tmp_path / "out")
    table = tmp_path / "t.csv"
    table.write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match="no image column: .* it has a, b; name it with --image"):
        prepare(table, tmp_path / "out")
    with pytest.raises(DataError, match="the table does not exist"):
        prepare(tmp_path / "none.csv", tmp_path / "out")
    (tmp_path / "t.jsonl").write_text("{broken\n")
    with pytest.raises(DataError, match="no jsonl table"):
        prepare(tmp_path / "t.jsonl", tmp_path / "out")
    table.write_text("path,caption\nx.jpg,words\n")
    with pytest.raises(DataError, match="(?s)none of 1 rows can be used.*missing-file"):
        prepare(table, tmp_path / "out")
    prepare(source, tmp_path / "used")
    with pytest.raises(DataError, match="made from other rows or with other options"):
        prepare(source, tmp_path / "used", PrepareOptions(longest_side=9))
    with pytest.raises(DataError, match=f"holds files but no {prepares.LOG}"):
        prepare(source, source)


def test_from_s3_to_s3(tmp_path: Path, s3: S3Options) -> None:
    source = folder_of(tmp_path / "in", 7)
    store = open_store("s3://bucket/pictures", s3)
    for path in source.rglob("*.*"):
        if path.is_file():
            store.write(str(path.relative_to(source)), path.read_bytes())
    done = prepare(
        "s3://bucket/pictures/", "s3://bucket/made", PrepareOptions(samples_per_shard=4), s3
    )
    assert done.written == 7
    assert len(read_back("s3://bucket/made/", s3)) == 7
