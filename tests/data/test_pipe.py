"""What goes from one thread to another through a pipe."""

from __future__ import annotations

import itertools
import queue
import threading

import pytest

from clip_ray.data.pipe import Pipe


def filled(pipe: Pipe[int], items) -> threading.Thread:
    thread = threading.Thread(target=pipe.fill, args=(items,), daemon=True)
    thread.start()
    return thread


def test_items_come_in_order_and_then_the_end():
    pipe: Pipe[int] = Pipe(2, threading.Event())
    thread = filled(pipe, lambda: iter(range(100)))
    assert list(pipe.take(10)) == list(range(100))
    thread.join(10)
    assert not thread.is_alive()


def test_what_the_filling_raises_is_raised_after_what_came_before():
    def items():
        yield from (1, 2)
        raise OSError("the store is away")

    pipe: Pipe[int] = Pipe(1, threading.Event())
    filled(pipe, items)
    taken = []
    with pytest.raises(OSError, match="the store is away"):
        for item in pipe.take(10):
            taken.append(item)
    assert taken == [1, 2]


def test_no_more_is_prepared_than_there_is_room_for():
    prepared = []

    def items():
        for number in itertools.count():
            prepared.append(number)
            yield number

    left = threading.Event()
    pipe: Pipe[int] = Pipe(3, left)
    thread = filled(pipe, items)
    taken = pipe.take(10)
    assert [next(taken) for _ in range(5)] == list(range(5))
    assert len(prepared) <= 5 + 3 + 1
    left.set()
    thread.join(10)
    assert not thread.is_alive(), "a filler whose taker left waits for room"
    assert list(taken) == []


def test_a_taker_does_not_wait_for_ever():
    forever = threading.Event()

    def items():
        forever.wait(30)
        yield 1

    pipe: Pipe[int] = Pipe(1, threading.Event())
    filled(pipe, items)
    with pytest.raises(queue.Empty):
        next(pipe.take(0.2))
    forever.set()
