"""Where a process is: the stacks of its threads, taken from outside, also while it is stopped."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

TIMEOUT_S = 6.0  # py-spy takes 0.05 s where it may look
PAUSE_S = 0.3
FRAMES = 4  # of the training thread, in the short form
_TRAINING = "TrainingThread"  # what Ray Train calls the thread that trains
_OWN = re.compile(r'File ".*?([^/"]+)", line (\d+), in (\S+)')


def dump(pid: int) -> str:
    """Return the stacks of a process on this machine; in their place why there are none.

    The process is not held up, so that a stopped one can be looked at; it must belong to the same
    user, and some systems (kernel.yama.ptrace_scope above 0) let only root look.
    """
    # Ray's dashboard needs it: it is there where Ray is.
    program = Path(sys.executable).with_name("py-spy")
    command = [str(program), "dump", "--nonblocking", "--pid", str(pid)]
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        try:
            left = deadline - time.monotonic()
            done = subprocess.run(command, capture_output=True, text=True, timeout=left)
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"no stack: {error}"
        if done.returncode == 0:
            return done.stdout
        # What changes while it is read may not be readable: the next look finds another moment.
        if time.monotonic() > deadline - TIMEOUT_S / 2:
            return f"no stack: {(done.stderr or done.stdout).strip().splitlines()[-1]}"
        time.sleep(PAUSE_S)


def short(stack: str) -> str:
    """Return where the training thread is, in one line, innermost first.

    Args:
        stack: what `dump` returned, or Python's own formatted stack of that thread.
    """
    own = [f"{name} ({file}:{line})" for file, line, name in _OWN.findall(stack)][::-1]
    for block in re.split(r"^Thread ", stack, flags=re.MULTILINE)[1:]:
        title, *lines = block.splitlines()
        if _TRAINING in title:
            own = [line.strip() for line in lines if line.startswith("    ")]
    return " < ".join(own[:FRAMES])
