from __future__ import annotations

import pickle
import shutil
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clip_ray.config import DataConfig, S3Options, SourceConfig
from clip_ray.data import manifest_file
from clip_ray.data.details import Lists, Spool
from clip_ray.data.indexing import Entry, Job, Outcome
from clip_ray.data.manifest import Manifest, build_manifest, equals, gather
from clip_ray.data.manifest_file import load_manifest, save_manifest, to_bytes
from clip_ray.data.plan import Plan
from clip_ray.data.samples import skip
from clip_ray.data.shards import Sample, fraction_of, read_ordinals
from clip_ray.errors import ConfigError, DataError
from clip_ray.storage import FileInfo, LocalStore, open_store
from tests.data.shard_files import cut, images, pairs, write_parquet, write_tar

FORMAT_1_DIGEST = "d69a50a4b70695620b69111d06d5bb79eccffcc18af160e72f946366a9fab89b"
FORMAT_1_OFFSETS = [0, 31232, 61952, 77824]  # the end in whole blocks: 77322 was written
FORMAT_2_DIGEST = "272d99447f859fa6e20da0b269fc928d6cdebf24da4f714ecfff5847c09b52c2"
FORMAT_3_DIGEST = "81be2e9c97a30f4163a8f1bb53124790a4fc528d323531593990014c6fad1811"


def config(*paths: Path | str, **options: object) -> DataConfig:
    sources = tuple(SourceConfig(path=str(path)) for path in paths)
    return DataConfig(sources=sources, **{"holdout": 0.0, **options})


