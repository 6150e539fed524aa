"""What a drill is judged by; the drills themselves are in tests/chaos/test_drill.py."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from clip_ray.runtime import drill as module
from clip_ray.runtime.drill import _Drill, _Run, table
from clip_ray.storage import LocalStore

TIME = 4e9  # after every fault


class Told(_Run):
    """A run whose journals say what a test wants."""

    def __init__(self, loss: float = 1.0, **changes: Any) -> None:
        super().__init__(Path("r"), "run", 30, LocalStore(Path("no-run")), Path("log"))
        rows = [{"step": 1, "attempt": 1}, {"step": 2, "attempt": 2}]
        self.journals: dict[str, list[Any]] = {
            "metrics": [
                {"time": TIME, "samples_digest": "d", "loss": loss, **row, **changes.get("row", {})}
                for row in rows
            ],
            "events": [
                {"time": TIME, "event": "attempt", "recomputes": changes.get("lost", 0)},
                {"time": changes.get("at", TIME), "event": changes.get("event", "hang")},
            ],
        }

    def rows(self, journal: str) -> list[Any]:
        return self.journals[journal]

    def start(self) -> None:
        pass

    def until_step(self, step: int) -> None:
        assert step == 10


@pytest.fixture
def drill(monkeypatch: pytest.MonkeyPatch) -> _Drill:
    proof = SimpleNamespace(holds=True, as_text=lambda: "WRONG: a step held other samples")
    monkeypatch.setattr(module, "verify", lambda store: proof)
    return _Drill("it hangs", "found", "hang", lambda run: None)


@pytest.mark.parametrize(
    ("run", "said"),
    [
        (Told(), "the same samples, 0 steps done again, loss 1.0000 (undisturbed 1.0000)"),
        (Told(loss=1.00009), "the same samples, 0 steps"),
        (Told(lost=3), "the same samples, 3 steps done again"),
        (Told(loss=1.0002), "ANOTHER LOSS; 0 steps"),
        (Told(row={"samples_digest": "e"}), "OTHER SAMPLES; 0 steps"),
        (Told(row={"attempt": 1}), "did not begin again; 0 steps"),
        (Told(event="ranks"), "no hang event; 0 steps"),
        (Told(at=1.0), "no hang event; 0 steps"),  # an earlier one
    ],
)
def test_what_holds_and_what_does_not(drill: _Drill, run: Told, said: str) -> None:
    found = module._carried_out(run, Told(), drill)
    assert found is not None and found.observed.startswith(said)
    assert found.held == said.startswith("the same samples")
    assert ("NOT" in table([found])) != found.held


def test_a_drill_may_allow_no_lost_step_and_no_new_beginning(drill: _Drill) -> None:
    found = module._carried_out(Told(lost=1), Told(), replace(drill, loses=False))
    assert found is not None and "steps were lost" in found.observed and not found.held
    same = Told(row={"attempt": 1})
    found = module._carried_out(same, Told(), replace(drill, begins_again=False))
    assert found is not None and found.held and found.back_s is None


def test_what_needs_two_nodes_is_left_out_on_one(drill: _Drill) -> None:
    assert module._carried_out(Told(), Told(), replace(drill, nodes=2)) is None
