"""The other jobs' command lines, on the runtime's head where they use Ray."""

from __future__ import annotations

import contextlib
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import ray
import simplejpeg

ROOT = Path(__file__).resolve().parents[2]
RAYLET = Path(ray.__file__).parent / "core/src/ray/raylet/raylet"


def script(name: str, *arguments: str, env=None, cwd=None, code: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, str(ROOT / "jobs" / name), *arguments],
        env=env or {k: v for k, v in os.environ.items() if not k.startswith("RAY_")},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=400,
    )
    output = done.stdout + done.stderr
    assert done.returncode == code, output
    assert "Traceback" not in output
    return output


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(40):
        image = simplejpeg.encode_jpeg(rng.integers(0, 255, (50, 70, 3), np.uint8))
        (folder / f"{i:03d}.jpg").write_bytes(image)
        (folder / f"{i:03d}.txt").write_text(f"picture number {i}")
    (folder / "lonely.jpg").write_bytes(image)
    return folder


@pytest.mark.parametrize(
    "name",
    [
        "deploy.py",
        "evaluate.py",
        "index.py",
        "keys.py",
        "prepare.py",
        "pretrain.py",
        "promote.py",
        "ui.py",
    ],
)
def test_every_job_explains_itself(name):
    assert "usage" in script(name, "--help")


@pytest.mark.ray
def test_a_folder_of_pictures_becomes_shards_and_a_report(head, tmp_path, pictures):
    output = script("prepare.py", "--source", str(pictures), "--out", str(tmp_path / "shards"))
    assert "40 of 41 samples written to 1 shards" in output
    output = script(
        *("index.py", "--report", "--data.sources", str(tmp_path / "shards")),
        *("--run.name", "mine", "--data.holdout", "0.1"),
        env=head.env,
        cwd=tmp_path,
    )
    assert "1 shards" in output and "duplicate captions" in output
    assert (tmp_path / "runs/mine/manifest.parquet").exists()
    assert (tmp_path / "runs/mine/report.png").read_bytes()[:4] == b"\x89PNG"


@contextlib.contextmanager
def policies(home: Path) -> Iterator[dict[str, set[int]]]:
    """Collect the scheduling policies of the threads of the processes with this HOME, by name."""
    seen: dict[str, set[int]] = {}
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(0.2):
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error, ProcessLookupError):
                    if process.environ().get("HOME") != str(home):
                        continue
                    found = {os.sched_getscheduler(thread.id) for thread in process.threads()}
                    name = (process.cmdline() or [""])[0]
                    seen.setdefault(name, set()).update(found)

    looking = threading.Thread(target=look)
    looking.start()
    try:
        yield seen
    finally:
        ended.set()
        looking.join()


@pytest.mark.ray
def test_an_embedded_ray_leaves_the_home_directory_alone(tmp_path):
    """No address, no cluster: the job starts a Ray of its own, with a token of its own."""
    import yaml

    from tests.runtime.support import RECIPE

    home = tmp_path / "home"
    home.mkdir()
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE))
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {"HOME": str(home)}
    with policies(home) as seen:
        output = script(
            *("pretrain.py", "--config", str(recipe), "--run.name", "own", "--train.steps", "4"),
            env=env,
            cwd=tmp_path,
        )
    assert "step 4/4" in output
    # Who only waits and tells takes no CPU from who decodes.
    rays = {name: found for name, found in seen.items() if name.startswith(("ray::", str(RAYLET)))}
    assert {str(RAYLET), "ray::RayTrainWorker"} <= rays.keys()
    assert set().union(*rays.values()) == {os.SCHED_BATCH}, rays
    assert os.SCHED_OTHER in seen[sys.executable]  # the driver
    assert stat.S_IMODE((tmp_path / "runs/own/ray-token").stat().st_mode) == 0o600
    assert not (home / ".ray").exists() and not (home / "ray_results").exists()

    # What the newcomer does next, with what this run left.
    runs = ("--storage", str(tmp_path / "runs"))
    assert "own version 1 is champion" in script("promote.py", "--model", "own", *runs, env=env)
    output = script(
        *("evaluate.py", "--model", "models:/own@champion"),
        *("--tracking_uri", f"sqlite:///{tmp_path}/runs/mlflow.db"),
        *("--dataset", str(ROOT / "clip_ray/bundled/starter")),
        *("--json", str(tmp_path / "result.json")),
        env=env,
    )
    assert "zero_shot.top5" in output
    assert "zero_shot.top5" in (tmp_path / "result.json").read_text()
    output = script("verify_run.py", "--run", str(tmp_path / "runs/own"), "--step", "2", env=env)
    assert output.count("pass 0") == 32
    assert "each step held exactly the samples of the plan" in output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("evaluate.py", "--model", "nowhere", "--dataset", "x"), "nowhere"),
        (("promote.py", "--model", "clip", "--storage", "nowhere"), "nowhere"),
        (("verify_run.py", "--run", "nowhere"), "not a run's directory"),
        (("prepare.py", "--source", "nowhere", "--out", "x"), "nowhere"),
        (("prepare.py", "--shards", "x", "--where", "a", "--out", "x"), "'a' is no condition"),
        (("ui.py", "--storage", "nowhere"), "run `make quickstart` first"),
    ],
)
def test_what_is_not_there_is_named(tmp_path, arguments, words):
    assert words in script(*arguments, cwd=tmp_path, code=2)
