from __future__ import annotations

import json
import os
import pickle
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from clip_ray.config import DataConfig, S3Options, SourceConfig
from clip_ray.data import node, offsets
from clip_ray.data.details import lists_of
from clip_ray.data.earlier import read_earlier
from clip_ray.data.manifest import Manifest, build_manifest
from clip_ray.data.manifest_file import load_manifest, save_manifest
from clip_ray.data.node import shared_folder
from clip_ray.data.report import report
from clip_ray.data.shards import BadSample, Sample, read_ordinals, read_samples
from clip_ray.data.sidecar import scan_sidecar
from clip_ray.errors import DataError
from clip_ray.storage import LocalStore, S3Store, Store, open_store
from tests.data.shard_files import cut, jpeg, write_parquet, write_tar

Rows = list[tuple[str, str, str | None]]  # key, status, caption

ROWS: Rows = [
    (f"{i:09d}", "failed_to_download" if i % 5 == 3 else "success", f"caption {i}")
    for i in range(60)
]
ROWS[7] = (ROWS[7][0], "success", None)
ROWS[11] = (ROWS[11][0], "success", "  ")


def put(store: Store, folder: Path, name: str, rows: Rows, tar_rows: Rows | None = None) -> None:
    """Write what img2dataset does: a tar, and a table of all downloads in its order."""
    members = [
        member
        for i, (key, status, caption) in enumerate(rows if tar_rows is None else tar_rows)
        if status == "success"
        for member in (
            (f"{key}.jpg", jpeg(i)),
            (f"{key}.json", json.dumps({"key": key, "alt": caption}).encode()),
            (f"{key}.txt", (caption or "").encode()),
        )
    ]
    store.write(f"{name}.tar", write_tar(folder / f"{name}.tar", members).read_bytes())
    columns = {
        "key": pa.array([key for key, _, _ in rows]),
        "status": pa.array([status for _, status, _ in rows]),
        "caption": pa.array([caption for _, _, caption in rows], pa.string()),
        "alt": pa.array([caption for _, _, caption in rows], pa.string()),
        "url": pa.array([f"http://{name}/{key}" for key, _, _ in rows]),
    }
    path = write_parquet(folder / f"{name}.parquet", columns, rows=25)
    store.write(path.name, path.read_bytes())


@pytest.fixture
def store(s3: S3Options, tmp_path: Path) -> Store:
    return open_store(f"s3://bucket/{tmp_path.name}", s3)


@pytest.fixture(autouse=True)
def node_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A temporary directory of the test's own, and nothing in the process's memory."""
    path = tmp_path / "node"
    path.mkdir()
    monkeypatch.setattr(node.tempfile, "gettempdir", lambda: str(path))
    offsets.find_offsets.cache_clear()
    yield path
    offsets.find_offsets.cache_clear()


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Bytes fetched from S3, by suffix."""
    count = {"tar": 0, "parquet": 0}
    plain = S3Store.read

    def counted(self: S3Store, name: str, *which: Any) -> bytes:
        data = plain(self, name, *which)
        if name.rpartition(".")[2] in count:
            count[name.rpartition(".")[2]] += len(data)
        return data

    monkeypatch.setattr(S3Store, "read", counted)
    return count


def config(path: str, s3: S3Options, **source: object) -> DataConfig:
    return DataConfig(
        sources=(SourceConfig(path=path, **source),), s3=s3, holdout=0.2, sidecars=True
    )


def everything(manifest: Manifest, data: DataConfig) -> list[Sample | BadSample]:
    return [
        sample
        for row in range(len(manifest))
        for sample in read_samples(
            manifest.shard(row), data.sources[0], data.s3, 0, int(manifest.samples[row])
        )
    ]


