from __future__ import annotations

import errno
import os
import pickle
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clip_ray import storage
from clip_ray.config import S3Options
from clip_ray.errors import ConfigError, DataError, StorageError
from clip_ray.storage import (
    ChangedError,
    FileInfo,
    LocalStore,
    S3Store,
    Store,
    digest_bytes,
    expand,
    open_store,
    split_uri,
)


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """An empty directory, on each kind of store."""
    if request.param == "local":
        return open_store(tmp_path / "store")
    options = request.getfixturevalue("s3")
    return open_store(f"s3://bucket/{tmp_path.name}", options)


def test_what_is_written_is_read_whole_and_in_parts(store: Store) -> None:
    store.write("a/b.bin", bytes(range(100)))
    assert store.read("a/b.bin") == bytes(range(100))
    assert store.read("a/b.bin", 10, 20) == bytes(range(10, 20))
    assert store.read("a/b.bin", 95, 200) == bytes(range(95, 100))
    assert store.child("a").read("b.bin", 98) == bytes([98, 99])
    store.write("a/b.bin", b"new")
    assert store.read("a/b.bin") == b"new"


def test_an_empty_file_is_a_file(store: Store) -> None:
    store.write("empty", b"")
    assert store.read("empty") == b"" and store.info("empty").size == 0
    assert store.exists("empty") and store.files() == ["empty"]


def test_info_tells_size_and_a_version_that_changes(store: Store) -> None:
    store.write("x.tar", b"one")
    first = store.info("x.tar")
    assert (first.size, first.path) == (3, f"{store.uri}/x.tar")
    assert store.info("x.tar") == first
    store.write("x.tar", b"two")
    assert store.info("x.tar").version != first.version


def test_a_read_may_ask_for_one_version(store: Store) -> None:
    store.write("x.tar", b"one")
    file = store.info("x.tar")
    assert store.read("x.tar", 1, 3, file) == b"ne" and store.read("x.tar", expected=file) == b"one"
    for other in (b"two", b"longer"):
        store.write("x.tar", other)
        with pytest.raises(ChangedError, match="expected 3 bytes, .*; now . bytes") as raised:
            store.read("x.tar", 1, 3, file)
        assert pickle.loads(pickle.dumps(raised.value)).now == store.info("x.tar")
    # Beyond the end of what is there now.
    long = FileInfo(file.path, 1000, file.version)
    with pytest.raises(ChangedError):
        store.read("x.tar", 500, 900, long)
    store.delete("x.tar")
    with pytest.raises(FileNotFoundError):
        store.read("x.tar", 1, 3, file)


