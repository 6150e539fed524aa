"""The code as a zip: what a cluster without our image needs, the same bytes each time."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from ray._private.runtime_env.packaging import unzip_package

from clip_ray.config import S3Options
from clip_ray.storage import open_store
from cluster import package


def test_ray_unpacks_it_into_a_directory_from_which_the_code_runs(tmp_path: Path):
    uri = package.write_package(str(tmp_path / "store"), S3Options())
    path = Path(uri.removeprefix("file://"))
    target = tmp_path / "unpacked"
    unzip_package(str(path), str(target), remove_top_level_directory=True, unlink_zip=False)
    for name in ("clip_ray/errors.py", "jobs/pretrain.py", "serve/app.py", "serve/static/app.js"):
        assert (target / name).is_file(), name
    assert not list(target.rglob("__pycache__")) and not (target / "tests").exists()
    code = (
        "import clip_ray.tracking as t, pathlib; "
        "print(t.__file__); print(t.source_version(pathlib.Path('.')))"
    )
    told = subprocess.run(
        [sys.executable, "-c", code],
        cwd=target,
        env={"PATH": "", "PYTHONPATH": str(target)},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    where, source = told.stdout.splitlines()
    assert where == str(target / "clip_ray/tracking.py")
    assert package.source_version(package.ROOT)["commit"] in source
    assert "BUILD" in source


def test_equal_code_is_one_address_and_other_code_another(tmp_path: Path, s3: S3Options):
    first = package.write_package("s3://bucket/code", s3)
    assert package.write_package("s3://bucket/code", s3) == first
    assert first.startswith("s3://bucket/code/clip-ray-") and first.endswith(".zip")
    assert open_store("s3://bucket/code", s3).files() == [first.rsplit("/", 1)[1]]
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs/a.py").write_text("1")
    one = package.package(tmp_path)
    assert package.package(tmp_path) == one
    (tmp_path / "jobs/a.py").write_text("2")
    assert package.package(tmp_path) != one


def test_no_destination_is_refused(capsys):
    assert package.main(["--dest", ""]) == 2
    assert "make package DEST=" in capsys.readouterr().err


def test_the_runtime_environment_has_every_dependency_but_ray_as_pinned():
    from ray.runtime_env import RuntimeEnv

    environment = yaml.safe_load((package.ROOT / "cluster/runtime-env.yaml").read_text())
    RuntimeEnv(**environment)
    given = {need.name: need for need in map(Requirement, environment["pip"])}
    lines = (package.ROOT / "constraints.txt").read_text().split()
    pins = {name.lower(): version for name, version in (line.split("==") for line in lines)}
    project = tomllib.loads((package.ROOT / "pyproject.toml").read_text())["project"]
    wanted = {need.name: need for need in map(Requirement, project["dependencies"])}
    assert set(given) == set(wanted) - {"ray"} | {"boto3"}
    for name, need in given.items():
        assert str(need.specifier) == f"=={pins[name.lower()]}"
        assert name == "boto3" or need.marker == wanted[name].marker