@pytest.mark.parametrize("caption", [None, "txt", "json:alt"])
@pytest.mark.parametrize("form", ["", "/*.tar", "/{00000..00001}.tar"])
def test_a_sidecar_gives_what_the_tar_would(
    store: Store,
    s3: S3Options,
    tmp_path: Path,
    fetched: dict[str, int],
    caption: str | None,
    form: str,
) -> None:
    put(store, tmp_path, "00000", ROWS)
    put(store, tmp_path, "00001", [(f"b{key}", *rest) for key, *rest in ROWS])
    data = config(store.uri + form, s3, caption=caption)
    built = build_manifest(data)
    assert fetched["tar"] <= 2 * (1024 + 4096)
    assert built.marks.tolist() == [0, 0] and built.samples.tolist() == [46, 46]
    local = LocalStore(tmp_path / "local")
    for name in ("00000.tar", "00001.tar"):
        local.write(name, store.read(name))
    here = config(str(local.root), s3, caption=caption)
    walked = build_manifest(here)
    assert walked.marks.tolist() == [24, 24]
    for row in range(2):
        ours, theirs = built.details[row], walked.details[row]
        assert ours.held.tolist() == theirs.held.tolist() != []
        assert ours.holdout.tolist() == theirs.holdout.tolist()
    assert built.skipped == walked.skipped and built.keys.tolist() == walked.keys.tolist()
    found = everything(built, data)
    assert found == everything(walked, here)
    assert all(isinstance(sample, Sample) for sample in found)


def test_a_tar_is_walked_once_a_node(
    store: Store, s3: S3Options, tmp_path: Path, fetched: dict[str, int], node_folder: Path
) -> None:
    put(store, tmp_path, "00000", ROWS)
    data = config(store.uri, s3)
    shard = build_manifest(data).shard(0)
    picked = np.array([5, 3])
    expected = read_ordinals(shard, data.sources[0], s3, picked)
    assert fetched["tar"] > shard.size
    fetched["tar"] = 0
    assert read_ordinals(shard, data.sources[0], s3, picked) == expected
    by_range = fetched["tar"]
    assert 0 < by_range < shard.size // 2
    offsets.find_offsets.cache_clear()  # another process of the node
    assert read_ordinals(shard, data.sources[0], s3, picked) == expected
    assert fetched["tar"] == 2 * by_range
    (file,) = node_folder.rglob("*.offsets")
    whole = file.read_bytes()
    assert len(whole) < 2 * shard.samples
    for damaged in (b"", whole[:4], whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1])):
        file.write_bytes(damaged)
        offsets.find_offsets.cache_clear()
        fetched["tar"] = 0
        assert read_ordinals(shard, data.sources[0], s3, picked) == expected
        assert fetched["tar"] > shard.size


def test_without_a_temporary_directory_the_process_remembers(
    store: Store, s3: S3Options, tmp_path: Path, fetched: dict[str, int], node_folder: Path
) -> None:
    put(store, tmp_path, "00000", ROWS)
    data = config(store.uri, s3)
    shard = build_manifest(data).shard(0)
    node_folder.rmdir()
    node_folder.touch()
    first = read_samples(shard, data.sources[0], s3, 0, 46)
    assert all(isinstance(sample, Sample) for sample in first)
    fetched["tar"] = 0
    assert read_samples(shard, data.sources[0], s3, 0, 46) == first
    assert fetched["tar"] <= shard.size


