"""Hits among the first k, with ties: shared by zero-shot classification and retrieval.

Counting only strictly better candidates would give a model that maps everything to one point
100 %. Here equal scores stand in an order drawn by lot, and the expectation is returned: such a
model gets chance level, exactly.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# Cosines nearer than this are equal: the last bits of a float32 product depend on where in a
# matrix it stands, and would otherwise break ties in a way that nobody chose.
TIE = 1e-6


def hit_rate(
    above: NDArray[np.int64], tied: NDArray[np.int64], right: NDArray[np.int64], k: int
) -> NDArray[np.float64]:
    """Return per query the probability that a right candidate is among the first k.

    With m = k - above places left for `tied` wrong and `right` right candidates of equal score, no
    right one gets a place with probability C(tied, m) / C(tied + right, m), which is the product
    over i < right of (tied + right - m - i) / (tied + right - i).

    Args:
        above: (Q,) wrong candidates that score higher than the best right one.
        tied: (Q,) wrong candidates that score the same.
        right: (Q,) right candidates that score the same, the best itself included.
        k: places.
    """
    places_Q = np.maximum(k - above, 0)
    total_Q = tied + right
    missed_Q = np.ones(len(above))
    for i in range(int(right.max(initial=0))):
        outside_Q = np.maximum(total_Q - places_Q - i, 0) / np.maximum(total_Q - i, 1)
        missed_Q *= np.where(i < right, outside_Q, 1.0)
    hit_Q: NDArray[np.float64] = 1.0 - missed_Q
    return hit_Q
