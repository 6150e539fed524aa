"""A real Ray of several nodes on this machine: `make cluster-up N=3`, `make cluster-down`.

Each node is a raylet of its own with the CPUs and GPUs that it is told to have, and a temporary
directory of its own; ports and token are this cluster's alone. The dashboard listens on loopback,
Ray's own ports on the machine's address, which Ray puts in the place of any other. What was started
is written down with its time of start: only that is ended, no other Ray on the machine is touched.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

from clip_ray.errors import ClipRayError, ClusterError, ConfigError  # noqa: E402
from clip_ray.runtime import processes  # noqa: E402

HOST = "127.0.0.1"
FOLDER = Path("runs/cluster")
STATE = "cluster.json"
START_S = 120.0
END_S = 40.0  # Ray drains a node for up to 30 s; then what is left is killed
STARTED = b"Ray runtime started."  # what `ray start` says when the node has joined
RAY = Path(sys.executable).with_name("ray")
MLFLOW_PORT = 5000
OBJECT_STORE_BYTES = 256 * 1024**2


def main(argv: list[str]) -> int:
    """Start or end the cluster; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("what", choices=("up", "down"))
    parser.add_argument("--nodes", type=int, default=3, help="nodes, the head among them")
    parser.add_argument("--cpus", type=int, default=2, help="CPUs that each says it has")
    parser.add_argument("--gpus", type=int, default=0, help="GPUs that each but the head says so")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="state and logs")
    own = parser.parse_args(argv)
    try:
        if own.what == "down":
            print(down(own.folder))
            return 0
        if own.nodes < 1 or own.cpus < 1 or own.gpus < 0:
            raise ConfigError(
                f"--nodes {own.nodes}, --cpus {own.cpus}, --gpus {own.gpus}: expected at least "
                "1, 1 and 0"
            )
        state = start(own.folder, own.nodes, own.cpus, own.gpus)
        print(described(state, own.folder, own.nodes, own.cpus, own.gpus))
    except ClipRayError as error:
        print(f"cluster: {error}", file=sys.stderr)
        return 2
    return 0


def start(folder: Path, nodes: int, cpus: int, gpus: int, ray: Path = RAY) -> dict[str, Any]:
    """Start the nodes' processes; return what is written down of them.

    Args:
        folder: where state, token and logs go.
        nodes: nodes, the head among them.
        cpus: CPUs of each.
        gpus: GPUs of each but the head.
        ray: Ray's command.

    Raises:
        ConfigError: the cluster runs already.
        ClusterError: a node did not join; those before it are ended.
    """
    folder.mkdir(parents=True, exist_ok=True)
    left = _read(folder)
    if left is not None:
        if left["machine"] != socket.gethostname() or _members(left):
            raise ConfigError(
                f"{folder / STATE}: a cluster at {left['address']} runs already on "
                f"{left['machine']}; end it there with make cluster-down"
            )
        shutil.rmtree(left["temp"], ignore_errors=True)
    token = (folder / "token").absolute()
    with open(os.open(token, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600), "w") as file:
        file.write(secrets.token_hex(32))
    ports = _free_ports(3)
    state: dict[str, Any] = {
        "machine": socket.gethostname(),
        "address": f"{HOST}:{ports[0]}",
        "dashboard": f"http://{HOST}:{ports[1]}",
        "token": str(token),
        # Short: socket paths below it end at 107 characters.
        "temp": tempfile.mkdtemp(prefix="clip-ray-", dir="/tmp"),
        "nodes": {},
    }
    _write(folder, state)
    head = ["--head", f"--port={ports[0]}", f"--dashboard-port={ports[1]}"]
    head += [f"--dashboard-host={HOST}", f"--ray-client-server-port={ports[2]}"]
    head += [f"--temp-dir={state['temp']}"]
    try:
        _start_node(ray, folder, state, "head", [*head, f"--num-cpus={cpus}", "--num-gpus=0"])
        for number in range(1, nodes):
            name = f"node-{number}"
            more = [f"--address={state['address']}", f"--num-cpus={cpus}", f"--num-gpus={gpus}"]
            # In one directory each would unpack a job's code anew, over that which runs.
            more += [f"--temp-dir={state['temp']}/{name}"]
            _start_node(ray, folder, state, name, more)
    except BaseException:
        down(folder)
        raise
    return state


def down(folder: Path) -> str:
    """End the cluster of `folder`, and nothing else; say what was ended.

    Raises:
        ConfigError: it runs on another machine.
        ClusterError: something of it cannot be ended.
    """
    state = _read(folder)
    if state is None:
        return f"no cluster of ours runs ({folder / STATE} is not there)"
    if state["machine"] != socket.gethostname():
        raise ConfigError(f"{folder / STATE}: the cluster runs on {state['machine']}; end it there")
    count = len(_members(state))
    # The head last: without it the others wait for it.
    for pid, since in reversed(state["nodes"].items()):
        if processes.started(int(pid)) == since:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGTERM)
    deadline = time.monotonic() + END_S
    while _members(state) and time.monotonic() < deadline:
        time.sleep(0.2)
    processes.end(_members(state), wait_s=2)
    left = _members(state)
    if left:
        raise ClusterError(f"processes {', '.join(map(str, left))} of it do not end")
    shutil.rmtree(state["temp"], ignore_errors=True)
    Path(state["token"]).unlink(missing_ok=True)
    (folder / STATE).unlink()
    return f"ended {len(state['nodes'])} nodes, {count} processes; logs: {folder}/*.log"


