"""Writes to S3 through a proxy that fails: each fault, the bounds, and answers that get lost."""

from __future__ import annotations

import random
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError
from s3fs import S3FileSystem

from clip_ray.config import S3Options
from clip_ray.errors import ConfigError, StorageError
from clip_ray.storage import S3Store, digest_bytes, s3_reads, s3_writes
from tests.s3_proxy import Faults, Proxy, s3_proxy

MB = 1 << 20


@pytest.fixture(scope="module")
def one_proxy(s3: S3Options) -> Iterator[Proxy]:
    with s3_proxy(str(s3.endpoint)) as running:
        yield running


@pytest.fixture
def proxy(one_proxy: Proxy) -> Proxy:
    """A proxy in front of the S3 server that does no harm yet."""
    one_proxy.begin()
    return one_proxy


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_reads, "_BACKOFF_S", (0.01, 0.1))


def through(proxy: Proxy, folder: Path, **options: Any) -> S3Store:
    """Return a directory of this test behind the proxy."""
    return S3Store(f"s3://bucket/{folder.name}", S3Options(endpoint=proxy.endpoint, **options))


def fill(data: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(data) and None


WRITES: dict[str, Callable[[S3Store, str], object]] = {
    "write": lambda store, name: store.write(name, b"data"),
    "create": lambda store, name: store.create(name, b"data"),
    "put": lambda store, name: store.put(name, fill(b"data")),
    "delete": lambda store, name: store.delete(name),
    "files": lambda store, name: store.files(),
    "directories": lambda store, name: store.directories(),
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("fault", ["error", "throttle", "lost", "hang"])
def test_each_write_outlives_each_fault(
    fault: str, write: str, proxy: Proxy, tmp_path: Path
) -> None:
    store = through(proxy, tmp_path, timeout_s=0.3, retry_s=30)
    direct = through(proxy, tmp_path)
    number = 0
    proxy.begin()
    while not proxy.counts[fault]:
        name = f"{number}/x"
        if write == "delete":
            proxy.begin()
            direct.write(name, b"data")
        proxy.begin(Faults(**{fault: 0.5}, hang_s=1), seed=number)  # type: ignore[arg-type]
        WRITES[write](store, name)
        counted = proxy.counts.copy()
        proxy.begin()
        if write in ("write", "create", "put"):
            assert direct.read(name) == b"data"
        elif write == "delete":
            assert not direct.exists(name)
        proxy.counts.update(counted)
        number += 1
    once = through(proxy, tmp_path, timeout_s=0.3, retry_s=0)
    proxy.begin(Faults(**{fault: 1}, hang_s=1))  # type: ignore[arg-type]
    with pytest.raises(StorageError, match=r"failed 1 times .* the last time: .*s3.retry_s"):
        WRITES[write](once, "once")


def test_a_store_that_never_answers_is_given_up_in_time(tmp_path: Path) -> None:
    writes = {
        **WRITES,
        "put of parts": lambda store, name: store.put(name, fill(bytes(2 * s3_writes.PART))),
    }

    def seconds(write: Callable[[S3Store, str], object]) -> float:
        begin = time.monotonic()
        with pytest.raises(StorageError, match=r"failed \d+ times in .* and was given up"):
            write(store, "x")
        return time.monotonic() - begin

    with socket.create_server(("127.0.0.1", 0), backlog=128) as silent:
        port = silent.getsockname()[1]
        options = S3Options(endpoint=f"http://127.0.0.1:{port}", timeout_s=0.5, retry_s=2)
        store = S3Store(f"s3://bucket/{tmp_path.name}", options)
        store.client.connect()  # its making has a bound of its own
        with ThreadPoolExecutor(len(writes)) as pool:
            took = dict(zip(writes, pool.map(seconds, writes.values()), strict=True))
    # s3fs's own loops take half an hour for this.
    assert all(1.5 < each < 8 for each in took.values()), took


@pytest.mark.parametrize("fault", ["error", "lost", "conflict"])
def test_creation_is_exclusive_where_requests_are_repeated(
    fault: str, proxy: Proxy, tmp_path: Path
) -> None:
    store = through(proxy, tmp_path)
    # Until the fault has hit one: a request that got lost after it was carried out looks, when
    # it is repeated, as if somebody else had been first.
    proxy.begin(Faults(**{fault: 0.25}, only="PUT"))  # type: ignore[arg-type]
    for number in range(20):
        store.create(f"{number}", b"mine")
        with pytest.raises(FileExistsError):
            store.create(f"{number}", b"yours")
        assert store.read(f"{number}") == b"mine"
        if proxy.counts[fault] > 1:
            break
    assert proxy.counts[fault] > 1


def uploads(store: S3Store) -> list[Any]:
    found: dict[str, Any] = store.client.call_s3("list_multipart_uploads", Bucket="bucket")
    return found.get("Uploads", [])


@pytest.mark.parametrize(
    ("size", "part"),
    [(17 * MB, 5 * MB), pytest.param(120 * MB, s3_writes.PART, marks=pytest.mark.slow)],
)
def test_a_large_file_goes_up_in_parts(
    size: int, part: int, proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_writes, "PART", part)
    store = through(proxy, tmp_path)
    data = random.Random(0).randbytes(size)
    proxy.begin(Faults(error=0.2 if size < 100 * MB else 0.05), seed=3)
    while not proxy.counts["error"]:
        assert store.put("x", fill(data)) == digest_bytes(data)
    sent = {r.path for r in proxy.log if r.method == "PUT" and not r.fault}
    assert len(sent) >= -(-size // part) and all("partNumber=" in path for path in sent)
    proxy.begin()
    assert store.read("x") == data
    # The same from memory, and only where nothing is.
    with pytest.raises(FileExistsError):
        store.create("x", bytes(2 * part))
    store.create("y", data[: 2 * part])
    assert store.read("y") == data[: 2 * part]
    assert uploads(store) == []


@pytest.mark.parametrize("request_", ["POST .*uploads", "PUT", "POST .*uploadId"])
def test_an_upload_of_which_answers_get_lost_is_whole(
    request_: str, proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_writes, "PART", 5 * MB)
    store = through(proxy, tmp_path)
    data = random.Random(1).randbytes(11 * MB)
    proxy.begin(Faults(lost=0.5, only=request_), seed=1)
    number = 0
    while not proxy.counts["lost"]:
        store.create(f"{number}", data)
        assert store.read(f"{number}") == data
        number += 1
    # What somebody else wrote is not taken for ours.
    begun = store.client._call_s3

    async def overtaken(method: str, *args: Any, **kwargs: Any) -> Any:
        if method == "complete_multipart_upload":
            await begun("put_object", Bucket="bucket", Key=kwargs["Key"], Body=b"other")
            answer = {"ResponseMetadata": {"HTTPStatusCode": 404}}  # moto has none for this
            raise FileNotFoundError("NoSuchUpload") from ClientError(answer, method)
        return await begun(method, *args, **kwargs)

    proxy.begin()
    monkeypatch.setattr(store.client, "_call_s3", overtaken)
    with pytest.raises(StorageError, match="has lost the upload"):
        store.put("theirs", fill(data))
    assert store.read("theirs") == b"other"


def test_an_upload_that_is_given_up_leaves_nothing(
    proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_writes, "PART", 5 * MB)
    store = through(proxy, tmp_path, retry_s=1)
    before = len(uploads(store))
    proxy.begin(Faults(error=1, only="PUT .*partNumber=2"))
    with pytest.raises(StorageError, match="upload_part of s3://bucket/.*/x failed"):
        store.put("x", fill(bytes(11 * MB)))
    proxy.begin()
    assert not store.exists("x") and len(uploads(store)) == before


def test_many_are_deleted_by_few_requests_and_refusals_are_said(
    proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_writes, "_KEYS", 3)
    store = through(proxy, tmp_path, retry_s=20)
    for number in range(7):
        store.write(f"a/{number}", b"x")
    store.write("ab", b"stays")
    proxy.begin()
    store.delete("a")
    assert [r.method for r in proxy.log] == ["GET", "POST", "POST", "POST"]
    assert store.files() == ["ab"]
    plain, answers = S3FileSystem._call_s3, ["InternalError", "AccessDenied"]

    async def failing(self: S3FileSystem, method: str, *args: Any, **kwargs: Any) -> Any:
        if method == "delete_objects":
            return {"Errors": [{"Code": answers.pop(0), "Key": "ab", "Message": "said so"}]}
        return await plain(self, method, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(S3FileSystem, "_call_s3", failing)
        with pytest.raises(ConfigError, match="access denied by the store .*said so"):
            store.delete("ab")
    assert answers == [] and store.exists("ab")
