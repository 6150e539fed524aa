"""The lease: one live job a run."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from clip_ray.errors import CheckpointError
from clip_ray.storage import LocalStore, Store, open_store
from clip_ray.train import lease
from clip_ray.train.lease import EXPIRE_S, Watch, held_lease, live_holder

REPOSITORY = Path(__file__).parents[2]
HOLD = """
import sys, time
from clip_ray.storage import open_store
from clip_ray.train import lease
skew, elsewhere = float(sys.argv[2]), sys.argv[3] == "elsewhere"
if elsewhere:
    now = time.time
    time.time = lambda: now() + skew
    lease._place = lambda: "elsewhere"
    lease.RENEW_S = 0.05
with lease.held_lease(open_store(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def run(tmp_path: Path) -> Store:
    return LocalStore(tmp_path / "r")


@contextlib.contextmanager
def held_by_another(
    run: Store, skew_s: float = 0, place: str = "here"
) -> Iterator[subprocess.Popen[str]]:
    """Another live process that holds the run's lease, as if on another machine for "elsewhere"."""
    command = [sys.executable, "-c", HOLD, run.uri, str(skew_s), place]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)
    try:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait(10)


@pytest.fixture
def holder(run: Store) -> Iterator[subprocess.Popen[str]]:
    with held_by_another(run) as process:
        yield process


def files(run: Store) -> list[str]:
    return run.child("lease").files()


def rewrite(run: Store, **fields: Any) -> None:
    """Change the lease on storage: another host cannot be had in a test."""
    (name,) = files(run)
    record = json.loads(run.read(f"lease/{name}"))
    assert fields.keys() <= record.keys()
    run.write(f"lease/{name}", json.dumps(record | fields).encode())


def leave(run: Store, **fields: Any) -> None:
    """Leave a lease behind as a holder that died would."""
    run.create("lease/00000001.json", lease._content("token", time.time(), 0))
    rewrite(run, **fields)


def test_it_can_be_held_again_after_its_release(run: Store) -> None:
    for _ in range(3):
        with held_lease(run):
            assert len(files(run)) == 1
        assert files(run) == []


def test_it_is_released_after_an_error(run: Store) -> None:
    with pytest.raises(ZeroDivisionError), held_lease(run):
        raise ZeroDivisionError
    assert files(run) == []


def test_a_second_live_job_is_refused_and_told_who(
    run: Store, holder: subprocess.Popen[str]
) -> None:
    message = f"run {run.uri} is being written by process {holder.pid} on {socket.gethostname()}"
    for _ in range(2):  # a refusal takes nothing away
        with pytest.raises(CheckpointError) as caught, held_lease(run):
            pass
        assert str(caught.value).startswith(message) and "--run.name" in str(caught.value)
    with held_lease(open_store(f"{run.uri}-2")):  # another run is another lease
        pass


def test_one_process_cannot_hold_it_twice(run: Store) -> None:
    with held_lease(run), pytest.raises(CheckpointError, match=f"process {os.getpid()} "):
        with held_lease(run):
            pass


@pytest.mark.parametrize("reaped", [True, False])
def test_a_killed_holder_is_taken_over_at_once(
    run: Store, holder: subprocess.Popen[str], reaped: bool
) -> None:
    """Not reaped: dead, but its entry in the process table is still there."""
    holder.kill()
    if reaped:
        holder.wait(10)
    else:
        os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)
    with held_lease(run):
        assert files(run) == ["00000002.json"]


def test_a_reused_process_number_is_another_process(run: Store) -> None:
    """The holder died, and its number now is that of a process that lives: here, this one."""
    leave(run, process_started="1")
    with held_lease(run):
        assert files(run) == ["00000002.json"]


def test_a_holder_learns_that_it_was_taken_over(run: Store, monkeypatch) -> None:
    """It was paused for so long that another host has the run now."""
    monkeypatch.setattr("clip_ray.train.lease.RENEW_S", 0.05)
    with held_lease(run) as lost:
        assert not lost.wait(0.2)
        run.write("lease/00000002.json", run.read("lease/00000001.json"))
        assert lost.wait(10)


SKEWS = (-3600, 0, 3600)