def test_details_on_s3_are_copied_once_a_node(
    store: Store, s3: S3Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, node_folder: Path
) -> None:
    put(store, tmp_path, "00000", ROWS)
    put(store, tmp_path, "00001", [(f"b{key}", *rest) for key, *rest in ROWS])
    data = config(store.uri, s3).model_copy(update={"sidecars": False})
    built = build_manifest(data)
    run = store.child("run")
    saved = save_manifest(built, run, "manifest.parquet")
    asked: list[str] = []
    for name in ("read", "download"):
        plain = getattr(S3Store, name)

        def counted(self, file, *rest, name=name, plain=plain):
            asked.append(f"{name} {file.rpartition('.')[2]}")
            return plain(self, file, *rest)

        monkeypatch.setattr(S3Store, name, counted)
    assert everything(saved, data) == everything(built, data)
    loaded = pickle.loads(pickle.dumps(load_manifest(run, "manifest.parquet")))  # another process
    for row in (1, 0):
        assert loaded.shard(row).offsets.tolist() == built.shard(row).offsets.tolist()
    assert [a for a in asked if "details" in a] == ["download details"]
    # A copy that is damaged or gone is no copy; without room for one, each record is a request.
    (copy,) = node_folder.rglob("*.details")
    copy.write_bytes(bytes(copy.stat().st_size))
    assert loaded.shard(0).offsets.tolist() == built.shard(0).offsets.tolist()
    assert asked[-1] == "read details"
    copy.unlink()
    copy.with_suffix(".lock").unlink()
    node_folder.joinpath(copy.parent.name).rmdir()
    node_folder.rmdir()
    node_folder.touch()
    lists_of.cache_clear()
    assert loaded.shard(1).offsets.tolist() == built.shard(1).offsets.tolist()
    assert asked[-1] == "read details" and asked.count("download details") == 1
    run.delete(saved.details.name)
    with pytest.raises(DataError, match="is missing or not whole"):
        load_manifest(run, "manifest.parquet")


def test_a_copy_that_nobody_reads_goes_when_the_next_one_comes(
    store: Store, s3: S3Options, tmp_path: Path, node_folder: Path
) -> None:
    put(store, tmp_path, "00000", ROWS)
    data = config(store.uri, s3)
    saved = save_manifest(build_manifest(data), store.child("run"), "manifest.parquet")
    folder = shared_folder()
    assert folder is not None
    for name, age_s in (("old", 8 * 86400), ("used", 6 * 86400)):
        (folder / f"{name}.details").touch()
        then = time.time() - age_s
        os.utime(folder / f"{name}.details", (then, then))
    saved.shard(0)
    names = sorted(path.name for path in folder.glob("*.details"))
    assert names == sorted([saved.details.name, "used.details"])


@pytest.mark.parametrize("other", ["fewer", "keys", "caption", "members-apart"])
def test_a_tar_that_does_not_fit_its_sidecar_is_void(
    store: Store, s3: S3Options, tmp_path: Path, fetched: dict[str, int], other: str
) -> None:
    tar_rows = list(ROWS)
    if other == "fewer":
        tar_rows.pop()
    elif other == "keys":
        tar_rows[20] = ("another", *ROWS[20][1:])
    elif other == "caption":  # a sample that the sidecar counts is none in the tar
        tar_rows[20] = (*ROWS[20][:2], "")
    else:
        tar_rows.append(ROWS[0])
    put(store, tmp_path, "00000", ROWS, tar_rows)
    data = config(store.uri, s3)
    shard = build_manifest(data).shard(0)
    found = read_ordinals(shard, data.sources[0], s3, np.array([5, 2]))
    assert [(bad.key, bad.reason) for bad in found] == [
        ("#5", "sidecar-mismatch"),
        ("#2", "sidecar-mismatch"),
    ]
    said = (
        "do not lie side by side"
        if other == "members-apart"
        else "delete the sidecar, or set data.sidecars: false"
    )
    assert said in found[0].detail
    fetched["tar"] = 0  # known from now on, to the node's other processes too
    offsets.find_offsets.cache_clear()
    assert read_ordinals(shard, data.sources[0], s3, np.array([5, 2])) == found
    assert fetched["tar"] == 0


@pytest.mark.parametrize("column", ["key", "status", "caption"])
def test_a_table_that_does_not_say_enough_is_no_sidecar(
    store: Store, s3: S3Options, tmp_path: Path, column: str
) -> None:
    put(store, tmp_path, "00000", ROWS)
    rest = {"key": pa.array(["x"]), "status": pa.array(["success"]), "caption": pa.array(["y"])}
    del rest[column]
    store.write("00000.parquet", write_parquet(tmp_path / "x.parquet", rest).read_bytes())
    assert build_manifest(config(store.uri, s3)).marks.tolist() == [24]
    store.write("00000.parquet", b"no Parquet file")
    assert build_manifest(config(store.uri, s3)).marks.tolist() == [24]


