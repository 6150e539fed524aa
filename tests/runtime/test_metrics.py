"""The metrics of training, as Ray's agent exports them while a job runs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from clip_ray.runtime.metrics import TRAINING
from tests.runtime.support import ROOT, wait_for

pytestmark = [pytest.mark.ray, pytest.mark.slow]
LINE = re.compile(r"^(ray_\w+)\{([^}]*)\} (\S+)$")


def scraped(head) -> dict[str, dict[str, float]]:
    """Return what the nodes export now: value by labels, by name."""
    found: dict[str, dict[str, float]] = {}
    (file,) = Path(head.env["RAY_TMPDIR"]).glob("prom_metrics_service_discovery.json")
    for target in {t for group in json.loads(file.read_text()) for t in group["targets"]}:
        try:
            with urllib.request.urlopen(f"http://{target}/metrics", timeout=30) as answer:
                text = answer.read().decode()
        except OSError:
            continue  # the dashboard's own, which starts late and has one port on a machine
        for line in text.splitlines():
            if match := LINE.match(line):
                found.setdefault(match[1], {})[match[2]] = float(match[3])
    return found


def of_run(head, run: str) -> dict[str, float]:
    """Return the metrics of a run, summed over its phases."""
    return {
        name: sum(value for labels, value in series.items() if f'run="{run}"' in labels)
        for name, series in scraped(head).items()
        if any(f'run="{run}"' in labels for labels in series)
    }


def test_a_running_job_exports_what_the_dashboard_shows(head, jobs):
    job = jobs.start("watched", "--train.steps", "5000", "--checkpoint.every_steps", "5")
    jobs.wait_for_step("watched", 12)
    # The agent is told every few seconds.
    wait_for(lambda: of_run(head, "watched").get("ray_clip_train_step", 0) >= 12, 90, "its step")
    now = of_run(head, "watched")
    rows = [row for row in jobs.rows("watched") if row["step"] <= now["ray_clip_train_step"]]
    events = {series.name for series in TRAINING} - {
        name.removeprefix("ray_").removesuffix("_total") for name in now
    }
    # Nothing was bad and nothing failed: a counter is exported from its first count on.
    assert events == {"clip_train_bad_samples", "clip_train_recoveries"}
    assert now["ray_clip_train_steps_total"] == now["ray_clip_train_step"]
    assert now["ray_clip_train_samples_total"] == 32 * now["ray_clip_train_step"]
    assert now["ray_clip_train_active"] == 1 and now["ray_clip_train_workers"] == 2
    assert now["ray_clip_train_commits_total"] >= 2
    # What the phases have taken is what the steps have, but for the loop's own lines.
    seconds = sum(row["step_s"] for row in rows)
    assert now["ray_clip_train_step_seconds_total"] == pytest.approx(seconds, rel=0.02)
    assert now["ray_clip_train_phase_seconds_total"] == pytest.approx(seconds, rel=0.2)
    assert 0 < now["ray_clip_train_step_time"] - now["ray_clip_train_commit_time"] < 600
    assert job.poll() is None


ONCE = """
import time
import ray
from ray.util import metrics
from clip_ray.runtime.metrics import ALIAS_SERVED, Gauges, make_in_ray

ray.init("auto", log_to_driver=False)
Gauges().set(make_in_ray(ALIAS_SERVED), 1, {"model": "kept"})
metrics.Gauge("clip_set_once", "as Ray has it", tag_keys=("model",)).set(1, {"model": "kept"})
print("set", flush=True)
time.sleep(300)
"""


def test_a_gauge_that_is_set_once_is_kept(head):
    """Ray's own is forgotten after two reports: alerts on what stands still would never fire."""
    process = subprocess.Popen(
        [sys.executable, "-c", ONCE], cwd=ROOT, env=head.env, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == "set\n"

        def there() -> set[str]:
            return {name for name, s in scraped(head).items() if 'model="kept"' in "".join(s)}

        wait_for(lambda: len(there()) == 2, 90, "both are exported")
        wait_for(lambda: there() == {"ray_clip_alias_served"}, 120, "one is forgotten")
        assert process.poll() is None
    finally:
        process.kill()
        process.wait(20)
