"""The lease: one live job writes a run, and a second one is told who does.

The holder renews a file in the run's directory. A holder that has died is taken over: at once
where it ran on this host and its process is gone, else when it has not renewed for a minute.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from clip_ray.errors import CheckpointError
from clip_ray.storage import Store

RENEW_S = 10.0
EXPIRE_S = 60.0
_FOLDER = "lease"


@dataclass(frozen=True)
class Holder:
    """The live job that writes a run; `token` is unique to its lease."""

    host: str
    pid: int
    since: float
    token: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} (since {time.ctime(self.since)})"


@contextlib.contextmanager
def held_lease(run: Store) -> Iterator[threading.Event]:
    """Hold the run's lease for the duration of the block.

    Yields:
        An event that is set when another job has taken the lease over, after this process did not
        run for a minute: it must write nothing more.

    Raises:
        CheckpointError: another live job holds it; the message says which.
    """
    token = uuid.uuid4().hex
    number = _take(run, token)
    ended, lost = threading.Event(), threading.Event()
    renewer = threading.Thread(
        target=_renew, args=(run, number, token, ended, lost), name="lease", daemon=True
    )
    renewer.start()
    try:
        yield lost
    finally:
        ended.set()
        renewer.join(timeout=EXPIRE_S)
        run.delete(f"{_FOLDER}/{number:08d}.json")


def live_holder(run: Store) -> Holder | None:
    """Return the job that writes a run; None where none is alive."""
    return _holder(run)[1]


def _holder(run: Store) -> tuple[int, Holder | None]:
    """Return the newest lease's number, 0 where there is none, and its holder if it is alive."""
    while True:
        newest = _newest(run)
        if not newest:
            return 0, None
        try:
            fields = json.loads(run.read(f"{_FOLDER}/{newest:08d}.json"))
        except FileNotFoundError:
            continue  # released between the listing and the reading
        if not _alive(fields):
            return newest, None
        return newest, Holder(fields["host"], fields["pid"], fields["since"], fields["token"])


def _take(run: Store, token: str) -> int:
    """Create the next lease file, exclusively, once no earlier one is alive."""
    while True:
        newest, holder = _holder(run)
        if holder is not None:
            raise CheckpointError(
                f"run {run.uri} is being written by {holder}; wait for it, stop it "
                "(jobs/stop.py), or give this run another name (--run.name)"
            )
        try:
            run.create(f"{_FOLDER}/{newest + 1:08d}.json", _content(token, time.time()))
        except FileExistsError:
            continue
        for old in range(max(newest - 3, 1), newest + 1):
            run.delete(f"{_FOLDER}/{old:08d}.json")
        return newest + 1


def _newest(run: Store) -> int:
    return max((int(name.split(".")[0]) for name in run.child(_FOLDER).files()), default=0)


def _content(token: str, since: float) -> bytes:
    fields = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "process_started": _process_started(os.getpid()),
        "since": since,
        "renewed": time.time(),
        "token": token,
    }
    return json.dumps(fields).encode()


def _alive(holder: dict[str, object]) -> bool:
    if holder["host"] == socket.gethostname():
        started = _process_started(int(str(holder["pid"])))
        return started is not None and started == holder["process_started"]
    return time.time() - float(str(holder["renewed"])) < EXPIRE_S


def _process_started(pid: int) -> str | None:
    """Return what tells a process from a later one with the same number; None if there is none."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    if not Path("/proc/self/stat").exists():
        return "alive"
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # Dead, and kept by a parent that has not asked for its exit status: a container's first
    # process often never does.
    if fields[0] in ("Z", "X"):
        return None
    # Field 22, counted behind the name in brackets: start time in clock ticks since boot.
    return fields[19]


def _renew(
    run: Store, number: int, token: str, ended: threading.Event, lost: threading.Event
) -> None:
    since = time.time()
    while not ended.wait(RENEW_S):
        # Storage may be down for a while, in whatever words; the next renewal may succeed.
        with contextlib.suppress(Exception):
            if _newest(run) > number:
                lost.set()
                return
            run.write(f"{_FOLDER}/{number:08d}.json", _content(token, since))
