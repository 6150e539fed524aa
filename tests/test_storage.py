from __future__ import annotations

import asyncio
import itertools
import pickle
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from clip_ray.config import S3Options
from clip_ray.errors import ConfigError, DataError
from clip_ray.storage import (
    LocalStore,
    S3Store,
    Store,
    digest_bytes,
    expand,
    open_store,
    s3_reads,
    split_uri,
)
from tests.s3_proxy import Faults, Proxy, s3_proxy


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


# A network that fails


@pytest.fixture(scope="module")
def one_proxy(s3: S3Options) -> Iterator[Proxy]:
    with s3_proxy(str(s3.endpoint)) as running:
        yield running


@pytest.fixture
def proxy(one_proxy: Proxy) -> Proxy:
    """A proxy in front of the S3 server that does no harm yet."""
    one_proxy.begin()
    return one_proxy


def through(proxy: Proxy, folder: Path, **options: Any) -> S3Store:
    """Return a directory of this test behind the proxy."""
    return S3Store(f"s3://bucket/{folder.name}", S3Options(endpoint=proxy.endpoint, **options))


@pytest.fixture
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_reads, "_BACKOFF_S", (0.01, 0.1))


READS: dict[str, Callable[[S3Store], object]] = {
    "whole": lambda store: store.read("a/x"),
    "range": lambda store: store.read("a/x", 1000, 3000),
    "to the end": lambda store: store.read("a/x", 3000),
    "beyond the end": lambda store: store.read("a/x", 3990, 5000),
    "files": lambda store: store.files(),
    "directories": lambda store: store.directories(),
    "find": lambda store: expand(store.uri, store.options),
    "glob": lambda store: expand(f"{store.uri}/**/*.tar", store.options),
    "after the end": lambda store: store.read("a/x", 4000, 5000),
    "info": lambda store: store.info("a/x"),
    "exists": lambda store: store.exists("a/x"),
    "missing": lambda store: store.exists("a/y"),
}
WITH_BODY = list(READS)[:8]


@pytest.mark.usefixtures("_short_pauses")
@pytest.mark.parametrize("fault", ["error", "throttle", "lost", "hang", "reset", "cut", "short"])
def test_each_read_outlives_each_fault(fault: str, proxy: Proxy, tmp_path: Path) -> None:
    store = through(proxy, tmp_path, timeout_s=0.3, retry_s=20)
    once = through(proxy, tmp_path, timeout_s=0.3, retry_s=0)
    store.write("a/x", random.Random(0).randbytes(4000))
    store.write("a/b.tar", b"tar")
    assert store.read("a/x", 3990, 5000) == random.Random(0).randbytes(4000)[3990:]
    assert store.read("a/x", 4000, 5000) == b""
    for name in WITH_BODY if fault in ("reset", "cut", "short") else READS:
        proxy.begin()
        expected = READS[name](store)
        proxy.begin(Faults(**{fault: 0.3}, hang_s=2))  # type: ignore[arg-type]
        while not proxy.counts[fault]:
            assert READS[name](store) == expected, name
        proxy.begin(Faults(**{fault: 1}, hang_s=2))  # type: ignore[arg-type]
        with pytest.raises(OSError, match=r"failed 1 times .* the last time: .*s3.retry_s"):
            READS[name](once)


@pytest.mark.usefixtures("_short_pauses")
def test_a_store_that_is_down_is_given_up_in_time(proxy: Proxy, tmp_path: Path) -> None:
    store = through(proxy, tmp_path, timeout_s=0.3, retry_s=1)
    store.write("x", b"123")
    for faults in (Faults(error=1), Faults(hang=1, hang_s=10)):
        proxy.begin(faults)
        begin = time.monotonic()
        with pytest.raises(
            OSError, match=r"bytes 0 to 2 of s3://.*/x failed (\d+) times"
        ) as raised:
            store.read("x", 0, 2)
        # Not the bound itself: the pause before the last attempt may be as long as an attempt.
        assert 0.5 < time.monotonic() - begin < 5
        if faults.error:
            assert f"failed {len(proxy.log)} times" in str(raised.value)
    port = proxy.endpoint.rpartition(":")[2]
    nobody = S3Options(endpoint=proxy.endpoint.replace(port, "1"), timeout_s=0.3, retry_s=0.5)
    with pytest.raises(OSError, match=r"the last time: .*Check the network and s3.endpoint"):
        open_store("s3://bucket/x", nobody).info("x")