def test_a_store_that_does_not_heed_if_match_is_seen_through(
    s3: S3Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = S3Store(f"s3://bucket/{tmp_path.name}", s3)
    store.write("x", b"one")
    file = store.info("x")
    get = store.client._get
    with monkeypatch.context() as patch:
        patch.setattr(store.client, "_get", lambda path, start, stop, _: get(path, start, stop, ""))
        assert store.read("x", 0, 3, file) == b"one"
        store.write("x", b"two")
        with pytest.raises(ChangedError):
            store.read("x", 0, 3, file)
    # One that refuses the ETag that it names itself must not void a sample: no ChangedError.
    file = store.info("x")
    monkeypatch.setattr(
        store.client, "_get", lambda path, start, stop, _: get(path, start, stop, '"x"')
    )
    with pytest.raises(StorageError, match="refuses a read of that ETag"):
        store.read("x", 0, 3, file)


def test_what_is_missing_is_file_not_found(store: Store) -> None:
    for read in (store.read, store.info):
        with pytest.raises(FileNotFoundError):
            read("gone")
    assert not store.exists("gone")
    assert store.files() == [] and store.directories() == []
    store.delete("gone")


def test_listings_name_files_below_and_directories_beside(store: Store) -> None:
    for name in ("z", "a/1", "a/b/2", "c/3"):
        store.write(name, b"x")
    assert store.files() == ["a/1", "a/b/2", "c/3", "z"]
    assert store.directories() == ["a", "c"]
    assert store.child("a").files() == ["1", "b/2"]
    assert not store.exists("a")
    store.delete("a")
    assert store.files() == ["c/3", "z"]
    store.delete("z")
    assert store.files() == ["c/3"]


def test_one_of_many_creators_wins(store: Store) -> None:
    outcomes: list[str] = []
    start = threading.Barrier(6)

    def create(number: int) -> None:
        start.wait(30)
        try:
            store.create("lock", f"owner {number}".encode())
            outcomes.append(f"owner {number}")
        except FileExistsError:
            outcomes.append("")

    threads = [threading.Thread(target=create, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    winners = [outcome for outcome in outcomes if outcome]
    assert len(outcomes) == 6 and len(winners) == 1
    assert store.read("lock") == winners[0].encode()


def test_put_and_download_carry_files(store: Store, tmp_path: Path) -> None:
    digest = store.put("big", lambda path: path.write_bytes(b"x" * 1000) and None)
    assert digest == digest_bytes(b"x" * 1000)
    store.download("big", tmp_path / "new" / "copy")
    assert (tmp_path / "new" / "copy").read_bytes() == b"x" * 1000


def test_a_put_that_fails_leaves_nothing(store: Store) -> None:
    def fail(path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        store.put("big", fail)
    assert store.files() == []


def test_a_store_pickles(store: Store) -> None:
    store.write("a", b"1")
    assert pickle.loads(pickle.dumps(store)).read("a") == b"1"


LOCAL_READS: dict[str, Callable[[LocalStore, Path], object]] = {
    "read": lambda store, _: store.read("x", 1, 3),
    "info": lambda store, _: store.info("x"),
    "download": lambda store, folder: store.download("x", folder / "copy"),
}


@pytest.mark.parametrize("name", LOCAL_READS)
def test_local_reads_outlive_what_passes_and_no_more(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "_PAUSES_S", (0.0, 0.0))
    store, read = LocalStore(tmp_path / "store"), LOCAL_READS[name]
    store.write("x", b"123")
    expected = read(store, tmp_path)
    failures: list[int] = []

    def failing(plain: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if failures:
                raise OSError(failures.pop(0), "said so")
            return plain(*args, **kwargs)

        return call

    if name == "read":
        monkeypatch.setattr(storage, "open", failing(open), raising=False)
    elif name == "info":
        monkeypatch.setattr(Path, "stat", failing(os.stat))
    else:
        monkeypatch.setattr(shutil, "copyfile", failing(shutil.copyfile))
    for code in (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.ENOTCONN):
        failures[:] = [code, code]
        assert read(store, tmp_path) == expected and failures == []
        failures[:] = [code] * 4
        with pytest.raises(OSError, match="said so") as raised:
            read(store, tmp_path)
        assert raised.value.errno == code and len(failures) == 1
    for code in (errno.ENOENT, errno.EACCES, errno.ENOSPC, errno.EISDIR):
        failures[:] = [code, code]
        with pytest.raises(OSError, match="said so"):
            read(store, tmp_path)
        assert len(failures) == 1


def test_local_temporaries_are_not_listed(tmp_path: Path) -> None:
    (tmp_path / ".a.123.tmp").write_bytes(b"half")
    assert LocalStore(tmp_path).files() == []


def test_expand_takes_files_folders_globs_and_braces(store: Store) -> None:
    options = getattr(store, "options", None)
    for name in ("00008.tar", "00009.tar", "00010.TAR", "sub/x.parquet", "notes.txt"):
        store.write(name, b"x")
    root = store.uri

    def names(pattern: str) -> list[str]:
        found = expand(pattern, options)
        assert all(info.size == 1 and info.version for info in found)
        return [info.path.removeprefix(f"{root}/") for info in found]

    assert names(root) == ["00008.tar", "00009.tar", "00010.TAR", "sub/x.parquet"]
    assert names(f"{root}/") == names(root)
    assert names(f"{root}/00009.tar") == ["00009.tar"]
    assert names(f"{root}/0000*.tar") == ["00008.tar", "00009.tar"]
    assert names(f"{root}/{{00008..00012}}.tar") == ["00008.tar", "00009.tar"]
    assert names(f"{root}/*/x.parquet") == ["sub/x.parquet"]
    assert names(f"{root}/**/*.parquet") == ["sub/x.parquet"]
    for pattern in (f"{root}/nothing*", f"{root}/notes.txt", f"{root}/none/"):
        with pytest.raises(DataError, match="no shard matches .* jobs/prepare.py"):
            names(pattern)


def test_expanded_versions_are_those_of_info(store: Store) -> None:
    store.write("a.tar", b"x")
    assert expand(store.uri, getattr(store, "options", None)) == [store.info("a.tar")]


def test_an_unmatched_brace_pattern_shows_its_ends(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"000.tar \.\.\. .*/123.tar \(124 names\)"):
        expand(f"{tmp_path}/{{000..123}}.tar")


def test_a_missing_bucket_is_named(s3: S3Options) -> None:
    with pytest.raises(DataError, match="bucket 'no-such-bucket' does not exist"):
        expand("s3://no-such-bucket/set/", s3)
    with pytest.raises(DataError, match="bucket 'no-such-bucket' does not exist"):
        open_store("s3://no-such-bucket/x", s3).write("a", b"1")


def test_other_schemes_are_refused() -> None:
    with pytest.raises(ConfigError, match="cannot read gs://"):
        open_store("gs://bucket/x")


def test_split_uri() -> None:
    assert split_uri("/a/b.tar") == ("/a", "b.tar")
    assert split_uri("s3://bucket/a/b.tar") == ("s3://bucket/a", "b.tar")
    assert split_uri("/b.tar") == ("/", "b.tar")


def test_many_shards_of_an_s3_folder_are_one_listing(
    s3: S3Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store("s3://bucket/many", s3)
    for number in (*range(12), 20, 21):
        store.write(f"{number:05d}.tar", b"x")
    store.write("00000.parquet", b"x")
    store.write("other.tar", b"x")
    store.write("below/00003.tar", b"x")
    listed = []
    plain = storage._matches
    monkeypatch.setattr(storage, "_matches", lambda n, o: listed.append(n) or plain(n, o))
    found = expand("s3://bucket/many/{00000..00020}.tar", s3)
    assert [f.path for f in found] == [
        f"s3://bucket/many/{number:05d}.tar" for number in (*range(12), 20)
    ]
    assert listed == ["s3://bucket/many/*"]
    assert found[0] == store.info("00000.tar")
    assert [f.path for f in expand("s3://bucket/many/{00003..00005}.tar", s3)] == [
        f"s3://bucket/many/0000{number}.tar" for number in (3, 4, 5)
    ]
    assert len(listed) == 4
    with pytest.raises(DataError, match=r"no shard matches .*\(20 names\)"):
        expand("s3://bucket/many/no-{00000..00019}.tar", s3)
