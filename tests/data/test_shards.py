from __future__ import annotations

import contextlib
import io
import json
import os
import tarfile
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clip_ray.config import S3Options, SourceConfig
from clip_ray.data import shards
from clip_ray.data import tar as tars
from clip_ray.data.samples import Suffixes
from clip_ray.data.shards import STRIDE, BadSample, IndexOptions, Sample, Shard, ShardIndex
from clip_ray.data.tar import Stream, scan_tar
from clip_ray.errors import DataError
from clip_ray.storage import FileInfo, LocalStore, expand, open_store
from tests.data.shard_files import cut, images, jpeg, pairs, write_parquet, write_tar

SOURCE = SourceConfig(path="unused")


def info(path: Path) -> FileInfo:
    return LocalStore(path.parent).info(path.name)


def index(
    path: Path, source: SourceConfig = SOURCE, options: IndexOptions | None = None
) -> ShardIndex:
    return shards.index_shard(info(path), source, None, options or IndexOptions())


def read_all(shard: Shard, source: SourceConfig = SOURCE) -> list[Sample]:
    found = shards.read_samples(shard, source, None, 0, shard.samples)
    assert all(isinstance(sample, Sample) for sample in found), found
    return found  # type: ignore[return-value]


def keys(shard: Shard, source: SourceConfig = SOURCE) -> list[str]:
    return [sample.key for sample in read_all(shard, source)]


def naive(path: Path) -> list[tuple[str, bytes, str]]:
    """The second, dumber implementation: tarfile and a dict."""
    found: dict[str, dict[str, bytes]] = {}
    with tarfile.open(path) as tar:
        for member in tar:
            if member.isfile():
                stem, _, suffix = member.name.rpartition(".")
                found.setdefault(stem, {})[suffix] = tar.extractfile(member).read()
    return [
        (key, parts["jpg"], parts["txt"].decode())
        for key, parts in found.items()
        if {"jpg", "txt"} <= parts.keys()
    ]


def test_counts_and_offsets(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", pairs(20))
    found = index(path)
    shard = found.shard
    assert (shard.samples, shard.kind, shard.size) == (20, "tar", path.stat().st_size)
    assert found.skipped == {} and found.truncated == "" and len(found.held) == 0
    with tarfile.open(path) as tar:
        expected = [tar.getmember(f"{i:05d}.jpg").offset for i in range(0, 20, STRIDE)]
        last = tar.getmember("00019.txt")
    assert shard.offsets.tolist() == [*expected, last.offset_data + last.size]


@settings(
    deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_ordinals_equal_a_naive_read(tmp_path: Path, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 40))
    members = pairs(count)
    # Some captions and images are missing, some strangers lie between.
    lost = data.draw(st.sets(st.integers(0, 2 * count - 1), max_size=6))
    members = [m for i, m in enumerate(members) if i not in lost]
    for at in data.draw(st.lists(st.integers(0, len(members)), max_size=4)):
        members.insert(at, (f"x{at}.npy", bytes(at)))
    path = write_tar(tmp_path / "a.tar", members)
    expected = naive(path)
    with pytest.MonkeyPatch.context() as patch:
        # 8: in manifests of earlier versions.
        patch.setattr("clip_ray.data.tar.STRIDE", data.draw(st.sampled_from([8, STRIDE])))
        shard = index(path).shard
    assert shard.samples == len(expected)
    if expected:
        ordinals = data.draw(st.lists(st.integers(0, len(expected) - 1), unique=True))
        found = shards.read_ordinals(shard, SOURCE, None, np.array(ordinals, np.int64))
        assert [(s.key, s.image, s.caption) for s in found] == [expected[i] for i in ordinals]
        first = data.draw(st.integers(0, len(expected) - 1))
        span = data.draw(st.integers(0, len(expected) - first))
        found = shards.read_samples(shard, SOURCE, None, first, span)
        assert [s.key for s in found] == [e[0] for e in expected[first : first + span]]


def test_neighbouring_reads_are_one_range(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = index(write_tar(tmp_path / "a.tar", pairs(64))).shard
    reads = []
    plain = LocalStore.read

    def counted(self: LocalStore, name: str, *which: Any) -> bytes:
        reads.append(which)
        return plain(self, name, *which)

    monkeypatch.setattr(LocalStore, "read", counted)
    shards.read_samples(shard, SOURCE, None, 5, 30)
    assert len(reads) == 1
    reads.clear()
    shards.read_ordinals(shard, SOURCE, None, np.array([1, 2, 50, 51]))
    assert len(reads) == 2


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names(tmp_path: Path, format: int) -> None:
    # USTAR's prefix, GNU's long names and pax headers, at every stride.
    folder = "/".join(["a-rather-long-folder"] * 6)
    names = [f"{folder}/{i:04d}" for i in range(20)]
    if format != tarfile.USTAR_FORMAT:
        names += [f"日本/{'x' * 120}{i}" for i in range(10)]
    members = [
        (f"{n}.{s}", d) for i, n in enumerate(names) for s, d in (("jpg", jpeg(i)), ("txt", b"c"))
    ]
    shard = index(write_tar(tmp_path / "a.tar", members, format)).shard
    assert keys(shard) == names
    for i in (0, 8, 13, 19):
        (sample,) = shards.read_ordinals(shard, SOURCE, None, np.array([i]))
        assert (sample.key, sample.image) == (names[i], jpeg(i))


@pytest.mark.parametrize("fill", [0x00, 0x41, 0xFF])
def test_a_header_whose_sum_is_off_by_one_is_none(fill: int) -> None:
    header = bytearray([fill]) * tars.BLOCK
    header[124:136] = b"00000001750\0"
    header[148:156] = b" " * 8  # as the sum is defined
    for error in (-1, 1):
        wrong = b"%07o\0" % (sum(header) + error)
        with pytest.raises(tars.DamageError, match="no header at byte 7"):
            tars._check(bytes(header[:148] + wrong + header[156:]), 7)
    right = b"%07o\0" % sum(header)
    assert tars._check(bytes(header[:148] + right + header[156:]), 7)[1] == 1000


def test_a_global_pax_header_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "x"}) as tar:
        for name, data in pairs(3):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    assert keys(index(path).shard) == ["00000", "00001", "00002"]