def test_what_will_not_pass_is_not_tried_again(proxy: Proxy, tmp_path: Path) -> None:
    store = through(proxy, tmp_path)
    with pytest.raises(FileNotFoundError):
        store.read("gone")
    assert len(proxy.log) == 1


@pytest.mark.usefixtures("_short_pauses")
def test_large_files_are_read_in_parts_of_one_version(
    proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_reads, "PART", 1000)
    store = through(proxy, tmp_path, retry_s=20)
    data = random.Random(1).randbytes(9500)
    store.write("x", data)
    proxy.begin(Faults(reset=0.2, short=0.2))
    assert store.read("x") == data and store.read("x", 500, 4200) == data[500:4200]
    store.download("x", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == data
    assert proxy.counts["reset"] and proxy.counts["short"]
    proxy.begin()
    with pytest.raises(FileNotFoundError):
        store.download("gone", tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.usefixtures("_short_pauses")
def test_a_file_that_is_replaced_while_it_is_read_is_an_error(
    proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_reads, "PART", 1000)
    store = through(proxy, tmp_path)
    store.write("x", bytes(5000))
    part = store.reader._part

    async def replacing(*args: Any) -> s3_reads.Part:
        found = await part(*args)
        if args[1] == 0:
            await asyncio.to_thread(store.write, "x", bytes([1]) * 5000)
        return found

    monkeypatch.setattr(store.reader, "_part", replacing)
    with pytest.raises(OSError, match="pre-condition"):
        store.read("x")


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


# Slow reads


def test_what_is_slow_follows_what_is_usual() -> None:
    pace = s3_reads.Pace(0.05, floor_s=1.0, first_s=2.0)
    assert pace.patience() == 2.0
    for _ in range(99):
        pace.saw(0.01)
    assert pace.patience() == 2.0
    pace.saw(0.01)
    assert pace.patience() == 1.0
    for n in range(1000):
        pace.saw(3.0 + n / 1000)
    assert pace.patience() == pytest.approx(3.99, abs=0.002)


@pytest.mark.parametrize("share", [0.0, 0.05])
def test_at_most_a_share_is_sent_twice(share: float) -> None:
    pace = s3_reads.Pace(share)
    allowed = 0
    for _ in range(2000):
        allowed += pace.may_send_twice()
        pace.saw(9.0)
    assert allowed == pace.sent_twice
    assert abs(allowed - share * 2000) <= 1
    # A long calm saves up a few, not a hundred.
    for _ in range(2000):
        pace.saw(9.0)
    assert sum(pace.may_send_twice() for _ in range(100)) == (10 if share else 0)


def waits(store: S3Store, ranges: list[tuple[int, int]], data: bytes) -> list[float]:
    """Read ranges in order, two under way, each right; return the seconds between deliveries."""
    found: list[float] = []
    with ThreadPoolExecutor(2) as pool:
        under_way = [pool.submit(store.read, "x", *ranges[0])]
        last = time.monotonic()
        for (start, stop), following in itertools.zip_longest(ranges, ranges[1:]):
            if following:
                under_way.append(pool.submit(store.read, "x", *following))
            assert under_way.pop(0).result(60) == data[start:stop]
            now = time.monotonic()
            found.append(now - last)
            last = now
    return found


@pytest.mark.parametrize(
    ("slow_s", "floor_s", "ratio"),
    [(1.0, 0.15, 0.7), pytest.param(5.0, 1.0, 0.5, marks=pytest.mark.slow)],
)
def test_a_slow_read_is_overtaken(
    slow_s: float, floor_s: float, ratio: float, proxy: Proxy, tmp_path: Path
) -> None:
    data = random.Random(2).randbytes(200_000)
    ranges = [(at, at + 1000) for at in range(0, 200_000, 1000)]
    store, plain = through(proxy, tmp_path), through(proxy, tmp_path, hedge=0)
    store.write("x", data)
    store.reader.pace = s3_reads.Pace(0.05, floor_s=floor_s, first_s=2 * floor_s)
    took = {}
    for name, reading in (("hedged", store), ("plain", plain)):
        # With this seed 4 of 200 GETs are slow, the first after 100.
        proxy.begin(Faults(slow=0.01, slow_s=slow_s, only="GET"), seed=13)
        took[name] = waits(reading, ranges, data)
        slow = proxy.counts["slow"]
        assert slow >= 3
        if name == "hedged":
            assert slow <= store.reader.pace.sent_twice <= 0.05 * len(ranges)
            assert max(took[name]) < slow_s
    assert sum(wait > 0.9 * slow_s for wait in took["plain"]) >= slow - 1
    assert sum(took["hedged"]) < ratio * sum(took["plain"]), took
