"""Serving on this machine: a Ray and a Serve of our own, in the foreground, until told to end.

Whoever stops it (Ctrl-C, SIGTERM, `make serve-down` from elsewhere) gets the same: requests that
have begun are answered, Serve is shut down, and nothing of ours listens any more. A file tells
other processes what runs; only what it names, with its time of start, is ever ended by force.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import secrets
import shutil
import signal
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray

from clip_ray.config.serving import ServeConfig
from clip_ray.errors import ClusterError, ConfigError
from clip_ray.registry import Target
from clip_ray.runtime import processes
from clip_ray.runtime.cluster import ray_temp
from clip_ray.runtime.rollout import POLL_S, confirm
from clip_ray.runtime.serve_config import IMPORT_PATH, declaration, node_environment
from clip_ray.runtime.serve_state import STATE, Running, read_running, write_running
from clip_ray.runtime.serving import Live, places, quiet

PROBE_S = 60.0  # HAProxy reloads once a replica is there, and checks it every 5 s
DRAIN_S = 100.0  # a request's last seconds, and Serve's own 30 s
DOWN_S = DRAIN_S + 60
_LISTENERS_S = 15.0
_HAPROXY_PORTS = {
    "RAY_SERVE_HAPROXY_STATS_PORT": 8404,
    "RAY_SERVE_HAPROXY_METRICS_PORT": 9101,
    "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": 8500,
}
_HAPROXY_FILES = {
    "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": "haproxy.cfg",
    "RAY_SERVE_HAPROXY_SOCKET_PATH": "admin.sock",
    "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": "metrics.sock",
    "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": "server-state",
}
Say = Callable[[str], None]


class _Signals:
    """SIGINT, SIGTERM and SIGHUP as SystemExit, once; what follows is only noted."""

    NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self.ending = False

    def own(self) -> None:
        for number in self.NUMBERS:
            signal.signal(number, self._take)

    def _take(self, number: int, frame: Any) -> None:
        if self.ending:
            os.write(2, b"ending already; requests that have begun are answered first\n")
            return
        self.ending = True
        raise SystemExit(128 + number)


def serve_in_foreground(
    config: ServeConfig,
    target: Target,
    folder: Path,
    say: Say,
    ready: Callable[[dict[str, Any]], None],
    import_path: str = IMPORT_PATH,
) -> int:
    """Start a Ray and Serve of our own, and stay until a signal ends both.

    Args:
        config: the deployment, `located`.
        target: the model.
        folder: where the file about it goes.
        say: prints a line for the user.
        ready: called with the declarative config once every replica serves.
        import_path: the application's builder.

    Returns:
        The exit status: 128 + the signal's number, or 1 where Serve ended by itself.

    Raises:
        ClipRayError: it cannot be started; nothing of it is left then.
    """
    _clear(folder, say)
    config, running, environment = _plan(config, folder)
    os.environ |= environment
    write_running(folder, running, create=True)
    signals = _Signals()
    before = {number: signal.getsignal(number) for number in signals.NUMBERS}
    signals.own()
    try:
        running = _start_ray(config, running, say)
        # Ray has put its own handler in place of ours.
        signals.own()
        write_running(folder, running)
        declared = declaration(config, target, import_path)
        _deploy(config, declared, running, say)
        ready(declared)
        _wait(say)
        return 1
    except SystemExit as stopped:
        # While it starts, Ray's own handler has the signal's number for its status.
        number = int(stopped.code or 0)
        return number if number > 128 else 128 + number
    finally:
        signals.ending = True
        signals.own()
        with contextlib.suppress(OSError):  # whoever listened may be gone, as with SIGHUP
            say("ending")
        _end(running)
        (folder / STATE).unlink(missing_ok=True)
        for number, handler in before.items():
            signal.signal(number, handler)
        with contextlib.suppress(OSError):
            say("ended: nothing of it listens any more")


def _plan(config: ServeConfig, folder: Path) -> tuple[ServeConfig, Running, dict[str, str]]:
    """Choose ports and directories; return them with the environment that Serve needs."""
    port = config.port or processes.free_port(config.host)
    if processes.listens(config.host, port):
        raise ConfigError(
            f"port {port} of {config.host} is taken; end what listens there, or give another: "
            "--serve.port N (0 = a free one)"
        )
    config = config.model_copy(update={"port": port})
    environment = {"RAY_SERVE_ENABLE_HA_PROXY": "0", **node_environment(config)}
    more: dict[str, str] = {}
    scratch = None
    if config.profile == "gpu":
        if sys.platform != "linux":
            raise ConfigError("profile gpu needs HAProxy, which is there on Linux only; use local")
        # Its own directory: HAProxy's admin socket is open to whoever reaches it, and the name in
        # its command line proves that a process is ours.
        scratch = str(ray_temp() / f"ha-{secrets.token_hex(4)}")
        more = {k: str(processes.free_port("0.0.0.0", p)) for k, p in _HAPROXY_PORTS.items()}
        environment = {
            **environment,
            **more,
            **{name: f"{scratch}/{file}" for name, file in _HAPROXY_FILES.items()},
            "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": scratch,
            # Half a minute for load balancers of a cluster; here there is none.
            "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",
        }
    mine = processes.started(os.getpid())
    assert mine is not None
    running = Running(
        machine=socket.gethostname(),
        pid=os.getpid(),
        started=mine,
        name=config.name,
        host=config.host,
        port=port,
        more_ports=tuple(map(int, more.values())),
        scratch=scratch,
        token=str(folder / "ray-token"),
    )
    return config, running, environment


def _clear(folder: Path, say: Say) -> None:
    """End what a killed process has left."""
    left = read_running(folder)
    if left is None:
        return
    if left.machine != socket.gethostname():
        raise ConfigError(
            f"{folder / STATE}: application {left.name} was started on {left.machine}; end it "
            "there (make serve-down), or give this one another serve.state_uri"
        )
    if left.alive():
        raise ConfigError(f"{folder / STATE}: process {left.pid} has started Serve meanwhile")
    say(f"process {left.pid} was killed; ending what it left")
    _end_leftovers(left)
    (folder / STATE).unlink()


def _start_ray(config: ServeConfig, running: Running, say: Say) -> Running:
    token = Path(running.token)
    with open(os.open(token, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600), "w") as file:
        file.write(secrets.token_hex(32))
    temp = ray_temp()
    os.environ |= {"RAY_AUTH_TOKEN_PATH": str(token), "RAY_TMPDIR": str(temp)}
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    quiet()
    if running.scratch is not None:
        Path(running.scratch).mkdir(mode=0o700)
    gpus = _gpus(config)
    # One replica more than there may be: new settings start beside the old.
    cpus = max(os.cpu_count() or 1, math.ceil(config.cpus * (config.max_replicas + 1)))
    say(f"starting Ray and Serve ({config.profile}), a few seconds")
    try:
        context: Any = ray.init(
            address="local",
            num_cpus=cpus,
            num_gpus=gpus,
            include_dashboard=True,
            dashboard_host="127.0.0.1",
            dashboard_port=processes.free_port("127.0.0.1"),
            log_to_driver=False,
            logging_level=logging.ERROR,
            _temp_dir=str(temp),
        )
    except Exception as error:  # Ray raises many kinds here
        raise ClusterError(f"a local Ray could not be started: {error}") from error
    pids = [info.process.pid for infos in _node().all_processes.values() for info in infos]
    return running.model_copy(
        update={
            "address": context.address_info["gcs_address"],
            "dashboard": f"http://{context.dashboard_url}",
            "children": {p: since for p in pids if (since := processes.started(p)) is not None},
        }
    )


def _gpus(config: ServeConfig) -> int:
    """Return the GPUs that Ray is to deal out."""
    if not config.gpus:
        return 0
    count = config.declared_gpus
    if count is None:
        import torch

        count = torch.cuda.device_count()
    if count < config.gpus * config.min_replicas:
        raise ConfigError(
            f"{config.min_replicas} replicas with {config.gpus:g} GPUs each, and {count} GPUs are "
            "there: lower serve.gpus or serve.min_replicas, or use profile local"
        )
    return count


def _deploy(config: ServeConfig, declared: dict[str, Any], running: Running, say: Say) -> None:
    live = start_serve(declared)
    live.write({"applications": declared["applications"]})
    place = places(declared)[0]
    say(f"loading {place.target.id}")
    confirm(live, place, config.start_timeout_s, settled=True)
    probe(running.url, PROBE_S)


def start_serve(declared: dict[str, Any]) -> Live:
    """Start Serve on the connected Ray with the options of a declarative config.

    Raises:
        ClusterError: its proxies do not start.
    """
    from ray import serve

    try:
        serve.start(
            proxy_location=declared["proxy_location"],
            http_options=declared["http_options"],
            tracing_config=declared.get("tracing_config"),
        )
    except Exception as error:  # a proxy that cannot bind its port fails as several kinds
        raise ClusterError(f"Serve could not be started: {error}") from error
    live = Live.connect()
    if live is None:
        raise ClusterError("Serve's controller ended as soon as it was started")
    return live


def probe(url: str, timeout_s: float) -> None:
    """Wait until a proxy answers, and passes requests on: Serve reports ready before it is.

    Raises:
        ClusterError: it does not, in time.
    """
    # What the environment says of proxies is for other hosts.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + timeout_s
    for path in ("/-/healthz", "/ready"):
        while True:
            try:
                with opener.open(f"{url}{path}", timeout=5):
                    break
            except (OSError, urllib.error.URLError) as error:
                if time.monotonic() > deadline:
                    raise ClusterError(
                        f"{url}{path} does not answer with 200 after {timeout_s:g} s ({error}), "
                        "though Serve says that it runs: is the port another process's, or "
                        "behind a firewall?"
                    ) from error
            time.sleep(POLL_S)


def _wait(say: Say) -> None:
    """Return when Serve has ended by itself."""
    node = _node()
    while True:
        for _ in range(10):
            time.sleep(0.5)
            if dead := node.dead_processes():
                ended = ", ".join(kind for kind, _ in dead)
                say(f"Ray's {ended} ended by itself; its logs: {node.get_logs_dir_path()}")
                return
        if Live.connect() is None:
            say("Serve was shut down from elsewhere")
            return


def _end(running: Running) -> None:
    """Shut Serve and Ray down; end by force what stays.

    Raises:
        ClusterError: something of ours still listens.
    """
    if ray.is_initialized():
        # Ray prints how its controller's calls fail while Serve shuts down, which they must.
        with contextlib.redirect_stdout(io.StringIO()):
            if not _node().dead_processes():
                # Calls to a Ray that dies meanwhile may wait for ever.
                drain = threading.Thread(target=_drain, daemon=True)
                drain.start()
                drain.join(DRAIN_S)
            ray.shutdown()
    _end_leftovers(running)


def _node() -> Any:
    """Return the Ray node that this process has started."""
    return ray._private.worker._global_node


def _drain() -> None:
    from ray import serve

    # Whatever state Serve is in, what follows ends it.
    with contextlib.suppress(Exception):
        live = Live.connect()
        if live is None:
            return
        # The proxies end with Serve at once; first the replicas answer what they have begun.
        for name in live.details()["applications"]:
            serve.delete(name)
        serve.shutdown()


def _end_leftovers(running: Running) -> None:
    """End what is provably ours, and make sure that our ports are free.

    Raises:
        ClusterError: somebody listens on them all the same.
    """
    processes.end(running.children, wait_s=5)
    if running.scratch is not None:
        processes.end(processes.with_argument(running.scratch), wait_s=2)
        shutil.rmtree(running.scratch, ignore_errors=True)
    ports = [(running.host, running.port), *(("0.0.0.0", port) for port in running.more_ports)]
    deadline = time.monotonic() + _LISTENERS_S
    while taken := [port for host, port in ports if processes.listens(host, port)]:
        if time.monotonic() > deadline:
            raise ClusterError(
                f"somebody still listens on port {', '.join(map(str, taken))}, and it is no "
                "process that this Serve has started"
            )
        time.sleep(0.2)


def down(folder: Path, say: Say) -> None:
    """End the Serve in the foreground of another process, and see that it is gone.

    Raises:
        ClusterError: something of it still listens.
        ConfigError: it runs on another machine.
    """
    running = read_running(folder)
    if running is None:
        say(f"no Serve of ours runs ({folder / STATE} is not there)")
        return
    if running.machine == socket.gethostname() and running.alive():
        say(f"ending application {running.name} on port {running.port} (process {running.pid})")
        os.kill(running.pid, signal.SIGTERM)
        deadline = time.monotonic() + DOWN_S
        while running.alive() and time.monotonic() < deadline:
            time.sleep(0.2)
        if running.alive():
            say(f"process {running.pid} does not end; it is killed")
            processes.end({running.pid: running.started}, wait_s=1)
    if read_running(folder) is not None:
        _clear(folder, say)
    _end_leftovers(running)
    say("ended: nothing of it listens any more")