def environment(state: dict[str, Any]) -> dict[str, str]:
    """Return what a process needs to reach the cluster."""
    return {
        "RAY_ADDRESS": state["address"],
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": state["token"],
    }


def described(state: dict[str, Any], folder: Path, nodes: int, cpus: int, gpus: int) -> str:
    """Say how the cluster is reached."""
    declared = f"{cpus} CPUs each" + (f", {gpus} GPUs on each but the head" if gpus else "")
    exports = " ".join(f"{name}={value}" for name, value in environment(state).items())
    mlflow = f"http://{HOST}:{MLFLOW_PORT}"
    which = "" if folder == FOLDER else f" CLUSTER={folder}"
    return (
        f"{nodes} nodes with {declared} (as declared), head {state['address']}\n"
        f"  export {exports}\n"
        f"  ray status\n"
        f"  python jobs/ui.py --create --port {MLFLOW_PORT}   # an MLflow for it, in another "
        "terminal: sqlite is for one node\n"
        f"  ray job submit --address {state['dashboard']} --working-dir . -- "
        f"python jobs/pretrain.py --run.storage {ROOT / 'runs'} --tracking.uri {mlflow}\n"
        f"  make cluster-down{which}"
    )


def _start_node(
    ray: Path, folder: Path, state: dict[str, Any], name: str, flags: list[str]
) -> None:
    """Start a node in a session of its own, by which its processes are known; wait for it."""
    command = [str(ray), "start", "--block", *flags]
    command += [
        f"--node-name={name}",
        f"--object-store-memory={OBJECT_STORE_BYTES}",
        # 0 = any free one: the fixed ranges are one node's a machine.
        "--min-worker-port=0",
        "--max-worker-port=0",
        "--dashboard-agent-listen-port=0",
        "--disable-usage-stats",
    ]
    # Of another Ray that this shell may know.
    env = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    ours = {key: value for key, value in environment(state).items() if key != "RAY_ADDRESS"}
    # A job's `python` is found there: it has to be the one that has Ray.
    ours["PATH"] = f"{RAY.parent}{os.pathsep}{os.environ.get('PATH', '')}"
    log_path = folder / f"{name}.log"
    with open(log_path, "wb") as log:
        node = subprocess.Popen(
            command,
            # Not the checkout: a job has the code that it brings, as on other clusters.
            cwd=folder,
            env=env | ours | {"RAY_JOB_STOP_WAIT_TIME_S": "60"},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    since = processes.started(node.pid)
    if since is None:
        raise ClusterError(f"{name} ended at once; see {log_path}")
    state["nodes"][str(node.pid)] = since
    _write(folder, state)
    # One after the other: several that start at once on a busy machine miss Ray's 30 s.
    deadline = time.monotonic() + START_S
    while STARTED not in log_path.read_bytes():
        if processes.started(node.pid) != since or time.monotonic() > deadline:
            raise ClusterError(f"{name} did not join {state['address']}; see {log_path}")
        time.sleep(0.2)


def _members(state: dict[str, Any]) -> dict[int, str]:
    """Return the live processes of the cluster, by number with their time of start.

    A job's driver is in no session of ours: a watcher of Ray's ends it when its node has ended.
    """
    sessions = {
        int(pid)
        for pid, since in state["nodes"].items()
        # A number that another process has by now leads another session.
        if processes.started(int(pid)) in (since, None)
    }
    found = {}
    for pid in _pids():
        try:
            ours = os.getsid(pid) in sessions
        except OSError:  # ended meanwhile
            continue
        if ours and (since := processes.started(pid)) is not None:
            found[pid] = since
    return found


def _pids() -> list[int]:
    if Path("/proc/self").exists():
        return [int(entry.name) for entry in Path("/proc").glob("[0-9]*")]
    told = subprocess.run(["ps", "-A", "-o", "pid="], capture_output=True, text=True, check=True)
    return [int(word) for word in told.stdout.split()]


def _free_ports(count: int) -> list[int]:
    """Return free ports, all different: they are held until the last is found."""
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind((HOST, 0))
        return [one.getsockname()[1] for one in sockets]


def _read(folder: Path) -> dict[str, Any] | None:
    try:
        state: dict[str, Any] = json.loads((folder / STATE).read_text())
    except FileNotFoundError:
        return None
    return state


def _write(folder: Path, state: dict[str, Any]) -> None:
    part = folder / f"{STATE}.part"
    part.write_text(json.dumps(state, indent=1))
    part.replace(folder / STATE)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
