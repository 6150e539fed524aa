"""What faults have cost, from journals written by hand."""

from __future__ import annotations

import pytest

from clip_ray.train.recovery import as_metrics, recoveries, time_in_steps


def steps(attempt: int, first: int, last: int, begun: float) -> list[dict]:
    """Steps of a second each."""
    return [
        {"step": step, "attempt": attempt, "step_s": 1.0, "time": begun + step - first + 1}
        for step in range(first, last + 1)
    ]


def attempt(number: int, from_step: int, time: float) -> dict:
    return {"event": "attempt", "attempt": number, "from_step": from_step, "time": time}


def test_a_run_that_nothing_happened_to_has_lost_nothing():
    assert recoveries(steps(1, 1, 9, 100), [attempt(1, 0, 95)]) == {}
    assert recoveries([], []) == {}


@pytest.mark.parametrize(
    ("between", "cause"),
    [
        ([], "job restarted"),
        (["attempt_failed"], "workers failed"),
        (["hang", "attempt_failed"], "hang"),
        (["commit", "yield", "commit"], "resize"),
        (["rollback"], "rollback"),
        (["commit", "preempted", "commit"], "preempted"),
        (["hang", "attempt_failed", "controller_hang"], "hang"),
    ],
)
def test_a_cause_is_named_and_its_time_counted(between, cause):
    # 9 steps until 109, of which 6 count: the sixth ended at 106. The seventh, done again, ends
    # at 131: 24 s were lost beside its own.
    metrics = steps(1, 1, 9, 100) + steps(2, 7, 9, 130)
    events = [attempt(1, 0, 95), *({"event": e, "time": 110.0} for e in between)]
    events.append(attempt(2, 6, 125))
    assert recoveries(metrics, events) == {cause: {"times": 1, "seconds": 24.0}}


def test_attempts_that_come_to_nothing_count_once_each_and_their_time_once():
    metrics = steps(1, 1, 4, 100) + steps(3, 5, 6, 150)
    failed = [{"event": "attempt_failed", "time": t} for t in (105.0, 125.0)]
    events = [attempt(1, 0, 95), failed[0], attempt(2, 4, 120), failed[1], attempt(3, 4, 140)]
    # Attempt 2 made no step: from 104 to its start at 120, and on to 150.
    assert recoveries(metrics, events) == {"workers failed": {"times": 2, "seconds": 46.0}}


def test_the_share_of_the_time_in_steps_that_count():
    line = steps(1, 1, 6, 100) + steps(2, 7, 10, 130)
    events = [attempt(1, 0, 94), attempt(2, 6, 125)]
    # Ten steps of a second count, of the 40 s from 94 to 134.
    assert time_in_steps(line, events) == pytest.approx(10 / 40)
    assert time_in_steps([], events) == 0


def test_what_faults_have_cost_as_metrics():
    assert as_metrics(0.5, {"workers failed": {"times": 2, "seconds": 46.0}}) == {
        "ettr": 0.5,
        "recovery/workers_failed_times": 2.0,
        "recovery/workers_failed_seconds": 46.0,
    }
