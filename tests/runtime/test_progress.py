"""What the user reads while a run goes on."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from clip_ray.runtime.progress import ProgressLine, _cost, _summed_cost, duration
from clip_ray.storage import LocalStore
from clip_ray.tracking import Lag

FINE = Lag(steps=0, actions=0, replaying=False, acked_step=0, failures=0, refused=0, error=None)


def make_line(price: float | None = None) -> tuple[ProgressLine, io.StringIO]:
    run = SimpleNamespace(
        total_steps=100,
        config=SimpleNamespace(
            train=SimpleNamespace(global_batch=50), cluster=SimpleNamespace(price_per_hour=price)
        ),
        tokenizer=SimpleNamespace(context_length=16),
    )
    out = io.StringIO()
    return ProgressLine(run, 0, out), out


def row(step: int, **changes) -> dict:
    fields = {"step": step, "loss": 2.5, "step_s": 0.5, "data_wait": 0.1, "bad": 0, "truncated": 0}
    return {**fields, **changes}


def test_the_line_says_step_loss_speed_wait_and_eta():
    line, out = make_line()
    line.steps([row(s) for s in range(1, 21)], FINE)
    text = out.getvalue()
    for part in ("step 20/100", "loss 2.500", "100 samples/s", "data wait 20 %", "ETA 40s"):
        assert part in text


def test_there_is_no_eta_before_ten_steps():
    line, out = make_line()
    line.steps([row(9)], FINE)
    assert "ETA ..." in out.getvalue()


def test_truncated_captions_are_warned_of_once_with_two_ways_out():
    line, out = make_line()
    line.steps([row(2, truncated=10)], FINE)
    line.steps([row(3, truncated=15)], FINE)
    text = out.getvalue()
    assert text.count("10 % of the captions are longer than 16 tokens") == 1
    assert "--tokenizer.train_vocab" in text and "--model.text.context_length" in text


def test_few_truncated_captions_are_no_warning():
    line, out = make_line()
    line.steps([row(4, truncated=10)], FINE)  # 5 %, the limit
    assert "captions" not in out.getvalue()


def test_the_first_bad_sample_of_each_reason_and_lost_shards_are_named():
    line, out = make_line()

    def bad(key: str, shard: str, reason: str) -> None:
        line.bad({"key": key, "shard": shard, "reason": reason})

    bad("a", "0.tar", "truncated")
    bad("b", "1.tar", "truncated")
    bad("c", "1.tar", "aspect")
    for number in range(9):  # the second sample of a lost shard says nothing new
        bad("#0", f"{number}.tar", "shard-missing")
        bad("#1", f"{number}.tar", "shard-missing")
    said = [text.partition(" (void")[0] for text in out.getvalue().splitlines()]
    assert said == [
        "! bad sample: a in 0.tar: truncated",
        "! bad sample: c in 1.tar: aspect",
        *(f"! bad shard: #0 in {number}.tar: shard-missing" for number in range(5)),
    ]


def test_a_loss_that_is_not_finite_and_bad_samples_show():
    line, out = make_line()
    line.bad({"key": "cat", "shard": "a.tar", "reason": "truncated"})
    line.steps([row(1, loss=None, bad=1)], FINE)
    assert "bad sample: cat in a.tar: truncated" in out.getvalue()
    assert "loss not finite" in out.getvalue() and "1 bad samples" in out.getvalue()


def test_an_outage_of_mlflow_shows():
    line, out = make_line()
    line.steps([row(1)], Lag(7, 0, False, 0, 3, 0, "refused"))
    assert "MLflow behind by 7 steps" in out.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0s"), (59.6, "1m00s"), (190, "3m10s"), (7500, "2h05m"), (273600, "3d04h")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_the_line_says_what_the_rest_will_cost():
    line, out = make_line(price=36.0)
    line.steps([row(s) for s in range(1, 21)], FINE)
    assert "ETA 40s (costs 0.40)" in out.getvalue()  # 80 steps of 0.5 s, a cent a second


def priced_run(folder: Path, price: float | None, steps: list[dict]) -> SimpleNamespace:
    """A run whose first job began at 1000 s."""
    store = LocalStore(folder)
    store.write("attempts/00001.json", json.dumps({"driver": "a", "started": 1000.0}).encode())
    store.write("metrics.jsonl", b"".join(json.dumps(s).encode() + b"\n" for s in steps))
    config = SimpleNamespace(cluster=SimpleNamespace(price_per_hour=price))
    return SimpleNamespace(store=store, config=config, total_steps=100)


def timed(count: int, world_size: int = 2) -> list[dict]:
    return [{"step_s": 2.0, "world_size": world_size, "time": 1000.0 + 2 * n} for n in range(count)]


@pytest.mark.parametrize(
    ("steps", "start", "text"),
    [
        # 19 intervals of 2 s, and 80 steps of 2 s, at a cent a second.
        (timed(20), 20, "36 an hour, 0.38 so far, 1.60 expected for the 80 steps left"),
        (
            timed(20, 4),
            20,
            "36 an hour, 0.38 so far, what 80 steps will cost is shown with the ETA",
        ),
        ([], 0, "36 an hour, what 100 steps will cost is shown with the ETA"),
    ],
)
def test_the_start_says_what_the_run_costs(tmp_path, steps, start, text):
    run = priced_run(tmp_path, 36.0, steps)
    assert _cost(run, SimpleNamespace(num_workers=2), start) == [("cost", text)]


def test_without_a_price_nothing_is_said(tmp_path):
    run = priced_run(tmp_path, None, timed(20))
    assert _cost(run, SimpleNamespace(num_workers=2), 20) == []
    assert _summed_cost({"cost": None, "cluster_hours": 2.0}) == []
    assert _summed_cost({}) == []  # of a run that an earlier version finished


def test_the_summary_says_the_cost():
    assert _summed_cost({"cost": 25.0, "cluster_hours": 2.0}) == [
        ("cost", "25.00 (2.00 hours at 12.5)")
    ]
