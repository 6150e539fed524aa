"""Signs of life: each worker tells the recorder where it is, the driver finds who hangs.

A worker's thread sends a pulse every second, whatever the training thread does. A process that was
stopped sends none; one that waits for ever sends pulses that no longer move.
"""

from __future__ import annotations

import contextlib
import os
import signal
import statistics
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from clip_ray.runtime import stacks
from clip_ray.train.hooks import PHASES
from clip_ray.train.journal import Row

BEAT_S = 1.0
RANKS_A_SECOND = 200  # pulses that the recorder takes without a pause
HANG_S = 8.0  # with the time to notice it, below 10
HANG_STEPS = 4.5  # times the median step
FIRST_STEPS = 3  # steps whose time says nothing yet
FIRST_S = 600.0  # the bound for these
COMPARE_S = 30.0  # between two comparisons of the ranks
STRAGGLES = 1.5  # times the median, above which a rank is named
MANY = 64  # ranks whose own times are journaled
STACK_S = 4.0  # still for so long, a rank sends its stack: before anybody calls it hung
SILENT_S = 60.0  # a rank that starts is heard too
OVERDUE_S = 90.0  # for Ray Train to say that a group has ended; it takes 1 to 12 s
BEGIN_S = 900.0  # for the workers of a group to begin; without room Ray gives up after 60 s
# Phases that may take long while the other ranks wait, within bounds of their own.
_SLOW = ("starting", "data_wait", "checkpoint", "profile", "ending")
_ORDER = ("starting", *PHASES, "profile", "ending", "ended")


@dataclass(frozen=True)
class Pulse:
    """Where a rank is.

    Attributes:
        rank: the rank.
        pid: its process.
        node: id of its node, in hex.
        host: address of its node.
        step: steps that it has done.
        phase: what it does now.
        still_s: seconds since it last went from one phase to the next.
        age_s: seconds since this was heard.
        steps: steps of this attempt.
        compute_s: seconds of them in its own work: copies and forward passes.
        wait_s: seconds of them in waits for data.
        stack: its training thread's, once it has been still for long.
        block: number of the block that it waits for, once it has for long; None else.
    """

    rank: int
    pid: int
    node: str
    host: str
    step: int = 0
    phase: str = "starting"
    still_s: float = 0.0
    age_s: float = 0.0
    steps: int = 0
    compute_s: float = 0.0
    wait_s: float = 0.0
    stack: str = ""
    block: int | None = None

    @property
    def who(self) -> str:
        """Name the rank, its process and its host."""
        return f"rank {self.rank} (process {self.pid} on {self.host})"


class Heart:
    """Sends a rank's pulses from a thread; made on the training thread.

    Attributes:
        host: address of this node.
        awaited: returns the block of data that the rank waits for.

    Args:
        recorder: takes them.
        group: the group of workers, unique.
        rank: this rank.
        world_size: number of ranks.
    """

    def __init__(self, recorder: Any, group: str, rank: int, world_size: int) -> None:
        self._recorder, self._group, self._rank = recorder, group, rank
        self._every_s = max(BEAT_S, world_size / RANKS_A_SECOND)
        self._where = (0, "starting", time.monotonic())
        self._worked = (0, 0.0, 0.0)
        self._training = threading.get_ident()
        self._ended = threading.Event()
        self.awaited: Callable[[], int | None] = lambda: None
        context = ray.get_runtime_context()
        self._node, self.host = context.get_node_id(), ray.util.get_node_ip_address()
        threading.Thread(target=self._beat, name="heart", daemon=True).start()

    def moved(self, step: int, phase: str) -> None:
        """Note that the rank is somewhere else."""
        self._where = (step, phase, time.monotonic())

    def worked(self, seconds: Mapping[str, float]) -> None:
        """Note the seconds of each phase of a step."""
        steps, compute, wait = self._worked
        compute += seconds["copy"] + seconds["forward"]
        self._worked = (steps + 1, compute, wait + seconds["data_wait"])

    def end(self) -> None:
        """Say that this is the end, and send no more."""
        self.moved(self._where[0], "ended")
        self._ended.set()

    def _beat(self) -> None:
        last = False
        while not last:
            last = self._ended.is_set()
            with contextlib.suppress(ray.exceptions.RayError):
                self._send()
            self._ended.wait(0 if last else self._every_s)

    def _send(self) -> None:
        step, phase, since = self._where
        still_s, stack, block = time.monotonic() - since, "", None
        if still_s > STACK_S and phase != "ended":
            frame = sys._current_frames().get(self._training)
            stack = "".join(traceback.format_stack(frame)) if frame else ""
            block = self.awaited() if phase == "data_wait" else None
        pulse = Pulse(
            self._rank,
            os.getpid(),
            self._node,
            self.host,
            step,
            phase,
            still_s,
            0.0,
            *self._worked,
            stack,
            block,
        )
        self._recorder.beat.remote(self._group, pulse)


