"""A run's state in parts, put together again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from clip_ray.config import Config
from clip_ray.errors import CheckpointError
from clip_ray.train.state import build_state, dealt, restore, snapshot


def test_sizes_are_dealt_evenly_and_all_of_them() -> None:
    sizes = {f"layer.{i}": size for i, size in enumerate([100, 60, 60, 40, 30, 10, 1, 1])}
    parts = dealt(sizes, 3)
    assert sorted(name for part in parts for name in part) == sorted(sizes)
    totals = [sum(sizes[name] for name in part) for part in parts]
    assert max(totals) - min(totals) <= 1
    # The order in which a rank happens to hold them does not matter.
    assert dealt(dict(reversed(sizes.items())), 3) == parts


def stepped() -> tuple[torch.nn.Module, torch.optim.Optimizer, Config]:
    config = Config.model_validate({"train": {"steps": 1}, "model": {"name": "ViT-micro-8-32"}})
    model, optimizer = build_state(config, seed=1)
    for number, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, 0.1 * number)
    optimizer.step()
    return model, optimizer, config


@pytest.mark.parametrize("parts", [1, 2, 5])
def test_parts_restore_what_one_file_does(tmp_path: Path, parts: int) -> None:
    model, optimizer, config = stepped()
    files = {}
    for part in range(parts):
        for name, fill in snapshot(model, optimizer, part, parts).items():
            assert name not in files
            fill(tmp_path / name)
            files[name] = (tmp_path / name).read_bytes()
    assert len(files) == 2 * parts
    other, others = build_state(config, seed=2)
    restore(other, others, files)
    for (name, a), b in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        for kind in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(optimizer.state[a][kind], others.state[b][kind])


def test_a_disk_that_refuses_is_an_error_of_the_system(tmp_path: Path) -> None:
    """Of those, and no others, the worker does without a commit."""
    model, optimizer, _ = stepped()
    (fill, *_) = snapshot(model, optimizer).values()
    with pytest.raises(OSError, match="No such file"):
        fill(tmp_path / "missing" / "model.safetensors")


def test_a_part_that_lacks_is_no_state(tmp_path: Path) -> None:
    model, optimizer, config = stepped()
    files = {}
    for name, fill in snapshot(model, optimizer, 0, 2).items():
        fill(tmp_path / name)
        files[name] = (tmp_path / name).read_bytes()
    with pytest.raises(CheckpointError, match="Missing key"):
        restore(*build_state(config, seed=2), files)
