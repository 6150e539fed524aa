"""Dashboard and alerts: every query names a metric and labels that the code or Ray exports."""

from __future__ import annotations

import ast
import json
import re
from functools import cache
from pathlib import Path

import pytest
import ray
import yaml
from ray._private.ray_constants import PROMETHEUS_SERVICE_DISCOVERY_FILE

from clip_ray.runtime.metrics import ALIAS_SERVED, TRAINING

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "cluster/observability"
NAME = re.compile(r"\b(?:ray|autoscaler)_[a-z0-9_]+\b")
SELECTOR = re.compile(r"(ray_clip_[a-z_]+)\{([^}]*)\}")
PARTS = {"Counter": ("_total",), "Histogram": ("_bucket", "_sum", "_count"), "Gauge": ("",)}
# Tags that Ray puts on a deployment's metrics, and Prometheus on all.
GIVEN = {"application", "deployment", "replica", "instance", "job", "le"}


@cache
def own() -> dict[str, set[str]]:
    """Return what training and serve/metrics.py export: series name to its labels."""
    series = {one.exported: set(one.labels) for one in (*TRAINING, ALIAS_SERVED)}
    for node in ast.walk(ast.parse((ROOT / "serve/metrics.py").read_text())):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        if node.func.attr in PARTS and ast.unparse(node.func.value) == "metrics":
            name = ast.literal_eval(node.args[0])
            (tags,) = (item.value for item in node.keywords if item.arg == "tag_keys")
            labels = ast.literal_eval(tags) if isinstance(tags, ast.Tuple) else None
            if labels is None:
                assert isinstance(tags, ast.Call)
                labels = [ast.literal_eval(tag) for tag in tags.args]
            for part in PARTS[node.func.attr]:
                series[f"ray_{name}{part}"] = set(labels)
    return series


@cache
def rays() -> str:
    """Return the sources of Ray in which its own metrics are named."""
    package = Path(ray.__file__).parent
    folders = ("serve/_private", "dashboard/modules/reporter", "dashboard/modules/metrics")
    files = [path for folder in folders for path in sorted((package / folder).rglob("*.py"))]
    return "\n".join(path.read_text() for path in files)


def exported(name: str) -> bool:
    """Tell whether somebody exports a series."""
    if name.startswith("ray_clip_"):
        return name in own()
    # Ray's panels name series that the C++ core exports; Python names them without the prefix.
    bare = re.sub(r"_(?:bucket|sum|count|total)$", "", name.removeprefix("ray_"))
    found = re.search(rf'"{bare}"|\b{name}\b', rays())
    return found is not None


def problems(expression: str) -> list[str]:
    """Return what is wrong with a query."""
    names = NAME.findall(expression)
    found = [f"{name}: nobody exports it" for name in names if not exported(name)]
    if not names:
        found.append("names no metric")
    for name, selector in SELECTOR.findall(expression):
        labels = set(re.findall(r"(\w+)\s*[=!]", selector))
        found += [f"{name} has no label {label}" for label in labels - own()[name] - GIVEN]
    for labels_text in re.findall(r"\bby \(([^)]*)\)", expression):
        wanted = {word.strip() for word in labels_text.split(",")} - GIVEN
        for name in names:
            if name.startswith("ray_clip_") and exported(name):
                found += [f"{name} has no label {label}" for label in wanted - own()[name]]
    for opening, closing in ("()", "{}", "[]"):
        if expression.count(opening) != expression.count(closing):
            found.append(f"{opening} and {closing} do not match")
    return found


def dashboard() -> list[str]:
    board = json.loads((FOLDER / "grafana-dashboard.json").read_text())
    return [target["expr"] for panel in board["panels"] for target in panel["targets"]]


def alerts() -> list[str]:
    groups = yaml.safe_load((FOLDER / "alerts.yaml").read_text())["groups"]
    return [rule["expr"] for group in groups for rule in group["rules"]]


@pytest.mark.parametrize("expression", dashboard() + alerts())
def test_a_query_names_what_is_exported(expression: str):
    assert problems(expression) == []


@pytest.mark.parametrize(
    ("expression", "word"),
    [
        ("sum(rate(ray_clip_request_total[5m]))", "nobody exports it"),
        ("rate(ray_clip_requests[5m])", "nobody exports it"),
        ("ray_clip_request_ms_total", "nobody exports it"),
        ("ray_node_disk_used", "nobody exports it"),
        ('ray_clip_rejects_total{why="x"}', "has no label why"),
        ("sum by (cause) (ray_clip_rejects_total)", "has no label cause"),
        ("sum(ray_node_disk_free", "do not match"),
        ("up == 0", "names no metric"),
        ("max by (job) (ray_clip_train_loss_total)", "nobody exports it"),
        ("rate(ray_clip_train_steps[5m])", "nobody exports it"),
        ('ray_clip_train_steps_total{phase="loss"}', "has no label phase"),
    ],
)
def test_a_wrong_query_is_seen(expression: str, word: str):
    assert any(word in problem for problem in problems(expression))


def test_every_metric_of_the_code_is_on_the_dashboard():
    shown = {name for expression in dashboard() for name in NAME.findall(expression)}
    families = {re.sub(r"_(?:bucket|sum|count|total)$", "", name) for name in own()}
    assert len(families) == 8 + len(TRAINING) + 1  # Serve's, training's, and the watcher's
    missing = [family for family in families if not any(n.startswith(family) for n in shown)]
    assert missing == []


def test_panels_do_not_lie_on_each_other():
    board = json.loads((FOLDER / "grafana-dashboard.json").read_text())
    places = [(p["gridPos"]["x"], p["gridPos"]["y"]) for p in board["panels"]]
    assert len(set(places)) == len(places) == len({p["id"] for p in board["panels"]})


def test_the_runbook_has_a_paragraph_for_each_alert_and_no_other():
    runbook = (ROOT / "cluster/RUNBOOK.md").read_text()
    sections = dict(re.findall(r"^### (\w+)\n\n(.+)$", runbook, re.MULTILINE))
    groups = yaml.safe_load((FOLDER / "alerts.yaml").read_text())["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert set(sections) == {rule["alert"] for rule in rules}
    for rule in rules:
        assert len(sections[rule["alert"]]) > 80
        assert rule["annotations"]["runbook"] == f"cluster/RUNBOOK.md#{rule['alert'].lower()}"
        assert {"severity"} == set(rule["labels"]) and "for" in rule


def test_rejects_are_asked_for_by_a_reason_that_the_code_gives():
    reasons = {value for text in alerts() for value in re.findall(r'reason="(\w+)"', text)}
    code = "\n".join(path.read_text() for path in (ROOT / "serve").glob("*.py"))
    assert reasons == {"overloaded"}
    assert all(f'"{reason}"' in code for reason in reasons)


def test_prometheus_finds_the_nodes_where_ray_and_kuberay_put_them():
    config = yaml.safe_load((FOLDER / "prometheus.yaml").read_text())
    assert [(FOLDER / file).is_file() for file in config["rule_files"]] == [True]
    jobs = {job["job_name"]: job for job in config["scrape_configs"]}
    (files,) = jobs["ray-nodes"]["file_sd_configs"]
    assert files["files"] == [f"/tmp/ray/{PROMETHEUS_SERVICE_DISCOVERY_FILE}"]
    (pods,) = jobs["ray-pods"]["kubernetes_sd_configs"]
    settings = yaml.safe_load((ROOT / "cluster/kuberay/settings/kustomization.yaml").read_text())
    assert pods["namespaces"]["names"] == [settings["namespace"]]