def test_names_follow_webdataset(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    write_tar(
        path,
        [
            ("v1.0/a.b/000.txt", b"dots in folders"),  # caption before image
            ("v1.0/a.b/000.seg.png", b"another suffix"),
            ("v1.0/a.b/000.JPG", jpeg(0)),
            ("._000.jpg", b"macOS litter"),
            ("README", b"no suffix"),
            ("001.JPEG", jpeg(1)),
            ("001.TXT", b"upper case"),
        ],
    )
    with tarfile.open(path, "a") as tar:
        folder = tarfile.TarInfo("002.jpg")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    found = index(path)
    assert keys(found.shard) == ["v1.0/a.b/000", "001"]
    assert found.skipped == {}
    assert found.unknown_suffixes == {"seg.png": 1, "_000.jpg": 1, "": 1}


def test_what_is_no_valid_sample_is_counted_by_reason(tmp_path: Path) -> None:
    members = [
        *pairs(1),
        ("a.jpg", jpeg(1)),
        ("b.txt", b"no image"),
        ("c.jpg", b""),
        ("c.txt", b"empty image"),
        ("d.jpg", jpeg(2)),
        ("d.txt", b" \n"),
        ("e.jpg", jpeg(3)),
        ("e.json", b"{not json"),
        ("f.jpg", jpeg(4)),
        ("f.json", json.dumps({"caption": None, "url": "x"}).encode()),
        ("g.jpg", jpeg(5)),
        ("g.txt", b"fine"),
    ]
    found = index(write_tar(tmp_path / "a.tar", members))
    assert keys(found.shard) == ["00000", "g"]
    assert found.skipped == {
        "bad-json": 1,
        "empty-caption": 1,
        "empty-image": 1,
        "missing-caption": 2,
        "missing-image": 1,
    }


def test_invalid_utf8_is_replaced_flagged_and_counted(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [*pairs(1), ("a.jpg", jpeg(1)), ("a.txt", b"caf\xe9 x")])
    found = index(path)
    assert found.invalid_utf8 == 1
    samples = read_all(found.shard)
    assert [s.replaced_utf8 for s in samples] == [False, True]
    assert samples[1].caption == "caf\ufffd x"


def test_captions_from_json_and_named_members(tmp_path: Path) -> None:
    document = json.dumps({"caption": "from json", "alt": ["first", "", "second"]}).encode()
    members = [("a.jpg", jpeg(0)), ("a.png", b"depth"), ("a.json", document), ("a.cap", b"named")]
    path = write_tar(tmp_path / "a.tar", members)
    for caption, expected, others in (
        (None, "from json", ()),
        ("json", "from json", ()),
        ("json:alt", "first", ("second",)),
        (".CAP", "named", ()),
    ):
        source = SourceConfig(path="unused", caption=caption)
        (sample,) = read_all(index(path, source).shard, source)
        assert (sample.caption, sample.others, sample.image) == (expected, others, jpeg(0))
    source = SourceConfig(path="unused", image="png")
    assert read_all(index(path, source).shard, source)[0].image == b"depth"


def test_img2dataset_tar_prefers_txt_over_json(tmp_path: Path) -> None:
    members = [
        member
        for i in range(10)
        for member in (
            (f"{i:09d}.jpg", jpeg(i)),
            (f"{i:09d}.json", json.dumps({"caption": "json", "status": "success"}).encode()),
            (f"{i:09d}.txt", f"text {i}".encode()),
        )
    ]
    samples = read_all(index(write_tar(tmp_path / "00000.tar", members)).shard)
    assert [s.caption for s in samples] == [f"text {i}" for i in range(10)]


@pytest.mark.parametrize(
    ("suffix", "shift", "whole", "where"),
    [
        # Sample 8 could go on where the cut is: it is whole only when the next one begins.
        ("jpg", 100, 8, "in a header"),
        ("txt", 100, 9, "in a header"),
        ("jpg", 512 + 50, 8, "in a member"),
        ("txt", 512 + 4, 9, "in a member"),
        ("txt", 512 + 100, 9, "in padding"),
        ("jpg", 0, 9, "without an end mark"),
    ],
)
def test_a_truncated_tar_tells_where(
    tmp_path: Path, suffix: str, shift: int, whole: int, where: str
) -> None:
    path = write_tar(tmp_path / "a.tar", pairs(12))
    with tarfile.open(path) as tar:
        member = tar.getmember(f"00009.{suffix}")
    found = index(cut(path, member.offset + shift))
    least = whole if where == "without an end mark" else whole + 1
    assert found.truncated.startswith(
        f"truncated after sample {whole} of at least {least} ({where}"
    )
    assert keys(found.shard) == [f"{i:05d}" for i in range(whole)]


def test_zero_bytes_and_empty_tars_are_counted(tmp_path: Path) -> None:
    (tmp_path / "zero.tar").touch()
    (tmp_path / "zero.parquet").touch()
    write_tar(tmp_path / "empty.tar", [])
    assert index(tmp_path / "zero.tar").skipped == {"zero-byte-shard": 1}
    assert index(tmp_path / "zero.parquet").skipped == {"zero-byte-shard": 1}
    empty = index(tmp_path / "empty.tar")
    assert empty.skipped == {"empty-shard": 1} and empty.truncated == ""
    assert empty.shard.samples == 0
    assert shards.read_samples(empty.shard, SOURCE, None, 0, 0) == []


def test_members_apart_are_refused(tmp_path: Path) -> None:
    members = [m for s in ("jpg", "txt") for m in pairs(3) if m[0].endswith(s)]
    with pytest.raises(DataError, match=r"'00000' do not lie side by side.*jobs/prepare.py"):
        index(write_tar(tmp_path / "a.tar", members))


def test_no_tar_and_a_compressed_tar_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(b"<html>" * 500)
    with pytest.raises(DataError, match="no tar, or damaged: no header at byte 0; re-copy it"):
        index(path)
    with tarfile.open(path, "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("x"))
    path.write_bytes(path.read_bytes() + bytes(1000))
    with pytest.raises(DataError, match="gunzip it"):
        index(path)


def test_concatenated_tars_are_refused(tmp_path: Path) -> None:
    # tarfile and webdataset read the first one and say nothing.
    both = write_tar(tmp_path / "a.tar", pairs(2)).read_bytes() * 2
    (tmp_path / "a.tar").write_bytes(both)
    with pytest.raises(DataError, match="data follow the end mark"):
        index(tmp_path / "a.tar")


def test_a_changed_shard_is_void_as_a_whole(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", pairs(5))
    shard = index(path).shard
    os.utime(path, ns=(1, 1))
    found = shards.read_samples(shard, SOURCE, None, 1, 3)
    assert [(b.key, b.reason, b.shard) for b in found] == [
        (f"#{i}", "shard-changed", str(path)) for i in (1, 2, 3)
    ]
    path.unlink()
    (bad,) = shards.read_ordinals(shard, SOURCE, None, np.array([4]))
    assert isinstance(bad, BadSample) and (bad.key, bad.reason) == ("#4", "shard-missing")


def test_rotten_bytes_under_the_same_version_are_void(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", pairs(16))
    shard = index(path).shard
    before = path.stat().st_mtime_ns
    with open(path, "r+b") as file:
        file.seek(int(shard.offsets[8 // STRIDE]))
        file.write(b"rotten" * 20)
    os.utime(path, ns=(before, before))
    found = shards.read_samples(shard, SOURCE, None, 0, 16)
    # Sample 7 may have had more members where the rot begins.
    assert [type(s) for s in found[:7]] == [Sample] * 7
    assert {b.reason for b in found[7:]} == {"shard-damaged"}


def test_io_errors_are_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = index(write_tar(tmp_path / "a.tar", pairs(3))).shard

    def fail(*_: object, **__: object) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(LocalStore, "read", fail)
    with pytest.raises(OSError, match="Input/output error"):
        shards.read_samples(shard, SOURCE, None, 0, 3)


def test_held_out_excluded_and_selected(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", pairs(200))
    elsewhere = write_tar(tmp_path / "b.tar", pairs(200))
    some = frozenset(f"{i:05d}" for i in range(50))
    plain = index(path, options=IndexOptions(holdout=0.2))
    assert 20 < len(plain.holdout) < 60
    assert (plain.held == plain.holdout).all()
    assert (index(elsewhere, options=IndexOptions(holdout=0.2)).holdout == plain.holdout).all()
    without = index(path, options=IndexOptions(0.2, exclude=some))
    assert set(without.held) == set(range(50)) | set(plain.holdout.tolist())
    assert set(without.holdout) == set(plain.holdout.tolist()) - set(range(50))
    only = index(path, options=IndexOptions(0.2, select=some))
    assert set(range(200)) - set(only.held.tolist()) == set(range(50)) - set(plain.holdout.tolist())
    assert set(only.holdout) == set(plain.holdout.tolist()) & set(range(50))


# Parquet


def test_img2dataset_parquet_leaves_failed_downloads_out(tmp_path: Path) -> None:
    pictures: list[bytes | None] = list(images(10))
    pictures[2] = pictures[3] = pictures[9] = None
    path = write_parquet(
        tmp_path / "00000.parquet",
        {
            "key": pa.array([f"{i:09d}" for i in range(10)]),
            "jpg": pa.array(pictures, pa.binary()),
            "caption": pa.array([f"caption {i}" for i in range(10)]),
            "status": pa.array(["success"] * 10),
        },
    )
    found = index(path)
    shard = found.shard
    assert found.skipped == {"missing-image": 3} and shard.rows_skipped.tolist() == [2, 3, 9]
    assert shard.offsets.tolist() == [0, 4, 8, 10] and shard.kind == "parquet"
    rows = [0, 1, 4, 5, 6, 7, 8]
    samples = read_all(shard)
    assert [(s.key, s.image, s.caption) for s in samples] == [
        (f"{i:09d}", jpeg(i), f"caption {i}") for i in rows
    ]
    picked = shards.read_ordinals(shard, SOURCE, None, np.array([6, 1, 3]))
    assert [s.key for s in picked] == ["000000008", "000000001", "000000005"]


def test_parquet_reads_only_the_row_groups_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_parquet(
        tmp_path / "a.parquet", {"jpg": pa.array(images(40)), "txt": pa.array(["x"] * 40)}
    )
    shard = index(path).shard
    groups = []
    plain = pq.ParquetFile.read_row_group

    def counted(self: pq.ParquetFile, group: int, **options: object) -> pa.Table:
        groups.append(group)
        return plain(self, group, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    shards.read_ordinals(shard, SOURCE, None, np.array([1, 2, 39]))
    assert groups == [0, 9]


SCORED: dict[str, Any] = {
    "similarity": pa.array([0.1, 0.3, None, float("nan"), 0.5, 0.9] * 2, pa.float32()),
    "width": pa.array([100, 300] * 6, pa.uint16()),
    "nsfw": pa.array(["UNLIKELY", "NSFW", "UNLIKELY"] * 4).dictionary_encode(),
    "license type": pa.array(["5", "cc"] * 6, pa.large_string()),
    "upright": pa.array([True, False, None] * 4),
    "hash": pa.array([2**64 - 1, 5] * 6, pa.uint64()),
    "price": pa.array([Decimal("0.30"), Decimal("12.5")] * 6, pa.decimal128(38, 20)),
    "half": pa.array(np.array([0.2, 0.4] * 6, np.float16)),
}


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        (["similarity >= 0.29"], [1, 4, 5, 7, 10, 11]),
        (["similarity<0.5"], [0, 1, 6, 7]),
        (["similarity != 0.5"], [0, 1, 3, 5, 6, 7, 9, 11]),  # NaN is not 0.5; null is nothing
        (["similarity > 0.2", "width > 255"], [1, 5, 7, 11]),
        (["nsfw == UNLIKELY", "width <= 100"], [0, 2, 6, 8]),
        (['license type == "5"'], [0, 2, 4, 6, 8, 10]),
        (["license type == cc", "upright == true"], [3, 9]),
        (["similarity <= 0.3"], [0, 1, 6, 7]),  # as float32, which 0.3 is not as a double
        (["similarity == .5"], [4, 10]),
        ([f"hash != {2**64 - 1}"], [1, 3, 5, 7, 9, 11]),
        (["hash > 0", "width < 100000", "width > -1"], list(range(12))),
        (["price >= 3"], [1, 3, 5, 7, 9, 11]),
        (["half <= 0.2"], [0, 2, 4, 6, 8, 10]),
        (['nsfw != "a > b"', "width >= 99.5"], list(range(12))),
        ([], list(range(12))),
    ],
)
def test_conditions_on_columns_choose_the_samples_of_parquet(
    tmp_path: Path, where: list[str], expected: list[int]
) -> None:
    pictures: list[bytes | None] = [*images(12)]
    columns = {"jpg": pa.array(pictures), "txt": pa.array([f"{i}" for i in range(12)]), **SCORED}
    path = write_parquet(tmp_path / "0.parquet", columns, rows=5)
    source = SourceConfig(path=str(path), where=tuple(where))
    found = index(path, source)
    assert found.shard.samples == 12 and not len(found.holdout)
    assert set(range(12)) - set(found.held.tolist()) == set(expected)
    # By ordinals of valid samples, whatever rows are left out; with keys and the hold-out.
    pictures[0] = None
    columns["jpg"] = pa.array(pictures)
    path = write_parquet(tmp_path / "1.parquet", columns, rows=5)
    names = [sample.key for sample in read_all(index(path, source).shard, source)]
    some = frozenset(names[:7])
    both = index(path, source, IndexOptions(0.5, select=some))
    kept = set(names) - {names[at] for at in set(both.held) - set(both.holdout)}
    assert kept == some & {names[row - 1] for row in expected if row}


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("clip_score > 1", "looked for 'clip_score'; it has jpg, txt, similarity, width"),
        ("width == wide", "column 'width' is uint16, and cannot be compared with \"wide\" "),
        ("nsfw < 3", "column 'nsfw' is string, and cannot be compared with 3 .*\"5\" in quotes"),
        ("upright == 1", "column 'upright' is bool, .* true and false"),
        ("twice > 1", "2 columns are 'twice'"),
    ],
)
def test_a_condition_that_cannot_be_told_names_the_column(
    tmp_path: Path, where: str, message: str
) -> None:
    columns = {"jpg": pa.array(images(12)), "txt": pa.array(["a"] * 12), **SCORED}
    table = pa.table(columns).append_column("twice", [[1] * 12]).append_column("twice", [[2] * 12])
    path = tmp_path / "0.parquet"
    pq.write_table(table, path)
    with pytest.raises(DataError, match=f"shard .*0.parquet: .*{message}"):
        index(path, SourceConfig(path=str(path), where=(where,)))


def test_a_tar_has_no_columns_for_conditions(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", pairs(2))
    with pytest.raises(DataError, match=r"a.tar: a tar has no columns for .*where.* select"):
        index(path, SourceConfig(path=str(path), where=("width > 1",)))


def test_parquet_structs_lists_dictionaries_and_rotten_text(tmp_path: Path) -> None:
    struct = pa.array([{"bytes": jpeg(0), "path": "a"}, {"bytes": None, "path": "b"}, None])
    rotten = pa.array([b"caf\xe9", b"x", b"y"]).cast(pa.binary()).view(pa.string())
    path = write_parquet(tmp_path / "a.parquet", {"image": struct, "text": rotten})
    found = index(path)
    assert found.skipped == {"missing-image": 2} and found.invalid_utf8 == 1
    (sample,) = read_all(found.shard)
    assert (sample.key, sample.image, sample.caption) == ("a/0", jpeg(0), "caf\ufffd")
    assert sample.replaced_utf8
    listed = {
        "jpg": pa.array(images(3)),
        "caption": pa.array([["one", "two"], [], None], pa.list_(pa.string())),
    }
    found = index(write_parquet(tmp_path / "b.parquet", listed))
    assert found.skipped == {"empty-caption": 1, "missing-caption": 1}
    (sample,) = read_all(found.shard)
    assert (sample.caption, sample.others) == ("one", ("two",))
    coded = {"jpg": pa.array(images(2)), "txt": pa.array(["x", "x"]).dictionary_encode()}
    assert [s.caption for s in read_all(index(write_parquet(path, coded)).shard)] == ["x", "x"]


def test_an_empty_image_in_parquet_shows_when_read(tmp_path: Path) -> None:
    columns = {"jpg": pa.array([jpeg(0), b""]), "txt": pa.array(["a", "b"])}
    found = index(write_parquet(tmp_path / "a.parquet", columns))
    good, bad = shards.read_samples(found.shard, SOURCE, None, 0, 2)
    assert isinstance(good, Sample)
    assert isinstance(bad, BadSample) and (bad.key, bad.reason) == ("a/1", "empty-image")


def test_unknown_and_unfit_columns_list_what_there_is(tmp_path: Path) -> None:
    path = write_parquet(
        tmp_path / "a.parquet", {"jpg": pa.array([1, 2]), "words": pa.array(["a", "b"])}
    )
    with pytest.raises(DataError, match="no caption column: .*txt, caption, text; it has jpg, wor"):
        index(path)
    with pytest.raises(DataError, match="looked for 'nope'; it has jpg, words"):
        index(path, SourceConfig(path="unused", image="nope"))
    with pytest.raises(DataError, match="'jpg' is int64, expected the bytes"):
        index(path, SourceConfig(path="unused", caption="words"))


def test_a_truncated_parquet_is_refused_and_io_errors_are_not_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    columns = {"jpg": pa.array(images(8)), "txt": pa.array(["x"] * 8)}
    path = write_parquet(tmp_path / "a.parquet", columns)
    shard = index(path).shard

    def fail(*_: object, **__: object) -> bytes:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(LocalStore, "read", fail)
        with pytest.raises(OSError, match="Input/output error"):
            shards.read_samples(shard, SOURCE, None, 0, 3)
    before = path.stat()
    with open(path, "r+b") as file:
        file.seek(200)
        file.write(os.urandom(3000))
    os.utime(path, ns=(before.st_mtime_ns, before.st_mtime_ns))
    found = shards.read_samples(shard, SOURCE, None, 0, 8)
    assert any(isinstance(s, BadSample) and s.reason == "shard-damaged" for s in found)
    with pytest.raises(DataError, match="no Parquet file, or truncated"):
        index(cut(path, 2000))


# S3


def test_s3_reads_equal_local_ones(tmp_path: Path, s3: S3Options) -> None:
    tar = write_tar(tmp_path / "a.tar", [*pairs(40), ("x.jpg", b"no caption")])
    table = {"jpg": pa.array([*images(9), None]), "txt": pa.array(["x"] * 10)}
    parquet = write_parquet(tmp_path / "b.parquet", table)
    store = open_store("s3://bucket/same", s3)
    for path in (tar, parquet):
        store.write(path.name, path.read_bytes())
    remote = expand("s3://bucket/same/", s3)
    for file, path in zip(remote, (tar, parquet), strict=True):
        here, there = index(path), shards.index_shard(file, SOURCE, s3, IndexOptions())
        assert there.skipped == here.skipped
        assert (there.shard.offsets == here.shard.offsets).all()
        picked = np.array([7, 0, 8, here.shard.samples - 1])
        assert shards.read_ordinals(there.shard, SOURCE, s3, picked) == shards.read_ordinals(
            here.shard, SOURCE, None, picked
        )
        assert shards.read_samples(there.shard, SOURCE, s3, 2, 6) == read_all(here.shard)[2:8]


def test_a_changed_or_deleted_s3_shard_is_void(tmp_path: Path, s3: S3Options) -> None:
    store = open_store("s3://bucket/change", s3)
    store.write("a.tar", write_tar(tmp_path / "a.tar", pairs(3)).read_bytes())
    (file,) = expand("s3://bucket/change/a.tar", s3)
    shard = shards.index_shard(file, SOURCE, s3, IndexOptions()).shard
    changed = bytearray(store.read("a.tar"))
    changed[520] ^= 1
    store.write("a.tar", bytes(changed))
    reasons = {b.reason for b in shards.read_samples(shard, SOURCE, s3, 0, 3)}
    assert reasons == {"shard-changed"}
    store.delete("a.tar")
    reasons = {b.reason for b in shards.read_samples(shard, SOURCE, s3, 0, 3)}
    assert reasons == {"shard-missing"}


def test_parquet_of_which_the_footer_is_known_is_void_too_when_it_changes(
    tmp_path: Path, s3: S3Options
) -> None:
    columns = {"jpg": pa.array(images(8)), "txt": pa.array(["x"] * 8)}
    path = write_parquet(tmp_path / "a.parquet", columns)
    store = open_store("s3://bucket/change", s3)
    store.write("a.parquet", path.read_bytes())
    (file,) = expand("s3://bucket/change/a.parquet", s3)
    remote = shards.index_shard(file, SOURCE, s3, IndexOptions()).shard
    here = index(path).shard
    whole = bytearray(path.read_bytes())
    assert shards.read_samples(remote, SOURCE, s3, 2, 5) == read_all(here)[2:7]
    for shard, options in ((remote, s3), (here, None)):
        whole[200] ^= 1
        store.write("a.parquet", bytes(whole))
        os.utime(path, ns=(1, 1))
        found = shards.read_samples(shard, SOURCE, options, 0, 8)
        assert {bad.reason for bad in found} == {"shard-changed"}
    store.delete("a.parquet")
    path.unlink()
    for shard, options in ((remote, s3), (here, None)):
        found = shards.read_samples(shard, SOURCE, options, 0, 8)
        assert {bad.reason for bad in found} == {"shard-missing"}


class _Counting:
    """A store that is one file on S3, and keeps the ranges that were read."""

    uri = "s3://bucket/x"

    def __init__(self, data: bytes) -> None:
        self.data, self.reads = data, []

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        self.reads.append((start, stop))
        return self.data[start:stop]


@pytest.mark.parametrize("chunk", [700, 20_000, 10**6])
def test_a_tar_is_streamed_once(tmp_path: Path, chunk: int) -> None:
    # Captions before images, too: they are looked at when the image's end has been seen.
    members = [*pairs(30), *((f"x{n}", d) for n, d in reversed(pairs(10)))]
    path = write_tar(tmp_path / "a.tar", members)
    store = _Counting(path.read_bytes())
    size = len(store.data)
    with contextlib.closing(Stream(store, "a.tar", size, chunk)) as data:
        found = tars._scan(str(path), data, size, Suffixes.of(SOURCE))
    expected = scan_tar(str(path), LocalStore(tmp_path), "a.tar", size, Suffixes.of(SOURCE))
    assert found.keys == expected.keys and found.offsets.tolist() == expected.offsets.tolist()
    assert found.content.digest() == expected.content.digest()
    if chunk > 700:  # smaller than a member is not what a chunk is
        assert sorted(store.reads) == [(at, min(at + chunk, size)) for at in range(0, size, chunk)]


def test_a_stream_that_fails_says_so_and_ends(tmp_path: Path) -> None:
    class Failing(_Counting):
        def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
            if start:
                raise OSError(5, "Input/output error")
            return super().read(name, start, stop)

    store = Failing(write_tar(tmp_path / "a.tar", pairs(30)).read_bytes())
    with pytest.raises(OSError, match="Input/output error"):
        with contextlib.closing(Stream(store, "a.tar", len(store.data), 4096)) as data:
            tars._scan("a.tar", data, len(store.data), Suffixes.of(SOURCE))
