"""Which processes wait for their turn: SCHED_BATCH and its long turns, inherited and taken back."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from clip_ray.runtime import cpu_policy

pytestmark = pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="Linux's")


def told_by_a_child(asked: str) -> int:
    return int(subprocess.check_output([sys.executable, "-c", asked]))


def policy_of_a_child() -> int:
    return told_by_a_child("import os; print(os.sched_getscheduler(0))")


def turn_of_a_child() -> int:
    """Return its length in nanoseconds, as `sched_getattr` has it, 0 where it tells of none."""
    number = {"x86_64": 315, "aarch64": 275}[platform.machine()]
    return told_by_a_child(
        "import ctypes, struct; attr = ctypes.create_string_buffer(48);"
        f"assert ctypes.CDLL(None).syscall({number}, 0, attr, 48, 0) == 0;"
        "print(struct.unpack_from('Q', attr, 24)[0])"
    )


def test_processes_started_meanwhile_wait_for_their_turn_and_no_others():
    with cpu_policy.batch():
        assert policy_of_a_child() == os.SCHED_BATCH
    assert os.sched_getscheduler(0) == os.SCHED_OTHER
    assert policy_of_a_child() == os.SCHED_OTHER


@pytest.mark.skipif(
    platform.machine() not in cpu_policy._SCHED_SETATTR,
    reason="its number of the system call is not known",
)
def test_turns_are_long_meanwhile_and_no_longer():
    before = turn_of_a_child()
    assert before < 1e9 * cpu_policy.SLICE_S
    with cpu_policy.batch():
        meanwhile = turn_of_a_child()
    linux = tuple(int(part) for part in platform.release().split(".")[:2])
    assert meanwhile == (1e9 * cpu_policy.SLICE_S if linux >= (6, 12) else before)
    assert turn_of_a_child() == before


def test_niceness_stays():
    asked = "import os; os.nice(5); from clip_ray.runtime import cpu_policy as c\n"
    nice = "print(os.getpriority(os.PRIO_PROCESS, 0))"
    assert told_by_a_child(f"{asked}with c.batch(): {nice}") == 5
    assert told_by_a_child(f"{asked}with c.batch(): pass\n{nice}") == 5


def test_the_policy_is_taken_back_after_an_error():
    with pytest.raises(RuntimeError), cpu_policy.batch():
        raise RuntimeError
    assert os.sched_getscheduler(0) == os.SCHED_OTHER


def test_a_policy_that_somebody_chose_is_left_alone(monkeypatch):
    changed: list[tuple] = []
    monkeypatch.setattr(os, "sched_getscheduler", lambda pid: os.SCHED_RR)
    monkeypatch.setattr(os, "sched_setscheduler", lambda *given: changed.append(given))
    with cpu_policy.batch():
        pass
    assert changed == []


def test_where_it_is_forbidden_all_goes_on(monkeypatch):
    def forbidden(pid: int, policy: int, parameter: os.sched_param) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "sched_setscheduler", forbidden)
    with cpu_policy.batch():
        assert os.sched_getscheduler(0) == os.SCHED_OTHER
