from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clip_ray.config import DataConfig, SourceConfig
from clip_ray.data import indexing
from clip_ray.data.earlier import BESIDE, PARTS, Earlier, folder_of, read_earlier
from clip_ray.data.manifest import Manifest, build_manifest
from clip_ray.data.manifest_file import save_manifest, to_bytes
from clip_ray.errors import DataError
from clip_ray.storage import LocalStore
from tests.data.shard_files import cut, images, pairs, write_parquet, write_tar


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five shards: three tars, one of them empty, a Parquet file, a file of zero bytes."""
    path = tmp_path / "set"
    path.mkdir()
    write_tar(path / "00000.tar", pairs(20))
    write_tar(path / "00001.tar", [(f"b{n}", d) for n, d in pairs(7)] + [("x.txt", b"no image")])
    write_tar(path / "00002.tar", [("x.txt", b"no image")])
    table = {"jpg": pa.array([*images(6), None]), "txt": pa.array(["x"] * 7)}
    write_parquet(path / "p.parquet", table)
    (path / "zero.tar").touch()
    return path


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "run")


@pytest.fixture
def scanned(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of the shards that are scanned from here on."""
    names: list[str] = []
    plain = indexing.index_shard

    def counted(file, *rest):
        names.append(Path(file.path).name)
        return plain(file, *rest)

    monkeypatch.setattr(indexing, "index_shard", counted)
    yield names


def config(folder: Path, **options: object) -> DataConfig:
    return DataConfig(sources=(SourceConfig(path=str(folder)),), **{"holdout": 0.3, **options})


def index(data: DataConfig, store: LocalStore, said: list[str] | None = None) -> Manifest:
    """Index as jobs/index.py does, without Ray."""
    earlier = read_earlier(store, data, (said if said is not None else []).append)
    manifest = build_manifest(data, earlier=earlier)
    manifest = save_manifest(manifest, store, "manifest.parquet")
    store.delete(PARTS)
    return manifest


def test_nothing_is_scanned_twice(folder: Path, store: LocalStore, scanned: list[str]) -> None:
    data = config(folder)
    first = index(data, store)
    assert sorted(scanned) == ["00000.tar", "00001.tar", "00002.tar", "p.parquet", "zero.tar"]
    scanned.clear()
    calls = []
    earlier = read_earlier(store, data, print)
    again = build_manifest(data, progress=lambda *now: calls.append(now), earlier=earlier)
    assert scanned == [] and calls == [(5, 5)] and (earlier.kept, earlier.scanned) == (5, 0)
    assert to_bytes(again) == to_bytes(first)


def test_new_and_changed_shards_alone_are_scanned(
    folder: Path, store: LocalStore, scanned: list[str]
) -> None:
    data = config(folder)
    index(data, store)
    write_tar(folder / "00001.tar", pairs(9))
    write_tar(folder / "00000a.tar", [(f"a{n}", d) for n, d in pairs(5)])
    (folder / "p.parquet").unlink()
    scanned.clear()
    kept = index(data, store)
    assert scanned == ["00000a.tar", "00001.tar"]
    assert to_bytes(kept) == to_bytes(build_manifest(data))
    assert kept.samples.tolist() == [20, 5, 9]


@pytest.mark.parametrize(
    "change",
    [
        lambda data, tmp: data.model_copy(update={"holdout": 0.5}),
        lambda data, tmp: data.model_copy(update={"exclude": keys(tmp, "00003")}),
        lambda data, tmp: on_source(data, select=keys(tmp, "00003", "00004", "00005", "p/1")),
        lambda data, tmp: on_source(data, caption="txt"),
        lambda data, tmp: on_source(data, image="jpg"),
    ],
    ids=["holdout", "exclude", "select", "caption", "image"],
)
def test_other_settings_scan_all_again(
    folder: Path,
    store: LocalStore,
    scanned: list[str],
    tmp_path: Path,
    change: Callable[[DataConfig, Path], DataConfig],
) -> None:
    data = config(folder)
    index(data, store)
    scanned.clear()
    other = change(data, tmp_path)
    assert to_bytes(index(other, store)) == to_bytes(build_manifest(other))
    assert len(scanned) == 10  # by both


