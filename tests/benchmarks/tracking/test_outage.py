"""What an MLflow that swallows all and answers nothing costs a step, beside no MLflow at all.

.venv/bin/python -m pytest -m bench -s tests/benchmarks/tracking

Both kinds of steps take turns, so that what else the machine does befalls both. In a job the sink
lives in the driver, another process than the steps: sharing one here is the harder case.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import pytest
import torch

from clip_ray.config import Config, TrackingConfig
from clip_ray.contrastive import clip_loss, contrastive_step
from clip_ray.storage import open_store
from clip_ray.tracking import TrackedRun, Tracker
from clip_ray.train.journal import Journal, read_journal
from clip_ray.train.state import build_state
from tests.test_tracking import black_hole

pytestmark = pytest.mark.bench
TURNS, STEPS = 40, 5


def test_an_mlflow_that_never_answers_costs_no_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow  # noqa: F401 - its import holds the interpreter; it is no part of an outage

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    torch.set_num_threads(1)
    config = Config.model_validate(
        {"train": {"steps": 1, "global_batch": 64}, "model": {"name": "ViT-micro-8-32"}}
    )
    model, optimizer = build_state(config)
    pixels = torch.randint(0, 255, (64, 3, 32, 32), dtype=torch.uint8)
    ids = torch.randint(1, 500, (64, config.model.text.context_length), dtype=torch.int32)
    store = open_store(tmp_path)
    journal = Journal(store, "metrics")
    numbers = {f"metric_{i}": 0.5 for i in range(20)}
    taken = 0

    def turn(sink: Tracker | None) -> tuple[float, float]:
        nonlocal taken
        wall, cpu = time.perf_counter(), time.thread_time()
        for _ in range(STEPS):
            optimizer.zero_grad(set_to_none=True)
            loss = contrastive_step(model, [(pixels, ids)], clip_loss)
            optimizer.step()
            taken += 1
            row = {"step": taken, "attempt": 1, "time": time.time(), "loss": loss.item()} | numbers
            journal.append([row])
            if sink is not None:
                sink.offer([row])
                sink.set_tags({"progress": taken})
                sink.lag()
        return (time.perf_counter() - wall) / STEPS, (time.thread_time() - cpu) / STEPS

    with black_hole() as hole:
        address = f"http://127.0.0.1:{hole.getsockname()[1]}"
        sink = Tracker(
            TrackedRun("r", "r#1", str(tmp_path)),
            TrackingConfig(uri=address, flush_s=0.02),
            store,
            lambda step: (r for r in read_journal(store, "metrics") if r["step"] >= step),
        )
        turn(None), turn(sink)
        pairs = [(turn(None), turn(sink)) for _ in range(TURNS)]
        lag = sink.lag()
        assert not sink.finish("FINISHED", 0.1)
    assert lag.failures > 0 and lag.acked_step == -1
    for unit, name in enumerate(("wall", "CPU of the training thread")):
        without, within = (statistics.median(p[kind][unit] for p in pairs) for kind in (0, 1))
        ratio = statistics.median(p[1][unit] / p[0][unit] for p in pairs)
        print(
            f"a step's {name}: {1000 * without:.1f} ms without MLflow, {1000 * within:.1f} ms with "
            f"one that answers nothing ({lag.failures} attempts failed): {ratio:.3f}x"
        )
        assert ratio <= 1.05