def same(a: Manifest, b: Manifest) -> bool:
    return a.digest == b.digest and to_bytes(a) == to_bytes(b)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three tars of 20, 7 and 0 samples."""
    path = tmp_path / "set"
    path.mkdir()
    write_tar(path / "00000.tar", pairs(20))
    write_tar(path / "00001.tar", [(f"b{n}", d) for n, d in pairs(7)] + [("x.txt", b"no image")])
    write_tar(path / "00002.tar", [])
    return path


def test_counts_shards_and_what_is_skipped(folder: Path) -> None:
    calls = []
    built = build_manifest(config(folder), progress=lambda *now: calls.append(now))
    assert len(built) == 2 and built.total == 27
    assert built.train_counts.tolist() == [20, 7]
    assert built.skipped == {"empty-shard": 1, "missing-image": 1}
    assert calls == [(0, 3), (1, 3), (2, 3), (3, 3)]
    (row,) = built.by_source()
    assert (row["path"], row["shards"], row["samples"], row["train"]) == (str(folder), 2, 27, 27)
    shard = built.shard(1)
    assert shard.path == str(folder / "00001.tar") and (shard.samples, shard.source) == (7, 0)


def test_order_of_the_map_does_not_matter(folder: Path) -> None:
    def backwards(function: Callable[[Job], Outcome], jobs: list[Job]) -> list[Outcome]:
        # As a remote function would: through pickle, in any order.
        function = pickle.loads(pickle.dumps(function))
        return [pickle.loads(pickle.dumps(function(job))) for job in reversed(jobs)]

    data = config(folder, holdout=0.2)
    assert same(build_manifest(data), build_manifest(data, backwards))


def test_a_file_and_pickle_bring_it_back(folder: Path, tmp_path: Path) -> None:
    table = {"jpg": pa.array([*images(6), None]), "txt": pa.array(["x"] * 7)}
    write_parquet(folder / "p.parquet", table)
    built = build_manifest(config(folder, holdout=0.3))
    store = LocalStore(tmp_path / "run")
    saved = save_manifest(built, store, "m.parquet")
    loaded = load_manifest(store, "m.parquet")
    for back in (saved, loaded, *(pickle.loads(pickle.dumps(m)) for m in (built, loaded))):
        assert same(back, built)
        assert back.by_source() == built.by_source() and back.skipped == built.skipped
        for number in range(len(built)):
            ours, theirs = built.shard(number), back.shard(number)
            assert (ours.path, ours.version) == (theirs.path, theirs.version)
            assert (ours.offsets == theirs.offsets).all()
            assert (ours.rows_skipped == theirs.rows_skipped).all()


def test_the_arrays_travel_out_of_band(folder: Path) -> None:
    buffers: list[pickle.PickleBuffer] = []
    built = build_manifest(config(folder))
    pickle.dumps(built, protocol=5, buffer_callback=buffers.append)
    details = int(built.details.lengths.sum())
    assert sum(b.raw().nbytes for b in buffers) >= details + built.sizes.nbytes


def test_train_ordinals_are_what_is_not_held() -> None:
    rng = np.random.default_rng(0)
    for held_count in (0, 1, 30, 99):
        held = np.sort(rng.choice(100, held_count, replace=False))
        expected = np.setdiff1d(np.arange(100), held)
        places = rng.permutation(len(expected))
        assert (skip(places, held) == expected[places]).all()


def test_holdout_is_disjoint_readable_and_follows_the_key(folder: Path) -> None:
    data = config(folder, holdout=0.25)
    built = build_manifest(data)
    shards, ordinals = built.holdout_items()
    assert 0 < len(ordinals) < 27 and built.total + len(ordinals) == 27
    held = set(zip(shards.tolist(), ordinals.tolist(), strict=True))
    for number in range(len(built)):
        places = np.arange(built.train_counts[number])
        train = built.train_ordinals(number, places)
        assert not held & {(number, int(o)) for o in train}
        for ordinal, sample in enumerate(
            read_ordinals(built.shard(number), data.sources[0], None, np.arange(len(places)))
        ):
            assert isinstance(sample, Sample)
            assert ((number, ordinal) in held) == (fraction_of(sample.key) < 0.25)


def test_exclude_and_select_are_part_of_the_digest(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("00003\r\n\nb00001\nnobody\n")
    (tmp_path / "in").write_text("\n".join(f"{i:05d}" for i in range(10)))
    plain = build_manifest(config(folder))
    without = build_manifest(config(folder, exclude=str(tmp_path / "out")))
    assert without.total == 25 and len(without.holdout_items()[0]) == 0
    assert without.train_ordinals(0, np.arange(19)).tolist() == [0, 1, 2, *range(4, 20)]
    source = SourceConfig(path=str(folder / "00000.tar"), select=str(tmp_path / "in"))
    only = build_manifest(DataConfig(sources=(source,), holdout=0))
    assert only.total == 10
    assert len({plain.digest, without.digest, only.digest}) == 3
    with pytest.raises(DataError, match="data.exclude: .*gone does not exist"):
        build_manifest(config(folder, exclude=str(tmp_path / "gone")))


def test_a_changed_shard_changes_the_digest(folder: Path) -> None:
    first = build_manifest(config(folder)).digest
    assert build_manifest(config(folder)).digest == first
    write_tar(folder / "00001.tar", pairs(8))
    assert build_manifest(config(folder)).digest != first


def test_truncated_shards_are_refused_or_salvaged(folder: Path) -> None:
    path = cut(folder / "00000.tar", (folder / "00000.tar").stat().st_size // 2)
    with pytest.raises(DataError) as caught:
        build_manifest(config(folder))
    assert str(caught.value).startswith(f"shard {path}: truncated after sample ")
    assert "re-copy it, or data.salvage: true" in str(caught.value)
    data = config(folder, salvage=True)
    built = build_manifest(data)
    assert 0 < built.train_counts[0] < 20 and built.skipped["truncated-shard"] == 1
    found = read_ordinals(built.shard(0), data.sources[0], None, np.arange(built.train_counts[0]))
    assert all(isinstance(sample, Sample) for sample in found)


def test_every_damaged_shard_is_named_up_to_a_limit(tmp_path: Path) -> None:
    for number in range(7):
        (tmp_path / f"{number}.tar").write_bytes(b"x" * 1000)
    with pytest.raises(DataError, match=r"(?s)/0.tar: no tar.*/4.tar: no tar.*and 2 more shards"):
        build_manifest(config(tmp_path))


def test_what_cannot_be_trained_on_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="data.sources is empty"):
        build_manifest(DataConfig())
    with pytest.raises(DataError, match="no shard matches.*nowhere"):
        build_manifest(config(tmp_path / "nowhere"))
    with pytest.raises(DataError, match=r"00000.tar is in data.sources\[0\] and again in \[1\]"):
        build_manifest(config(folder, folder / "00000.tar"))
    with pytest.raises(DataError, match="no sample to train on in 1 shards.*27 held|20 held"):
        build_manifest(config(folder / "00000.tar", holdout=0.9999999))
    wrong = SourceConfig(path=str(folder), image="bmp")
    with pytest.raises(DataError, match=r"27 missing-image|.jpg \(27\)"):
        build_manifest(DataConfig(sources=(wrong,)))


def test_an_img2dataset_folder_is_read_as_it_lies(tmp_path: Path) -> None:
    # Beside each tar lie its metadata and statistics.
    for number in range(2):
        write_tar(tmp_path / f"0000{number}.tar", pairs(5 + number))
        metadata = {"key": pa.array(["00000"]), "url": pa.array(["x"]), "caption": pa.array(["y"])}
        write_parquet(tmp_path / f"0000{number}.parquet", metadata)
        (tmp_path / f"0000{number}_stats.json").write_text("{}")
    built = build_manifest(config(tmp_path))
    assert len(built) == 2 and built.total == 11 and built.skipped == {}


def test_a_copy_is_refused_by_name_or_accepted(folder: Path) -> None:
    copy = shutil.copy(folder / "00000.tar", folder / "00007.tar")
    with pytest.raises(DataError) as caught:
        build_manifest(config(folder))
    first = str(folder / "00000.tar")
    assert str(caught.value).startswith(f"shard {copy}: the same samples as in {first}; delete one")
    built = build_manifest(config(folder, copies=True))
    assert built.total == 47 and built.same_keys() == [[0, 2]]


@pytest.mark.parametrize("what", ["pixels", "caption", "key"])
def test_what_differs_in_one_sample_is_no_copy(folder: Path, what: str) -> None:
    members = pairs(20)
    if what == "pixels":  # of the same length: sizes alone would not tell
        name, image = members[10]
        rest = bytearray(image)
        rest[min(len(rest), 2048) - 10] ^= 1
        members[10] = (name, bytes(rest))
    elif what == "caption":
        members[11] = (members[11][0], b"caption 6")
    else:
        members[10], members[11] = (("z.jpg", members[10][1]), ("z.txt", members[11][1]))
    write_tar(folder / "00007.tar", members)
    built = build_manifest(config(folder))
    assert built.same_keys() == ([] if what == "key" else [[0, 2]])


def test_copies_of_parquet_files_are_told(tmp_path: Path) -> None:
    for name, order in (("a", images(6)), ("b", images(6)), ("c", images(7)[1:])):
        table = {"jpg": pa.array(order), "txt": pa.array(["x"] * 6)}
        write_parquet(tmp_path / f"{name}.parquet", table)
    with pytest.raises(DataError, match="b.parquet: the same samples as in .*a.parquet") as caught:
        build_manifest(config(tmp_path))
    assert "c.parquet" not in str(caught.value)


def test_equal_rows() -> None:
    a, b = np.array([3, 1, 3, 1, 3], np.uint64), np.array([0, 0, 0, 5, 0], np.uint64)
    assert equals(a, b) == [[0, 2, 4]] and equals(a) == [[0, 2, 4], [1, 3]]
    assert equals(np.zeros(0, np.uint64)) == []


def test_unknown_columns_are_an_error_of_the_shard(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", {"a": pa.array([1]), "b": pa.array([2])})
    with pytest.raises(DataError, match=f"shard {path}: no image column: .* it has a, b"):
        build_manifest(config(path))


def test_a_newer_or_foreign_or_damaged_file_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LocalStore(tmp_path / "run")
    built = save_manifest(build_manifest(config(folder)), store, "m")
    data = store.read("m")
    rotten = bytearray(data)
    rotten[60] ^= 1  # in a page: its checksum tells
    for bad in (b"", b"nonsense", data[: len(data) // 2], bytes(rotten)):
        store.write("m", bad)
        with pytest.raises(DataError, match="no manifest, or a damaged one"):
            load_manifest(store, "m")
    table = pq.read_table(pa.BufferReader(data))
    sink = pa.BufferOutputStream()
    pq.write_table(table.slice(1), sink)
    store.write("m", sink.getvalue().to_pybytes())
    with pytest.raises(DataError, match="is damaged: index again"):
        load_manifest(store, "m")
    with monkeypatch.context() as patch:
        patch.setattr(manifest_file, "FORMAT", 4)
        save_manifest(built, store, "m")
    with pytest.raises(DataError, match="has format 4, this code reads up to 3"):
        load_manifest(store, "m")


def test_details_that_are_gone_or_damaged_are_an_error(folder: Path, tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "run")
    built = save_manifest(build_manifest(config(folder)), store, "m")
    path = store.root / built.details.name
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert built.shard(0).samples == 20  # the other record
    with pytest.raises(DataError, match=f"{built.details.name}: damaged at byte"):
        load_manifest(store, "m").shard(1)
    for left in (whole[:-1], None):
        path.unlink() if left is None else path.write_bytes(left)
        with pytest.raises(DataError, match=f"{built.details.name}.* is missing or not whole"):
            load_manifest(store, "m")


def test_a_manifest_that_is_written_again_leaves_one_file_of_details(
    folder: Path, tmp_path: Path
) -> None:
    store = LocalStore(tmp_path / "run")
    first = save_manifest(build_manifest(config(folder)), store, "m")
    again = save_manifest(first, store, "m")
    assert again.details.name == first.details.name
    write_tar(folder / "00001.tar", pairs(8))
    second = save_manifest(build_manifest(config(folder)), store, "m")
    assert store.files() == sorted(["m", second.details.name])
    assert second.details.name != first.details.name


def test_a_process_holds_the_lists_of_few_shards(tmp_path: Path) -> None:
    shards, samples = 200, 20_000
    rng, none, spool, entries = np.random.default_rng(0), np.zeros(0, np.int64), Spool(), []
    for number in range(shards):
        offsets = np.cumsum(rng.integers(80, 240, samples // 2 + 1))
        held = np.flatnonzero(rng.random(samples) < 0.5)
        lists = Lists(offsets, held, held[:9], none)
        entry = Entry(f"{number}.tar", "tar", 10**9, "1", samples, held=len(held), holdout=9)
        entries.append(replace(entry, marks=len(offsets), lists=lists.digest()))
        spool.add(lists.pack())
    jobs = [Job(number, 0, FileInfo(e.path, e.size, "1")) for number, e in enumerate(entries)]
    built = gather(jobs, entries, spool.details(), ["x"], ("",), {})
    store = LocalStore(tmp_path)
    size = store.info(save_manifest(built, store, "m").details.name).size
    unpacked = 8 * (samples + 1)  # bytes of a shard's lists
    tracemalloc.start()
    loaded = load_manifest(store, "m")
    plan_needs, _ = tracemalloc.get_traced_memory()
    for shard in range(shards):
        assert len(loaded.shard(shard).offsets) == samples // 2 + 1
        last = loaded.train_ordinals(shard, np.array([loaded.train_counts[shard] - 1]))
        assert samples - 50 < last[0] < samples
    held_now, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # The table: a few hundred bytes a shard. Of the lists, those of the last few shards: less than
    # all of them take when they are packed.
    assert plan_needs < 1000 * shards and len(pickle.dumps(loaded)) < 1000 * shards
    assert held_now - plan_needs < 10 * unpacked < size


def older(number: int) -> Manifest:
    # Written by the first version of each format; never to be regenerated.
    return load_manifest(LocalStore(Path(__file__).parent), f"manifest-{number}.parquet")


def test_format_1_is_read() -> None:
    built = older(1)
    assert built.train_counts.tolist() == [17, 6, 6] and built.total == 29
    assert built.digest == FORMAT_1_DIGEST
    assert built.skipped == {"empty-shard": 1, "missing-image": 2}
    assert built.evidence is None and built.same_keys() == []
    assert built.shard(0).keys == 0
    assert built.shard(0).offsets.tolist() == FORMAT_1_OFFSETS
    assert built.shard(2).offsets.tolist() == [0, 4, 7]
    assert len(built.holdout_items()[0]) == built.holdout.sum() == 4


def test_format_2_is_read() -> None:
    built = older(2)
    assert built.train_counts.tolist() == [17, 6, 6] and built.total == 29
    assert built.digest == FORMAT_2_DIGEST
    assert built.entry(1).skipped == {"missing-image": 1}
    assert built.evidence is not None
    assert [entry["path"] for entry in built.evidence.empty] == ["/tmp/set2/00002.tar"]
    assert pickle.loads(pickle.dumps(built)).digest == FORMAT_2_DIGEST


def test_format_3_is_read() -> None:
    built = older(3)
    assert built.train_counts.tolist() == [17, 6, 6] and built.total == 29
    assert built.digest == FORMAT_3_DIGEST
    assert built.entry(1).skipped == {"missing-image": 1}
    # Of the same shards as format 2, with an offset every 2 samples in the place of 8.
    *starts, end = built.shard(0).offsets.tolist()
    assert [*starts[::4], -(-end // 512) * 512] == older(2).shard(0).offsets.tolist()
    assert [a.tolist() for a in built.holdout_items()] == [
        a.tolist() for a in older(2).holdout_items()
    ]


def test_sources_on_s3_and_key_lists_there(folder: Path, s3: S3Options) -> None:
    store = open_store("s3://bucket/manifest", s3)
    for path in folder.iterdir():
        store.write(path.name, path.read_bytes())
    store.write("keys.txt", b"00000\n00001\n")
    data = config("s3://bucket/manifest/", s3=s3, exclude="s3://bucket/manifest/keys.txt")
    built = build_manifest(data)
    assert built.train_counts.tolist() == [18, 7]
    assert built.shard(0).path == "s3://bucket/manifest/00000.tar"
    with pytest.raises(DataError, match="bucket 'no-such' does not exist"):
        build_manifest(config("s3://no-such/x/", s3=s3))


def test_a_plan_holds_at_most_64_bytes_a_shard() -> None:
    shards = 20_000
    counts, sources = np.full(shards, 1000), np.arange(shards) // (shards // 2)
    for weights in (None, (1.0, 3.0)):
        tracemalloc.start()
        plan = Plan(counts, sources, weights=weights, seed=0, global_batch=4096, slot=64, window=8)
        held, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert 0 < held <= 64 * shards
        assert len(plan.step_rows(1).shard) == 4096