@dataclass(frozen=True)
class Hang:
    """A rank that does not go on, and why one thinks so."""

    pulse: Pulse
    why: str


class Health:
    """Finds the rank that holds the others up, from their pulses.

    Args:
        hang_s: seconds without a step after which a group hangs; none = by the median step.
        slow_s: seconds that a checkpoint, a trace or a wait for data may take.
        ending_s: seconds that the last commit may take.
    """

    def __init__(self, hang_s: float | None, slow_s: float, ending_s: float) -> None:
        self._hang_s, self._slow_s, self._ending_s = hang_s, slow_s, ending_s
        self._steps: deque[float] = deque(maxlen=50)
        self._seen = 0
        self._suspect: int | None = None

    def took(self, rows: list[Row]) -> None:
        """Note the times of steps, from their journal rows."""
        for row in rows:
            self._seen += 1
            if self._seen > FIRST_STEPS:
                self._steps.append(row["step_s"])

    @property
    def bound_s(self) -> float:
        """Seconds without a step that are too many."""
        if not self._steps:
            return FIRST_S
        if self._hang_s is not None:
            return self._hang_s
        return max(HANG_S, HANG_STEPS * statistics.median(self._steps))

    def judge(self, pulses: list[Pulse]) -> Hang | None:
        """Return the rank that hangs, once two looks in a row have found it."""
        hang = self._silent(pulses) or self._stuck(pulses)
        known, self._suspect = self._suspect, hang.pulse.rank if hang else None
        return hang if hang and known == hang.pulse.rank else None

    def slow(self, pulses: list[Pulse]) -> Pulse | None:
        """Return the rank that all wait for, if it has been at it for longer than a hang takes."""
        if not pulses:
            return None
        last = last_mover(pulses)
        return last if last.phase in _SLOW and last.still_s > self.bound_s else None

    def _silent(self, pulses: list[Pulse]) -> Hang | None:
        bound = min(self.bound_s, SILENT_S)
        for pulse in pulses:
            if pulse.age_s > bound and pulse.phase != "ended":
                return Hang(
                    pulse,
                    f"not heard of for {pulse.age_s:.0f} s, in {pulse.phase} of step "
                    f"{pulse.step + 1}: its process was stopped, or its node does not answer",
                )
        return None

    def _stuck(self, pulses: list[Pulse]) -> Hang | None:
        if all(p.phase == "ended" for p in pulses):
            return None
        last = last_mover(pulses)
        bound = self.bound_s
        if last.phase in _SLOW:
            own = self._ending_s if last.phase == "ending" else self._slow_s
            bound = max(bound, own)
        if min(p.still_s + p.age_s for p in pulses) <= bound:
            return None
        others = sorted({p.phase for p in pulses if p is not last})
        return Hang(
            last,
            f"in {last.phase} of step {last.step + 1} for {last.still_s:.0f} s"
            + (f", while the others wait in {', '.join(others)}" if others else ""),
        )


class Overdue:
    """Tells that a group of workers has ended, or never began, and Ray Train does not say so.

    Its controller is a process of its own, that can hang too.
    """

    def __init__(self) -> None:
        self._begun: float | None = time.monotonic()
        self._over_since: float | None = None

    def why(self, pulses: list[Pulse]) -> str:
        """Return what is overdue, "" where nothing is."""
        now = time.monotonic()
        if not pulses:
            # Later there may be none for a while: a recorder that restarts knows of none.
            waited = 0.0 if self._begun is None else now - self._begun
            return f"no worker has begun for {waited:.0f} s" if waited > BEGIN_S else ""
        self._begun = None
        if not all(p.phase == "ended" or p.age_s > SILENT_S for p in pulses):
            self._over_since = None
            return ""
        self._over_since = self._over_since or now
        waited = now - self._over_since
        return f"the workers have ended for {waited:.0f} s" if waited > OVERDUE_S else ""