@pytest.mark.parametrize("skew_s", SKEWS)
def test_a_live_lease_of_another_machine_is_not_taken_whatever_its_clock_says(
    run: Store, skew_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "LOOK_S", 0.05)
    said: list[str] = []
    with held_by_another(run, skew_s, "elsewhere") as process:
        message = f"is being written by process {process.pid} on"
        with pytest.raises(CheckpointError, match=message), held_lease(run, said.append):
            pass
        assert process.poll() is None and files(run) == ["00000001.json"]
    (line,) = said
    assert "seeing whether it lives (at most 60 s)" in line


@pytest.mark.parametrize("skew_s", SKEWS)
def test_a_dead_lease_of_another_machine_is_taken_whatever_its_clock_said(
    run: Store, skew_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave(run, place="elsewhere", host="elsewhere", pid=4242, renewed=time.time() + skew_s)
    monkeypatch.setattr(lease, "EXPIRE_S", 0.5)
    monkeypatch.setattr(lease, "LOOK_S", 0.05)
    begun = time.monotonic()
    with held_lease(run):
        assert files(run) == ["00000002.json"]
    assert time.monotonic() - begun >= 0.5  # never at once


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 1e6

    def __call__(self) -> float:
        return self.now


def test_a_lease_expires_a_minute_after_the_last_change_that_was_seen(run: Store) -> None:
    clock = Clock()
    watch = Watch(run, clock)
    assert watch.look() is None and not watch.renews
    leave(run, place="elsewhere", host="elsewhere")
    seen = watch.look()
    assert seen is not None and seen.host == "elsewhere"
    assert not watch.renews  # it may have been written long ago
    clock.now += EXPIRE_S - 1
    assert watch.look() == seen and not watch.renews
    rewrite(run, renewals=1)
    assert watch.look() == seen and watch.renews
    clock.now += EXPIRE_S - 1
    assert watch.look() == seen
    clock.now += 1
    assert watch.look() is None
    # A new holder is watched anew.
    run.write("lease/00000002.json", run.read("lease/00000001.json"))
    assert watch.look() is not None and not watch.renews and watch.number == 2


def test_a_slow_look_is_no_sign_of_death(run: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The storage took two minutes to answer: nothing was seen in between."""
    leave(run, place="elsewhere", host="elsewhere")
    clock = Clock()
    watch, read = Watch(run, clock), LocalStore.read

    def slow(self: LocalStore, name: str, start: int = 0, stop: int | None = None) -> bytes:
        clock.now += 2 * EXPIRE_S
        return read(self, name, start, stop)

    with monkeypatch.context() as patch:
        patch.setattr(LocalStore, "read", slow)
        assert watch.look() is not None
        assert watch.look() is not None
    clock.now += EXPIRE_S
    assert watch.look() is None


def test_the_same_number_in_another_container_is_another_process(run: Store) -> None:
    """Same host name, own process numbers: this process's number says nothing of the holder's."""
    leave(run, place="another boot, or pid:[4026532000]", process_started="1")
    assert live_holder(run) is not None


def test_it_is_renewed(run: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "RENEW_S", 0.05)
    with held_lease(run):
        rewrite(run, host="elsewhere", renewed=0.0, renewals=-1)
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            record = json.loads(run.read(f"lease/{files(run)[0]}"))
            if record["renewed"] > 0:
                break
            time.sleep(0.02)
        assert record["host"] == socket.gethostname()
        assert abs(record["renewed"] - time.time()) < 20 and record["renewals"] > 0
        assert record["since"] <= record["renewed"]
    assert files(run) == []


def test_a_storage_outage_does_not_end_the_renewal(
    run: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "RENEW_S", 0.02)
    failures: list[int] = []
    write = LocalStore.write

    def failing(self: LocalStore, name: str, data: bytes) -> None:
        if len(failures) < 3:
            failures.append(1)
            raise OSError("storage is down")
        write(self, name, data)

    monkeypatch.setattr(LocalStore, "write", failing)
    with held_lease(run):
        path = Path(run.uri, "lease", files(run)[0])
        before = path.read_bytes()
        deadline = time.monotonic() + 20
        while path.read_bytes() == before and time.monotonic() < deadline:
            time.sleep(0.02)
        assert len(failures) == 3 and path.read_bytes() != before


def test_on_s3(tmp_path: Path, s3: object) -> None:
    run = open_store(f"s3://bucket/{tmp_path.name}/r", s3)  # type: ignore[arg-type]
    with held_lease(run):
        with pytest.raises(CheckpointError, match=f"process {os.getpid()} "), held_lease(run):
            pass
    leave(run, process_started="1")
    with held_lease(run):
        assert files(run) == ["00000002.json"]
    assert files(run) == []
