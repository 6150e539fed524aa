"""Every alert fires on samples of what it is for, and stays silent on those of a sound system."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from clip_ray.runtime.metrics import REFRESH_S, Gauges, Series, TrainingMetrics
from tests.cluster.promql import Samples, evaluate, firing

FOLDER = Path(__file__).resolve().parents[2] / "cluster/observability"
START = 1_700_000_000.0
SCRAPE_S = 15.0
FORGOTTEN_S = 20.0  # Ray's agent exports no gauge that was not set for so long
RULES = {
    rule["alert"]: rule
    for group in yaml.safe_load((FOLDER / "alerts.yaml").read_text())["groups"]
    for rule in group["rules"]
}


# ---------------------------------------------------------------------- the evaluator itself


def counted(*values: float, every: float = 15, name: str = "c_total", **labels: str) -> Samples:
    samples = Samples()
    for i, value in enumerate(values):
        samples.add(name, START + every * i, value, **labels)
    return samples


def only(value: Any) -> float:
    assert isinstance(value, dict)
    (number,) = value.values()
    return number


@pytest.mark.parametrize(
    ("values", "expression", "expected"),
    [
        # 0..60 at 1 a second: 4 intervals of 15 s; the window of 60 s ends at the last sample
        # and, open at its start, begins with the second: 45, and 15 more to its start.
        ((0, 15, 30, 45, 60), "rate(c_total[1m])", 1.0),
        ((0, 15, 30, 45, 60), "increase(c_total[1m])", 60.0),
        # Restarted at 0 in between: 30 before, 15 and 15 after it; half an interval before.
        ((30, 45, 60, 15, 30), "increase(c_total[1m])", 45 + 15),
        # New within the window: it was never below 0, so it is not drawn out beyond that.
        ((3, 6), "increase(c_total[5m])", 3 * (15 + 7.5 + 0) / 15),
        ((5,), "c_total", 5.0),
        ((5,), "2 * c_total - 1", 9.0),
        ((5,), "time() - c_total", START - 5),
    ],
)
def test_the_evaluator_against_hand_calculation(values, expression, expected):
    at = START + 15 * (len(values) - 1)
    assert only(evaluate(expression, counted(*values), at)) == pytest.approx(expected)


def test_the_evaluator_groups_joins_and_matches():
    samples = Samples()
    for run, phase, value in (("a", "x", 1), ("a", "y", 2), ("b", "x", 4)):
        samples.add("m", START, value, run=run, phase=phase)
    samples.add("on", START, 1, run="a", other="z")
    a, b = frozenset({("run", "a")}), frozenset({("run", "b")})
    assert evaluate("sum by (run) (m)", samples, START) == {a: 3, b: 4}
    assert evaluate("max(m)", samples, START) == {frozenset(): 4}
    assert evaluate('sum by (run) (m{phase="y"})', samples, START) == {a: 2}
    assert evaluate('sum by (run) (m{phase!~"x|z"})', samples, START) == {a: 2}
    assert evaluate("sum by (run) (m) > 3", samples, START) == {b: 4}
    assert evaluate("sum by (run) (m) > 2 and on (run) on == 1", samples, START) == {a: 3}
    assert evaluate("sum by (run) (m) > 2 unless on (run) on == 1", samples, START) == {b: 4}
    assert evaluate("sum by (run) (m) / sum by (run) (m)", samples, START) == {a: 1, b: 1}
    assert evaluate("m", samples, START + 301) == {}  # gone


def test_the_evaluator_takes_quantiles_as_prometheus_does():
    samples = Samples()
    for bound, count in (("10", 0), ("20", 90), ("+Inf", 100)):
        samples.add("h_bucket", START, count, le=bound)
    # A third of the way through the bucket that holds the 30th of 100.
    assert only(evaluate("histogram_quantile(0.3, h_bucket)", samples, START)) == pytest.approx(
        10 + 10 / 3
    )
    assert only(evaluate("histogram_quantile(0.99, h_bucket)", samples, START)) == 20


@pytest.mark.parametrize(
    "expression", ["sum(a", "a[5m]", "predict_linear(a[5m], 3)", "a ? b", "1 > 2", "a offset 5m"]
)
def test_the_evaluator_refuses_what_it_does_not_know(expression):
    with pytest.raises(ValueError):
        evaluate(expression, counted(1), START)


def test_an_alert_fires_only_when_it_holds_for_its_time():
    rule = {"alert": "A", "expr": "c_total > 1", "for": "1m"}
    samples = counted(0, 2, 2, 2, 2, 2)
    assert firing(rule, samples, START + 75) == {frozenset()}
    assert firing(rule, samples, START + 60) == set()


# ---------------------------------------------------------------------- what is exported


class Recorded:
    """A run's journal rows through the exporter of the code, scraped as Prometheus would.

    Args:
        refreshed: gauges are set again every few seconds, as the exporter's thread does.
    """

    def __init__(self, refreshed: bool = True) -> None:
        self.samples, self.now = Samples(), START
        self._values: dict[tuple[Series, frozenset[tuple[str, str]]], tuple[float, float]] = {}
        self._scraped, self._set_again, self._refreshed = START - SCRAPE_S, START, refreshed
        self._gauges = Gauges(every_s=None)
        self._metrics = TrainingMetrics("clip", self._make, lambda: self.now, self._gauges)
        self._step = 0

    def _make(self, series: Series) -> Any:
        run = self

        class Metric:
            def set(self, value: float, tags: dict[str, str]) -> None:
                assert series.kind == "Gauge" and set(tags) == set(series.labels)
                run._values[series, frozenset(tags.items())] = (value, run.now)

            def inc(self, value: float, tags: dict[str, str]) -> None:
                assert series.kind == "Counter" and set(tags) == set(series.labels)
                key = (series, frozenset(tags.items()))
                run._values[key] = (run._values.get(key, (0, 0))[0] + value, run.now)

        return Metric()

    def wait(self, seconds: float) -> Recorded:
        """Let time pass, and scrape meanwhile."""
        until = self.now + seconds
        while self._scraped + SCRAPE_S <= until:
            self._scraped += SCRAPE_S
            self.now = self._scraped
            if self._refreshed and self.now - self._set_again >= REFRESH_S:
                self._set_again = self.now
                self._gauges.refresh()
            for (series, labels), (value, at) in self._values.items():
                if series.kind == "Counter" or self.now - at <= FORGOTTEN_S:
                    self.samples.add(series.exported, self.now, value, **dict(labels))
                else:
                    self.samples.gone(series.exported, self.now, **dict(labels))
        self.now = until
        return self

    def steps(self, count: int, step_s: float = 10, data_wait: float = 0.1, bad: int = 0):
        """Train: with so many seconds of waiting, and bad samples of 100, in each step."""
        for _ in range(count):
            self.wait(step_s)
            self._step += 1
            row = {"step": self._step, "attempt": 1, "loss": 2.0, "logit_scale": 14.0, "lr": 1e-4}
            row |= {"grad_norm": 1.0, "world_size": 2, "step_s": step_s}
            row |= {"samples_per_s": 100 / step_s, "data_wait": data_wait, "time_forward": 5.0}
            self._metrics.took([("metrics", row)])
            self._metrics.took([("quarantine", {})] * bad)
        return self

    def event(self, name: str) -> Recorded:
        self._metrics.took([("events", {"event": name})])
        return self

    def end(self) -> Recorded:
        self._metrics.ended()
        return self


def train(**changes: float) -> Recorded:
    run = Recorded().event("attempt")
    for _ in range(6):
        run.steps(30, **changes).event("commit")
    return run


Scenario = Callable[[], Any]


def with_failures(count: int, apart_s: float) -> Recorded:
    run = train()
    for _ in range(count):
        run.event("attempt_failed").event("attempt").steps(int(apart_s / 10)).event("commit")
    return run


def uncommitted(hours: float) -> Recorded:
    return train().steps(int(hours * 360))


TRAINING: dict[str, tuple[list[Scenario], list[Scenario]]] = {
    # alert: (those that fire it, those that must not)
    "ClipTrainStuck": (
        [
            lambda: train().wait(700),
            lambda: Recorded().event("attempt").wait(700),  # no first step
        ],
        [
            train,
            lambda: train().wait(500),
            lambda: train().end().wait(3600),  # evaluation
            lambda: train(step_s=300),  # slow, and moving
            lambda: Recorded().wait(3600),  # waits for machines
            lambda: with_failures(3, 600),
        ],
    ),
    "ClipTrainCommitAge": (
        [lambda: uncommitted(2.5)],
        [train, lambda: uncommitted(1.8), lambda: uncommitted(2.5).event("commit").steps(6)],
    ),
    "ClipTrainDataWait": (
        [lambda: train(data_wait=3)],
        [train, lambda: train(data_wait=1.5), lambda: train().steps(30, data_wait=9)],  # 5 min
    ),
    "ClipTrainQuarantine": (
        [lambda: train(bad=3), lambda: train().steps(180, bad=4)],
        [train, lambda: train(bad=1)],
    ),
    "ClipTrainRecoveries": (
        [lambda: with_failures(6, 300), lambda: rolled_back(6)],
        [train, lambda: with_failures(2, 300), lambda: with_failures(6, 3600)],
    ),
}


def rolled_back(times: int) -> Recorded:
    run = train()
    for _ in range(times):
        run.event("rollback").steps(12)
    return run


@pytest.mark.parametrize("alert", sorted(TRAINING))
def test_an_alert_of_training_fires_when_it_should_and_only_then(alert: str):
    fires, silent = TRAINING[alert]
    for scenario in fires:
        run = scenario()
        assert firing(RULES[alert], run.samples, run.now) == {frozenset({("run", "clip")})}
    for number, scenario in enumerate(silent):
        run = scenario()
        assert firing(RULES[alert], run.samples, run.now) == set(), f"silent scenario {number}"


# ---------------------------------------------------------------------- serving and machines

GIVEN = {"application": "clip", "deployment": "clip", "replica": "r1"}


def served(
    ok: float = 10, failed: float = 0, rejected: float = 0, slow: float = 0, minutes: int = 30
) -> Samples:
    """Requests a second, answered in 40 ms, but for those that are `slow`: 4 s."""
    samples = Samples()
    for i in range(minutes * 4 + 1):
        time, s = START + SCRAPE_S * i, SCRAPE_S * i
        for status, rate in (("200", ok + slow), ("503", failed), ("429", rejected)):
            samples.add(
                "ray_clip_requests_total", time, rate * s, status=status, route="/", **GIVEN
            )
        samples.add("ray_clip_rejects_total", time, rejected * s, reason="overloaded", **GIVEN)
        for bound, rate in (("20", 0), ("50", ok), ("2000", ok), ("5000", ok + slow)):
            samples.add("ray_clip_request_ms_bucket", time, rate * s, le=bound, **GIVEN)
        samples.add("ray_clip_request_ms_bucket", time, (ok + slow) * s, le="+Inf", **GIVEN)
    return samples


def gauges(*values: float, minutes: int = 30, **named: tuple[str, dict[str, str]]) -> Samples:
    samples = Samples()
    for i in range(minutes * 4 + 1):
        for value, (name, labels) in zip(values, named.values(), strict=True):
            samples.add(name, START + SCRAPE_S * i, value, **labels)
    return samples


def one(name: str, value: float, **labels: str) -> Samples:
    return gauges(value, only=(name, labels))


def wanted(target: float, *healthy: float) -> Samples:
    """So many replicas are wanted, and those that there are say whether they are healthy."""
    names = {f"r{i}": value for i, value in enumerate(healthy)}
    app = {"application": "clip", "deployment": "clip"}
    replicas = {
        name: ("ray_serve_deployment_replica_healthy", app | {"replica": name}) for name in names
    }
    target_of = ("ray_serve_autoscaling_target_replicas", app)
    return gauges(target, *names.values(), target=target_of, **replicas)


def disk(used: float) -> Samples:
    node = {"instance": "n1"}
    return gauges(
        used,
        1000 - used,
        used=("ray_node_disk_usage", node),
        free=("ray_node_disk_free", node),
    )


def memory(used: float) -> Samples:
    node = {"instance": "n1"}
    return gauges(used, 100, used=("ray_node_mem_used", node), total=("ray_node_mem_total", node))


SERVING: dict[str, tuple[list[Samples], list[Samples]]] = {
    "ClipServingErrors": ([served(failed=1)], [served(), served(failed=0.05), served(rejected=5)]),
    "ClipServingSlow": ([served(slow=0.5)], [served(), served(slow=0.05)]),
    "ClipServingRejects": ([served(rejected=1)], [served(), served(rejected=0.3)]),
    "ClipReplicaUnhealthy": (
        [wanted(2, 1, 0), wanted(2, 1), wanted(1)],
        [wanted(2, 1, 1), wanted(1, 1, 1), wanted(0), one("ray_clip_target_failed", 0, **GIVEN)],
    ),
    "ClipReplicaTargetFailed": (
        [
            gauges(
                0,
                1,
                a=("ray_clip_target_failed", GIVEN),
                b=("ray_clip_target_failed", GIVEN | {"replica": "r2"}),
            )
        ],
        [one("ray_clip_target_failed", 0, **GIVEN)],
    ),
    "ClipAliasNotServed": (
        [one("ray_clip_alias_served", 0, model="clip")],
        [one("ray_clip_alias_served", 1, model="clip")],
    ),
    "RayDiskFull": ([disk(930)], [disk(850)]),
    "RayMemoryFull": ([memory(97)], [memory(90)]),
}


@pytest.mark.parametrize("alert", sorted(SERVING))
def test_an_alert_of_serving_fires_when_it_should_and_only_then(alert: str):
    fires, silent = SERVING[alert]
    at = START + 30 * 60
    for samples in fires:
        assert len(firing(RULES[alert], samples, at)) == 1
    for number, samples in enumerate(silent):
        assert firing(RULES[alert], samples, at) == set(), f"silent samples {number}"
    # What has begun a moment ago wakes nobody.
    (number, unit) = re.fullmatch(r"(\d+)(m)", RULES[alert]["for"]).groups()
    assert int(number) >= 2 and unit == "m"


def test_gauges_that_nobody_sets_again_would_leave_nothing_to_alert_on():
    """The negative control of the exporter's thread: what Ray's agent forgets fires nothing."""
    run = Recorded(refreshed=False).event("attempt").steps(30).wait(1200)
    assert firing(RULES["ClipTrainStuck"], run.samples, run.now) == set()


def test_every_rule_is_tried():
    assert set(RULES) == set(TRAINING) | set(SERVING)


def test_nothing_fires_without_samples():
    """No series, no alert: a cluster that has nothing to do is silent."""
    for rule in RULES.values():
        assert firing(rule, Samples(), START) == set()


def test_no_request_is_no_error():
    assert math.isnan(only(evaluate("a / a", counted(0, name="a"), START)))
    assert firing(RULES["ClipServingErrors"], served(ok=0), START + 1800) == set()
