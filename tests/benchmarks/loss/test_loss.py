"""The gathered loss against the plain formulation: CPU time and memory, each in a fresh process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.bench
ROOT = Path(__file__).resolve().parents[3]
WIDTH, ROUNDS = 512, 3


def once(name: str, rows: int) -> dict[str, float]:
    """Measure one forward and backward in a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.loss.once", name, str(rows), str(WIDTH)]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, timeout=300)
    measured: dict[str, float] = json.loads(done.stdout)
    return measured


def test_time_and_memory_against_the_plain_formulation():
    print("\nN | plain s | tiled s | ratio | plain MB | tiled MB | ratio")
    for rows in (1024, 4096, 8192):
        # The least of rounds in turn: what else the machine does only adds.
        best = {name: {"seconds": 1e9, "bytes": 1e15} for name in ("plain", "tiled")}
        for _ in range(ROUNDS):
            for name, least in best.items():
                for key, value in once(name, rows).items():
                    least[key] = min(least[key], value)
        seconds, memory = ([best[n][k] for n in best] for k in ("seconds", "bytes"))
        time_ratio, memory_ratio = seconds[1] / seconds[0], memory[1] / memory[0]
        print(
            f"{rows} | {seconds[0]:.3f} | {seconds[1]:.3f} | {time_ratio:.2f} | "
            f"{memory[0] / 1e6:.0f} | {memory[1] / 1e6:.0f} | {memory_ratio:.3f}"
        )
    assert time_ratio <= 0.7 and memory_ratio <= 0.15, "N = 8192"
