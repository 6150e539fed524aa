"""Processes and listeners of this machine: telling ours from others', without further packages."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

from clip_ray.errors import ConfigError

_WILDCARDS = ("0.0.0.0", "::", "")
_PROC = Path("/proc")


def started(pid: int) -> str | None:
    """Return what tells a process from a later one with the same number; None: it has ended."""
    try:
        fields = (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        if (_PROC / "self").exists():
            return None
        told = subprocess.run(
            ["ps", "-o", "stat=,lstart=", "-p", str(pid)], capture_output=True, text=True
        )
        state, _, since = told.stdout.strip().partition(" ")
        return None if not since or state.startswith("Z") else since.strip()
    # Field 22, counted behind the name in brackets: start time in clock ticks since boot. A dead
    # process may be kept by a parent that never asks for its exit status.
    return None if fields[0] in ("Z", "X") else fields[19]


def end(processes: Mapping[int, str], wait_s: float) -> list[int]:
    """End processes for certain: SIGTERM, and SIGKILL where that takes too long.

    Args:
        processes: start by process number (`started`); a number that has another process by now
            is left alone.
        wait_s: seconds between the two signals.

    Returns:
        Those that were still there.
    """
    found = [pid for pid, since in processes.items() if started(pid) == since]
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in found:
            if started(pid) == processes[pid]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
        deadline = time.monotonic() + wait_s
        while time.monotonic() < deadline and any(started(p) == processes[p] for p in found):
            time.sleep(0.1)
    return found


def with_argument(text: str) -> dict[int, str]:
    """Return the processes with `text` in their command line, by number; Linux only."""
    found = {}
    for entry in _PROC.glob("[0-9]*"):
        try:
            line = (entry / "cmdline").read_bytes()
        except OSError:  # ended, or somebody else's
            continue
        pid = int(entry.name)
        if text.encode() in line and pid != os.getpid() and (since := started(pid)) is not None:
            found[pid] = since
    return found


def reachable(host: str) -> str:
    """Return the address under which this machine reaches a listener on `host`."""
    if host in _WILDCARDS:
        return "::1" if host == "::" else "127.0.0.1"
    return host


def listens(host: str, port: int) -> bool:
    """Tell whether somebody listens on a port of this machine.

    Raises:
        ConfigError: this process could never listen there.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.settimeout(1)
        if probe.connect_ex((reachable(host), port)) == 0:
            return True
    with socket.socket(family) as probe:
        # Connections that have just ended keep the port busy for a minute; no listener does.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return True
            raise ConfigError(
                f"cannot listen on {host}:{port}: {error.strerror}; set serve.host to an address "
                "of this machine and serve.port to a port above 1023"
            ) from error
    return False


def free_port(host: str, wanted: int = 0) -> int:
    """Return the wanted port if it is free, else any free one."""
    if wanted and not listens(host, wanted):
        return wanted
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
