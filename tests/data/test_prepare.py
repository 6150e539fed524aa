from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import simplejpeg

from clip_ray.config import DataConfig, S3Options, SourceConfig
from clip_ray.data import prepare as prepares
from clip_ray.data.manifest import build_manifest
from clip_ray.data.prepare import Prepared, PrepareOptions, prepare
from clip_ray.data.rewrite import coarse_sources, rewrite, sparse_sources
from clip_ray.data.shards import Sample, read_ordinals
from clip_ray.errors import DataError
from clip_ray.images import decode, with_orientation
from clip_ray.storage import LocalStore, open_store
from tests.data.shard_files import images, jpeg, pairs, write_parquet, write_tar

ROOT = Path(__file__).resolve().parents[2]


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


def test_a_shrunk_picture_keeps_its_orientation(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    plain = simplejpeg.encode_jpeg(np.full((300, 200, 3), 90, np.uint8))
    (tmp_path / "in" / "a.jpg").write_bytes(with_orientation(plain, 6))
    (tmp_path / "in" / "a.txt").write_text("a")
    prepare(tmp_path / "in", tmp_path / "out", PrepareOptions(longest_side=150))
    (sample,) = read_back(tmp_path / "out")
    assert decode(sample.image, 10**6).shape == (150, 100, 3)
    assert decode(sample.image, 10**6, exif_orientation=True).shape == (100, 150, 3)


def test_an_image_that_shrinking_leaves_too_small_is_not_written(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name, width in (("narrow", 10), ("wide", 100)):
        data = simplejpeg.encode_jpeg(np.full((150, width, 3), 90, np.uint8))
        (tmp_path / "in" / f"{name}.jpg").write_bytes(data)
        (tmp_path / "in" / f"{name}.txt").write_text(name)
    done = prepare(tmp_path / "in", tmp_path / "out", PrepareOptions(longest_side=30))
    assert (done.written, done.skipped) == (1, {"too-small": 1})


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


def test_several_captions_of_a_row_are_kept(tmp_path: Path) -> None:
    (tmp_path / "0.jpg").write_bytes(jpeg(0))
    lines = [{"path": "0.jpg", "caption": ["one", " ", "two"]}, {"path": "0.jpg", "caption": []}]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, lines)))
    done = prepare(tmp_path / "t.jsonl", tmp_path / "out")
    assert (done.written, done.skipped) == (1, {"empty-caption": 1})
    (sample,) = read_back(tmp_path / "out")
    assert (sample.caption, sample.others, sample.image) == ("one", ("two",), jpeg(0))


def selection_of(path: Path) -> SourceConfig:
    """Tars of 40 and 41 samples with the same keys, 7 selected; some of them cannot be used."""
    (path / "in").mkdir(parents=True)
    for name, count in (("a", 40), ("b", 41)):
        members = pairs(count)
        members[2 * 5] = ("00005.jpg", b"<html>")
        members[2 * 6 + 1] = ("00006.json", b'{"caption": ["a", "b"]}')
        members[2 * 9 + 1] = ("00009.txt", f"9 of {name}".encode())
        del members[2 * 30 + 1]  # a caption
        write_tar(path / "in" / f"{name}.tar", members)
    chosen = ["00005", "00006", "00009", "00012", "00030", "00033", "00039", "no-such-key"]
    (path / "keys.txt").write_text("\n".join(chosen))
    (path / "never.txt").write_text("00012")
    return SourceConfig(path=str(path / "in"), select=str(path / "keys.txt"))


def rewritten(source: SourceConfig, out: Path) -> Prepared:
    never = str(Path(source.path).parent / "never.txt")
    return rewrite(source, never, out, PrepareOptions(samples_per_shard=3))


