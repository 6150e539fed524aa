"""The wheel holds every package that lies in the repository."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_the_wheel_lists_every_package() -> None:
    there = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for path in (ROOT / "clip_ray").rglob("__init__.py")
    }
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert set(project["tool"]["setuptools"]["packages"]) == there
