"""SIGTERM to a worker's process: noted while somebody heeds it, else Ray's own answer."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from clip_ray.runtime import preemption


@pytest.fixture
def rays() -> Iterator[list[int]]:
    """Install a notice over a handler that stands for Ray's; yield what that one got."""
    got: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: got.append(number))
    preemption.install()
    yield got
    signal.signal(signal.SIGTERM, before)


def terminated() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_worker_that_trains_notes_the_first(rays):
    notice = preemption.installed()
    with notice.heeded():
        assert not notice.received
        terminated()
        assert notice.received and rays == []
        terminated()
        assert rays == [signal.SIGTERM]


def test_before_and_after_ray_answers(rays):
    notice = preemption.installed()
    terminated()
    with notice.heeded():
        pass
    terminated()
    assert rays == [signal.SIGTERM] * 2 and not notice.received


def test_another_thread_finds_the_notice_of_the_main_one(rays):
    found: list[preemption.Notice] = []
    thread = threading.Thread(target=lambda: found.append(preemption.installed()))
    thread.start()
    thread.join(10)
    assert found == [signal.getsignal(signal.SIGTERM)]


def test_where_none_is_installed_nothing_is_noted():
    assert not isinstance(signal.getsignal(signal.SIGTERM), preemption.Notice)
    notice = preemption.installed()
    notice(signal.SIGTERM, None)
    assert not notice.received
