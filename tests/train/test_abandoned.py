"""MLflow runs of killed jobs do not stay RUNNING."""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clip_ray.config import S3Options
from clip_ray.storage import LocalStore
from clip_ray.tracking import RUN_DIR, mlflow_client
from clip_ray.train import abandoned, lease
from clip_ray.train.abandoned import end_abandoned, end_abandoned_in_background
from clip_ray.train.lease import held_lease

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An MLflow; one for all tests, as making its tables takes seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


@pytest.fixture
def begin(uri: str) -> Callable[[str], Callable[[], str]]:
    """Make an MLflow run of a directory; return what tells its status."""
    client = mlflow_client(uri)

    def make(folder: str, status: str = "RUNNING") -> Callable[[], str]:
        run = client.create_run("0", tags={RUN_DIR: folder}, run_name=Path(folder).name)
        client.update_run(run.info.run_id, status=status)
        return lambda: str(client.get_run(run.info.run_id).info.status)

    return make


def leave_lease(folder: Path, **changes: Any) -> None:
    """Leave what a killed job leaves; by default one of this machine whose process is gone."""
    content = json.loads(lease._content("token", 0.0, 0)) | {"process_started": "1"} | changes
    LocalStore(folder).write("lease/00000001.json", json.dumps(content).encode())


def test_only_runs_of_this_storage_that_nobody_writes_are_ended(
    uri: str, begin: Callable[..., Callable[[], str]], tmp_path: Path
) -> None:
    storage = tmp_path / "runs"
    names = ("killed", "gone", "live", "finished", "elsewhere")
    killed, gone, live, finished, elsewhere = (storage / name for name in names)
    leave_lease(killed)
    leave_lease(finished)
    leave_lease(elsewhere, place="another machine")
    status = {folder.name: begin(str(folder)) for folder in (killed, gone, live, elsewhere)}
    status["finished"] = begin(str(finished), "FINISHED")
    status["of another storage"] = begin(f"{storage}-2/killed")
    with held_lease(LocalStore(live)):
        ended = end_abandoned(uri, str(storage), S3Options())
        assert sorted(ended) == ["gone", "killed"]
        assert end_abandoned(uri, str(storage), S3Options()) == []
    assert {name: of() for name, of in status.items()} == {
        "killed": "KILLED",
        "gone": "KILLED",
        "live": "RUNNING",
        "elsewhere": "RUNNING",
        "finished": "FINISHED",
        "of another storage": "RUNNING",
    }


def test_a_job_of_another_machine_is_watched_for_a_while(
    uri: str,
    begin: Callable[..., Callable[[], str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dead, renewing = tmp_path / "runs" / "dead", tmp_path / "runs" / "renewing"
    for folder in (dead, renewing):
        leave_lease(folder, place="another machine")
    status = [begin(str(dead)), begin(str(renewing))]

    def passes(seconds: float) -> None:
        leave_lease(renewing, place="another machine", renewals=1)
        monkeypatch.setattr(lease, "EXPIRE_S", 0.0)

    monkeypatch.setattr(abandoned.time, "sleep", passes)
    assert end_abandoned(uri, f"{tmp_path}/runs/", S3Options(), wait=True) == ["dead"]
    assert [of() for of in status] == ["KILLED", "RUNNING"]


def test_an_mlflow_that_fails_disturbs_nobody(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    blocked = tmp_path / "a file"
    blocked.write_text("")
    thread = end_abandoned_in_background(f"sqlite:///{blocked}/mlflow.db", "runs", S3Options())
    thread.join(60)
    assert not thread.is_alive() and not caplog.records


def test_the_page_of_a_storage_ends_them_before_it_opens(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    mlflow_client(uri)
    shutil.copy(uri.removeprefix("sqlite:///"), tmp_path)
    client = mlflow_client(f"sqlite:///{tmp_path}/mlflow.db")
    run = client.create_run("0", tags={RUN_DIR: f"{tmp_path}/killed"})
    leave_lease(tmp_path / "killed")
    became: list[tuple[Any, ...]] = []
    monkeypatch.setattr(os, "execv", lambda *call: became.append(call))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", ["ui.py", "--storage", str(tmp_path)])
    for name in ("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "MLFLOW_DISABLE_TELEMETRY"):
        monkeypatch.setenv(name, "as before")  # restored after it
    with contextlib.suppress(SystemExit):
        runpy.run_path(str(ROOT / "jobs" / "ui.py"), run_name="__main__")
    assert client.get_run(run.info.run_id).info.status == "KILLED"
    assert len(became) == 1 and "warning" not in capsys.readouterr().err
