"""Reads from S3 through a proxy that fails: each fault, the bounds, and slow reads overtaken."""

from __future__ import annotations

import asyncio
import itertools
import random
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from clip_ray.config import S3Options
from clip_ray.errors import StorageError
from clip_ray.storage import S3Store, expand, open_store, s3_reads
from tests.s3_proxy import Faults, Proxy, s3_proxy


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
def test_a_store_that_is_down_is_given_up_in_time(
    proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = through(proxy, tmp_path, timeout_s=0.3, retry_s=4)
    store.write("x", b"123")
    attempts = []
    get = store.client._get
    monkeypatch.setattr(store.client, "_get", lambda *args: attempts.append(args) or get(*args))
    for faults in (Faults(error=1), Faults(hang=1, hang_s=10)):
        proxy.begin(faults)
        begin = time.monotonic()
        with pytest.raises(OSError, match="bytes 0 to 2 of s3://.*/x failed") as raised:
            store.read("x", 0, 2)
        # Not the bound itself: the pause before the last attempt may be as long as an attempt.
        assert 3.5 < time.monotonic() - begin < 8
        said = int(re.search(r"failed (\d+) times", str(raised.value))[1])  # type: ignore[index]
        # The last attempt has what is left of the bound, which may be nothing; on a busy machine
        # others do not arrive in their 0.3 s either.
        assert said - len(attempts) in (0, 1) and 1 < sum(proxy.counts.values()) <= said
        attempts.clear()
    port = proxy.endpoint.rpartition(":")[2]
    nobody = S3Options(endpoint=proxy.endpoint.replace(port, "1"), timeout_s=0.3, retry_s=0.5)
    with pytest.raises(OSError, match=r"the last time: .*Check the network and s3.endpoint"):
        open_store("s3://bucket/x", nobody).info("x")


def test_no_request_pays_for_the_making_of_a_client(
    proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Other options than those of other tests: fsspec would give their client.
    store = through(proxy, tmp_path, timeout_s=0.7, retry_s=0)
    make, made = store.client.set_session, []

    async def slowly(*args: Any) -> Any:
        if not made:
            time.sleep(1)  # not the loop's: it is the CPU that is busy
            made.append(True)
        return await make(*args)

    monkeypatch.setattr(store.client, "set_session", slowly)
    store.write("x", b"123")
    assert made and store.read("x") == b"123"

    async def never(*args: Any) -> None:
        await asyncio.sleep(30)

    monkeypatch.setattr(store.client, "set_session", never)
    monkeypatch.setattr(s3_reads, "_CLIENT_S", 0.1)
    with pytest.raises(StorageError, match=r"x: no client of S3 was made within 0.1 s; .*hang"):
        store.read("x")


def test_what_will_not_pass_is_not_tried_again(proxy: Proxy, tmp_path: Path) -> None:
    store = through(proxy, tmp_path)
    with pytest.raises(FileNotFoundError):
        store.read("gone")
    assert [r.method for r in proxy.log if r.path.endswith("/gone")] == ["GET"]


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
    part = store.client._part

    async def replacing(*args: Any) -> s3_reads.Part:
        found = await part(*args)
        if args[1] == 0:
            await asyncio.to_thread(store.write, "x", bytes([1]) * 5000)
        return found

    monkeypatch.setattr(store.client, "_part", replacing)
    with pytest.raises(OSError, match="pre-condition"):
        store.read("x")


def test_what_is_slow_follows_what_is_usual() -> None:
    pace = s3_reads.Pace(0.05, floor_s=1.0, first_s=2.0)
    for _ in range(9):
        pace.saw(0.01)
        assert pace.patience() == 2.0
    for _ in range(40):
        pace.saw(0.01)
        assert pace.patience() == 1.0
    # Of few, twice the slowest; of 100, one is no rule.
    for seen, patience in ((0.7, 1.4), (5.0, 2.0)):
        pace.saw(seen)
        assert pace.patience() == patience
    for _ in range(300):
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
    assert abs(allowed - (share * 2000 + 2 if share else 0)) <= 1
    # A long calm saves up a few, not a hundred.
    for _ in range(2000):
        pace.saw(9.0)
    assert sum(pace.may_send_twice() for _ in range(100)) == (10 if share else 0)


def test_the_first_reads_of_a_process_are_overtaken_too(proxy: Proxy, tmp_path: Path) -> None:
    # A run reads in many processes: each comes to its 21st GET late.
    store = through(proxy, tmp_path, timeout_s=29)  # not the client of other tests
    store.write("x", b"123")
    store.client.pace = s3_reads.Pace(0.05, first_s=0.2)
    for _ in range(2):
        proxy.begin(Faults(slow=1, slow_s=20, only="GET"))
        with ThreadPoolExecutor(1) as pool:
            reading = pool.submit(store.read, "x", 0, 3)
            while not proxy.counts["slow"]:
                time.sleep(0.01)
            proxy.faults = Faults()
            assert reading.result(15) == b"123"
        assert len(proxy.log) == 2
    assert store.client.pace.sent_twice == 2


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


def test_a_slow_read_is_overtaken(proxy: Proxy, tmp_path: Path) -> None:
    slow_s, floor_s = 5.0, 1.0  # far apart: a busy machine is slow by itself
    data = random.Random(2).randbytes(200_000)
    ranges = [(at, at + 1000) for at in range(0, 200_000, 1000)]
    store, plain = through(proxy, tmp_path), through(proxy, tmp_path, hedge=0)
    store.write("x", data)
    store.client.pace = s3_reads.Pace(0.05, floor_s=floor_s, first_s=2 * floor_s)
    took, lost = {}, {}
    for name, reading in (("hedged", store), ("plain", plain)):
        # With this seed 4 of 200 GETs are slow, the first after 100.
        proxy.begin(Faults(slow=0.01, slow_s=slow_s, only="GET"), seed=13)
        found = waits(reading, ranges, data)
        assert proxy.counts["slow"] >= 3
        took[name], lost[name] = sum(found), sum(w for w in found if w > slow_s / 2)
    print(f"slow GETs of {slow_s} s: seconds {took}, of them in waits for one read {lost}")
    assert 3 <= store.client.pace.sent_twice <= 0.05 * len(ranges)
    assert lost["plain"] > 2 * slow_s
    assert lost["hedged"] < 0.3 * lost["plain"]
    assert took["hedged"] < took["plain"]
