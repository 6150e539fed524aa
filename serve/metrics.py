"""Counts and times of a replica: kept in memory, and exported through Ray's metrics agent.

Ray is the only exporter: a /metrics route would be answered by one replica of many. The in-memory
counts are what tests and `status()` read.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

# Milliseconds; from a cache hit to the longest request that is allowed.
LATENCY_BOUNDS_MS: list[float] = [
    1,
    2,
    5,
    10,
    20,
    50,
    100,
    200,
    500,
    1000,
    2000,
    5000,
    10_000,
    30_000,
]
PLACES = ("turn", "body", "input", "decode")
BATCH_BOUNDS: list[float] = [1, 2, 4, 8, 16, 32, 64, 128]


class Metrics:
    """Counts in memory; `RayMetrics` exports them as well."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, ...]] = Counter()

    def request(self, route: str, status: int, ms: float) -> None:
        """Count an answered request of a route's template, with its time."""
        self.counts["request", route, str(status)] += 1

    def batch(self, kind: str, size: int) -> None:
        """Count a forward pass of `size` images or texts."""
        self.counts["batch", kind] += 1
        self.counts["batch_items", kind] += size

    def cache(self, which: str, hit: bool) -> None:
        """Count a look into a cache: classifier or text."""
        self.counts["cache", which, "hit" if hit else "miss"] += 1

    def reject(self, reason: str) -> None:
        """Count a request that was refused, by the code of its error."""
        self.counts["reject", reason] += 1

    def waits(self, place: str, change: int) -> None:
        """Count requests that begin (1) or end (-1) to wait, and where.

        Places: turn (to be worked on), body, input and decode (for memory).
        """
        self.counts["waiting", place] += change

    def stage(self, stage: str, ms: float) -> None:
        """Record the time of a stage: decode (of a request's images), model (of a pass)."""
        self.counts["stage", stage] += 1

    def target(self, failed: bool) -> None:
        """Note whether the replica could not load what it is to serve."""
        self.counts["target", "failed" if failed else "taken"] += 1


class RayMetrics(Metrics):
    """Metrics that Ray's agent exports under `ray_clip_...` with the deployment's tags."""

    def __init__(self) -> None:
        super().__init__()
        from ray.serve import metrics

        from clip_ray.runtime.metrics import Gauges

        self._requests = metrics.Counter(
            "clip_requests", "answered requests", tag_keys=_keys("route", "status")
        )
        self._latency = metrics.Histogram(
            "clip_request_ms", "time of a request", LATENCY_BOUNDS_MS, tag_keys=("route",)
        )
        self._batches = metrics.Histogram(
            "clip_batch_size", "images or texts of a forward pass", BATCH_BOUNDS, tag_keys=("kind",)
        )
        self._cache = metrics.Counter(
            "clip_cache_lookups", "looks into a cache", tag_keys=_keys("cache", "result")
        )
        self._rejects = metrics.Counter(
            "clip_rejects", "refused requests by reason", tag_keys=("reason",)
        )
        self._stages = metrics.Histogram(
            "clip_stage_ms", "time of a stage", LATENCY_BOUNDS_MS, tag_keys=("stage",)
        )
        self._gauges = Gauges()
        self._waiting = metrics.Gauge(
            "clip_waiting_requests",
            "requests that wait in the replica, by what for",
            tag_keys=_keys("place"),
        )
        for place in PLACES:
            self._gauges.set(self._waiting, 0, {"place": place})
        self._target_failed = metrics.Gauge(
            "clip_target_failed", "1 where the replica could not load its target", tag_keys=_keys()
        )

    def request(self, route: str, status: int, ms: float) -> None:  # noqa: D102 - see Metrics
        super().request(route, status, ms)
        self._requests.inc(1, {"route": route, "status": str(status)})
        self._latency.observe(ms, {"route": route})

    def batch(self, kind: str, size: int) -> None:  # noqa: D102
        super().batch(kind, size)
        self._batches.observe(size, {"kind": kind})

    def cache(self, which: str, hit: bool) -> None:  # noqa: D102
        super().cache(which, hit)
        self._cache.inc(1, {"cache": which, "result": "hit" if hit else "miss"})

    def reject(self, reason: str) -> None:  # noqa: D102
        super().reject(reason)
        self._rejects.inc(1, {"reason": reason})

    def waits(self, place: str, change: int) -> None:  # noqa: D102
        super().waits(place, change)
        self._gauges.set(self._waiting, self.counts["waiting", place], {"place": place})

    def stage(self, stage: str, ms: float) -> None:  # noqa: D102
        super().stage(stage, ms)
        self._stages.observe(ms, {"stage": stage})

    def target(self, failed: bool) -> None:  # noqa: D102
        super().target(failed)
        self._gauges.set(self._target_failed, int(failed), {})


def _keys(*names: str) -> Any:
    """Return tag keys; Ray annotates a counter's as one key, and means any number."""
    return names
