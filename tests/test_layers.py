"""The layers of DESIGN.md section 3: imports point down, and Ray stays in the runtime."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
LAYERS = {
    "clip_ray": 0,  # the version
    "clip_ray.errors": 0,
    "clip_ray.config": 0,
    "clip_ray.model": 1,
    "clip_ray.tokenizer": 1,
    "clip_ray.images": 1,
    "clip_ray.contrastive": 1,
    "clip_ray.optim": 1,
    "clip_ray.storage": 1,
    "clip_ray.data": 2,
    "clip_ray.train": 2,
    "clip_ray.eval": 2,
    "clip_ray.tracking": 2,
    "clip_ray.registry": 2,
    "clip_ray.inference": 2,
    "clip_ray.keys": 2,
    "clip_ray.sizing": 2,
    "clip_ray.runtime": 3,
    "jobs": 4,
    "serve": 4,
}
RUNTIME = 3


def name_of(path: Path) -> str:
    """Return the dotted name of a module of the repository."""
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {
    name_of(path): path
    for top in ("clip_ray", "jobs", "serve")
    for path in sorted((REPOSITORY / top).rglob("*.py"))
}


def part_of(module: str) -> str:
    """Return the entry of LAYERS that a module belongs to: its first two names, or `jobs`."""
    parts = module.split(".")
    return ".".join(parts[: 2 if parts[0] == "clip_ray" else 1])


def imports(source: str) -> Iterator[str]:
    """Yield every module that a source imports, anywhere in it; `from a import b` as `a.b`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                yield "." * node.level
            else:
                yield from (f"{node.module}.{alias.name}" for alias in node.names)


def violations(module: str, source: str) -> list[str]:
    """Return what a module imports that its layer must not."""
    own = LAYERS[part_of(module)]
    found = []
    for name in imports(source):
        top = name.split(".")[0]
        if top == "":
            found.append(f"{module}: a relative import, which this test cannot follow")
        elif top == "ray" and own < RUNTIME:
            found.append(f"{module} (layer {own}) imports Ray")
        elif top in ("clip_ray", "jobs", "serve"):
            part = part_of(name)
            # `from clip_ray import __version__` is a name of the package itself.
            part = part if part in LAYERS else "clip_ray"
            if LAYERS[part] > own:
                found.append(f"{module} (layer {own}) imports {name} (layer {LAYERS[part]})")
            if {part_of(module), part} == {"jobs", "serve"}:
                found.append(f"{module} imports {name}: jobs and serve are apart")
        elif top == "tests":
            found.append(f"{module} imports the tests")
    return found


def test_every_module_has_a_layer() -> None:
    assert {part_of(module) for module in MODULES} <= LAYERS.keys()
    assert len(MODULES) > 40  # it did look


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_point_down(module: str) -> None:
    assert violations(module, MODULES[module].read_text()) == []


@pytest.mark.parametrize(
    ("module", "source", "count"),
    [
        ("clip_ray.train.loop", "import ray.train", 1),
        ("clip_ray.train.loop", "def f():\n    from ray import data", 1),
        ("clip_ray.train.loop", "if TYPE_CHECKING:\n    from clip_ray.runtime import train", 1),
        ("clip_ray.train.loop", "from clip_ray import runtime, errors", 1),
        ("clip_ray.optim", "import clip_ray.train.loop as loop", 1),
        ("clip_ray.config.load", "from clip_ray import model", 1),
        ("clip_ray.config.load", "from . import schema", 1),
        ("clip_ray.errors", "import tests.distributed", 1),
        ("jobs.pretrain", "from serve import app", 1),
        ("serve.app", "import jobs.pretrain", 1),
        ("clip_ray.train.loop", "from clip_ray.data.plan import Plan\nimport rayon", 0),
        ("clip_ray.train.loop", "from clip_ray import __version__", 0),
        ("clip_ray.runtime.train", "import ray\nfrom clip_ray.eval.ranks import x", 0),
        ("jobs.pretrain", "from clip_ray.runtime.train import pretrain", 0),
    ],
)
def test_the_check_tells_right_from_wrong(module: str, source: str, count: int) -> None:
    assert len(violations(module, source)) == count


def run_python(source: str) -> str:
    """Run a source in a fresh interpreter, from the repository; return what it prints."""
    result = subprocess.run(
        [sys.executable, "-c", source], cwd=REPOSITORY, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


LOADED = "import sys; print(sorted({'torch', 'ray', 'numpy', 'mlflow'} & sys.modules.keys()))"


def test_importing_the_package_is_cheap() -> None:
    assert run_python(f"import clip_ray; {LOADED}") == "[]\n"


def test_layer_0_needs_no_torch() -> None:
    """`--help` and a faulty flag answer at once."""
    assert run_python(f"import clip_ray.errors, clip_ray.config.load; {LOADED}") == "[]\n"


BLOCK_RAY = """
import importlib, sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name == "ray" or name.startswith("ray."):
            raise ModuleNotFoundError("blocked: " + name, name="ray")

sys.meta_path.insert(0, Block())
"""


def test_layers_0_to_2_import_without_ray() -> None:
    modules = [name for name in MODULES if LAYERS[part_of(name)] < RUNTIME]
    assert "clip_ray.train.loop" in modules and "clip_ray.eval.evaluate" in modules
    source = f"{BLOCK_RAY}\nfor name in {modules!r}:\n    importlib.import_module(name)\n{LOADED}"
    loaded = run_python(source)
    assert "torch" in loaded and "ray" not in loaded


def test_the_block_does_block() -> None:
    source = f"{BLOCK_RAY}\nimport clip_ray.runtime.train"
    with pytest.raises(AssertionError, match="blocked: ray"):
        run_python(source)
