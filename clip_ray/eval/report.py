"""Evaluation for people: a text table for the terminal, and figures as PNG bytes.

Captions and images are the data set owner's: a caller passes keys as names, unless
tracking.samples allows more.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MAX_NAMES = 40  # class names beside a matrix; more cannot be read
_NAME_CHARS = 32


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the results as text, one line a measure.

    Args:
        results: by data set, what `Result.to_dict` returns.
    """
    lines = []
    for dataset, result in results.items():
        skipped = ", ".join(f"{n} {reason}" for reason, n in sorted(result["skipped"].items()))
        lines.append(
            f"{dataset}: {result['samples']} samples" + (f", skipped: {skipped}" if skipped else "")
        )
        metrics = {k: v for k, v in result.items() if isinstance(v, float)}
        width = max(map(len, metrics), default=0)
        lines += [f"  {name:<{width}}  {value:8.2%}" for name, value in metrics.items()]
    return "\n".join(lines)


def similarity_figure(
    similarity: NDArray[np.float32], rows: Sequence[str] = (), columns: Sequence[str] = ()
) -> bytes:
    """Return the heat map of image-text cosines as PNG.

    Args:
        similarity: (rows, columns); pairs stand on the diagonal.
        rows: names of the images, or none.
        columns: names of the captions (keys, unless tracking.samples allows the text), or none.
    """
    side = 5.0 if max(len(rows), len(columns)) == 0 else 7.0
    figure, axes = _figure(side + 1, side)
    shown = axes.imshow(similarity, cmap="viridis", interpolation="nearest")
    figure.colorbar(shown, ax=axes, label="cosine")
    axes.set(xlabel="caption", ylabel="image", title="Image-text similarity")
    _name(axes, rows, columns)
    return _png(figure)


def confusion_figure(confusion: NDArray[np.int64], names: Sequence[str]) -> bytes:
    """Return the confusion matrix as PNG, each row as fractions of its class.

    Args:
        confusion: (N, N) images by (true class, predicted class).
        names: N class names; drawn up to 40 of them.
    """
    rows = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    side = min(10.0, 4.5 + 0.12 * min(len(names), _MAX_NAMES))
    figure, axes = _figure(side + 1, side)
    shown = axes.imshow(rows, cmap="magma", vmin=0, vmax=1, interpolation="nearest")
    figure.colorbar(shown, ax=axes, label="fraction of the class")
    axes.set(xlabel="predicted", ylabel="true", title="Zero-shot classification")
    _name(axes, names, names)
    return _png(figure)


def loss_figure(records: Iterable[Mapping[str, Any]], name: str = "loss") -> bytes:
    """Return a curve of the journal as PNG.

    Args:
        records: the journal's; the later of two records of one step counts.
        name: which field.
    """
    by_step = {
        int(r["step"]): float(r[name])
        for r in records
        if isinstance(r.get(name), int | float) and math.isfinite(r[name])
    }
    steps = sorted(by_step)
    figure, axes = _figure(6.5, 4.0)
    axes.plot(steps, [by_step[step] for step in steps], linewidth=1)
    axes.set(xlabel="step", ylabel=name, title=name)
    axes.grid(alpha=0.3)
    return _png(figure)


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    # Not pyplot: it keeps every figure in a global list and picks a backend for a screen.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def _name(axes: Axes, rows: Sequence[str], columns: Sequence[str]) -> None:
    """Write names beside a matrix where there are few enough to read."""

    def short(name: str) -> str:
        name = name if len(name) <= _NAME_CHARS else name[: _NAME_CHARS - 1] + "…"
        return name.replace("$", r"\$")  # a dollar sign would start a formula

    if 0 < len(rows) <= _MAX_NAMES:
        axes.set_yticks(range(len(rows)), [short(name) for name in rows], fontsize=7)
    if 0 < len(columns) <= _MAX_NAMES:
        names = [short(name) for name in columns]
        axes.set_xticks(range(len(columns)), names, rotation=90, fontsize=7)


def _png(figure: Figure) -> bytes:
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=110)
    return data.getvalue()
