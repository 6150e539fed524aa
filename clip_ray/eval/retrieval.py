"""Image-text retrieval: recall at 1, 5 and 10 both ways, several captions an image.

Similarities are made a block of queries at a time, so memory does not grow with the square of the
data set.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from clip_ray.eval.ranks import TIE, hit_rate

Floats = NDArray[np.float32]
RECALLS = (1, 5, 10)
_BLOCK_ELEMENTS = 1 << 24  # 64 MB of float32 similarities


@dataclass(frozen=True)
class RetrievalScores:
    """Recall by k (1, 5, 10), as fractions in [0, 1].

    Attributes:
        image_to_text: images with one of their captions among the k nearest texts.
        text_to_image: captions with their image among the k nearest images.
    """

    image_to_text: dict[int, float]
    text_to_image: dict[int, float]


def retrieve(
    image_features: Floats, text_features: Floats, image_of_text: NDArray[np.int64]
) -> RetrievalScores:
    """Score retrieval over all images and all captions.

    Args:
        image_features: (I, E) of unit length.
        text_features: (T, E) of unit length.
        image_of_text: (T,) the image that each caption belongs to; each image has one at least.
    """
    own_I = np.arange(len(image_features))
    assert len(np.unique(image_of_text)) == len(own_I), "an image without a caption"
    return RetrievalScores(
        image_to_text=_recalls(image_features, text_features, own_I, image_of_text),
        text_to_image=_recalls(text_features, image_features, image_of_text, own_I),
    )


def _recalls(
    query_QE: Floats,
    candidate_CE: Floats,
    group_of_query: NDArray[np.int64],
    group_of_candidate: NDArray[np.int64],
) -> dict[int, float]:
    """Return recall by k; a candidate is right for a query of the same group."""
    hits = {k: np.empty(len(query_QE)) for k in RECALLS}
    block = max(1, _BLOCK_ELEMENTS // max(1, len(candidate_CE)))
    for start in range(0, len(query_QE), block):
        rows = slice(start, start + block)
        similarity_BC = query_QE[rows] @ candidate_CE.T
        right_BC = group_of_query[rows, None] == group_of_candidate[None, :]
        best_B1 = np.where(right_BC, similarity_BC, -np.inf).max(axis=1, keepdims=True)
        above_BC = similarity_BC > best_B1 + TIE
        near_BC = similarity_BC >= best_B1 - TIE
        above_B = above_BC.sum(axis=1)
        right_B = (near_BC & right_BC).sum(axis=1)
        tied_B = near_BC.sum(axis=1) - above_B - right_B
        for k in RECALLS:
            hits[k][rows] = hit_rate(above_B, tied_B, right_B, k)
    return {k: float(hit_Q.mean()) for k, hit_Q in hits.items()}
