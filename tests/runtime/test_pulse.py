"""Who hangs, told from signs of life; no Ray is started."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from unittest.mock import MagicMock

import pytest

from clip_ray.runtime import stacks
from clip_ray.runtime.pulse import (
    BEAT_S,
    BEGIN_S,
    FIRST_S,
    HANG_S,
    OVERDUE_S,
    SILENT_S,
    STACK_S,
    Health,
    Heart,
    Overdue,
    Pulse,
    Stragglers,
    _signal,
    end_process,
    last_mover,
)


def pulse(rank: int, step: int = 9, phase: str = "loss", still: float = 0, age: float = 0) -> Pulse:
    return Pulse(rank, 100 + rank, "node", f"host-{rank}", step, phase, still, age)


def health(step_s: float = 0.1, steps: int = 20, hang_s: float | None = None) -> Health:
    made = Health(hang_s, slow_s=180, ending_s=900)
    made.took([{"step_s": step_s}] * steps)
    return made


def judged(health: Health, *pulses: Pulse):
    """Look twice: once is not enough."""
    assert health.judge(list(pulses)) is None
    return health.judge(list(pulses))


def test_all_is_well():
    assert judged(health(), pulse(0, still=5), pulse(1, still=7, age=1)) is None


def test_a_process_that_is_not_heard_of_hangs():
    hang = judged(health(), pulse(0, still=9), pulse(1, age=9))
    assert hang.pulse.rank == 1 and "not heard of for 9 s, in loss of step 10" in hang.why
    assert hang.pulse.who == "rank 1 (process 101 on host-1)"


@pytest.mark.parametrize(
    ("behind", "words"),
    [
        ({"step": 8, "phase": "optimizer"}, "in optimizer of step 9 for 9 s"),
        ({"phase": "forward"}, "in forward of step 10 for 9 s, while the others wait in loss"),
    ],
)
def test_of_those_that_wait_the_one_furthest_behind_hangs(behind, words):
    slow = replace(pulse(1, still=9), **behind)
    hang = judged(health(), pulse(0, still=9), slow, pulse(2, still=9.5))
    assert hang.pulse.rank == 1 and words in hang.why


def test_as_long_as_one_moves_nobody_hangs():
    found = judged(health(), pulse(0, still=100), pulse(1, step=8, phase="forward", still=1))
    assert found is None


def test_steps_that_take_long_may():
    assert judged(health(step_s=10), pulse(0, still=44), pulse(1, still=44)) is None
    assert judged(health(step_s=10), pulse(0, still=46), pulse(1, still=46)) is not None
    assert judged(health(hang_s=20), pulse(0, still=19), pulse(1, still=19)) is None
    assert judged(health(hang_s=20), pulse(0, still=21), pulse(1, still=21)) is not None


@pytest.mark.parametrize("phase", ["data_wait", "checkpoint", "profile", "ending"])
def test_what_may_take_long_is_named_and_has_a_bound_of_its_own(phase):
    made = health()
    held = [pulse(0, still=30), pulse(1, phase=phase, still=30, step=8)]
    assert judged(made, *held) is None
    assert made.slow(held) == held[1]
    bound = 900 if phase == "ending" else 180
    assert judged(made, *(replace(p, still_s=bound - 1) for p in held)) is None
    assert judged(made, *(replace(p, still_s=bound + 1) for p in held)).pulse.rank == 1


def test_a_group_that_starts_has_its_own_bound():
    made = health(steps=3)
    starting = [pulse(0, step=0, phase="starting", still=FIRST_S - 1)] * 2
    assert judged(made, *starting) is None
    assert judged(made, *(replace(p, still_s=FIRST_S + 1) for p in starting)) is not None
    # A process that is stopped while it starts is found all the same.
    silent = [starting[0], replace(starting[0], rank=1, still_s=1, age_s=61)]
    assert judged(health(steps=0), *silent).pulse.rank == 1


def test_ranks_that_have_ended_do_not_hang():
    ended = pulse(1, phase="ended", still=500, age=500)
    assert judged(health(), ended, pulse(0, phase="ending", still=100)) is None
    assert judged(health(), ended, replace(ended, rank=0)) is None
    assert last_mover([ended, pulse(0, phase="ending")]).rank == 0


def test_a_group_that_has_ended_is_not_waited_for_for_ever(monkeypatch):
    now = 0.0
    monkeypatch.setattr("clip_ray.runtime.pulse.time.monotonic", lambda: 1000 + now)
    found = Overdue()
    ended, trains = pulse(0, phase="ended", age=500), pulse(1)
    assert found.why([ended, trains]) == ""
    now = 3000.0
    assert found.why([ended, trains]) == "" and found.why([ended, replace(ended, rank=1)]) == ""
    now += OVERDUE_S / 2
    # One that had only been silent goes on after all: the time begins anew.
    silent = replace(trains, age_s=SILENT_S + 1)
    assert found.why([ended, silent]) == "" and found.why([ended, trains]) == ""
    assert found.why([ended, silent]) == ""
    now += OVERDUE_S - 1
    assert found.why([ended, silent]) == ""
    now += 2
    assert found.why([ended, silent]) == f"the workers have ended for {OVERDUE_S + 1:.0f} s"


def test_a_group_that_never_begins_is_not_either(monkeypatch):
    now = 0.0
    monkeypatch.setattr("clip_ray.runtime.pulse.time.monotonic", lambda: 1000 + now)
    found = Overdue()
    now = BEGIN_S
    assert found.why([]) == ""
    now += 1
    assert found.why([]) == f"no worker has begun for {BEGIN_S + 1:.0f} s"
    # Once some were heard of, silence is a recorder's that restarts.
    assert found.why([pulse(0)]) == "" and found.why([]) == ""


def test_a_suspicion_that_passes_is_forgotten():
    made, hung, fine = health(), [pulse(0, still=9)], [pulse(0)]
    assert [made.judge(p) for p in (hung, fine, hung)] == [None] * 3


def test_the_slowest_rank_is_told_from_its_own_work(monkeypatch):
    now = 0.0
    monkeypatch.setattr("clip_ray.runtime.pulse.time.monotonic", lambda: now)
    found = Stragglers()

    def at(seconds: float, steps: int, *compute_and_wait: tuple[float, float]):
        nonlocal now
        now = seconds
        return found.compare(
            [
                replace(pulse(rank), steps=steps, compute_s=steps * c, wait_s=steps * w)
                for rank, (c, w) in enumerate(compute_and_wait)
            ]
        )

    ranks = ((0.1, 0.01), (0.2, 0.0), (0.1, 0.05))
    assert at(10, 5, *ranks) is None  # too early
    assert at(31, 10, *ranks) is None  # nothing to compare with
    assert at(62, 20, *ranks) == {
        "slowest_rank": 1,
        "slowest_host": "host-1",
        "ranks": {"1": [0.2, 0.0], "2": [0.1, 0.05], "0": [0.1, 0.01]},
        "compute_p50_s": 0.1,
        "compute_max_s": 0.2,
        "data_wait_p50_s": 0.01,
        "data_wait_max_s": 0.05,
    }
    assert at(93, 20, *ranks) is None  # no step since
    assert at(124, 30, ranks[0]) is None  # one rank is compared with nobody


def test_a_rank_that_is_still_sends_its_stack(monkeypatch):
    """Before it is called hung, and without being asked: who is killed then can tell no more."""
    assert STACK_S + 2 * BEAT_S < HANG_S
    recorder = MagicMock()
    monkeypatch.setattr("clip_ray.runtime.pulse.ray", MagicMock())
    monkeypatch.setattr("clip_ray.runtime.pulse.threading.Thread", MagicMock())
    heart = Heart(recorder, "group", rank=3, world_size=4)
    heart.moved(7, "forward")
    _, since = heart._where[1:]
    sent = []
    for later in (STACK_S / 2, 2 * STACK_S):
        monkeypatch.setattr("clip_ray.runtime.pulse.time.monotonic", lambda at=since + later: at)
        heart._send()
        sent.append(recorder.beat.remote.call_args.args[1])
    assert [(p.rank, p.step, p.phase) for p in sent] == [(3, 7, "forward")] * 2
    assert [p.still_s for p in sent] == pytest.approx([STACK_S / 2, 2 * STACK_S])
    assert sent[0].stack == "" and "test_a_rank_that_is_still_sends_its_stack" in sent[1].stack


def test_only_a_worker_of_ray_is_killed():
    kill = partial(_signal._function, number=signal.SIGKILL, look=True)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        assert kill(other.pid) == ("another process has its number", "")
        assert other.poll() is None
        other.kill()
    assert kill(other.pid) == ("gone already", "")


WAITS = """
import sys, threading, time

