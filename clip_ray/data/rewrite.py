"""Shards made from shards: those of which few samples are wanted, or whose samples lie apart.

Indexed as for training, but that a tar whose samples' members do not lie side by side is taken
too: it is read whole, one at a time, and written in order.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace

import numpy as np
from tqdm import tqdm

from clip_ray.config.schema import DataConfig, S3Options, SourceConfig
from clip_ray.data.manifest import KINDS, Manifest, build_manifest
from clip_ray.data.prepare import BATCH, Packed, Prepared, PrepareOptions, fitted, pack, prepare
from clip_ray.data.samples import Sample, Suffixes
from clip_ray.data.shards import PARQUET, BadSample, Shard, read_ordinals
from clip_ray.data.tar import Slab, samples_apart
from clip_ray.errors import DataError
from clip_ray.storage import open_store, split_uri

_COARSE = 4  # times its bytes that a slot may read before a rewriting is advised


@dataclass(frozen=True)
class Wanted:
    """What shards are made of: a source or shards, one of them, and how it is read.

    Attributes:
        source: folder or table of pictures.
        shards: shards, as in `SourceConfig.path`.
        image: column or suffix of the images; none = the usual names.
        caption: column or suffix of the captions; none = the usual names.
        select: with shards: file of the keys to take.
        where: with shards: conditions on columns that all hold.
        exclude: with shards: file of the keys to leave out.
    """

    source: str | None
    shards: str | None
    image: str | None = None
    caption: str | None = None
    select: str | None = None
    exclude: str | None = None
    where: tuple[str, ...] = ()


def make_shards(wanted: Wanted, out: str, options: PrepareOptions, s3: S3Options) -> Prepared:
    """Make shards with a bar on the terminal: `prepare` or `rewrite`, whichever it takes."""
    with tqdm(desc="packing", unit="img") as bar:

        def progress(done: int, total: int) -> None:
            bar.total, bar.n = total, done
            bar.refresh()

        image, caption = wanted.image, wanted.caption
        if wanted.source:
            options = replace(options, image=image, caption=caption)
            return prepare(wanted.source, out, options, s3, progress)
        shards = SourceConfig(
            path=wanted.shards or "",
            image=image,
            caption=caption,
            select=wanted.select,
            where=wanted.where,
        )
        return rewrite(shards, wanted.exclude, out, options, s3, progress)


def rewrite(
    source: SourceConfig,
    exclude: str | None,
    out: str | os.PathLike[str],
    options: PrepareOptions | None = None,
    s3: S3Options | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Prepared:
    """Pack the samples that `select`, `where` and `exclude` leave into shards of their own.

    Keys stay, and with them what is held out; a dot in one (Parquet) is written as %2E, since a
    tar's key ends there. Several captions of an image stay, other columns and members do not. Of
    samples of one key in a tar whose samples lie apart, the first is taken.

    Args:
        source: the shards, and which of their samples to take.
        exclude: file of keys to leave out.
        out: directory of the shards, local or on s3://; finished shards there are kept.
        options: sizes; columns are named by the source.
        s3: access to all of them.
        progress: called with (samples done, samples).

    Raises:
        DataError: the shards cannot be indexed, or `out` holds something else.
    """
    options, s3 = options or PrepareOptions(), s3 or S3Options()
    data = DataConfig(sources=(source,), s3=s3, exclude=exclude, holdout=0)
    manifest = build_manifest(data, apart=True)
    skipped = Counter(manifest.skipped)
    skipped["not-selected"] = int(manifest.samples.sum()) - manifest.total
    fresh = Prepared(
        rows=manifest.total + skipped.total(),
        skipped=+skipped,
        examples={reason: [source.path] for reason in skipped},
    )
    identity = {"manifest": manifest.digest, **asdict(options)}
    # The walk begins anew with each shard that is written.
    whole = functools.lru_cache(maxsize=1)(lambda index: _whole(manifest.shard(index), s3))
    return pack(
        source.path,
        lambda first: _samples(manifest, source, first, options, s3, whole),
        fresh,
        manifest.total,
        open_store(out, s3),
        hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest(),
        options,
        progress,
    )


def sparse_sources(manifest: Manifest) -> list[str]:
    """Return a line for each source of which `select`, `where` and `exclude` leave less than half.

    A read fetches the neighbours of a sample along with it: below half, more than twice the bytes
    of what is trained on.
    """
    lines = []
    for number, row in enumerate(manifest.by_source()):
        kept = row["train"] + row["holdout"]
        if 2 * kept < row["samples"]:
            lines.append(
                f"data.sources[{number}] {row['path']}: its lists and conditions leave {kept:,} of "
                f"{row['samples']:,} samples; reading fetches {row['samples'] / kept:.1f} times "
                "their bytes; rewrite them once with jobs/prepare.py --shards ... --select ... "
                "--where ... --exclude ..., and train on what it makes"
            )
    return lines


def coarse_sources(manifest: Manifest, slot: int) -> list[str]:
    """Return a line for each Parquet source whose row groups are much larger than a slot.

    A row group is read whole: of R samples side by side, their groups' rows, R - 1 + a group's.

    Args:
        manifest: the shards.
        slot: R of the plan.
    """
    lines = []
    for number, path in enumerate(manifest.sources):
        mine = (manifest.source == number) & (manifest.kinds == KINDS.index(PARQUET))
        groups, rows = int((manifest.marks[mine] - 1).sum()), int(manifest.samples[mine].sum())
        if not groups:
            continue
        size = rows / groups
        times = min(size + slot - 1, rows / int(mine.sum())) / slot
        if times > _COARSE:
            lines.append(
                f"data.sources[{number}] {path}: its Parquet row groups have {size:,.0f} rows, and "
                f"are read whole for each slot of {slot}: {times:.0f} times the slot's bytes; "
                "rewrite them once with jobs/prepare.py --shards ..., or raise data.slot"
            )
    return lines


def _samples(
    manifest: Manifest,
    source: SourceConfig,
    first: int,
    options: PrepareOptions,
    s3: S3Options,
    whole: Callable[[int], Slab],
) -> Iterator[tuple[str, Packed | str]]:
    """Yield the samples of the shards from the `first` that is taken on, in order."""
    ends = np.cumsum(manifest.train_counts)
    at = first
    while at < manifest.total:
        index = int(np.searchsorted(ends, at, side="right"))
        place = at - int(ends[index] - manifest.train_counts[index])
        count = int(ends[index]) - at
        shard = manifest.shard(index)
        samples: Iterable[Sample | BadSample]
        if len(shard.offsets):
            count = min(BATCH, count)
            ordinals = manifest.train_ordinals(index, np.arange(place, place + count))
            samples = read_ordinals(shard, source, s3, ordinals)
        else:
            wanted = set(manifest.train_ordinals(index, np.arange(place, place + count)).tolist())
            every = enumerate(samples_apart(whole(index), Suffixes.of(source)))
            samples = (sample for ordinal, sample in every if ordinal in wanted)
        for sample in samples:
            yield f"{sample.key} in {shard.path}", _repacked(sample, shard.path, options)
        at += count


def _whole(shard: Shard, s3: S3Options) -> Slab:
    folder, name = split_uri(shard.path)
    store = open_store(folder, s3)
    slab, now = Slab(0, store.read(name)), store.info(name)
    if (now.size, now.version) != (shard.size, shard.version):
        raise DataError(f"shard {shard.path}: changed while it was rewritten; begin again")
    return slab


def _repacked(sample: Sample | BadSample, path: str, options: PrepareOptions) -> Packed | str:
    if isinstance(sample, BadSample):
        return sample.reason
    image = fitted(sample.image, options)
    if isinstance(image, str):
        return image
    return Packed(image, (sample.caption, *sample.others), {"shard": path}, _tar_key(sample.key))


def _tar_key(key: str) -> str:
    """Return a key as a tar's member can carry it: no dot in its last part, and not empty."""
    folder, slash, base = key.replace("\0", "%00").rpartition("/")
    return folder + slash + (base.replace(".", "%2E") or "%")
