"""The drills that a user runs, on a cluster of two nodes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.runtime.support import ROOT, ray_head, ray_node

pytestmark = [pytest.mark.ray, pytest.mark.slow]
# jobs/drill.py with runs of a few seconds.
SCRIPT = """
import sys
from pathlib import Path
from clip_ray.config.load import load_config
from clip_ray.runtime.drill import drill, table
from clip_ray.runtime.train import resolve

recipe = Path("jobs/configs/quickstart.yaml")
config = load_config(sys.argv[1:], default_recipe=recipe, program="drill")
findings = drill(resolve(config), print, length_s=6.0)
print(table(findings))
raise SystemExit(not all(one.held for one in findings))
"""


def test_every_drill_holds_on_two_nodes(tracking, tmp_path: Path):
    proxy, _ = tracking
    flags = ("--run.storage", str(tmp_path / "runs"), "--tracking.uri", proxy.endpoint)
    flags += ("--cluster.num_workers", "[1, 2]", "--cluster.cpus_per_worker", "2")
    with ray_head(tmp_path, cpus=3, with_dashboard=False) as head, ray_node(head, tmp_path, cpus=2):
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, *flags],
            cwd=ROOT,
            env=head.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=1500,
        )
    print(done.stdout)
    assert done.returncode == 0
    assert "all workers of a node are killed" in done.stdout and "left out" not in done.stdout
