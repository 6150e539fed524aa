"""A loss that is finite and lost all the same: told from what the run had learnt before."""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass
from typing import Literal

STEPS = 20  # the loss of one step says little: medians of so many are compared
# A rise that is no noise and no warm-up: a tenth of chance where nothing is learnt yet, else half
# of what was. Spikes that pass within ten steps do not move a median of twenty.
RISE, FORGOTTEN = 0.1, 0.5


@dataclass(frozen=True)
class Diverged:
    """A loss that has risen for long.

    Attributes:
        step: the step at which it is noticed.
        loss: median of the last steps.
        best: the lowest such median.
        best_step: last step of those.
        chance: the loss of a model that has learnt nothing.
    """

    step: int
    loss: float
    best: float
    best_step: int
    chance: float


def chance_loss(loss: Literal["clip", "siglip"], global_batch: int) -> float:
    """Return the loss of features that say nothing, with the best scale and bias.

    clip: each row's softmax is uniform over G: ln G. siglip: each of G pairs, of which one is
    right, has probability 1/G: -ln(1/G) - (G - 1) ln(1 - 1/G) a row, or nearly ln G + 1.
    """
    wrong = 0.0 if loss == "clip" else -(global_batch - 1) * math.log1p(-1 / global_batch)
    return math.log(global_batch) + wrong


class Divergence:
    """Follows a run's loss.

    Args:
        chance: see `chance_loss`.
    """

    def __init__(self, chance: float) -> None:
        self._chance = chance
        self._recent: deque[float] = deque(maxlen=STEPS)
        self._best, self._best_step = math.inf, 0
        self._diverged = False

    def took(self, step: int, loss: float | None) -> Diverged | None:
        """Take a step's loss, none where it is not finite; return, once, that it has diverged.

        It is told of again after the loss had come back.
        """
        if loss is None:
            return None
        self._recent.append(loss)
        if len(self._recent) < STEPS:
            return None
        now = statistics.median(self._recent)
        if now < self._best:
            self._best, self._best_step = now, step
        rise = max(RISE * self._chance, FORGOTTEN * (self._chance - self._best))
        before, self._diverged = self._diverged, now > self._best + rise
        if self._diverged and not before:
            return Diverged(step, now, self._best, self._best_step, self._chance)
        return None
