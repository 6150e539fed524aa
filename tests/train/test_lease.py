"""The lease: one live job a run."""

from __future__ import annotations

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
from clip_ray.train.lease import EXPIRE_S, held_lease

REPOSITORY = Path(__file__).parents[2]
HOLD = """
import sys, time
from clip_ray.storage import open_store
from clip_ray.train.lease import held_lease
with held_lease(open_store(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def run(tmp_path: Path) -> Store:
    return LocalStore(tmp_path / "r")


@pytest.fixture
def holder(run: Store) -> Iterator[subprocess.Popen[str]]:
    """Another live process that holds the run's lease."""
    command = [sys.executable, "-c", HOLD, run.uri]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)
    try:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait(10)


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
    run.create("lease/00000001.json", lease._content("token", time.time()))
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


@pytest.mark.parametrize(("age_s", "alive"), [(EXPIRE_S - 5, True), (EXPIRE_S + 1, False)])
def test_another_hosts_lease_expires_by_time(run: Store, age_s: float, alive: bool) -> None:
    leave(run, host="elsewhere", pid=4242, renewed=time.time() - age_s)
    if alive:
        with pytest.raises(CheckpointError, match="process 4242 on elsewhere"), held_lease(run):
            pass
    else:
        with held_lease(run):
            assert files(run) == ["00000002.json"]


def test_it_is_renewed(run: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "RENEW_S", 0.05)
    with held_lease(run):
        rewrite(run, host="elsewhere", renewed=0.0)
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            record = json.loads(run.read(f"lease/{files(run)[0]}"))
            if record["renewed"] > 0:
                break
            time.sleep(0.02)
        assert record["host"] == socket.gethostname()
        assert abs(record["renewed"] - time.time()) < 20
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
