"""Prometheus itself judges our files: its own reader of rules, and its evaluation of each alert.

The scenarios are test_alerts.py's, where an evaluator of our own judges them on every machine.
`promtool` comes with Prometheus (`apt-get install prometheus`).
"""

from __future__ import annotations

import math
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster.promql import Labels, Samples
from tests.cluster.test_alerts import FOLDER, RULES, SCRAPE_S, SERVING, START, TRAINING, Recorded

pytestmark = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not installed"
)
ABSOLUTE = ("ray_clip_train_step_time", "ray_clip_train_commit_time")  # times since 1970


def promtool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["promtool", *map(str, arguments)], capture_output=True, text=True, timeout=120
    )


def test_the_rules_and_the_templates_in_their_annotations_are_prometheus_own():
    done = promtool("check", "rules", FOLDER / "alerts.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(RULES)} rules found" in done.stdout


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("humanizePercentage }}", "humanisePercentage }}"),
        ("by (run)", "by run"),
        ("for: 10m", "for: 10 minutes"),
    ],
)
def test_promtool_sees_what_is_wrong(tmp_path: Path, old: str, new: str):
    text = (FOLDER / "alerts.yaml").read_text()
    assert old in text
    (tmp_path / "alerts.yaml").write_text(text.replace(old, new, 1))
    assert promtool("check", "rules", tmp_path / "alerts.yaml").returncode != 0


def test_the_scrape_config_is_prometheus_own(tmp_path: Path):
    """Debian's promtool is built without the discovery of pods: that one is left to the others."""
    config = yaml.safe_load((FOLDER / "prometheus.yaml").read_text())
    shutil.copy(FOLDER / "alerts.yaml", tmp_path)

    def check(changed: dict[str, Any]) -> str:
        (tmp_path / "prometheus.yaml").write_text(yaml.safe_dump(changed))
        done = promtool("check", "config", tmp_path / "prometheus.yaml")
        return "" if done.returncode == 0 else done.stdout + done.stderr

    found = check(config)
    if "kubernetes_sd_configs not found" in found:
        (job,) = (job for job in config["scrape_configs"] if job["job_name"] == "ray-pods")
        del job["kubernetes_sd_configs"]
        found = check(config)
    assert found == ""
    config["scrape_configs"][0]["relabel_configs"][0]["action"] = "keeps"
    assert "keeps" in check(config)


def series(samples: Samples, until: float) -> Iterable[dict[str, str]]:
    """Yield the samples as promtool's own notation has them, from time 0 on."""
    for (name, labels), points in samples.series.items():
        values = ["_"] * (int((until - START) // SCRAPE_S) + 1)
        for time, value in points:
            place, rest = divmod(time - START, SCRAPE_S)
            assert rest == 0, "a scrape beside the grid"
            if name in ABSOLUTE:
                value -= START
            if place < len(values):
                values[int(place)] = "stale" if math.isnan(value) else f"{value:.6f}"
        shown = ", ".join(f'{key}="{label}"' for key, label in sorted(labels))
        yield {"series": f"{name}{{{shown}}}", "values": " ".join(values)}


def case(
    alert: str, name: str, samples: Samples, at: float, fires: Iterable[Labels]
) -> dict[str, Any]:
    severity = RULES[alert]["labels"]
    return {
        "name": name,
        "interval": f"{SCRAPE_S:.0f}s",
        "input_series": list(series(samples, at)),
        "alert_rule_test": [
            {
                "eval_time": f"{int(at - START)}s",
                "alertname": alert,
                "exp_alerts": [{"exp_labels": dict(labels) | severity} for labels in fires],
            }
        ],
    }


# Labels that are left when the expression has summed over the others.
LEFT: dict[str, dict[str, str]] = {
    "ClipReplicaUnhealthy": {"application": "clip", "deployment": "clip"},
    "ClipReplicaTargetFailed": {"application": "clip"},
    "ClipAliasNotServed": {"model": "clip"},
    "RayDiskFull": {"instance": "n1"},
    "RayMemoryFull": {"instance": "n1"},
}


def cases(alert: str) -> list[dict[str, Any]]:
    """Return each of test_alerts.py's scenarios of an alert, with what is to fire."""
    found = []
    if alert in TRAINING:
        for fires, scenarios in zip((True, False), TRAINING[alert], strict=True):
            for number, scenario in enumerate(scenarios):
                run: Recorded = scenario()
                expected = [frozenset({("run", "clip")})] if fires else []
                name = f"{alert} {'fires' if fires else 'silent'} {number}"
                found.append(case(alert, name, run.samples, run.now, expected))
    else:
        for fires, many in zip((True, False), SERVING[alert], strict=True):
            for number, samples in enumerate(many):
                expected = [frozenset(LEFT.get(alert, {}).items())] if fires else []
                name = f"{alert} {'fires' if fires else 'silent'} {number}"
                found.append(case(alert, name, samples, START + 1800, expected))
    return found


def judged(folder: Path, tests: list[dict[str, Any]]) -> str:
    """Return what Prometheus says against the tests; "" = nothing."""
    groups = yaml.safe_load((FOLDER / "alerts.yaml").read_text())["groups"]
    for group in groups:
        for rule in group["rules"]:
            del rule["annotations"]  # their values are the scenario's, to the digit
    (folder / "rules.yaml").write_text(yaml.safe_dump({"groups": groups}))
    document = {"rule_files": ["rules.yaml"], "evaluation_interval": "15s", "tests": tests}
    (folder / "tests.yaml").write_text(yaml.safe_dump(document))
    done = promtool("test", "rules", folder / "tests.yaml")
    return "" if done.returncode == 0 else done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("alert", sorted(RULES))
def test_prometheus_fires_each_alert_where_it_should_and_only_there(tmp_path: Path, alert: str):
    tests = cases(alert)
    assert judged(tmp_path, tests) == ""
    # The control: the same samples with the opposite expected must be refused.
    for test in tests:
        (rule,) = test["alert_rule_test"]
        if rule["exp_alerts"]:
            rule["exp_alerts"] = []
    assert "FAILED" in judged(tmp_path, tests)
