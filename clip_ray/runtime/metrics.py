"""What training exports to Prometheus: the names, once, and the one place where they are set.

Ray's agent on each node exports them with the prefix `ray_`, counters with `_total` behind. The
recorder sets them: all of a run's rows pass through it, and it outlives the workers. Times are
points in time (`time() - x` is an age), so that nobody has to count.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from clip_ray.train.journal import Row


@dataclass(frozen=True)
class Series:
    """A metric that we export: its name without Ray's prefix, and its labels."""

    kind: Literal["Counter", "Gauge"]
    name: str
    help: str
    labels: tuple[str, ...] = ("run",)

    @property
    def exported(self) -> str:
        """Its name in Prometheus."""
        return f"ray_{self.name}" + ("_total" if self.kind == "Counter" else "")


STEPS = Series("Counter", "clip_train_steps", "steps computed, also those computed again")
SAMPLES = Series("Counter", "clip_train_samples", "samples of these steps")
STEP_SECONDS = Series("Counter", "clip_train_step_seconds", "seconds of these steps")
PHASE_SECONDS = Series(
    "Counter", "clip_train_phase_seconds", "seconds of a phase, on rank 0", ("run", "phase")
)
BAD_SAMPLES = Series("Counter", "clip_train_bad_samples", "samples that were void and quarantined")
COMMITS = Series("Counter", "clip_train_commits", "commits written")
RECOVERY_EVENTS = ("attempt_failed", "preempted", "controller_hang", "rollback")
RECOVERIES = Series(
    "Counter", "clip_train_recoveries", "groups of workers that failed or had to go, roll-backs"
)
STEP = Series("Gauge", "clip_train_step", "last step")
LOSS = Series("Gauge", "clip_train_loss", "its loss; stands still where it is not finite")
LOGIT_SCALE = Series("Gauge", "clip_train_logit_scale", "its factor on cosine similarities")
GRAD_NORM = Series("Gauge", "clip_train_grad_norm", "its gradient's norm, before clipping")
LEARNING_RATE = Series("Gauge", "clip_train_learning_rate", "its learning rate")
WORKERS = Series("Gauge", "clip_train_workers", "workers that computed it")
ACTIVE = Series("Gauge", "clip_train_active", "1 while steps are computed, 0 before and after")
STEP_TIME = Series("Gauge", "clip_train_step_time", "when the last step ended, or training began")
COMMIT_TIME = Series(
    "Gauge", "clip_train_commit_time", "when the last commit was written, likewise"
)
TRAINING = (
    *(STEPS, SAMPLES, STEP_SECONDS, PHASE_SECONDS, BAD_SAMPLES, COMMITS, RECOVERIES),
    *(STEP, LOSS, LOGIT_SCALE, GRAD_NORM, LEARNING_RATE, WORKERS),
    *(ACTIVE, STEP_TIME, COMMIT_TIME),
)
ALIAS_SERVED = Series(
    "Gauge", "clip_alias_served", "1 where every replica serves the champion, else 0", ("model",)
)

Make = Callable[[Series], Any]
# Ray's agent drops a gauge that was not set for two of its reports, 20 s: of a run that stands
# still, or a fact that rarely changes, nothing would be left to alert on.
REFRESH_S = 5.0


class Gauges:
    """Sets gauges, and sets them again every few seconds for as long as the process lives.

    Args:
        every_s: how often; none = whenever `refresh` is called.
    """

    def __init__(self, every_s: float | None = REFRESH_S) -> None:
        self._lock = threading.Lock()
        self._last: dict[tuple[int, frozenset[tuple[str, str]]], Any] = {}
        if every_s is not None:
            thread = threading.Thread(target=self._keep, args=(every_s,), name="gauges")
            thread.daemon = True
            thread.start()

    def set(self, gauge: Any, value: float, tags: dict[str, str]) -> None:
        """Set a gauge of Ray's, now and from now on."""
        with self._lock:
            self._last[id(gauge), frozenset(tags.items())] = (gauge, value, tags)
            gauge.set(value, tags)

    def refresh(self) -> None:
        """Set all of them again."""
        with self._lock:
            for gauge, value, tags in self._last.values():
                gauge.set(value, tags)

    def _keep(self, every_s: float) -> None:
        while True:
            time.sleep(every_s)
            self.refresh()


def make_in_ray(series: Series) -> Any:
    """Return a metric of Ray's."""
    from ray.util import metrics

    return getattr(metrics, series.kind)(series.name, series.help, tag_keys=series.labels)


class TrainingMetrics:
    """Sets a run's metrics from its journal rows.

    Args:
        run: the run's name.
        make: makes a metric.
        clock: seconds since 1970.
        gauges: sets the gauges; none = every few seconds.
    """

    def __init__(
        self,
        run: str,
        make: Make = make_in_ray,
        clock: Callable[[], float] = time.time,
        gauges: Gauges | None = None,
    ) -> None:
        self._tags, self._clock = {"run": run}, clock
        self._gauges = gauges or Gauges()
        self._metrics = {series: make(series) for series in TRAINING}
        self._begun = False
        self._set(ACTIVE, 0)

    def took(self, rows: Iterable[tuple[str, Row]]) -> None:
        """Take rows, as (journal, row), in the order in which the recorder got them."""
        for journal, row in rows:
            if journal == "metrics":
                self._step(row)
            elif journal == "quarantine":
                self._add(BAD_SAMPLES, 1)
            elif row["event"] == "commit":
                self._add(COMMITS, 1)
                self._set(COMMIT_TIME, self._clock())
            elif row["event"] in RECOVERY_EVENTS:
                self._add(RECOVERIES, 1)
            elif row["event"] == "attempt":
                self._begin()

    def ended(self) -> None:
        """Note that no more steps are to be expected: what follows is export and evaluation."""
        self._set(ACTIVE, 0)

    def _begin(self) -> None:
        self._set(ACTIVE, 1)
        if not self._begun:
            self._begun = True
            self._set(STEP_TIME, self._clock())
            self._set(COMMIT_TIME, self._clock())

    def _step(self, row: Row) -> None:
        self._begin()
        self._set(STEP_TIME, self._clock())
        self._add(STEPS, 1)
        self._add(SAMPLES, round(row["samples_per_s"] * row["step_s"]))
        self._add(STEP_SECONDS, row["step_s"])
        for key, value in row.items():
            if key == "data_wait" or key.startswith("time_"):
                self._add(PHASE_SECONDS, value, phase=key.removeprefix("time_"))
        for series, key in (
            (STEP, "step"),
            (LOSS, "loss"),
            (LOGIT_SCALE, "logit_scale"),
            (GRAD_NORM, "grad_norm"),
            (LEARNING_RATE, "lr"),
            (WORKERS, "world_size"),
        ):
            if row[key] is not None:
                self._set(series, row[key])

    def _set(self, series: Series, value: float) -> None:
        self._gauges.set(self._metrics[series], value, self._tags)

    def _add(self, series: Series, value: float, **labels: str) -> None:
        if value > 0:  # Ray refuses to add nothing
            self._metrics[series].inc(value, self._tags | labels)
