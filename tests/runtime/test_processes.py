"""Telling our processes and listeners from others', and what a killed Serve leaves."""

from __future__ import annotations

import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from clip_ray.errors import ClusterError, ConfigError
from clip_ray.runtime import processes, serve_local
from clip_ray.runtime.deployment import deploy, home
from clip_ray.runtime.serve_local import down, probe
from clip_ray.runtime.serve_state import STATE, Running, attached, read_running, write_running
from tests.config.test_serving import PROFILES, load
from tests.runtime.support import wait_for


@pytest.fixture
def sleeper():
    made = []

    def start(*more: str, code: str = "import time; time.sleep(60)") -> subprocess.Popen:
        made.append(subprocess.Popen([sys.executable, "-c", code, *more]))
        return made[-1]

    yield start
    for process in made:
        process.kill()
        process.wait()


@pytest.fixture
def deaf(sleeper, tmp_path):
    """A process that ignores SIGTERM."""
    ready = tmp_path / "deaf"
    code = "import pathlib, signal, sys, time; signal.signal(15, signal.SIG_IGN); "
    code += "pathlib.Path(sys.argv[1]).touch(); time.sleep(60)"
    process = sleeper(str(ready), code=code)
    wait_for(ready.exists, 30, "a process that ignores SIGTERM")
    return process


@pytest.fixture
def listener():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        yield s.getsockname()[1]


def test_a_process_is_known_by_its_start(sleeper):
    process = sleeper()
    since = processes.started(process.pid)
    assert since is not None and since == processes.started(process.pid)
    process.kill()
    process.wait()
    assert processes.started(process.pid) is None


def test_without_proc_ps_is_asked(sleeper, monkeypatch):
    """On macOS."""
    process = sleeper()
    monkeypatch.setattr(processes, "_PROC", Path("/no-proc"))
    since = processes.started(process.pid)
    assert since is not None and str(time.localtime().tm_year) in since
    process.kill()  # and not waited for: a zombie has ended
    wait_for(lambda: processes.started(process.pid) is None, 5, "the zombie's end")


def test_a_dead_process_that_nobody_waits_for_has_ended(sleeper):
    process = sleeper()
    assert processes.started(process.pid) is not None
    process.kill()
    wait_for(lambda: processes.started(process.pid) is None, 5, "the zombie's end")


def test_processes_are_ended_for_certain_and_others_are_not(sleeper, deaf):
    willing, other = sleeper(), sleeper()
    ours = {p.pid: processes.started(p.pid) for p in (willing, deaf)}
    found = processes.end({**ours, other.pid: "another start"}, wait_s=0.5)
    assert sorted(found) == sorted(ours)
    assert willing.wait(5) == -signal.SIGTERM and deaf.wait(5) == -signal.SIGKILL
    assert other.poll() is None


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_process_is_found_by_its_command_line(sleeper, tmp_path):
    process = sleeper(f"{tmp_path}/ha-1/haproxy.cfg")
    sleeper(f"{tmp_path}/ha-2/haproxy.cfg")
    wait_for(lambda: processes.with_argument(f"{tmp_path}/ha-1"), 30, "the process")
    assert processes.with_argument(f"{tmp_path}/ha-1").keys() == {process.pid}


def test_who_listens(listener):
    assert processes.listens("127.0.0.1", listener)
    assert processes.listens("0.0.0.0", listener)  # binding all of them would fail
    free = processes.free_port("127.0.0.1")
    assert not processes.listens("127.0.0.1", free)
    assert processes.free_port("127.0.0.1", free) == free
    assert processes.free_port("127.0.0.1", listener) != listener
    with pytest.raises(ConfigError, match="cannot listen on 192.0.2.77:80"):
        processes.listens("192.0.2.77", 80)


def test_a_connection_that_has_just_ended_is_no_listener():
    """Its port stays busy for a minute."""
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do
        s.bind(("127.0.0.1", 0))
        s.listen()
        port = s.getsockname()[1]
        client = socket.create_connection(("127.0.0.1", port))
        s.accept()[0].close()
        client.close()
    assert not processes.listens("127.0.0.1", port)


# ---------------------------------------------------------------------- what runs, and its end


def running(folder: Path, process: subprocess.Popen | None = None, **more) -> Running:
    pid = process.pid if process else 2**22 + 1
    started = (processes.started(pid) if process else None) or "1"
    fields = {
        "machine": socket.gethostname(), "pid": pid, "started": started, "name": "clip",
        "host": "127.0.0.1", "port": processes.free_port("127.0.0.1"), "token": "/t",
    }  # fmt: skip
    made = Running(**fields | more)
    write_running(folder, made, create=True)
    return made


def test_what_runs_is_written_for_its_owner_alone(tmp_path):
    made = running(tmp_path / "a", children={7: "8"})
    path = tmp_path / "a" / STATE
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert read_running(tmp_path / "a") == made and read_running(tmp_path) is None
    with pytest.raises(ConfigError, match="another process is starting Serve here"):
        write_running(tmp_path / "a", made, create=True)
    write_running(tmp_path / "a", made.model_copy(update={"address": "h:1"}))
    path.write_text("{")
    with pytest.raises(ConfigError, match="serve.json: not a description of a running Serve"):
        read_running(tmp_path / "a")


def test_it_is_not_alive_when_its_number_is_anothers(tmp_path, sleeper):
    process = sleeper()
    made = running(tmp_path, process)
    assert made.alive()
    assert not made.model_copy(update={"started": "other"}).alive()
    assert not made.model_copy(update={"machine": "other"}).alive()


def test_down_without_anything_says_so(tmp_path):
    said: list[str] = []
    down(tmp_path, said.append)
    assert "no Serve of ours runs" in said[0]


