"""Shards: one pass that indexes a shard, and reads of any of its samples by number.

A shard's *ordinal* i is its i-th valid sample, in the order in which they lie there. The index
decides what is valid; the readers agree with it because they ask the same functions. A shard that
is not the one that was indexed gives bad samples, never an error: I/O errors alone are raised.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace

import numpy as np

from clip_ray.config.schema import S3Options, SourceConfig
from clip_ray.data.offsets import Tar, find_offsets
from clip_ray.data.parquet import read_parquet, scan_parquet
from clip_ray.data.quarantine import BadSample
from clip_ray.data.samples import Ints, Sample, Scan, Suffixes, digest_keys
from clip_ray.data.sidecar import scan_sidecar
from clip_ray.data.tar import STRIDE, Slab, ranges, read_tar, scan_tar
from clip_ray.data.threads import RANGES
from clip_ray.errors import DataError
from clip_ray.storage import ChangedError, FileInfo, Store, open_store, split_uri

__all__ = [
    "STRIDE",
    "BadSample",
    "IndexOptions",
    "Sample",
    "Shard",
    "ShardIndex",
    "index_shard",
    "read_ordinals",
    "read_samples",
]

TAR, PARQUET = "tar", "parquet"
_LOCAL_GAP = 0  # bytes: a seek is cheaper than any copy
_S3_GAP = 1 << 20  # bytes: about what arrives while another request would travel


@dataclass(frozen=True)
class Shard:
    """What it takes to read any sample of a shard.

    Attributes:
        path: full path or s3:// URI.
        kind: "tar" or "parquet".
        size: bytes.
        version: ETag or modification time when it was indexed.
        samples: number of valid samples.
        offsets: tar: the byte where every STRIDE-th valid sample begins, then the end of the last,
            or nothing where a sidecar was indexed: they are found when the shard is first read;
            Parquet: the first row of every row group, then the number of rows.
        rows_skipped: Parquet: the rows that are no valid sample, sorted.
        source: index of its source in data.sources; set by the manifest.
        keys: digest of the valid samples' keys, in order.
    """

    path: str
    kind: str
    size: int
    version: str
    samples: int
    offsets: Ints
    rows_skipped: Ints
    source: int = 0
    keys: int = 0


@dataclass(frozen=True)
class ShardIndex:
    """A shard with what the index found in it.

    Attributes:
        shard: what the readers need.
        held: ordinals that are not trained on, sorted, int32.
        holdout: those of them that are held out for evaluation (not excluded, not unselected).
        skipped: number of samples (or, for an empty shard, shards) left out, by reason.
        invalid_utf8: number of valid samples whose caption is no valid UTF-8.
        truncated: "truncated after sample i of at least n (where)"; empty for a whole shard.
        unknown_suffixes: tar: members of no known suffix, counted.
        content: 64-bit digest of what the index saw of the samples: equal in copies.
        sidecar: size and version of the sidecar that was at hand; empty without one.
    """

    shard: Shard
    held: np.ndarray[tuple[int], np.dtype[np.int32]]
    holdout: np.ndarray[tuple[int], np.dtype[np.int32]]
    skipped: dict[str, int] = field(default_factory=dict)
    invalid_utf8: int = 0
    truncated: str = ""
    unknown_suffixes: dict[str, int] = field(default_factory=dict)
    content: int = 0
    sidecar: str = ""


@dataclass(frozen=True)
class IndexOptions:
    """Which samples are kept out of training.

    Attributes:
        holdout: share of the samples held out, by hash of the key.
        select: the keys that are taken; none = all.
        exclude: the keys that are never taken.
        apart: take tars whose samples' members lie apart, which are read whole to be rewritten.
    """

    holdout: float = 0.0
    select: frozenset[str] | None = None
    exclude: frozenset[str] = frozenset()
    apart: bool = False


def index_shard(
    file: FileInfo,
    source: SourceConfig,
    s3: S3Options | None,
    options: IndexOptions,
    sidecar: FileInfo | None = None,
) -> ShardIndex:
    """Index one shard in one pass.

    Local tars are walked header by header, Parquet files are read by their footers, captions and
    keys. Of an S3 tar with a sidecar that names its samples, the sidecar is read; without one it
    is streamed in large ranges.

    Raises:
        DataError: the shard is damaged, changes meanwhile, lacks a column, or is a tar where the
            source has conditions. A truncated tar is
            no error here: see `ShardIndex.truncated`.
    """
    folder, name = split_uri(file.path)
    store = open_store(folder, s3)
    kind = PARQUET if name.lower().endswith(".parquet") else TAR
    if file.size == 0:
        scan = Scan()
        scan.skipped["zero-byte-shard"] = 1
    elif kind == TAR and source.where:
        raise DataError(
            f"shard {file.path}: a tar has no columns for data.sources[].where; list the keys of "
            "what is wanted in a file, and name it in select"
        )
    elif kind == PARQUET:
        scan = scan_parquet(file.path, store, name, file.size, source)
    else:
        known = scan_sidecar(file, sidecar, s3, source) if sidecar is not None else None
        suffixes = Suffixes.of(source)
        scan = known or scan_tar(file.path, store, name, file.size, suffixes, options.apart)
    now = store.info(name)
    if (now.size, now.version) != (file.size, file.version):
        raise DataError(f"shard {file.path}: changed while it was indexed; index it when written")
    if not scan.keys and not scan.skipped and not scan.truncated:
        scan.skipped["empty-shard"] = 1
    held, holdout = _held(scan.keys, options, frozenset(scan.not_chosen))
    shard = Shard(
        file.path,
        kind,
        file.size,
        file.version,
        len(scan.keys),
        scan.offsets,
        scan.rows_skipped,
        keys=digest_keys(scan.keys),
    )
    return ShardIndex(
        shard,
        held,
        holdout,
        dict(sorted(scan.skipped.items())),
        scan.invalid_utf8,
        scan.truncated,
        dict(sorted(scan.unknown_suffixes.most_common(5))),
        int.from_bytes(scan.content.digest(), "big"),
        identity(sidecar),
    )


def identity(file: FileInfo | None) -> str:
    """Return size and version of a file as one text; empty for none."""
    return "" if file is None else f"{file.size} {file.version}"


def fraction_of(key: str) -> float:
    """Return where a key falls in [0, 1): its hash, so that any copy of a set splits alike."""
    digest = hashlib.blake2b(key.encode(errors="backslashreplace"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _held(
    keys: list[str], options: IndexOptions, not_chosen: frozenset[int]
) -> tuple[np.ndarray[tuple[int], np.dtype[np.int32]], np.ndarray[tuple[int], np.dtype[np.int32]]]:
    held, holdout = [], []
    for ordinal, key in enumerate(keys):
        unselected = options.select is not None and key not in options.select
        if unselected or key in options.exclude or ordinal in not_chosen:
            held.append(ordinal)
        elif options.holdout > 0 and fraction_of(key) < options.holdout:
            held.append(ordinal)
            holdout.append(ordinal)
    return np.array(held, dtype=np.int32), np.array(holdout, dtype=np.int32)


def read_samples(
    shard: Shard, source: SourceConfig, s3: S3Options | None, first: int, count: int
) -> list[Sample | BadSample]:
    """Return the samples with ordinals [first, first + count): one byte range of a tar."""
    return read_ordinals(shard, source, s3, np.arange(first, first + count, dtype=np.int64))


def read_ordinals(
    shard: Shard, source: SourceConfig, s3: S3Options | None, ordinals: Ints
) -> list[Sample | BadSample]:
    """Return the samples with these ordinals, in their order.

    Args:
        shard: from the manifest.
        source: how its samples are named.
        s3: access to it.
        ordinals: distinct, in [0, shard.samples).

    Raises:
        OSError: the store failed, after its own retries; never for what the shard contains.
    """
    ordered = np.sort(np.asarray(ordinals, dtype=np.int64))
    if not len(ordered):
        return []
    if ordered[0] < 0 or ordered[-1] >= shard.samples:
        raise IndexError(f"{shard.path}: ordinals {ordered[0]}..{ordered[-1]} of {shard.samples}")
    folder, name = split_uri(shard.path)
    store = open_store(folder, s3)
    try:
        suffixes = Suffixes.of(source)
        if shard.kind == TAR and not len(shard.offsets):
            tar = Tar(shard.path, shard.size, shard.version, shard.samples, shard.keys)
            late = find_offsets(tar, suffixes, s3)
            if late.problem:
                return _all_bad(shard, ordinals, "sidecar-mismatch", late.problem)
            shard = replace(shard, offsets=late.offsets)
        found = _read(shard, source, store, name, ordered)
    except ChangedError as error:
        now = error.now
        return _all_bad(
            shard,
            ordinals,
            "shard-changed",
            f"indexed with {shard.size} bytes, version {shard.version}; now {now.size} bytes, "
            f"version {now.version}",
        )
    except FileNotFoundError:
        return _all_bad(shard, ordinals, "shard-missing", "it is there no more")
    return [
        found[ordinal]
        if ordinal in found
        else BadSample(f"#{ordinal}", "shard-changed", "not where it was indexed", shard.path)
        for ordinal in np.asarray(ordinals).tolist()
    ]


def _all_bad(shard: Shard, ordinals: Ints, reason: str, detail: str) -> list[Sample | BadSample]:
    return [BadSample(f"#{ordinal}", reason, detail, shard.path) for ordinal in ordinals]


def _read(
    shard: Shard, source: SourceConfig, store: Store, name: str, ordered: Ints
) -> dict[int, Sample | BadSample]:
    # With each read, not once before them: that would be a request a slot, and a gap in time.
    file = FileInfo(shard.path, shard.size, shard.version)
    remote = store.uri.startswith("s3://")
    gap = _S3_GAP if remote else _LOCAL_GAP
    if shard.kind == PARQUET:
        return read_parquet(
            file, store, name, source, shard.offsets, shard.rows_skipped, ordered, gap
        )
    suffixes = Suffixes.of(source)
    spans = ranges(shard.offsets, shard.samples, ordered, gap)
    bounds = [first for _, _, first in spans]
    owner = np.searchsorted(bounds, ordered, side="right") - 1

    def fetch(number: int) -> dict[int, Sample | BadSample]:
        start, stop, first = spans[number]
        wanted = set(ordered[owner == number].tolist())
        slab = Slab(start, store.read(name, start, stop, file))
        return read_tar(shard.path, slab, suffixes, first, wanted)

    result: dict[int, Sample | BadSample] = {}
    if remote and len(spans) > 1:
        for part in RANGES.map(fetch, range(len(spans))):
            result.update(part)
    else:
        for number in range(len(spans)):
            result.update(fetch(number))
    return result
