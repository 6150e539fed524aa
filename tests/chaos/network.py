"""A network of our own on this machine, from which a node can be cut off."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

import pytest


@dataclass(frozen=True)
class Network:
    """A bridge, and a namespace that is reached through it.

    Attributes:
        interface: the name of the network's interface, here and in the namespace.
        here: the machine's address in it.
        there: the namespace's.
        namespace: its name.
    """

    interface: str
    here: str
    there: str
    namespace: str

    def cut(self) -> None:
        """Take the link down: what is sent is lost, and nobody is told."""
        _ip("link", "set", f"{self.interface}v", "down")

    def mend(self) -> None:
        """Bring it up again."""
        _ip("link", "set", f"{self.interface}v", "up")


@contextlib.contextmanager
def network() -> Iterator[Network]:
    """Make such a network; without the right to, the test is skipped."""
    number = os.getpid()
    # The shared address space of RFC 6598: nobody on this machine is likely to use it.
    prefix = f"100.{64 + number % 64}.{number // 64 % 256}"
    made = Network(f"cr{number}", f"{prefix}.1", f"{prefix}.2", f"clip-ray-{number}")
    bridge, port, inside = made.interface, f"{made.interface}v", f"{made.interface}p"
    space = ("-n", made.namespace)
    if not shutil.which("ip") or not _may(("netns", "add", made.namespace)):
        pytest.skip("no right to make network namespaces")
    try:
        if not _may(("link", "add", bridge, "type", "bridge")):
            pytest.skip("this kernel has no bridges")
        _ip("link", "add", port, "type", "veth", "peer", "name", inside)
        _ip("link", "set", inside, "netns", made.namespace, "name", bridge)
        _ip("link", "set", port, "master", bridge, "up")
        _ip("addr", "add", f"{made.here}/24", "dev", bridge)
        _ip("link", "set", bridge, "up")
        _ip(*space, "addr", "add", f"{made.there}/24", "dev", bridge)
        for device in ("lo", bridge):
            _ip(*space, "link", "set", device, "up")
        yield made
    finally:
        _may(("link", "del", bridge))
        _may(("netns", "del", made.namespace))


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


def _may(arguments: tuple[str, ...]) -> bool:
    return subprocess.run(["ip", *arguments], capture_output=True).returncode == 0