def test_other_conditions_scan_all_again(
    store: LocalStore, scanned: list[str], tmp_path: Path
) -> None:
    columns = {"jpg": pa.array(images(6)), "txt": pa.array(["a"] * 6), "n": pa.array(range(6))}
    data = config(write_parquet(tmp_path / "0.parquet", columns))
    indexed = {}
    for where in ((), ("n > 2",), ("n > 3",), ("n>3",)):
        scanned.clear()
        found = index(on_source(data, where=where), store)
        assert scanned == ["0.parquet"] * (where != ("n>3",)), where
        indexed[where] = found.digest
    assert len(set(indexed.values())) == 3


def keys(folder: Path, *names: str) -> str:
    (folder / "keys").write_text("\n".join(names))
    return str(folder / "keys")


def on_source(data: DataConfig, **update: object) -> DataConfig:
    return data.model_copy(update={"sources": (data.sources[0].model_copy(update=update),)})


def test_weights_and_the_order_of_sources_scan_nothing_again(
    folder: Path, store: LocalStore, scanned: list[str]
) -> None:
    a, b = (SourceConfig(path=str(folder / name)) for name in ("00000.tar", "0000[12].tar"))
    index(DataConfig(sources=(a, b), holdout=0.3), store)
    scanned.clear()
    turned = tuple(s.model_copy(update={"weight": 2.0}) for s in (b, a))
    data = DataConfig(sources=turned, holdout=0.3)
    kept = index(data, store)
    assert scanned == []
    assert to_bytes(kept) == to_bytes(build_manifest(data))