def waits_for_ever():
    print("here", flush=True)
    while True:
        time.sleep(0.01)

thread = threading.Thread(target=waits_for_ever, name="TrainingThread(run_worker)")
thread.start()
thread.join()
"""


def test_where_a_stopped_worker_is_is_seen_before_it_is_killed(tmp_path):
    (tmp_path / "waits.py").write_text(WAITS)
    script = "import os, sys; os.execv(sys.executable, ['ray::Worker', 'waits.py'])"
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE) as mine:
        assert mine.stdout.readline() == b"here\n"
        mine.send_signal(signal.SIGSTOP)
        os.waitpid(mine.pid, os.WUNTRACED)
        how, stack = _signal._function(mine.pid, signal.SIGKILL, look=True)
        assert how == "killed (state T (stopped))" and mine.wait(10) == -9
    if stack.startswith("no stack: ") and os.geteuid() != 0:
        pytest.skip(stack)
    # Stopped anywhere in it: it may not have come to its loop.
    assert re.match(r"waits_for_ever \(waits\.py:[567]\) < ", stacks.short(stack)), stack


def test_the_stack_that_a_rank_sent_stands_in_where_nobody_may_look(monkeypatch):
    sent = 'File "/x/loop.py", line 3, in train\n  y()\nFile "/x/gloo.py", line 9, in wait\n'
    assert stacks.short(sent) == "wait (gloo.py:9) < train (loop.py:3)"
    for seen, expected in (("no stack: not permitted", sent), ("", sent)):
        monkeypatch.setattr("clip_ray.runtime.pulse._reach", lambda *a, seen=seen: ("killed", seen))
        assert end_process(replace(pulse(1), stack=sent)) == ("killed", expected)
    monkeypatch.setattr("clip_ray.runtime.pulse._reach", lambda *a: ("killed", "no stack: why"))
    assert end_process(pulse(1)) == ("killed", "no stack: why")


def test_a_program_that_is_missing_or_slow_is_said(monkeypatch):
    monkeypatch.setattr(stacks.sys, "executable", "/nowhere/python")
    assert stacks.dump(1).startswith("no stack: [Errno 2]")
    assert stacks.short(stacks.dump(1)) == ""
