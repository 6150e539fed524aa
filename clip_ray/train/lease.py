"""The lease: one live job writes a run, and a second one is told who does.

The holder renews a file in the run's directory. A holder that has died is taken over: at once
where it ran on this machine and its process is gone, else when whoever wants the lease has watched
for a minute of its own clock, and the file has not changed. No two machines' clocks are compared.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from clip_ray.errors import CheckpointError
from clip_ray.storage import Store

RENEW_S = 10.0
EXPIRE_S = 60.0
LOOK_S = 2.0  # between two looks at another machine's lease
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


class Watch:
    """Tells whether the holder of a run's lease lives, from one look to the next.

    Args:
        run: the run's directory.
        clock: seconds, monotonic.
    """

    def __init__(self, run: Store, clock: Callable[[], float] = time.monotonic) -> None:
        self._run, self._clock = run, clock
        self._number, self._content, self._changed = 0, b"", 0.0
        self._renews = False

    @property
    def renews(self) -> bool:
        """Whether the holder that was last seen is known to live; else it may have died."""
        return self._renews

    @property
    def number(self) -> int:
        """Number of the newest lease that was seen; 0 = there was none."""
        return self._number

    def look(self) -> Holder | None:
        """Return the holder; None where there is none, and where it is known to be dead."""
        while True:
            newest, begun = _newest(self._run), self._clock()
            content = b""
            if newest:
                try:
                    content = self._run.read(f"{_FOLDER}/{newest:08d}.json")
                except FileNotFoundError:
                    continue  # released between the listing and the reading
            return self._judge(newest, content, begun)

    def _judge(self, number: int, content: bytes, begun: float) -> Holder | None:
        """Take what a look has read that began at a time."""
        if number != self._number or content != self._content:
            # Not at the first sight of a holder: it may have written this long ago.
            self._renews = number == self._number
            self._number, self._content, self._changed = number, content, self._clock()
        if not number:
            return None
        fields = json.loads(content)
        if fields.get("place") == _place():
            started = _process_started(fields["pid"])
            self._renews = started is not None and started == fields["process_started"]
            dead = not self._renews
        else:
            dead = begun - self._changed >= EXPIRE_S
        return None if dead else Holder(*(fields[k] for k in ("host", "pid", "since", "token")))


@contextlib.contextmanager
def held_lease(
    run: Store, say: Callable[[str], None] = lambda line: None
) -> Iterator[threading.Event]:
    """Hold the run's lease for the duration of the block.

    Args:
        run: the run's directory.
        say: told, for the user, that it takes up to a minute to see whether a holder lives.

    Yields:
        An event that is set when another job has taken the lease over, after this process did not
        run for a minute: it must write nothing more.

    Raises:
        CheckpointError: another live job holds it; the message says which.
    """
    token = uuid.uuid4().hex
    number = _take(run, token, say)
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
    """Return the job that writes a run, at one look; None where none is alive.

    Of a job on another machine one look cannot tell that it has died (`Watch`).
    """
    return Watch(run).look()


def _take(run: Store, token: str, say: Callable[[str], None]) -> int:
    """Create the next lease file, exclusively, once no earlier one is alive."""
    watch, said = Watch(run), 0
    while True:
        holder = watch.look()
        if holder is not None and watch.renews:
            raise CheckpointError(
                f"run {run.uri} is being written by {holder}; wait for it, stop it "
                "(jobs/stop.py), or give this run another name (--run.name)"
            )
        if holder is not None:
            if said != watch.number:
                said = watch.number
                say(f"{holder} had this run last: seeing whether it lives (at most {EXPIRE_S:g} s)")
            time.sleep(LOOK_S)
            continue
        newest = watch.number
        try:
            run.create(f"{_FOLDER}/{newest + 1:08d}.json", _content(token, time.time(), 0))
        except FileExistsError:
            continue
        for old in range(max(newest - 3, 1), newest + 1):
            run.delete(f"{_FOLDER}/{old:08d}.json")
        return newest + 1


def _newest(run: Store) -> int:
    return max((int(name.split(".")[0]) for name in run.child(_FOLDER).files()), default=0)


def _content(token: str, since: float, renewals: int) -> bytes:
    fields = {
        "host": socket.gethostname(),
        "place": _place(),
        "pid": os.getpid(),
        "process_started": _process_started(os.getpid()),
        "since": since,
        "renewed": time.time(),
        "renewals": renewals,
        "token": token,
    }
    return json.dumps(fields).encode()


def _place() -> str:
    """Return what processes share that can see each other's numbers.

    Not the host's name: machines may share it, and so may containers with numbers of their own.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


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
    for renewals in itertools.count(1):
        if ended.wait(RENEW_S):
            return
        # Storage may be down for a while, in whatever words; the next renewal may succeed.
        with contextlib.suppress(Exception):
            if _newest(run) > number:
                lost.set()
                return
            run.write(f"{_FOLDER}/{number:08d}.json", _content(token, since, renewals))