def test_a_truncated_shard_is_remembered_as_truncated(
    folder: Path, store: LocalStore, scanned: list[str]
) -> None:
    cut(folder / "00000.tar", (folder / "00000.tar").stat().st_size // 2)
    salvaged = index(config(folder, salvage=True), store)
    scanned.clear()
    with pytest.raises(DataError, match="00000.tar: truncated after sample .* data.salvage"):
        index(config(folder), store)
    assert to_bytes(index(config(folder, salvage=True), store)) == to_bytes(salvaged)
    assert scanned == []


def test_what_another_run_left_beside_the_data_is_used(
    folder: Path, store: LocalStore, tmp_path: Path, scanned: list[str]
) -> None:
    data = config(folder)
    first = build_manifest(data)
    save_manifest(first, LocalStore(folder), BESIDE)
    scanned.clear()
    assert to_bytes(index(data, LocalStore(tmp_path / "other"))) == to_bytes(first)
    assert scanned == []


def test_an_unreadable_manifest_is_said_and_passed_over(
    folder: Path, store: LocalStore, scanned: list[str]
) -> None:
    store.write("manifest.parquet", b"nonsense")
    said: list[str] = []
    index(config(folder), store, said)
    assert len(scanned) == 5
    assert len(said) == 1 and "run/manifest.parquet is of no use to this index: no man" in said[0]


def test_details_that_are_gone_or_rotten_cost_a_scan(
    folder: Path, store: LocalStore, scanned: list[str]
) -> None:
    data, said = config(folder), []
    first = index(data, store)
    details = store.root / first.details.name
    whole = details.read_bytes()
    scanned.clear()
    details.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    assert to_bytes(index(data, store, said)) == to_bytes(first)
    assert scanned == ["00000.tar"] and said == []
    assert details.read_bytes() == whole
    details.unlink()
    assert to_bytes(index(data, store, said)) == to_bytes(first)
    assert len(scanned) == 6 and "is missing or not whole" in said[0]
    assert details.read_bytes() == whole


def test_a_manifest_of_format_1_is_of_no_use_and_no_harm(folder: Path, store: LocalStore) -> None:
    old = (Path(__file__).parent / "manifest-1.parquet").read_bytes()
    store.write("manifest.parquet", old)
    data = config(folder)
    earlier = read_earlier(store, data, print)
    build_manifest(data, earlier=earlier)
    assert (earlier.kept, earlier.scanned) == (0, 5)


KILLED = """
import sys, time
from pathlib import Path
from clip_ray.config import DataConfig, SourceConfig
from clip_ray.data import indexing
from clip_ray.data.earlier import Earlier
from clip_ray.data.manifest import build_manifest
from clip_ray.storage import LocalStore

plain = indexing.index_shard

def slow(file, *rest):
    if file.path.endswith("00002.tar"):
        print("here", flush=True)
        time.sleep(60)
    return plain(file, *rest)

indexing.index_shard = slow
data = DataConfig(sources=(SourceConfig(path=sys.argv[1]),), holdout=0.3)
build_manifest(data, earlier=Earlier(LocalStore(Path(sys.argv[2])), part_s=0))
"""


def test_a_killed_index_goes_on(folder: Path, store: LocalStore, scanned: list[str]) -> None:
    command = [sys.executable, "-c", KILLED, str(folder), str(store.root)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "here\n"
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL and len(store.child(PARTS).files()) == 4
    data = config(folder)
    calls = []
    earlier = read_earlier(store, data, print)
    resumed = build_manifest(data, progress=lambda *now: calls.append(now), earlier=earlier)
    assert sorted(scanned) == ["00002.tar", "p.parquet", "zero.tar"]
    assert calls == [(2, 5), (3, 5), (4, 5), (5, 5)]
    assert (earlier.kept, earlier.scanned) == (2, 3)
    assert to_bytes(resumed) == to_bytes(build_manifest(data))


def test_a_failed_index_keeps_what_it_found(
    folder: Path, store: LocalStore, scanned: list[str]
) -> None:
    # The storage fails at the third shard; parts are due every ten seconds otherwise.
    def fails(function: Callable, jobs: list) -> Iterator:
        yield from map(function, jobs[:2])
        raise OSError(5, "Input/output error")

    data = config(folder)
    with pytest.raises(OSError, match="Input/output"):
        build_manifest(data, fails, earlier=Earlier(store))
    scanned.clear()
    index(data, store)
    assert len(scanned) == 3 and store.child(PARTS).files() == []


def test_a_part_of_a_shard_that_changed_is_not_used(
    folder: Path, store: LocalStore, scanned: list[str]
) -> None:
    data = config(folder)
    build_manifest(data, earlier=Earlier(store))
    os.utime(folder / "00001.tar", ns=(time.time_ns(), 1))
    scanned.clear()
    index(data, store)
    assert scanned == ["00001.tar"]


@pytest.mark.parametrize(
    ("path", "folder"),
    [
        ("/a/b/{000..123}.tar", "/a/b"),
        ("/a/*/x.tar", "/a"),
        ("/a/b", "/a/b"),
        ("/a/b/", "/a/b"),
        ("/a/b/x.parquet", "/a/b"),
        ("s3://bucket/set/[01]*.tar", "s3://bucket/set"),
        ("s3://bucket/*.tar", "s3://bucket"),
    ],
)
def test_the_folder_of_a_source(path: str, folder: str) -> None:
    assert folder_of(path) == folder


@settings(deadline=None, max_examples=20)
@given(
    rounds=st.lists(
        st.dictionaries(st.sampled_from("abcde"), st.integers(0, 4)), min_size=1, max_size=4
    )
)
def test_any_history_gives_what_an_index_from_nothing_does(rounds: list[dict[str, int]]) -> None:
    """In each round some shards are written, with that many samples, or deleted (0 samples)."""
    with tempfile.TemporaryDirectory() as place:
        folder, store = Path(place) / "set", LocalStore(Path(place) / "run")
        folder.mkdir()
        write_tar(folder / "first.tar", pairs(3))
        for number, changes in enumerate(rounds):
            for name, count in changes.items():
                path = folder / f"{name}.tar"
                path.unlink(missing_ok=True)
                if count:
                    members = [(f"{name}{number}{n}", d) for n, d in pairs(count)]
                    write_tar(path, [*members, ("x.txt", b"no image")])
            data = config(folder, holdout=0.1)
            assert to_bytes(index(data, store)) == to_bytes(build_manifest(data))
