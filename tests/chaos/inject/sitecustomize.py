"""Faults inside a worker's process, put there by Python itself: no line of the product knows.

Python imports this file at the start of each process that has its folder on PYTHONPATH, as those
of the tests' Ray do. What befalls a run lies in the folder `CHAOS_FAULTS`, one file a fault,
`<run>.<fault>`, with a number in it, the step where nothing else is said:

* `pace`: each step waits so many milliseconds, as long as the file is there: the run is slow until
  its faults have come, whatever the machine, and fast after them.
* `nan`: the pixels of the last rank are NaN at that step, whenever it is made.
* `crash-in-file`: rank 0 is killed in the middle of a file of the first commit from that step on.
* `crash-before-commit`: it is killed when all of them are written, before COMMIT is.
* `pause-before-check`: there it waits, until the file `<run>.go` is there; `<run>.paused` then
  holds its process number. Whether the attempt is still the newest is yet to be looked at.
* `pause-before-commit`: the same, after that look: nothing but the creation of COMMIT is left.
* `hold`: no block from that window on is read as long as the file is there. Of the run `data`:
  reading tasks do not know for which run they read.

Crashes and pauses happen once.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.util
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

PAUSE_S = 600.0


class _AfterImport(importlib.abc.MetaPathFinder):
    """Installs faults when a module has been imported."""

    def __init__(self, module: str, install: Callable[[Any], None]) -> None:
        self._module, self._install = module, install

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != self._module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.loader is not None
        loader: Any = spec.loader
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            self._install(module)

        loader.exec_module = exec_module
        return spec


def _number(run: str, fault: str) -> int | None:
    # An empty file is about to be written.
    with contextlib.suppress(FileNotFoundError, ValueError):
        return int((_folder() / f"{run}.{fault}").read_text())
    return None


def _take(run: str, fault: str, step: int) -> bool:
    """Tell whether a fault is to happen, and make it happen no more."""
    wanted = _number(run, fault)
    if wanted is None or step < wanted:
        return False
    with contextlib.suppress(FileNotFoundError):
        os.rename(_folder() / f"{run}.{fault}", _folder() / f"{run}.{fault}.taken")
        return True
    return False


def _folder() -> Path:
    return Path(os.environ["CHAOS_FAULTS"])


def _install_in_worker(worker: Any) -> None:
    train, write = worker.train, worker.Checkpoints.write
    from clip_ray.storage import LocalStore

    create = LocalStore.create

    def faulty_train(
        model: Any, optimizer: Any, batches: Any, progress: Any, **options: Any
    ) -> Any:
        run = options["config"].run.name
        step, ranks = _number(run, "nan"), worker.dist.get_world_size()
        if step is not None and worker.dist.get_rank() == ranks - 1:
            batches = _poisoned(batches, progress.step, step)
        batches = _paced(batches, run)
        return train(model, optimizer, batches, progress, **options)

    def faulty_write(self: Any, commit: Any, files: Any, **options: Any) -> Any:
        run = self.uri(commit).split("/")[-3]
        if _take(run, "crash-in-file", commit.step):
            files = {**files, "model.safetensors": _half(files["model.safetensors"])}
        before = options.get("before_commit", lambda: None)

        def before_commit() -> None:
            before()
            if _take(run, "crash-before-commit", commit.step):
                _die()
            if _take(run, "pause-before-check", commit.step):
                _pause(run)

        return write(self, commit, files, **{**options, "before_commit": before_commit})

    def faulty_create(self: Any, name: str, data: bytes) -> Any:
        place = Path(self.uri)
        if name == "COMMIT" and place.name.startswith("step-"):
            run, step = place.parts[-3], int(place.name.removeprefix("step-").split(".")[0])
            if _take(run, "pause-before-commit", step):
                _pause(run)
        return create(self, name, data)

    worker.train, worker.Checkpoints.write = faulty_train, faulty_write
    LocalStore.create = faulty_create


def _install_in_reader(blocks: Any) -> None:
    fetch = blocks.BlockReader.fetch

    def held_fetch(self: Any, window: int, chunk: int, rank: int) -> Any:
        _wait(lambda: window < (_number("data", "hold") or window + 1))
        return fetch(self, window, chunk, rank)

    blocks.BlockReader.fetch = held_fetch


def _paced(batches: Iterator[Any], run: str) -> Iterator[Any]:
    for batch in batches:
        time.sleep((_number(run, "pace") or 0) / 1000)
        yield batch


def _poisoned(batches: Iterator[Any], first: int, at: int) -> Iterator[Any]:
    import torch

    for number, batch in enumerate(batches, first):
        if number == at:
            batch = replace(batch, pixels=torch.full(batch.pixels.shape, torch.nan))
        yield batch


def _half(fill: Any) -> Any:
    def fill_half(path: Path) -> None:
        fill(path)
        os.truncate(path, path.stat().st_size // 2)
        _die()

    return fill_half


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _pause(run: str) -> None:
    (_folder() / f"{run}.paused").write_text(str(os.getpid()))
    _wait((_folder() / f"{run}.go").exists)


def _wait(until: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PAUSE_S
    while not until() and time.monotonic() < deadline:
        time.sleep(0.1)


if "CHAOS_FAULTS" in os.environ:
    sys.meta_path.insert(0, _AfterImport("clip_ray.runtime.worker", _install_in_worker))
    sys.meta_path.insert(0, _AfterImport("clip_ray.data.blocks", _install_in_reader))
