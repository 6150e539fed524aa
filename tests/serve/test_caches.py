from __future__ import annotations

import asyncio
import hashlib
import logging

import numpy as np
import pytest

from serve.caches import Lru, MatrixCache, SingleFlight, TextCache, prompts_digest


class Work:
    """A computation that waits until it is let go; counts beginnings and ends."""

    def __init__(self, rows: int = 1, error: Exception | None = None) -> None:
        self.rows, self.error = rows, error
        self.begun = self.cancelled = 0
        self.go = asyncio.Event()

    async def __call__(self) -> np.ndarray:
        self.begun += 1
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.error:
            raise self.error
        return np.full((self.rows, 4), self.begun, np.float32)


async def settle() -> None:
    """Let every task run until it waits for something else."""
    for _ in range(10):
        await asyncio.sleep(0)


def test_no_other_labels_or_templates_have_the_same_digest():
    lists = [
        (["a", "b"], ["{}"]),
        (["a"], ["b", "{}"]),
        (["ab"], ["{}"]),
        (["a\0b"], ["{}"]),
        (["a\0b", "c"], ["{}"]),
        (["a", "b\0c"], ["{}"]),
        (["a", "b\0c", "{}"], []),
        (["", '["a\\u0000b", "{}"]'], []),
        (["b", "a"], ["{}"]),
        (["a", "b", ""], ["{}"]),
        (["\ud800"], ["{}"]),
        (["?"], ["{}"]),
    ]
    assert len({prompts_digest(*one) for one in lists}) == len(lists)
    assert prompts_digest(("a", "b"), ("{}",)) == prompts_digest(["a", "b"], ["{}"])


def test_the_digest_names_files_and_must_never_change():
    data = b"joined 2 1 cat\0dog\0a {}."
    assert prompts_digest(["cat", "dog"], ["a {}."]) == hashlib.sha256(data).hexdigest()


def test_what_was_used_longest_ago_goes_first():
    kept: Lru[str, int] = Lru(entries=2)
    kept.put("a", 1)
    kept.put("b", 2)
    assert kept.get("a") == 1
    kept.put("c", 3)
    assert kept.keys() == ("a", "c") and kept.get("b") is None


def test_bytes_bound_what_is_kept():
    kept: Lru[str, int] = Lru(max_bytes=10)
    kept.put("a", 1, 4)
    kept.put("b", 2, 4)
    kept.put("a", 3, 6)  # in the place of the 4 before
    assert (kept.keys(), kept.bytes) == (("b", "a"), 10)
    kept.put("huge", 4, 11)  # pushes nothing out
    assert (kept.keys(), kept.bytes) == (("b", "a"), 10)
    kept.put("c", 5, 1)
    assert (kept.keys(), kept.bytes) == (("a", "c"), 7)
    kept.pop("a")
    kept.pop("a")
    assert (kept.keys(), kept.bytes) == (("c",), 1)


def test_callers_of_one_key_share_one_computation():
    async def run() -> None:
        cache, work, other = MatrixCache(4), Work(), Work()
        calls = [asyncio.create_task(cache.get("k", work)) for _ in range(5)]
        calls.append(asyncio.create_task(cache.get("another", other)))
        await settle()
        work.go.set()
        other.go.set()
        results = await asyncio.gather(*calls)
        assert (work.begun, other.begun) == (1, 1)
        assert all(matrix is results[0][0] and not cached for matrix, cached in results[:5])
        assert results[5][0] is not results[0][0]
        matrix, cached = await cache.get("k", work)
        assert cached and matrix is results[0][0] and work.begun == 1
        assert (cache.hits, cache.misses) == (1, 6)

    asyncio.run(run())


def test_a_shared_matrix_cannot_be_changed():
    async def run() -> None:
        work = Work()
        work.go.set()
        matrix, _ = await MatrixCache(1).get("k", work)
        with pytest.raises(ValueError, match="read-only"):
            matrix[0, 0] = 7

    asyncio.run(run())


def test_an_error_goes_to_all_who_wait_and_is_not_kept():
    async def run() -> None:
        cache, broken = MatrixCache(4), Work(error=OSError("no"))
        calls = [asyncio.create_task(cache.get("k", broken)) for _ in range(2)]
        await settle()
        broken.go.set()
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(result) for result in results] == [OSError, OSError] and broken.begun == 1
        broken.error = None
        _, cached = await cache.get("k", broken)
        assert not cached and broken.begun == 2

    asyncio.run(run())


