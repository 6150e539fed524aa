"""How the ranks of an attempt begin: no Ray is started."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from clip_ray.config import Config
from clip_ray.storage import LocalStore
from clip_ray.train.checkpoint import Checkpoints, Commit
from clip_ray.train.state import Progress, build_state, snapshot
from tests import distributed
from tests.distributed import run_ranks

CONFIG = {"train": {"steps": 9}, "model": {"name": "ViT-micro-8-32"}}
RANKS = 3


def begin(run_uri: str, config: Config) -> tuple[list[str], list[torch.Tensor], Commit | None]:
    """Begin an attempt on this rank; return the files of commits it read, its state, its start."""
    from clip_ray.runtime import worker

    reads: list[str] = []
    read = LocalStore.read

    def counted(self: LocalStore, name: str, start: int = 0, stop: int | None = None) -> bytes:
        path = self.root / name
        if "checkpoints" in path.parts:
            reads.append(path.name)
        return read(self, name, start, stop)

    LocalStore.read = counted  # type: ignore[method-assign]
    worker.ray = SimpleNamespace(  # type: ignore[attr-defined]
        train=SimpleNamespace(get_context=lambda: SimpleNamespace(get_world_size=lambda: RANKS)),
        get_runtime_context=lambda: SimpleNamespace(get_node_id=lambda: "node"),
    )
    job: Any = SimpleNamespace(
        config=config, run_uri=run_uri, plan_digest="plan", driver="test", tokenizer=b""
    )
    reporter: Any = SimpleNamespace(add=lambda journal, rows: None)
    heart: Any = None
    rank = dist.get_rank()
    attempt = worker._begin(job, rank, torch.device("cpu"), reporter, heart)
    assert isinstance(attempt, worker._Attempt)
    assert attempt._start.progress.step == 7
    return reads, tensors(attempt._bare, attempt._optimizer), attempt._start.commit


def tensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Return weights and moments."""
    states = [optimizer.state[parameter] for parameter in model.parameters()]
    moments = [state[kind] for state in states for kind in sorted(state)]
    return [tensor.detach().clone() for tensor in [*model.state_dict().values(), *moments]]


def test_a_commit_is_read_once_whatever_the_number_of_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "TIMEOUT_S", 180)  # each rank imports Ray
    config = Config.model_validate(CONFIG)
    model, optimizer = build_state(config, seed=5)
    for number, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, 0.1 * number)
    optimizer.step()
    checkpoints = Checkpoints(LocalStore(tmp_path / "r"))
    files: dict[str, Any] = {"state.json": Progress(7, "plan").to_bytes()}
    for part in range(2):
        files |= snapshot(model, optimizer, part, 2)
    commit = Commit(7, checkpoints.begin_attempt({}))
    checkpoints.write(commit, files)

    ranks = run_ranks(begin, RANKS, str(tmp_path / "r"), config)
    reads = [read for read, _, _ in ranks]
    assert sorted(reads[0]) == sorted(["COMMIT", *files]) and reads[1:] == [[], []]
    for _, state, start in ranks:
        assert start == commit
        expected = tensors(model, optimizer)
        assert len(state) == len(expected) > 50
        assert all(torch.equal(a, b) for a, b in zip(state, expected, strict=True))