def test_down_of_a_killed_serve_ends_what_it_left(tmp_path, sleeper):
    scratch = tmp_path / "ha-1"
    scratch.mkdir()
    child, haproxy, other = sleeper(), sleeper(f"{scratch}/haproxy.cfg"), sleeper()
    children = {child.pid: processes.started(child.pid), other.pid: "not ours"}
    if sys.platform == "linux":
        wait_for(lambda: processes.with_argument(str(scratch)), 30, "haproxy's stand-in")
    running(tmp_path, children=children, scratch=str(scratch))
    down(tmp_path, lambda line: None)
    assert child.wait(5) and (haproxy.wait(5) or sys.platform != "linux")
    assert other.poll() is None
    assert not scratch.exists() and read_running(tmp_path) is None


def test_down_kills_what_does_not_end(tmp_path, deaf, monkeypatch):
    monkeypatch.setattr(serve_local, "DOWN_S", 0.5)
    running(tmp_path, deaf)
    down(tmp_path, lambda line: None)
    assert deaf.wait(5) == -signal.SIGKILL and read_running(tmp_path) is None


def test_down_tells_of_a_listener_that_is_not_ours(tmp_path, listener, monkeypatch):
    monkeypatch.setattr(serve_local, "_LISTENERS_S", 0.2)
    running(tmp_path, port=listener)
    with pytest.raises(
        ClusterError, match=f"still listens on port {listener}, and it is no process"
    ):
        down(tmp_path, lambda line: None)
    assert read_running(tmp_path) is not None  # it can be tried again


def test_what_runs_elsewhere_is_ended_there(tmp_path):
    running(tmp_path, machine="other-host")
    with pytest.raises(ConfigError, match="was started on other-host; end it there"):
        down(tmp_path, lambda line: None)


def test_a_serve_that_is_being_started_cannot_be_asked(tmp_path):
    with pytest.raises(ClusterError, match="is being started"), attached(running(tmp_path)):
        pass


def test_ready_is_believed_only_when_it_answers(listener):
    with pytest.raises(ClusterError, match="/-/healthz does not answer with 200 after 0.1 s"):
        probe(f"http://127.0.0.1:{processes.free_port('127.0.0.1')}", 0.1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_it_once(number, capfd):
    """The next ones do not disturb the ending."""
    signals = serve_local._Signals()
    before = {n: signal.getsignal(n) for n in signals.NUMBERS}
    try:
        signals.own()
        with pytest.raises(SystemExit) as caught:
            signal.raise_signal(number)
        assert caught.value.code == 128 + number
        signal.raise_signal(number)
        assert "ending already" in capfd.readouterr().err
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)


def test_gpus_that_are_not_there_are_told():
    flags = "--serve.gpus 1 --serve.max_replicas 3 --serve.min_replicas 3"
    config = load(*flags.split(), recipe=PROFILES / "local.yaml")
    assert serve_local._gpus(config.model_copy(update={"declared_gpus": 3})) == 3
    assert serve_local._gpus(config.model_copy(update={"gpus": 0})) == 0
    with pytest.raises(ConfigError, match="3 replicas with 1 GPUs each, and 2 GPUs are there"):
        serve_local._gpus(config.model_copy(update={"declared_gpus": 2}))


@pytest.mark.skipif(sys.platform != "linux", reason="HAProxy")
def test_haproxy_keeps_to_its_own_directory_and_to_free_ports(tmp_path, listener):
    """Its admin socket is open to whoever reaches it, and two may run on one machine."""
    config = load("--serve.profile", "gpu", "--serve.port", "0", recipe=PROFILES / "local.yaml")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(serve_local._HAPROXY_PORTS, "RAY_SERVE_HAPROXY_STATS_PORT", listener)
        chosen, made, environment = serve_local._plan(config, tmp_path)
    assert chosen.port and listener not in made.more_ports and len(made.more_ports) == 3
    assert environment["RAY_SERVE_ENABLE_HA_PROXY"] == "1"
    paths = [value for name, value in environment.items() if name.endswith(("FILE", "PATH", "LOC"))]
    assert len(paths) == 4 and all(path.startswith(f"{made.scratch}/") for path in paths)
    assert float(environment["RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S"]) > config.limits.request_s
    assert serve_local._plan(config, tmp_path)[1].scratch != made.scratch


# ---------------------------------------------------------------------- refused before any start


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--serve.host 0.0.0.0", "auth off while Serve listens on 0.0.0.0"),
        ("--serve.auth keys --serve.keys_file /no/keys.json", "/no/keys.json is not there; make a"),
        ("--serve.profile cluster --serve.address null", "profile cluster needs a Ray that runs"),
        ("--serve.model /no/model", "/no/model: no model there"),
    ],
)
def test_what_cannot_be_served_is_refused_before_anything_starts(
    tmp_path, flags, message, monkeypatch
):
    monkeypatch.setenv("RAY_ADDRESS", "http://head:8265")  # of `ray job submit`: no Ray
    config = load(*flags.split(), recipe=PROFILES / "local.yaml")
    with pytest.raises(Exception, match=message) as caught:
        deploy(config, str(tmp_path), print)
    assert type(caught.value).__name__ in ("ConfigError", "RegistryError")
    assert not (home(str(tmp_path)) / STATE).exists()


def test_a_taken_port_is_told(tmp_path, listener):
    config = load("--serve.port", str(listener), recipe=PROFILES / "local.yaml")
    with pytest.raises(ConfigError, match=f"port {listener} of 127.0.0.1 is taken"):
        serve_local._plan(config, tmp_path)
