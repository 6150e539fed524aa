"""Which processes wait for their turn: SCHED_BATCH is given, inherited and taken back."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from clip_ray.runtime import cpu_policy

pytestmark = pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="Linux's")


def policy_of_a_child() -> int:
    asked = "import os; print(os.sched_getscheduler(0))"
    return int(subprocess.check_output([sys.executable, "-c", asked]))


def test_processes_started_meanwhile_wait_for_their_turn_and_no_others():
    with cpu_policy.batch():
        assert policy_of_a_child() == os.SCHED_BATCH
    assert os.sched_getscheduler(0) == os.SCHED_OTHER
    assert policy_of_a_child() == os.SCHED_OTHER


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
