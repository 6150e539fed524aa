from __future__ import annotations

import asyncio
import gc
import random
from collections.abc import Coroutine
from typing import Any

import pytest

from serve.admission import Budget
from serve.errors import ApiError


class Turns(asyncio.SelectorEventLoop):
    """A loop whose clock jumps to the next timer where nothing else is to do: no test waits."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds = 0.0
        select = self._selector.select

        def jump(timeout: float | None) -> list[Any]:
            assert timeout is not None, "everything waits, and nothing will ever wake it"
            self.seconds += timeout
            return select(0)

        self._selector.select = jump

    def time(self) -> float:
        return self.seconds


def run(main: Coroutine[Any, Any, None]) -> None:
    faults: list[object] = []
    with asyncio.Runner(loop_factory=Turns) as runner:
        loop = runner.get_loop()
        loop.set_exception_handler(lambda _, context: faults.append(context))
        runner.run(main)
        assert [timer for timer in loop._scheduled if not timer.cancelled()] == []
    gc.collect(1)  # a failed future that nobody has asked speaks up when it goes
    assert faults == []


async def hold(budget: Budget, nbytes: int, seconds: float, entered: list[int]) -> None:
    async with budget.reserve(nbytes):
        entered.append(nbytes)
        await asyncio.sleep(seconds)


async def turn() -> None:
    """Let every task run until it waits."""
    for _ in range(5):
        await asyncio.sleep(0)


def test_what_fits_is_reserved_and_released() -> None:
    async def main() -> None:
        budget = Budget(100, queue_s=1)
        async with budget.reserve(60):
            async with budget.reserve(40):
                assert (budget.in_use, budget.peak, budget.waiting) == (100, 100, 0)
            assert budget.in_use == 60
        assert (budget.in_use, budget.peak, budget.total) == (0, 100, 100)

    run(main())


def test_first_come_first_served() -> None:
    async def main() -> None:
        waits: list[int] = []
        budget, entered = Budget(100, queue_s=10, waits=waits.append), []
        async with asyncio.TaskGroup() as tasks:
            # 30 would fit beside 60 and does not overtake 90; 20 and 30 fit together after it.
            for nbytes in (60, 90, 30, 20):
                tasks.create_task(hold(budget, nbytes, 1, entered))
            await turn()
            assert entered == [60] and budget.waiting == 3 and waits == [1, 1, 1]
            await asyncio.sleep(1)
            await turn()
            assert entered == [60, 90] and budget.waiting == 2 and sum(waits) == 2
        assert entered == [60, 90, 30, 20]
        assert (budget.in_use, budget.peak) == (0, 90)
        assert asyncio.get_running_loop().time() == 3

    run(main())


def test_waiting_is_bounded() -> None:
    async def main() -> None:
        budget, entered = Budget(100, queue_s=5), []
        loop = asyncio.get_running_loop()
        async with budget.reserve(80):
            began = loop.time()
            small = asyncio.create_task(hold(budget, 20, 0, entered))
            with pytest.raises(ApiError) as raised:
                async with budget.reserve(50):
                    raise AssertionError("entered")
            assert loop.time() - began == 5
            assert (raised.value.status, raised.value.code) == (429, "overloaded")
            assert raised.value.retry_after == 1
            await small
            assert (budget.in_use, budget.waiting) == (80, 0)

    run(main())


def test_one_that_is_refused_lets_the_next_in() -> None:
    async def main() -> None:
        budget, entered = Budget(100, queue_s=5), []
        async with budget.reserve(80):
            large = asyncio.create_task(hold(budget, 50, 0, entered))
            await asyncio.sleep(2)
            small = asyncio.create_task(hold(budget, 20, 0, entered))
            await turn()
            assert entered == []
            with pytest.raises(ApiError):
                await large
            await small
            assert entered == [20]
            assert asyncio.get_running_loop().time() == 5

    run(main())


def test_more_than_all_there_is_is_refused_at_once() -> None:
    async def main() -> None:
        budget = Budget(2_000_000, queue_s=5)
        async with budget.reserve(2_000_000):
            with pytest.raises(ApiError, match="needs 2.5 MB .* gives 2.0 MB") as raised:
                async with budget.reserve(2_500_000):
                    raise AssertionError("entered")
        assert raised.value.status == 413
        assert asyncio.get_running_loop().time() == 0

    run(main())


def test_a_cancelled_waiter_leaves_no_hole() -> None:
    async def main() -> None:
        budget, entered = Budget(100, queue_s=10), []
        async with budget.reserve(50):
            first = asyncio.create_task(hold(budget, 80, 0, entered))
            second = asyncio.create_task(hold(budget, 50, 0, entered))
            await turn()
            first.cancel()
            await second
            assert entered == [50]
            with pytest.raises(asyncio.CancelledError):
                await first
        assert (budget.in_use, budget.waiting) == (0, 0)

    run(main())


def test_a_waiter_cancelled_in_the_turn_of_its_grant_gives_it_back() -> None:
    async def main() -> None:
        budget, entered = Budget(100, queue_s=10), []
        for cancels_first in (True, False):
            async with budget.reserve(100):
                waiter = asyncio.create_task(hold(budget, 70, 0, entered))
                next_one = asyncio.create_task(hold(budget, 40, 0, entered))
                await turn()
                if cancels_first:
                    waiter.cancel()
            # The waiter has its memory, or was passed over, and has not run since.
            assert budget.in_use == (40 if cancels_first else 70)
            waiter.cancel()
            await next_one
            with pytest.raises(asyncio.CancelledError):
                await waiter
            assert (budget.in_use, budget.waiting) == (0, 0)
        assert entered == [40, 40]

    run(main())


def test_a_cancelled_or_failing_holder_releases() -> None:
    async def main() -> None:
        budget, entered = Budget(100, queue_s=10), []
        holder = asyncio.create_task(hold(budget, 100, 99, entered))
        await turn()
        holder.cancel()
        with pytest.raises(asyncio.CancelledError):
            await holder
        assert budget.in_use == 0
        with pytest.raises(ZeroDivisionError):
            async with budget.reserve(100):
                1 / 0  # noqa: B018
        assert budget.in_use == 0

    run(main())


def test_growing_goes_before_newcomers() -> None:
    async def main() -> None:
        budget, entered = Budget(100, queue_s=10), []
        other = asyncio.create_task(hold(budget, 40, 1, entered))
        await turn()
        async with budget.reserve(30) as reservation:
            newcomer = asyncio.create_task(hold(budget, 60, 0, entered))
            await turn()
            await reservation.grow(20)  # fits at once, though somebody waits
            assert (budget.in_use, reservation.nbytes) == (90, 50)
            growth = asyncio.create_task(reservation.grow(50))
            await turn()
            small = asyncio.create_task(hold(budget, 1, 0, entered))
            await growth  # when `other` ends, before the two that waited or came
            assert (budget.in_use, budget.waiting) == (100, 2)
            assert entered == [40]
        await asyncio.gather(other, newcomer, small)
        assert entered == [40, 60, 1] and budget.in_use == 0

    run(main())


def test_newcomers_wait_for_those_who_grow() -> None:
    async def main() -> None:
        budget, entered = Budget(100, queue_s=10), []
        other = asyncio.create_task(hold(budget, 40, 1, entered))
        await turn()
        async with budget.reserve(30) as reservation:
            growth = asyncio.create_task(reservation.grow(50))
            await turn()
            newcomer = asyncio.create_task(hold(budget, 25, 0, entered))
            await growth  # with 25 more in use it would have to wait again
            assert entered == [40] and budget.in_use == 80
        await asyncio.gather(other, newcomer)

    run(main())


def test_growing_is_bounded_in_size_and_time() -> None:
    async def main() -> None:
        budget, entered = Budget(100, queue_s=5), []
        other = asyncio.create_task(hold(budget, 60, 20, entered))
        await turn()
        async with budget.reserve(30) as reservation:
            with pytest.raises(ApiError) as raised:
                await reservation.grow(71)
            assert raised.value.status == 413
            assert asyncio.get_running_loop().time() == 0
            with pytest.raises(ApiError) as raised:
                await reservation.grow(11)
            assert raised.value.status == 429
            assert asyncio.get_running_loop().time() == 5
            assert reservation.nbytes == 30
        assert budget.in_use == 60
        await other

    run(main())


def test_a_cancelled_growth_keeps_what_was_held() -> None:
    async def main() -> None:
        budget = Budget(100, queue_s=5)
        async with budget.reserve(30) as reservation:
            async with budget.reserve(60):
                growth = asyncio.create_task(reservation.grow(50))
                await turn()
                growth.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await growth
                assert (budget.in_use, reservation.nbytes, budget.waiting) == (90, 30, 0)
                growth = asyncio.create_task(reservation.grow(50))
                await turn()
            assert budget.in_use == 80
            growth.cancel()  # granted, and not yet known to the task
            with pytest.raises(asyncio.CancelledError):
                await growth
            assert (budget.in_use, reservation.nbytes, budget._holders) == (30, 30, 1)
        assert budget.in_use == 0

    run(main())


def test_holders_that_all_want_more_do_not_block_each_other() -> None:
    """25 bodies of 20, each of which then wants 75 of 512: some give way at once, most are done."""

    async def request(budget: Budget) -> str:
        try:
            async with budget.reserve(20) as reservation:
                await asyncio.sleep(0)
                await reservation.grow(75)
                await asyncio.sleep(0.1)
                return "done"
        except ApiError as error:
            assert error.status == 429
            return "refused"

    async def main() -> None:
        budget = Budget(512, queue_s=5)
        ends = await asyncio.gather(*(request(budget) for _ in range(25)))
        # 12 are left over; four that leave make room for the first, and from then on it flows.
        assert ends.count("refused") == 4 and ends[:21] == ["done"] * 21
        assert (budget.in_use, budget.waiting) == (0, 0) and budget.peak <= 512
        assert asyncio.get_running_loop().time() < 2

    run(main())


def test_no_wait_at_all() -> None:
    async def main() -> None:
        budget = Budget(100, queue_s=0)
        async with budget.reserve(100):
            with pytest.raises(ApiError, match="in use by others"):
                async with budget.reserve(1):
                    raise AssertionError("entered")
        async with budget.reserve(100):
            pass

    run(main())


@pytest.mark.parametrize("seed", range(40))
def test_whatever_happens_the_sum_holds(seed: int) -> None:
    rng = random.Random(seed)
    waits: list[int] = []
    budget = Budget(100, queue_s=rng.choice([0, 0.5, 3]), waits=waits.append)
    held: dict[int, int] = {}
    ends = {"done": 0, 413: 0, 429: 0, "cancelled": 0}

    def moment() -> float:
        # Quarters: so that grants, refusals and cancellations fall into one turn of the loop.
        return rng.randint(0, 8) / 4

    def check() -> None:
        # Promised and not yet known to the task counts in the budget alone.
        assert sum(held.values()) <= budget.in_use <= budget.peak <= 100

    async def request(number: int) -> None:
        try:
            await asyncio.sleep(2 * moment())
            nbytes = rng.choice([0, rng.randint(1, 40), rng.randint(1, 105)])
            async with budget.reserve(nbytes) as reservation:
                held[number] = nbytes
                try:
                    for _ in range(rng.randint(0, 3)):
                        check()
                        await asyncio.sleep(moment() / 2)
                        await reservation.grow(rng.randint(0, 30))
                        held[number] = reservation.nbytes
                        check()
                    await asyncio.sleep(moment() / 2)
                finally:
                    del held[number]
            ends["done"] += 1
        except ApiError as error:
            ends[error.status] += 1
        except asyncio.CancelledError:
            ends["cancelled"] += 1
            raise
        check()

    async def main() -> None:
        tasks = [asyncio.create_task(request(number)) for number in range(60)]
        for _ in range(25):
            await asyncio.sleep(moment() / 2)
            rng.choice(tasks).cancel()
        for end in await asyncio.gather(*tasks, return_exceptions=True):
            assert end is None or isinstance(end, asyncio.CancelledError), repr(end)
        assert (budget.in_use, budget.waiting, budget._holders) == (0, 0, 0)
        # Each that waited was told to begin and to end to, however it ended.
        assert sum(waits) == 0 and waits.count(1) > 0 and set(waits) == {1, -1}
        # All of it is there again.
        async with budget.reserve(100):
            pass

    run(main())
    # A request cancelled before it ran counted nowhere.
    assert ends["done"] >= 5 and sum(ends.values()) <= 60