@pytest.mark.parametrize("leaver", [0, 1])
def test_a_caller_who_leaves_does_not_take_the_others_along(leaver):
    async def run() -> None:
        cache, work = MatrixCache(4), Work()
        calls = [asyncio.create_task(cache.get("k", work)) for _ in range(3)]
        await settle()
        calls[leaver].cancel()
        await settle()
        work.go.set()
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert isinstance(results.pop(leaver), asyncio.CancelledError)
        assert [cached for _, cached in results] == [False, False]
        assert (work.begun, work.cancelled) == (1, 0)

    asyncio.run(run())


def test_what_nobody_waits_for_is_ended_and_begun_anew():
    async def run() -> None:
        cache, work = MatrixCache(4), Work()
        calls = [asyncio.create_task(cache.get("k", work)) for _ in range(2)]
        await settle()
        for call in calls:
            call.cancel()
        late = asyncio.create_task(cache.get("k", work))  # comes while the first is ended
        await asyncio.gather(*calls, return_exceptions=True)
        await settle()
        work.go.set()
        matrix, _ = await late
        assert matrix[0, 0] == 2 and (work.begun, work.cancelled) == (2, 1)

    asyncio.run(run())


def test_a_computation_may_outlive_its_callers(caplog):
    async def run() -> None:
        cache, work = MatrixCache(4, cancel_abandoned=False), Work()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(cache.get("k", work), 0.001)
        work.go.set()
        await settle()
        assert (await cache.get("k", work))[1] and work.begun == 1

        flights: SingleFlight[np.ndarray] = SingleFlight(cancel_abandoned=False)
        broken = Work(error=OSError("too late"))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(flights.run("k", broken), 0.001)
        broken.go.set()
        await settle()

    with caplog.at_level(logging.WARNING):
        asyncio.run(run())
    assert [record.getMessage() for record in caplog.records] == [
        "computed for callers who had left: OSError: too late"
    ]


def test_matrices_are_bounded_by_number_and_by_bytes():
    async def run() -> None:
        def work(rows: int) -> Work:
            made = Work(rows)
            made.go.set()
            return made

        cache = MatrixCache(entries=2, max_bytes=16 * 10)
        for key in "abc":
            await cache.get(key, work(1))
        assert cache.keys() == ("b", "c") and cache.bytes == 32
        await cache.get("nine", work(9))
        assert cache.keys() == ("c", "nine")
        await cache.get("eleven", work(11))
        await cache.get("passing", work(1), keep=False)
        assert cache.keys() == ("c", "nine") and len(cache) == 2
        cache.drop(lambda key: key == "c")
        assert cache.keys() == ("nine",) and cache.bytes == 16 * 9

    asyncio.run(run())


def test_texts_are_found_by_model_and_text():
    cache = TextCache(10)
    rows = np.arange(8, dtype=np.float32).reshape(2, 4)
    cache.store("m1", ["a", "\ud800"], rows)
    rows[:] = -1  # the batch is reused; what is kept is not
    found = cache.lookup("m1", ["\ud800", "b", "a"])
    assert found[1] is None
    np.testing.assert_array_equal(found[0], [4, 5, 6, 7])
    np.testing.assert_array_equal(found[2], [0, 1, 2, 3])
    assert found[0].dtype == np.float32 and found[0].base is None
    assert cache.lookup("m2", ["a"]) == [None]
    assert (cache.hits, cache.misses) == (2, 2)


def test_texts_used_longest_ago_go_first():
    cache = TextCache(2)
    rows = np.zeros((1, 4), np.float32)
    for text in "ab":
        cache.store("m", [text], rows)
    cache.lookup("m", ["a"])
    cache.store("m", ["c"], rows)
    assert [row is not None for row in cache.lookup("m", ["a", "b", "c"])] == [True, False, True]


def test_no_entries_keep_no_text():
    cache = TextCache(0)
    cache.store("m", ["a"], np.zeros((1, 4), np.float32))
    assert cache.lookup("m", ["a"]) == [None] and len(cache) == 0
