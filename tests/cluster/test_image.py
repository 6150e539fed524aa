"""The image: what it copies exists, what it installs is pinned; no secret in it, no root."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = (ROOT / "cluster/Dockerfile").read_text()
SECRET = re.compile(r"secret|token|passw|credential|private|access_key|api_key", re.IGNORECASE)
SHAPES = re.compile(r"AKIA[0-9A-Z]{16}|-----BEGIN|ghp_\w{20}|://[^/\s]+:[^/\s]+@")


def instructions(text: str) -> list[tuple[str, str]]:
    """Return (keyword, rest) of each instruction, continued lines joined, comments left out."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n", " ", "\n".join(lines))
    pairs = (line.split(None, 1) for line in joined.splitlines() if line.strip())
    return [(pair[0], pair[1]) for pair in pairs]


def problems(text: str) -> list[str]:
    """Return what is wrong with a Dockerfile."""
    found, steps = [], instructions(text)
    for keyword, rest in steps:
        if keyword in ("COPY", "ADD"):
            *sources, _ = rest.split()
            found += [f"{source} is not there" for source in sources if not list(ROOT.glob(source))]
        if keyword in ("ENV", "ARG") and SECRET.search(rest):
            found.append(f"{keyword} looks like a secret: {rest}")
    users = [rest for keyword, rest in steps if keyword == "USER"]
    if not users or users[-1].split(":")[0] in ("root", "0"):
        found.append(f"ends as {users[-1] if users else 'root'}")
    if SHAPES.search(text):
        found.append("holds what looks like a key")
    return found


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().split()
    return {name.lower(): version for name, version in (line.split("==") for line in lines)}


def test_the_image_copies_what_is_there_ends_as_nobody_special_and_holds_no_secret():
    assert problems(DOCKERFILE) == []


@pytest.mark.parametrize(
    ("old", "new", "word"),
    [
        ("COPY jobs /app/jobs", "COPY jobz /app/jobs", "jobz is not there"),
        ("USER 1000:1000", "USER root", "ends as root"),
        ("USER 1000:1000", "", "ends as root"),
        ("ENV PYTHONPATH=/app", "ENV RAY_AUTH_TOKEN=abc", "looks like a secret"),
        ("ENV PYTHONPATH=/app", "ENV A=AKIAABCDEFGHIJKLMNOP", "looks like a key"),
    ],
)
def test_a_bad_image_is_seen(old: str, new: str, word: str):
    assert old in DOCKERFILE
    assert any(word in problem for problem in problems(DOCKERFILE.replace(old, new)))


def test_all_that_is_installed_is_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    own = [
        line
        for line in (ROOT / "cluster/requirements.txt").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    pinned = pins()
    for line in project["dependencies"] + own:
        need = Requirement(line)
        exact = [clause.version for clause in need.specifier if clause.operator == "=="]
        version = pinned.get(need.name.lower())
        if version is None:
            assert exact and "*" not in exact[0], f"{line}: neither pinned nor in constraints.txt"
        else:
            assert need.specifier.contains(version), f"{line}: constraints.txt has {version}"
    installs = [rest for word, rest in instructions(DOCKERFILE) if "pip install" in rest]
    assert len(installs) == 1
    assert "--constraint constraints.txt" in installs[0]
    assert "'^torch==' constraints.txt" in installs[0]


def test_the_base_is_a_python_that_the_project_takes_to_the_patch():
    base = re.search(r"^ARG BASE=python:(3\.\d+\.\d+)-slim-bookworm$", DOCKERFILE, re.MULTILINE)
    assert base is not None
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert Requirement(f"python{project['requires-python']}").specifier.contains(base[1])


def test_the_build_context_lets_in_what_is_copied_and_nothing_else():
    rules = [
        line
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line and line[0] != "#"
    ]
    assert rules[0] == "*"
    allowed = {rule[1:] for rule in rules if rule.startswith("!")}
    copied = {
        source
        for word, rest in instructions(DOCKERFILE)
        if word == "COPY"
        for source in rest.split()[:-1]
    }
    assert allowed == copied
