"""What the user reads while a run goes on."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest

from clip_ray.runtime.progress import ProgressLine, duration
from clip_ray.tracking import Lag

FINE = Lag(steps=0, actions=0, replaying=False, acked_step=0, failures=0, refused=0, error=None)


def make_line() -> tuple[ProgressLine, io.StringIO]:
    run = SimpleNamespace(
        total_steps=100,
        config=SimpleNamespace(train=SimpleNamespace(global_batch=50)),
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
