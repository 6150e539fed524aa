"""What the processes of one node share: files in its temporary directory, and locks on them."""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

LOCK_S = 600.0  # a shard of 10 GB at 20 MB/s; who waited longer does the work itself
_POLL_S = 0.1


def shared_folder() -> Path | None:
    """Return this user's directory for what can be found again; None where there can be none."""
    folder = Path(tempfile.gettempdir()) / f"clip-ray-offsets-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        # In a directory that all may write to, the name may be somebody else's.
        return folder if folder.stat().st_uid == os.getuid() else None
    except OSError:
        return None


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock that this node's processes share; go on without it after LOCK_S."""
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
    except OSError:
        yield
        return
    try:
        deadline = time.monotonic() + LOCK_S
        while time.monotonic() < deadline:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(_POLL_S)
        yield
    finally:
        os.close(descriptor)
