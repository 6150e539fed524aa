"""A writer of commits that is killed at each of its operations on storage in turn.

python tests/train/crashing.py RUNS ACKNOWLEDGED [ENDPOINT]

For N = 1, 2, ... a child process makes a run RUNS/N, commits to it, and ends without any clean-up
just before the N-th operation that would change the storage: on a local disk an open for writing,
a rename, a link or a deletion, as Python's audit events tell them, or half a file's content; on S3
(with ENDPOINT) a request that is no GET. It ends where a child has reached its end. ACKNOWLEDGED/N
holds the step of the last commit that had returned. Nothing here imports torch.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[2])

from clip_ray.config import S3Options  # noqa: E402
from clip_ray.storage import Store, open_store  # noqa: E402
from clip_ray.train.checkpoint import Checkpoints, Commit  # noqa: E402

KILLED = 77
BEFORE, AFTER = 20, 30
CHILD_S = 60  # a bound: a child takes less than a second


def content(step: int) -> dict[str, bytes]:
    """Return the files of a commit; no two commits have one in common."""
    names = ("model-1.safetensors", "state.json", "model-2.safetensors")
    return {name: f"{name} of step {step};".encode() * 50 for name in names}


def write(checkpoints: Checkpoints, commit: Commit, point: Callable[[], None]) -> None:
    """Commit a checkpoint whose second part another rank writes."""
    files = content(commit.step)

    def fill(name: str, path: Path) -> None:
        half = len(files[name]) // 2
        with open(path, "xb") as file:
            file.write(files[name][:half])
            file.flush()
            point()
            file.write(files[name][half:])

    last = "model-2.safetensors"
    checkpoints.write_part(commit, 1, {last: partial(fill, last)})
    first = "model-1.safetensors"
    own = {first: partial(fill, first), "state.json": files["state.json"]}
    checkpoints.write(commit, own, parts=2)


def attempt(run: Store, point: Callable[[], None], acknowledge: Callable[[int], object]) -> None:
    """Begin an attempt as rank 0 does, and commit."""
    checkpoints = Checkpoints(run)
    number = checkpoints.begin_attempt({})
    checkpoints.start_from_newest(number, refuse)
    checkpoints.prune(1, None)
    write(checkpoints, Commit(AFTER, number), point)
    acknowledge(AFTER)
    checkpoints.prune(1, None)


def prepare(run: Store) -> None:
    """Leave what an attempt has left that was killed amid its second commit."""
    checkpoints = Checkpoints(run)
    number = checkpoints.begin_attempt({})
    checkpoints.start_from_newest(number, refuse)
    write(checkpoints, Commit(BEFORE, number), lambda: None)
    checkpoints.write_part(Commit(25, number), 1, {"model-2.safetensors": b"x"})


def refuse(commit: Commit, why: str) -> None:
    """No commit of these may be rejected."""
    raise AssertionError(f"{commit.name}: {why}")


class Killer:
    """Ends the process before its N-th operation, once it is armed."""

    def __init__(self, runs: str) -> None:
        self._runs, self._left = runs, -1

    def arm(self, number: int) -> None:
        """Begin to count."""
        self._left = number

    def point(self) -> None:
        """Count an operation."""
        self._left -= 1
        if self._left == 0:
            os._exit(KILLED)

    def watch_disk(self) -> None:
        """Count what changes the directory of the runs."""
        changes = ("os.rename", "os.link", "os.remove", "os.rmdir", "os.mkdir")

        def hear(event: str, args: tuple[Any, ...]) -> None:
            writes = event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            # Relative to a directory's descriptor: shutil.rmtree deletes so.
            if event in changes or (writes and str(args[0]).startswith(self._runs)):
                self.point()

        sys.addaudithook(hear)

    def watch_s3(self) -> None:
        """Count the requests that change something."""
        from aiobotocore.httpsession import AIOHTTPSession

        send = AIOHTTPSession.send

        async def counted(session: AIOHTTPSession, request: Any) -> Any:
            if request.method not in ("GET", "HEAD"):
                self.point()
            return await send(session, request)

        AIOHTTPSession.send = counted


def child(number: int, runs: str, acknowledged: Path, endpoint: str | None) -> None:
    """Commit until the N-th operation."""
    signal.alarm(CHILD_S)
    killer = Killer(runs)
    run = open_store(f"{runs}/{number:03d}", S3Options(endpoint=endpoint))
    prepare(run)
    acknowledged = acknowledged / f"{number:03d}"
    acknowledged.write_text(str(BEFORE))
    if endpoint is None:
        killer.watch_disk()
    else:
        killer.watch_s3()
    killer.arm(number)
    attempt(run, killer.point, lambda step: acknowledged.write_text(str(step)))


def main() -> int:
    """Kill a child at each operation."""
    runs, acknowledged = sys.argv[1], Path(sys.argv[2])
    endpoint = sys.argv[3] if len(sys.argv) > 3 else None
    os.fsync = lambda descriptor: None  # it is processes that are killed here, not machines
    if endpoint is not None:
        import s3fs  # noqa: F401 - once, and not in each child
    for number in itertools.count(1):
        pid = os.fork()
        if pid == 0:
            try:
                child(number, runs, acknowledged, endpoint)
            except BaseException:
                sys.excepthook(*sys.exc_info())
                os._exit(1)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if status != KILLED:
            return status
    raise AssertionError


if __name__ == "__main__":
    raise SystemExit(main())
