"""From features to the JSON of the answers: scores, orders, and which model it was.

Pure functions on arrays; the routes decide where they run.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from serve.items import Item

if TYPE_CHECKING:
    from serve.engine import Loaded

Floats = NDArray[np.float32]


def provenance(loaded: Loaded) -> dict[str, Any]:
    """Return the members of every answer that tell which model gave it."""
    return {"model": loaded.id, "clip": facts(loaded)}


def facts(loaded: Loaded) -> dict[str, Any]:
    """Return what callers need to know of a model to keep and compare its embeddings."""
    served = loaded.served
    return {
        "name": served.name,
        "version": served.version,
        "run_id": served.run_id,
        "digest": served.digest,
        "logit_scale": loaded.logit_scale,
        "logit_bias": loaded.logit_bias,
        "dim": loaded.encoder.embed_dim,
    }


def usage(tokens: int, items: Sequence[Item]) -> dict[str, int]:
    """Return tokens and images of a request, as OpenAI's clients read them."""
    images = sum(item.text is None for item in items)
    return {"prompt_tokens": tokens, "total_tokens": tokens, "images": images}


def little_endian(features: Floats) -> bytes:
    """Return float32 as bytes, the same on every machine."""
    return features.astype("<f4", copy=False).tobytes()


def embeddings(features_NE: Floats, items: Sequence[Item], as_base64: bool) -> list[dict[str, Any]]:
    """Return OpenAI's list of embeddings, each with the modality of its item."""
    return [
        {
            "object": "embedding",
            "index": index,
            "embedding": base64.b64encode(little_endian(row)).decode() if as_base64 else row,
            "modality": item.modality,
        }
        for index, (item, row) in enumerate(
            zip(items, features_NE if as_base64 else features_NE.tolist(), strict=True)
        )
    ]


def classify(
    features_NE: Floats, matrix_CE: Floats, scale: float, bias: float, scoring: str, top_k: int
) -> list[list[tuple[int, float, float]]]:
    """Return the best labels of each image: (label's index, score, logit), best first.

    Args:
        features_NE: image features of unit length.
        matrix_CE: classifier, a row a label, of unit length.
        scale: factor on cosine similarities, exponentiated.
        bias: added to them, 0 for a model without one.
        scoring: softmax over the labels (Radford et al. 2021, section 3.1.2), or sigmoid.
        top_k: labels of an answer, at most C.
    """
    logits_NC = scale * (features_NE @ matrix_CE.T).astype(np.float64) + bias
    results = []
    for logits_C in logits_NC:
        best = _best(logits_C, top_k)
        if scoring == "softmax":
            highest = logits_C[best[0]]
            scores = np.exp(logits_C[best] - highest) / np.exp(logits_C - highest).sum()
        else:
            scores = 1 / (1 + np.exp(-logits_C[best]))
        rows = zip(best.tolist(), scores.tolist(), logits_C[best].tolist(), strict=True)
        results.append(list(rows))
    return results


def rank(queries_QE: Floats, documents_DE: Floats, top_n: int) -> list[list[tuple[int, float]]]:
    """Return the nearest documents of each query: (its index, cosine), nearest first."""
    results = []
    for cosines_D in queries_QE @ documents_DE.T:
        best = _best(cosines_D, top_n)
        results.append(list(zip(best.tolist(), cosines_D[best].tolist(), strict=True)))
    return results


def _best(scores: NDArray[Any], count: int) -> NDArray[np.int64]:
    """Return the indices of the `count` highest, the highest first; of equals the first."""
    chosen = np.arange(len(scores))
    if 4 * count < len(scores):
        # All that reach the count-th highest: sorting 100,000 labels would cost 8 ms an image.
        chosen = np.flatnonzero(scores >= np.partition(scores, -count)[-count])
    order = np.argsort(-scores[chosen], kind="stable")
    return chosen[order[:count]]