class Stragglers:
    """Compares the ranks' own work, every half a minute: who makes the others wait?"""

    def __init__(self) -> None:
        self._last: dict[int, Pulse] = {}
        self._looked = time.monotonic()

    def compare(self, pulses: list[Pulse]) -> Row | None:
        """Return the times a step since the last comparison, None where it is too early.

        `compute_` are copies and forward passes, which no other rank can hold up; `data_wait_`
        are waits for batches. The slowest is the rank with the most of both; `ranks` has these
        two of each rank, of the slowest `MANY` where there are more.
        """
        now = time.monotonic()
        if now - self._looked < COMPARE_S:
            return None
        before, self._last, self._looked = self._last, {p.rank: p for p in pulses}, now
        found = []
        for pulse in pulses:
            old = before.get(pulse.rank)
            steps = pulse.steps - old.steps if old else 0
            if old is not None and steps > 0:
                compute = (pulse.compute_s - old.compute_s) / steps
                found.append((compute, (pulse.wait_s - old.wait_s) / steps, pulse))
        if len(found) < 2:
            return None
        found.sort(key=lambda one: one[0] + one[1], reverse=True)
        slowest = found[0][2]
        row: Row = {"slowest_rank": slowest.rank, "slowest_host": slowest.host}
        row["ranks"] = {str(p.rank): [round(c, 4), round(w, 4)] for c, w, p in found[:MANY]}
        for name, values in (
            ("compute", [one[0] for one in found]),
            ("data_wait", [one[1] for one in found]),
        ):
            row[f"{name}_p50_s"] = round(statistics.median(values), 4)
            row[f"{name}_max_s"] = round(max(values), 4)
        return row


def last_mover(pulses: list[Pulse]) -> Pulse:
    """Return the rank that is furthest behind: what the others wait for."""
    return min(pulses, key=lambda p: (p.step, _ORDER.index(p.phase), -p.still_s))


def end_process(pulse: Pulse, timeout_s: float = 30.0) -> tuple[str, str]:
    """Kill a rank's process on its node; return what was found there, and where its threads were.

    Where nobody could look, the stack is what the rank itself has sent, or why there is none.
    """
    how, stack = _reach(pulse.node, pulse.pid, signal.SIGKILL, True, timeout_s)
    return how, stack if stacks.short(stack) or not pulse.stack else pulse.stack


def signal_process(node: str, pid: int, number: int, timeout_s: float = 30.0) -> str:
    """Send a signal to a worker's process on its node; return what was found there."""
    return _reach(node, pid, number, False, timeout_s)[0]


def _reach(node: str, pid: int, number: int, look: bool, timeout_s: float) -> tuple[str, str]:
    there = NodeAffinitySchedulingStrategy(node, soft=False)
    try:
        call = _signal.options(scheduling_strategy=there).remote(pid, number, look)
        found: tuple[str, str] = ray.get(call, timeout=timeout_s)
        return found
    except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError) as error:
        return f"not reached: {type(error).__name__}", ""


@ray.remote(num_cpus=0, max_retries=0)
def _signal(pid: int, number: int, look: bool) -> tuple[str, str]:
    """Signal a process; return what was found, and the stacks of its threads if asked for."""
    process = Path(f"/proc/{pid}")
    stack = ""
    try:
        if process.exists() and not process.joinpath("cmdline").read_bytes().startswith(b"ray::"):
            return "another process has its number", ""
        states = (process / "status").read_text().splitlines() if process.exists() else []
        stack = stacks.dump(pid) if look and states else ""
        os.kill(pid, number)
    except (ProcessLookupError, FileNotFoundError):
        return "gone already", stack
    state = next((line.split(":", 1)[1].strip() for line in states if "State" in line), "")
    done = "killed" if number == signal.SIGKILL else signal.Signals(number).name
    return f"{done} (state {state})" if state else done, stack