def test_shards_are_rewritten_with_a_selection(tmp_path: Path) -> None:
    done = rewritten(selection_of(tmp_path), tmp_path / "out")
    assert done.skipped == {"missing-caption": 2, "not-an-image": 2, "not-selected": 69}
    assert (done.rows, done.written) == (81, 8) and done.rows == done.written + done.skipped.total()
    samples = read_back(tmp_path / "out")
    assert [s.key for s in samples] == 2 * ["00006", "00009", "00033", "00039"]
    assert [(s.caption, s.others) for s in samples[:2]] == [("a", ("b",)), ("9 of a", ())]
    assert [s.image for s in samples] == 2 * [jpeg(i) for i in (6, 9, 33, 39)]
    # Three at most, and none with a key that it has.
    assert [s["samples"] for s in done.shards] == [3, 3, 2]
    assert done.examples["not-an-image"][0] == f"00005 in {tmp_path}/in/a.tar"


def test_shards_with_the_same_keys_are_not_mixed_into_one(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name, count in (("a", 4), ("b", 5)):
        write_tar(tmp_path / "in" / f"{name}.tar", pairs(count))
    done = rewrite(SourceConfig(path=str(tmp_path / "in")), None, tmp_path / "out")
    assert [s["samples"] for s in done.shards] == [4, 5] and done.skipped == {}


def test_an_interrupted_rewriting_goes_on_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = selection_of(tmp_path)
    whole = rewritten(source, tmp_path / "whole")
    plain = LocalStore.write

    def dies(self: LocalStore, name: str, data: bytes) -> None:
        if name == "00001.tar":
            raise OSError(28, "No space left on device")
        plain(self, name, data)

    with monkeypatch.context() as patch:
        patch.setattr(LocalStore, "write", dies)
        with pytest.raises(OSError, match="No space"):
            rewritten(source, tmp_path / "out")
    assert rewritten(source, tmp_path / "out") == whole
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    Path(tmp_path / "keys.txt").write_text("00009")
    with pytest.raises(DataError, match="made from other rows or with other options"):
        rewritten(source, tmp_path / "out")


def test_parquet_becomes_tar_with_its_keys(tmp_path: Path) -> None:
    keys = ["a/b", "c.d", "日本" * 60, ""]
    columns = {
        "key": pa.array(keys),
        "caption": pa.array([["one"], ["two", "zwei"], ["three"], ["four"]]),
        "image": pa.array(images(4)),
    }
    source = SourceConfig(path=str(write_parquet(tmp_path / "x.parquet", columns)))
    rewrite(source, None, tmp_path / "out", PrepareOptions(longest_side=20))
    samples = read_back(tmp_path / "out")
    assert [s.key for s in samples] == ["a/b", "c%2Ed", "日本" * 60, "%"]
    assert [(s.caption, *s.others) for s in samples] == [
        ("one",),
        ("two", "zwei"),
        ("three",),
        ("four",),
    ]
    assert all(max(decode(s.image, 10**6).shape) <= 20 for s in samples)


def test_a_source_of_which_less_than_half_is_taken_is_worth_rewriting(tmp_path: Path) -> None:
    source = selection_of(tmp_path)
    data = DataConfig(sources=(source,), holdout=0.5)
    (line,) = sparse_sources(build_manifest(data))
    assert f"data.sources[0] {source.path}: its lists and conditions leave 12 of 79 samples" in line
    assert "6.6 times their bytes" in line and "jobs/prepare.py --shards" in line
    # What is held out for evaluation is no reason: it is not chosen by a list.
    whole = DataConfig(sources=(SourceConfig(path=source.path),), holdout=0.6)
    assert sparse_sources(build_manifest(whole)) == []


def test_row_groups_that_are_much_larger_than_a_slot_are_worth_rewriting(tmp_path: Path) -> None:
    data = {"jpg": pa.array(images(1) * 1000), "txt": pa.array([str(i) for i in range(1000)])}
    groups, sources = {"whole": 1000, "hundreds": 100, "small": 10}, []
    for name, rows in groups.items():
        (tmp_path / name).mkdir()
        write_parquet(tmp_path / name / "0.parquet", data, rows=rows)
        sources.append(SourceConfig(path=str(tmp_path / name)))
    write_tar(tmp_path / "a.tar", pairs(20))
    sources.append(SourceConfig(path=str(tmp_path / "a.tar")))
    manifest = build_manifest(DataConfig(sources=tuple(sources), holdout=0, copies=True))
    (whole,) = coarse_sources(manifest, 64)
    # 1,000 / 64; of groups of 100: 163 / 64, and 103 / 4 for slots of 4.
    assert whole.startswith(f"data.sources[0] {sources[0].path}: ")
    assert "have 1,000 rows, and are read whole for each slot of 64: 16 times" in whole
    assert "jobs/prepare.py --shards" in whole
    assert [line[: len("data.sources[0]")] for line in coarse_sources(manifest, 4)] == [
        "data.sources[0]",
        "data.sources[1]",
    ]
    assert "26 times" in coarse_sources(manifest, 4)[1]


def scattered(folder: Path) -> Path:
    """A tar with all images first, then the captions; one in order beside it."""
    folder.mkdir()
    members = pairs(12)
    extra = [("00003.jpg", jpeg(50)), ("00003.txt", b"again"), ("00020.jpg", jpeg(20))]
    apart = [*members[::2], ("notes.md", b"x"), *reversed(members[1::2]), *extra]
    write_tar(folder / "a.tar", apart)
    write_tar(folder / "b.tar", [(f"b{name}", data) for name, data in pairs(5)])
    return folder


@pytest.mark.parametrize("per_shard", [4, 100])
def test_a_tar_whose_samples_lie_apart_is_rewritten(tmp_path: Path, per_shard: int) -> None:
    source = scattered(tmp_path / "in")
    options = PrepareOptions(samples_per_shard=per_shard)
    done = rewrite(SourceConfig(path=str(source)), None, tmp_path / "out", options)
    assert done.skipped == {"duplicate-key": 1, "missing-caption": 1}
    assert (done.rows, done.written) == (19, 17)
    samples = read_back(tmp_path / "out")
    assert [s.key for s in samples] == [f"{i:05d}" for i in range(12)] + [
        f"b{i:05d}" for i in range(5)
    ]
    for i, sample in enumerate(samples[:12]):
        assert (sample.caption, sample.image) == (f"caption {i}", jpeg(i))


def test_a_selection_of_samples_that_lie_apart(tmp_path: Path) -> None:
    source = scattered(tmp_path / "in")
    (tmp_path / "keys").write_text("00002\n00007\n00011\nb00001\n00020")
    (tmp_path / "never").write_text("00007")
    done = rewrite(
        SourceConfig(path=str(source), select=str(tmp_path / "keys")),
        str(tmp_path / "never"),
        tmp_path / "out",
        PrepareOptions(samples_per_shard=1),
    )
    assert [s.key for s in read_back(tmp_path / "out")] == ["00002", "00011", "b00001"]
    assert done.rows == done.written + done.skipped.total() == 19
    assert done.skipped["not-selected"] == 14


def test_parquet_is_rewritten_by_conditions_on_its_columns(tmp_path: Path) -> None:
    columns = {
        "jpg": pa.array(images(9)),
        "txt": pa.array([str(i) for i in range(9)]),
        "similarity": pa.array([i / 10 for i in range(9)]),
    }
    write_parquet(tmp_path / "0.parquet", columns)
    command = [ROOT / "jobs/prepare.py", "--shards", "0.parquet", "--out", "few"]
    chosen = ["--where", "similarity >= 0.3", "--where", "similarity < 0.6"]
    done = subprocess.run(
        [sys.executable, *command, *chosen], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "3 of 9 samples written to 1 shards" in done.stdout and "not-selected" in done.stdout
    assert [s.caption for s in read_back(tmp_path / "few")] == ["3", "4", "5"]


def test_the_command_that_an_error_names_mends_the_shard(tmp_path: Path) -> None:
    path = scattered(tmp_path / "my pictures") / "a.tar"
    with pytest.raises(DataError) as caught:
        build_manifest(DataConfig(sources=(SourceConfig(path=str(path)),)))
    assert "the members of sample '00010' do not lie side by side" in str(caught.value)
    command = shlex.split(str(caught.value).partition("rewrite it: python ")[2])
    assert command[0] == "jobs/prepare.py" and command[-2:] == ["--out", "FOLDER"]
    done = subprocess.run(
        [sys.executable, ROOT / command[0], *command[1:]], cwd=tmp_path, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    assert b"12 of 14 samples written to 1 shards" in done.stdout
    assert len(read_back(tmp_path / "FOLDER")) == 12
