"""What this machine knows of its own Serve: a file that the process in the foreground keeps."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from clip_ray.config.schema import Section
from clip_ray.errors import ClusterError, ConfigError
from clip_ray.runtime import processes
from clip_ray.runtime.serving import Live, connected

STATE = "serve.json"
OWNER = "serve.yaml"  # in state_uri: what was last applied; promotions keep it true


class Running(Section):
    """What the file says of a Serve in the foreground."""

    format: Literal[1] = 1
    machine: str = Field(description="host name")
    pid: int = Field(description="the process in the foreground")
    started: str = Field(description="tells it from a later process with its number")
    name: str = Field(description="application")
    host: str = Field(description="address that Serve listens on")
    port: int = Field(description="its port")
    more_ports: tuple[int, ...] = Field((), description="of HAProxy, on all interfaces")
    scratch: str | None = Field(None, description="HAProxy's own directory, in its command line")
    token: str = Field(description="file of the Ray's token")
    address: str | None = Field(None, description="of the Ray; none = it is being started")
    dashboard: str | None = Field(None, description="of the Ray, for `serve status`")
    children: dict[int, str] = Field({}, description="start by number of the Ray's processes")

    def alive(self) -> bool:
        """Tell whether the process in the foreground still runs, on this machine."""
        return self.machine == socket.gethostname() and processes.started(self.pid) == self.started

    @property
    def url(self) -> str:
        """Where this machine reaches it."""
        return url_of(self.host, self.port)


def url_of(host: str, port: int) -> str:
    """Return the URL under which this machine reaches a listener."""
    name = processes.reachable(host)
    return f"http://[{name}]:{port}" if ":" in name else f"http://{name}:{port}"


def read_running(folder: Path) -> Running | None:
    """Return what the file in `folder` says, None where there is none.

    Raises:
        ConfigError: it is damaged.
    """
    path = folder / STATE
    try:
        return Running.model_validate_json(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        raise ConfigError(
            f"{path}: not a description of a running Serve ({str(error).splitlines()[0]}); see "
            "whether one runs, end it, and delete the file"
        ) from error


@contextlib.contextmanager
def attached(running: Running) -> Iterator[Live]:
    """Connect to the Ray of a Serve in the foreground.

    Raises:
        ClusterError: it cannot be reached, or Serve has not started yet.
    """
    if running.address is None:
        raise ClusterError(f"application {running.name} is being started (process {running.pid})")
    _present_token(running.token)
    with connected(running.address) as live:
        if live is None:
            raise ClusterError(f"application {running.name} is being started or ended")
        yield live


def write_running(folder: Path, running: Running, create: bool = False) -> None:
    """Write the file, readable by its owner only.

    Args:
        folder: where.
        running: what it says.
        create: there must be none yet.

    Raises:
        ConfigError: there is one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{STATE}.{os.getpid()}.tmp"
    temporary.unlink(missing_ok=True)
    with open(os.open(temporary, os.O_CREAT | os.O_WRONLY | os.O_EXCL, 0o600), "w") as file:
        file.write(running.model_dump_json(indent=1))
    try:
        if not create:
            os.replace(temporary, folder / STATE)
            return
        os.link(temporary, folder / STATE)
    except FileExistsError as error:
        raise ConfigError(f"{folder / STATE}: another process is starting Serve here") from error
    finally:
        temporary.unlink(missing_ok=True)


def _present_token(file: str) -> None:
    """Make this process show a Ray's token; Ray reads its environment when it is imported."""
    from ray._private.authentication import authentication_token_setup as setup

    os.environ["RAY_AUTH_TOKEN_PATH"] = file
    setup._enable_token_auth()
    setup.AuthenticationTokenLoader.instance().reset_cache()
