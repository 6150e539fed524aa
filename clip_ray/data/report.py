"""What is in a data set: the numbers to look at before a training is paid for."""

from __future__ import annotations

import textwrap
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from clip_ray.config.schema import DataConfig
from clip_ray.data.manifest import Manifest
from clip_ray.data.samples import Ints
from clip_ray.data.shards import Sample, read_ordinals
from clip_ray.images import ImageError, decode, eval_crop, measure

_PAIRS = 16
_RUN = 8  # neighbours that are read together
_CHUNK = 512  # samples in memory at a time
_WALKED = 16  # shards without offsets that are read: each is streamed as a whole
_QUANTILES = (0, 5, 50, 95, 100)  # percent


class Tokenizer(Protocol):
    """What a report needs of `clip_ray.tokenizer.Tokenizer`."""

    context_length: int

    def __call__(self, texts: Sequence[str]) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return ids (B, L), the end token's id the highest, and truncated (B,)."""


@dataclass
class Report:
    """Counts over a whole data set, and distributions over the samples that were read.

    Attributes:
        sources: rows of `Manifest.by_source`.
        read: samples read for what follows.
        bad: of them, those whose image header or shard cannot be read, by reason.
        distributions: name -> values, one a sample: image width, image height, image bytes,
            caption characters, and with a tokenizer caption tokens (start and end included).
        context_length: of the tokenizer; none without one.
        truncated: captions longer than that.
        duplicates: captions that an earlier sample has too.
        invalid_utf8: captions that are no valid UTF-8.
        pairs: up to 16 samples for the figure.
    """

    sources: list[dict[str, Any]]
    read: int = 0
    bad: Counter[str] = field(default_factory=Counter)
    distributions: dict[str, list[int]] = field(default_factory=dict)
    context_length: int | None = None
    truncated: int = 0
    duplicates: int = 0
    invalid_utf8: int = 0
    pairs: list[Sample] = field(default_factory=list)

    def as_text(self) -> str:
        """Return the report as plain tables."""
        lines = [f"{'shards':>8} {'samples':>12} {'train':>12} {'holdout':>9} {'MB':>10}  source"]
        for row in self.sources:
            lines.append(
                f"{row['shards']:>8} {row['samples']:>12,} {row['train']:>12,} "
                f"{row['holdout']:>9,} {row['bytes'] / 1e6:>10,.1f}  {row['path']}"
            )
            lines += [f"{'':>8} skipped {n:,} x {why}" for why, n in row["skipped"].items()]
        lines += ["", f"over {self.read:,} samples, percentiles:"]
        lines.append(f"{'':<20}" + "".join(f"{f'{q} %':>10}" for q in _QUANTILES))
        for name, values in self.distributions.items():
            if values:
                shown = np.percentile(values, _QUANTILES, method="nearest")
                lines.append(f"{name:<20}" + "".join(f"{int(v):>10,}" for v in shown))
        lines.append("")
        if self.context_length is not None:
            name = f"captions beyond {self.context_length} tokens"
            lines.append(self._share(name, self.truncated))
        lines.append(self._share("duplicate captions", self.duplicates))
        lines.append(self._share("captions of invalid UTF-8", self.invalid_utf8))
        lines += [self._share(f"unreadable: {why}", n) for why, n in sorted(self.bad.items())]
        return "\n".join(lines)

    def _share(self, name: str, count: int) -> str:
        return f"{name:<34} {count:>10,} {100 * count / max(self.read, 1):>7.2f} %"

    def figure(self, path: str | PathLike[str], max_pixels: int = 64_000_000) -> None:
        """Write the 16 pairs as a PNG; it shows images and captions, so mind who may see it."""
        # The Figure class, not pyplot: no global state and no display.
        from matplotlib.figure import Figure

        figure = Figure(figsize=(12, 14), layout="constrained")
        axes = figure.subplots(4, 4).ravel()
        for axis in axes:
            axis.axis("off")
        for axis, sample in zip(axes, self.pairs, strict=False):
            try:
                pixels = eval_crop(decode(sample.image, max_pixels), 224).transpose(1, 2, 0)
            except ImageError as error:
                axis.text(0.5, 0.5, error.reason, ha="center")
            else:
                axis.imshow(pixels)
            caption = textwrap.shorten(sample.caption, 120, placeholder=" ...")
            # Captions are data: a dollar sign begins no formula.
            axis.set_title(textwrap.fill(caption, 32), fontsize=8, parse_math=False)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph")  # scripts the font does not have
            figure.savefig(path, format="png", dpi=100)


