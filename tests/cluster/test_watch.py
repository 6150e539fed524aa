"""jobs/watch.py: what it makes of the answers of a check."""

from __future__ import annotations

import importlib.util
import sys
from functools import partial
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


class Gauge:
    def __init__(self) -> None:
        self.values: list[tuple[float, dict[str, str]]] = []

    def set(self, value: float, tags: dict[str, str]) -> None:
        self.values.append((value, tags))


def test_it_exports_yes_no_and_leaves_the_rest_as_it_was(monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = importlib.util.spec_from_file_location("watch", ROOT / "jobs/watch.py")
    watch = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(watch)
    gauge, commands = Gauge(), []
    answers = iter([0, 1, 2, 124, 0])

    def look(command: list[str]) -> int:
        commands.append(command)
        return next(answers)

    monkeypatch.setattr(watch, "look", look)
    monkeypatch.setattr(watch, "make_in_ray", lambda series: gauge)
    monkeypatch.setattr(watch, "Gauges", partial(watch.Gauges, None))
    monkeypatch.setattr(watch.ray, "init", lambda *args, **kwargs: None)
    given = ["watch.py", "--model", "clip", "--every", "0", "--times", "5", "--app", "a"]
    monkeypatch.setattr(sys, "argv", given)
    assert watch.main() == 0
    assert gauge.values == [(1, {"model": "clip"}), (0, {"model": "clip"}), (1, {"model": "clip"})]
    assert capsys.readouterr().out.count("the metric stays as it was") == 2
    assert commands[0][1:] == [
        *(str(ROOT / "jobs/promote.py"), "--check", "--model", "clip", "--app", "a")
    ]


def test_the_command_it_runs_is_understood():
    """promote.py takes each flag: an unknown one would be status 2, no answer, for ever."""
    import subprocess

    command = [sys.executable, str(ROOT / "jobs/promote.py"), "--check", "--model", "clip"]
    done = subprocess.run(
        [*command, "--tracking_uri", "http://127.0.0.1:1", "--app", "a"],
        capture_output=True,
        text=True,
        timeout=120,
        env={"PATH": "/usr/bin", "HOME": "/nonexistent", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"},
    )
    assert done.returncode == 2 and "unrecognized" not in done.stderr
    assert "promote: MLflow at http://127.0.0.1:1" in done.stderr


@pytest.mark.parametrize(("code", "status"), [("0", 0), ("1", 1), ("2", 2)])
def test_a_look_is_the_status_of_the_check(code, status):
    spec = importlib.util.spec_from_file_location("watch2", ROOT / "jobs/watch.py")
    watch = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(watch)
    assert watch.look([sys.executable, "-c", f"raise SystemExit({code})"]) == status
