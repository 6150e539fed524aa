"""Several nodes on one machine: what was started is ended, all of it and nothing else."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from clip_ray.errors import ClusterError, ConfigError
from clip_ray.runtime import processes
from cluster import local

# A node as Ray has it: a leader, a child in its session that takes no hint, a port on the head.
RAY = """#!{python}
import os, signal, socket, subprocess, sys, time
if "--num-cpus=13" in sys.argv:
    sys.exit(3)
stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(300)"
child = subprocess.Popen([sys.executable, "-c", stubborn], start_new_session=False)
for word in sys.argv:
    if word.startswith("--port="):
        listener = socket.create_server(("127.0.0.1", int(word[7:])))
print("Ray runtime started.", flush=True)
time.sleep(300)
"""


@pytest.fixture
def ray(tmp_path: Path) -> Path:
    """Return a command that stands for Ray's."""
    path = tmp_path / "ray"
    path.write_text(RAY.format(python=sys.executable))
    path.chmod(0o755)
    return path


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, Path]]:
    """Return the folders of two clusters, which are ended with the test."""
    monkeypatch.setattr(local, "END_S", 0.5)
    both = tmp_path / "ours", tmp_path / "other"
    yield both
    for folder in both:
        local.down(folder)


def leaders(folder: Path) -> dict[int, str]:
    nodes = json.loads((folder / local.STATE).read_text())["nodes"]
    return {int(pid): since for pid, since in nodes.items()}


def sessions(pids: set[int]) -> set[int]:
    """Return all live processes in the sessions that `pids` lead."""
    found = set()
    for pid in local._pids():
        try:
            if os.getsid(pid) in pids and processes.started(pid) is not None:
                found.add(pid)
        except OSError:
            continue
    return found


def until(count: int, pids: set[int]) -> set[int]:
    deadline = time.monotonic() + 30
    while len(sessions(pids)) != count:
        assert time.monotonic() < deadline, (sessions(pids), pids)
        time.sleep(0.05)
    return sessions(pids)


def test_down_ends_every_process_of_its_nodes_and_no_other(ray: Path, folders: tuple[Path, Path]):
    ours, other = folders
    local.start(ours, 3, 2, 1, ray)
    state = local.start(other, 1, 1, 0, ray)
    mine, theirs = set(leaders(ours)), set(leaders(other))
    assert len(mine) == 3
    # Each leader has its stubborn child.
    until(6, mine)
    kept = until(2, theirs)
    assert local.down(ours).startswith("ended 3 nodes, 6 processes")
    assert sessions(mine) == set()
    assert sessions(theirs) == kept
    assert Path(state["temp"]).is_dir()
    assert not (ours / local.STATE).exists() and not (ours / "token").exists()
    assert "no cluster of ours runs" in local.down(ours)


def test_a_killed_leader_leaves_nothing_and_a_reused_number_is_left_alone(
    ray: Path, folders: tuple[Path, Path]
):
    ours, _ = folders
    local.start(ours, 1, 1, 0, ray)
    (leader,) = leaders(ours)
    until(2, {leader})
    os.kill(leader, signal.SIGKILL)
    # Another's process leads a session under a number that the file gives to a node of ours.
    stranger = subprocess.Popen(["sleep", "60"], start_new_session=True)
    try:
        state = json.loads((ours / local.STATE).read_text())
        state["nodes"][str(stranger.pid)] = "1"
        (ours / local.STATE).write_text(json.dumps(state))
        local.down(ours)
        assert sessions({leader}) == set()
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait(10)


def test_a_second_one_is_refused_while_the_first_runs(ray: Path, folders: tuple[Path, Path]):
    ours, _ = folders
    local.start(ours, 1, 1, 0, ray)
    before = leaders(ours)
    with pytest.raises(ConfigError, match="runs already"):
        local.start(ours, 1, 1, 0, ray)
    assert leaders(ours) == before


def test_a_head_that_ends_is_named_and_nothing_stays(ray: Path, folders: tuple[Path, Path]):
    ours, _ = folders
    with pytest.raises(ClusterError, match=r"head\.log"):
        local.start(ours, 2, 13, 0, ray)
    assert not (ours / local.STATE).exists()


def test_the_token_is_ours_alone_and_bad_numbers_are_refused(
    ray: Path, folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
):
    ours, _ = folders
    state = local.start(ours, 1, 1, 0, ray)
    assert Path(state["token"]).stat().st_mode & 0o777 == 0o600
    assert local.environment(state)["RAY_AUTH_MODE"] == "token"
    # The dashboard, and with it the job API, listens on loopback.
    (head,) = leaders(ours)
    told = subprocess.run(["ps", "-o", "args=", "-ww", "-p", str(head)], stdout=subprocess.PIPE)
    assert "--dashboard-host=127.0.0.1" in told.stdout.decode().split()
    assert local.main(["up", "--nodes", "0"]) == 2
    assert "--nodes 0" in capsys.readouterr().err


@pytest.mark.ray
@pytest.mark.slow
def test_a_real_ray_of_two_nodes_runs_a_job_and_ends(tmp_path: Path):
    folder = tmp_path / "cluster"
    script = [sys.executable, str(local.ROOT / "cluster/local.py")]
    where = ["--folder", str(folder)]
    up = [*script, "up", "--nodes", "2", "--cpus", "1", "--gpus", "1", *where]
    try:
        subprocess.run(up, check=True, timeout=240)
        state = json.loads((folder / local.STATE).read_text())
        env = os.environ | local.environment(state)
        count = "import ray; ray.init(); print(len(ray.nodes()), ray.cluster_resources())"
        job = [str(local.RAY), "job", "submit", "--address", state["dashboard"]]
        told = subprocess.run(
            [*job, "--", "python", "-c", count],
            env=env,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert told.returncode == 0, told.stdout + told.stderr
        assert "\n2 {" in told.stdout
        assert "'CPU': 2.0" in told.stdout and "'GPU': 1.0" in told.stdout
        without = {key: value for key, value in env.items() if "AUTH" not in key}
        refused = subprocess.run(
            [*job, "--", "true"], env=without, capture_output=True, text=True, timeout=120
        )
        assert refused.returncode != 0
        # A driver that would outlive the cluster if nobody ended it.
        mark = f"never-{os.getpid()}"
        sleep = [*job, "--no-wait", "--", "python", "-c", "import time; time.sleep(600)", mark]
        subprocess.run(sleep, env=env, check=True, capture_output=True, timeout=120)
        deadline = time.monotonic() + 60
        while not processes.with_argument(mark):
            assert time.monotonic() < deadline
            time.sleep(0.2)
    finally:
        subprocess.run([*script, "down", *where], check=True, timeout=120)
    deadline = time.monotonic() + 30
    while processes.with_argument(mark) or processes.with_argument(state["temp"]):
        assert time.monotonic() < deadline, "a job has outlived its cluster"
        time.sleep(0.2)
    assert not Path(state["temp"]).exists()