@pytest.mark.parametrize("source", [{"image": "jpeg"}, {"caption": "json"}, {"caption": "cap"}])
def test_settings_that_a_sidecar_cannot_answer_walk_the_tar(
    store: Store, s3: S3Options, tmp_path: Path, source: dict[str, str]
) -> None:
    put(store, tmp_path, "00000", ROWS)
    with pytest.raises(DataError, match="no sample to train on in 1 shards"):
        build_manifest(config(store.uri, s3, **source))


def test_a_tar_that_begins_or_ends_otherwise_is_scanned(
    store: Store, s3: S3Options, tmp_path: Path
) -> None:
    foreign = [("other", *ROWS[0][1:]), *ROWS[1:]]
    put(store, tmp_path, "00000", ROWS, foreign)
    data = config(store.uri, s3)
    built = build_manifest(data)
    assert built.marks.tolist() == [24]
    assert read_samples(built.shard(0), data.sources[0], s3, 0, 1)[0].key == "other"
    put(store, tmp_path, "00000", ROWS)
    store.write("00000.tar", cut(tmp_path / "00000.tar", 20_000).read_bytes())
    with pytest.raises(DataError, match="00000.tar: truncated after sample .* data.salvage"):
        build_manifest(data)


def test_sidecars_can_be_left_aside(
    store: Store, s3: S3Options, tmp_path: Path, fetched: dict[str, int]
) -> None:
    put(store, tmp_path, "00000", ROWS)
    data = config(store.uri, s3).model_copy(update={"sidecars": False})
    assert build_manifest(data).marks.tolist() == [24]
    assert fetched["parquet"] == 0 < fetched["tar"]


def test_a_rotten_sidecar_is_no_error(tmp_path: Path) -> None:
    local = LocalStore(tmp_path / "set")
    put(local, tmp_path, "00000", ROWS)
    tar, whole = local.info("00000.tar"), local.read("00000.parquet")
    source = SourceConfig(path="unused")
    expected = scan_sidecar(tar, local.info("00000.parquet"), None, source)
    assert expected is not None and len(expected.keys) == 46
    rng, none = np.random.default_rng(0), 0
    for _ in range(150):
        rotten = bytearray(whole)
        for at in rng.integers(0, len(whole), 5):
            rotten[at] ^= 1 << int(rng.integers(8))
        local.write("00000.parquet", bytes(rotten))
        none += scan_sidecar(tar, local.info("00000.parquet"), None, source) is None
    assert 0 < none < 150


def test_a_changed_sidecar_is_read_again(
    store: Store, s3: S3Options, tmp_path: Path, fetched: dict[str, int]
) -> None:
    put(store, tmp_path, "00000", ROWS)
    run, data = LocalStore(tmp_path / "run"), config(store.uri, s3)
    save_manifest(build_manifest(data), run, "manifest.parquet")
    fetched["parquet"] = 0
    earlier = read_earlier(run, data, print)
    build_manifest(data, earlier=earlier)
    assert (earlier.kept, fetched) == (1, {"tar": fetched["tar"], "parquet": 0})
    store.delete("00000.parquet")
    earlier = read_earlier(run, data, print)
    assert build_manifest(data, earlier=earlier).marks.tolist() == [24]
    assert (earlier.kept, earlier.scanned) == (0, 1)


def test_a_report_walks_few_of_the_shards(
    store: Store, s3: S3Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(3):
        put(store, tmp_path, f"{number:05d}", [(f"{number}{key}", *rest) for key, *rest in ROWS])
    monkeypatch.setattr("clip_ray.data.report._WALKED", 2)
    data = config(store.uri, s3)
    built = build_manifest(data)
    found = report(built, data)
    assert found.read == built.train_counts[[0, 2]].sum() < built.total