def report(
    manifest: Manifest,
    data: DataConfig,
    tokenizer: Tokenizer | None = None,
    limit: int = 10_000,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Read up to `limit` training samples, spread over the shards, and sum them up.

    Of the shards that were indexed by their sidecars at most 16 are read: see `offsets`.

    Args:
        manifest: the indexed data set.
        data: the configuration that it was indexed with.
        tokenizer: counts tokens; none leaves them out.
        limit: samples to read.
        progress: called with (samples read, samples to read).
    """
    result = Report(manifest.by_source())
    names = ["image width", "image height", "image bytes", "caption characters"]
    if tokenizer is not None:
        names.append("caption tokens")
        result.context_length = tokenizer.context_length
    result.distributions = {name: [] for name in names}
    counts = _affordable(manifest)
    total = min(limit, int(counts.sum()))
    seen: set[int] = set()
    for index, places in _spread(counts, total):
        shard = manifest.shard(index)
        ordinals = manifest.train_ordinals(index, places)
        for sample in read_ordinals(shard, data.sources[shard.source], data.s3, ordinals):
            if not isinstance(sample, Sample):
                result.bad[sample.reason] += 1
            else:
                _add(result, sample, seen, tokenizer)
                if len(result.pairs) < _PAIRS and result.read * _PAIRS >= len(result.pairs) * total:
                    result.pairs.append(sample)
            result.read += 1
        if progress is not None:
            progress(result.read, total)
    return result


def _spread(counts: Ints, total: int) -> Iterator[tuple[int, Ints]]:
    """Yield (shard, places): `total` in all, in short runs spread over each shard."""
    # Rounded on the running sum, so that the shares add up to `total` exactly.
    ends = np.cumsum(counts) * total // max(int(counts.sum()), 1)
    shares = np.diff(ends, prepend=0)
    for index, share in enumerate(shares.tolist()):
        if not share:
            continue
        runs = -(-share // _RUN)
        last_start = max(int(counts[index]) - _RUN, 0)
        starts = np.linspace(0, last_start, runs).astype(np.int64)
        # Runs overlap where nearly everything is taken: then it is the first `share`.
        places = np.unique(starts[:, None] + np.arange(_RUN))
        places = places[places < counts[index]][:share]
        if len(places) < share:
            places = np.arange(share)
        for start in range(0, share, _CHUNK):
            yield index, places[start : start + _CHUNK]


def _affordable(manifest: Manifest) -> Ints:
    """Return how many samples of each shard may be read: of those without offsets, a few shards."""
    counts = manifest.train_counts.copy()
    without = np.flatnonzero(manifest.marks == 0)
    few = np.linspace(0, len(without) - 1, min(_WALKED, len(without))).astype(np.int64)
    counts[np.delete(without, few)] = 0
    return counts


def _add(result: Report, sample: Sample, seen: set[int], tokenizer: Tokenizer | None) -> None:
    values = result.distributions
    try:
        width, height = measure(sample.image)
    except ImageError as error:
        result.bad[error.reason] += 1
    else:
        values["image width"].append(width)
        values["image height"].append(height)
    values["image bytes"].append(len(sample.image))
    values["caption characters"].append(len(sample.caption))
    result.invalid_utf8 += sample.replaced_utf8
    # Hashes, not captions: 10 million of them fit in memory.
    caption = hash(sample.caption)
    result.duplicates += caption in seen
    seen.add(caption)
    if tokenizer is not None:
        ids, truncated = tokenizer([sample.caption])
        values["caption tokens"].append(int(ids[0].argmax()) + 1)
        result.truncated += bool(truncated[0])
