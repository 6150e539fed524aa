"""The manifest: which shards a run reads, how many samples each has, and which it may train on.

Built once per data set, kept with the run, and small: everything is flat numpy arrays, so that it
travels through Ray's object store without a copy. It opens no file: `shards` reads.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clip_ray.config.schema import DataConfig, S3Options, SourceConfig
from clip_ray.data.samples import Ints, skip
from clip_ray.data.shards import PARQUET, TAR, IndexOptions, Shard, ShardIndex, index_shard
from clip_ray.errors import ConfigError, DataError
from clip_ray.storage import FileInfo, expand, open_store, split_uri

FORMAT = 1
_KINDS = (TAR, PARQUET)
_SHOWN = 5  # shards named in one message

MapShards = Callable[[Callable[["Job"], "Outcome"], list["Job"]], Iterable["Outcome"]]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Ragged:
    """Rows of different lengths in one flat array: row i is values[splits[i] : splits[i + 1]]."""

    values: np.ndarray[Any, Any]
    splits: Ints

    @classmethod
    def of(cls, rows: Sequence[np.ndarray[Any, Any]], dtype: type) -> Ragged:
        """Return the rows, one after the other."""
        splits = np.zeros(len(rows) + 1, np.int64)
        np.cumsum([len(row) for row in rows], out=splits[1:])
        values = np.concatenate(rows) if rows else np.zeros(0)
        return cls(values.astype(dtype), splits)

    @classmethod
    def of_text(cls, rows: Sequence[str]) -> Ragged:
        """Return texts as rows of UTF-8 bytes."""
        return cls.of([np.frombuffer(row.encode(), np.uint8) for row in rows], np.uint8)

    def __len__(self) -> int:
        return len(self.splits) - 1

    def __getitem__(self, row: int) -> np.ndarray[Any, Any]:
        return self.values[self.splits[row] : self.splits[row + 1]]

    def text(self, row: int) -> str:
        """Return a row of UTF-8 bytes as text."""
        return self[row].tobytes().decode()

    @property
    def lengths(self) -> Ints:
        """The rows' lengths."""
        return np.diff(self.splits)


@dataclass(frozen=True)
class Manifest:
    """The shards of a data set, in the order of their sources and, within one, their paths.

    Attributes:
        source: (n,) int32, index of each shard's source in `sources`.
        paths: text per shard.
        kinds: (n,) int8, index in ("tar", "parquet").
        sizes: (n,) int64 bytes.
        versions: text per shard.
        samples: (n,) int64 valid samples.
        offsets: int64 per shard, see `Shard.offsets`.
        held: sorted int32 ordinals per shard that are not trained on.
        holdout: those of them that are for evaluation.
        rows_skipped: int64 per shard.
        sources: path of each source, as configured.
        skipped: per source, what was left out, by reason.
        invalid_utf8: per source, valid samples whose caption is no valid UTF-8.
        options: what decided `held`: holdout, and digests of the select and exclude lists.
    """

    source: np.ndarray[Any, np.dtype[np.int32]]
    paths: Ragged
    kinds: np.ndarray[Any, np.dtype[np.int8]]
    sizes: Ints
    versions: Ragged
    samples: Ints
    offsets: Ragged
    held: Ragged
    holdout: Ragged
    rows_skipped: Ragged
    sources: tuple[str, ...]
    skipped_by_source: tuple[dict[str, int], ...]
    invalid_utf8: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.source)

    def shard(self, index: int) -> Shard:
        """Return what it takes to read from shard `index`."""
        return Shard(
            self.paths.text(index),
            _KINDS[self.kinds[index]],
            int(self.sizes[index]),
            self.versions.text(index),
            int(self.samples[index]),
            self.offsets[index],
            self.rows_skipped[index],
            int(self.source[index]),
        )

    @cached_property
    def train_counts(self) -> Ints:
        """(n,) int64: the training samples of each shard."""
        return self.samples - self.held.lengths

    @property
    def total(self) -> int:
        """Number of training samples."""
        return int(self.train_counts.sum())

    def train_ordinals(self, index: int, places: Ints) -> Ints:
        """Map places among shard `index`'s training samples to ordinals; any shape, any order."""
        return skip(np.asarray(places, np.int64), self.held[index])

    def holdout_items(self) -> tuple[Ints, Ints]:
        """Return the held-out samples as (shard, ordinal) arrays."""
        shards = np.repeat(np.arange(len(self), dtype=np.int64), self.holdout.lengths)
        return shards, self.holdout.values.astype(np.int64)

    @property
    def skipped(self) -> dict[str, int]:
        """What was left out over all sources, by reason."""
        total: Counter[str] = Counter()
        for counts in self.skipped_by_source:
            total.update(counts)
        return dict(sorted(total.items()))

    def by_source(self) -> list[dict[str, Any]]:
        """Return a row per source: path, shards, bytes, samples, train, holdout, skipped, ..."""
        rows = []
        for number, path in enumerate(self.sources):
            mine = self.source == number
            rows.append(
                {
                    "path": path,
                    "shards": int(mine.sum()),
                    "bytes": int(self.sizes[mine].sum()),
                    "samples": int(self.samples[mine].sum()),
                    "train": int(self.train_counts[mine].sum()),
                    "holdout": int(self.holdout.lengths[mine].sum()),
                    "held": int(self.held.lengths[mine].sum()),
                    "invalid_utf8": self.invalid_utf8[number],
                    "skipped": self.skipped_by_source[number],
                }
            )
        return rows

    @cached_property
    def digest(self) -> str:
        """Sha256 over what decides which samples there are; 64 hex digits."""
        sha = hashlib.sha256(f"clip-ray manifest {FORMAT}\n".encode())
        sha.update(json.dumps(self.options, sort_keys=True).encode())
        for array in (
            self.source,
            self.kinds,
            self.sizes,
            self.samples,
            *(a for r in (self.paths, self.versions) for a in (r.splits, r.values)),
            *(
                a
                for r in (self.held, self.holdout, self.rows_skipped)
                for a in (r.splits, r.values)
            ),
        ):
            fixed = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
            sha.update(str(fixed.nbytes).encode() + b":")
            sha.update(fixed.tobytes())
        return sha.hexdigest()

    def to_bytes(self) -> bytes:
        """Return the manifest as a Parquet file, a row per shard."""
        table = pa.table(
            {
                "source": self.source,
                "path": pa.array([self.paths.text(i) for i in range(len(self))], pa.string()),
                "kind": self.kinds,
                "size": self.sizes,
                "version": pa.array([self.versions.text(i) for i in range(len(self))], pa.string()),
                "samples": self.samples,
                "offsets": _lists(self.offsets),
                "held": _lists(self.held),
                "holdout": _lists(self.holdout),
                "rows_skipped": _lists(self.rows_skipped),
            }
        )
        head = {
            "format": FORMAT,
            "digest": self.digest,
            "sources": self.sources,
            "skipped": self.skipped_by_source,
            "invalid_utf8": self.invalid_utf8,
            "options": self.options,
        }
        sink = pa.BufferOutputStream()
        table = table.replace_schema_metadata({"clip_ray_manifest": json.dumps(head)})
        pq.write_table(table, sink, compression="zstd")
        return cast(bytes, sink.getvalue().to_pybytes())

    @classmethod
    def from_bytes(cls, data: bytes) -> Manifest:
        """Return the manifest in a file of `to_bytes`.

        Raises:
            DataError: it is no manifest, is damaged, or was written by newer code.
        """
        try:
            table = pq.read_table(pa.BufferReader(data))
            head = json.loads((table.schema.metadata or {})[b"clip_ray_manifest"])
        except (pa.ArrowException, OSError, KeyError, ValueError) as error:
            raise DataError(f"no manifest, or a damaged one ({error}); delete it") from error
        if head["format"] > FORMAT:
            raise DataError(
                f"the manifest has format {head['format']}, this code reads up to {FORMAT}; "
                "use the CLIP-Ray that wrote it, or index again"
            )
        manifest = cls(
            source=_flat(table, "source", np.int32),
            paths=Ragged.of_text(table["path"].to_pylist()),
            kinds=_flat(table, "kind", np.int8),
            sizes=_flat(table, "size", np.int64),
            versions=Ragged.of_text(table["version"].to_pylist()),
            samples=_flat(table, "samples", np.int64),
            offsets=_ragged(table, "offsets", np.int64),
            held=_ragged(table, "held", np.int32),
            holdout=_ragged(table, "holdout", np.int32),
            rows_skipped=_ragged(table, "rows_skipped", np.int64),
            sources=tuple(head["sources"]),
            skipped_by_source=tuple(head["skipped"]),
            invalid_utf8=tuple(head["invalid_utf8"]),
            options=head["options"],
        )
        if manifest.digest != head["digest"]:
            raise DataError(
                f"the manifest's content has digest {manifest.digest}, it was written as "
                f"{head['digest']}; it is damaged: index again"
            )
        return manifest


def _lists(ragged: Ragged) -> pa.Array:
    return pa.LargeListArray.from_arrays(ragged.splits, pa.array(ragged.values))


def _ragged(table: pa.Table, name: str, dtype: type) -> Ragged:
    array = table[name].combine_chunks()
    offsets = array.offsets.to_numpy()
    values = array.flatten().to_numpy(zero_copy_only=False).astype(dtype)
    return Ragged(values, (offsets - offsets[0]).astype(np.int64))


def _flat(table: pa.Table, name: str, dtype: type) -> np.ndarray[Any, Any]:
    return table[name].to_numpy().astype(dtype)


@dataclass(frozen=True)
class Job:
    """One shard to index; picklable, so that a cluster can map over them."""

    number: int
    source: int
    file: FileInfo
    config: SourceConfig
    s3: S3Options
    options: IndexOptions


@dataclass(frozen=True)
class Outcome:
    """A job's result, or its error as a value: a remote function would wrap what it raises."""

    number: int
    index: ShardIndex | None = None
    error: str = ""


def run_job(job: Job) -> Outcome:
    """Index one shard."""
    try:
        return Outcome(job.number, index_shard(job.file, job.config, job.s3, job.options))
    except DataError as error:
        return Outcome(job.number, error=str(error))
    except FileNotFoundError:
        return Outcome(job.number, error=f"shard {job.file.path}: vanished while it was indexed")


def build_manifest(
    data: DataConfig, map_shards: MapShards = map, progress: Progress | None = None
) -> Manifest:
    """Index all sources.

    Args:
        data: the sources and what is kept out of training.
        map_shards: called with a function and a list of jobs; returns their results in any order.
        progress: called with (shards done, shards) after each.

    Raises:
        ConfigError: there is no source.
        DataError: nothing matches, a shard is named twice, is truncated (without `data.salvage`)
            or damaged, or a source has no sample to train on.
    """
    if not data.sources:
        raise ConfigError("data.sources is empty; name at least one path, glob or s3:// prefix")
    jobs, options = _jobs(data)
    found: list[ShardIndex | None] = [None] * len(jobs)
    errors: dict[int, str] = {}
    for done, outcome in enumerate(map_shards(run_job, jobs), 1):
        found[outcome.number] = outcome.index
        if outcome.index is None:
            errors[outcome.number] = outcome.error
        if progress is not None:
            progress(done, len(jobs))
    _raise_errors([errors[number] for number in sorted(errors)])
    indexed = [index for index in found if index is not None]
    assert len(indexed) == len(jobs), "map_shards lost a job"
    if not data.salvage:
        _refuse_truncated(indexed)
    return _gather(data, jobs, indexed, options)


def _jobs(data: DataConfig) -> tuple[list[Job], dict[str, Any]]:
    exclude = _read_keys(data.exclude, data.s3, "data.exclude")
    options: dict[str, Any] = {"holdout": data.holdout, "exclude": _keys_digest(exclude)}
    selects: list[str | None] = []
    owner: dict[str, int] = {}
    jobs: list[Job] = []
    for number, source in enumerate(data.sources):
        select = _read_keys(source.select, data.s3, f"data.sources[{number}].select")
        selects.append(_keys_digest(select))
        kept_out = IndexOptions(data.holdout, select, exclude or frozenset())
        for file in _without_metadata(expand(source.path, data.s3)):
            if file.path in owner:
                raise DataError(
                    f"shard {file.path} is in data.sources[{owner[file.path]}] and again in "
                    f"[{number}]; name each shard once (weights repeat a source)"
                )
            owner[file.path] = number
            jobs.append(Job(len(jobs), number, file, source, data.s3, kept_out))
    options["select"] = selects
    return jobs, options


def _without_metadata(files: list[FileInfo]) -> list[FileInfo]:
    """Drop 00000.parquet beside 00000.tar: img2dataset's record of the tar, without images."""
    tars = {file.path[: -len(".tar")] for file in files if file.path.lower().endswith(".tar")}
    return [file for file in files if file.path.removesuffix(".parquet") not in tars]


def _read_keys(path: str | None, s3: S3Options, option: str) -> frozenset[str] | None:
    if path is None:
        return None
    folder, name = split_uri(path) if "/" in path else (".", path)
    try:
        text = open_store(folder, s3).read(name).decode()
    except FileNotFoundError as error:
        raise DataError(f"{option}: {path} does not exist; expected one key a line") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{option}: {path} is no UTF-8 text; expected one key a line") from error
    return frozenset(key for line in text.split("\n") if (key := line.rstrip("\r")))


def _keys_digest(keys: frozenset[str] | None) -> str | None:
    if keys is None:
        return None
    return hashlib.sha256("\n".join(sorted(keys)).encode()).hexdigest()


def _raise_errors(errors: list[str]) -> None:
    if not errors:
        return
    rest = len(errors) - _SHOWN
    more = f"\n... and {rest} more shards" if rest > 0 else ""
    raise DataError("\n".join(errors[:_SHOWN]) + more)


def _refuse_truncated(indexed: list[ShardIndex]) -> None:
    _raise_errors(
        [
            f"shard {index.shard.path}: {index.truncated}; re-copy it, or data.salvage: true "
            "takes its whole samples"
            for index in indexed
            if index.truncated
        ]
    )


def _gather(
    data: DataConfig, jobs: list[Job], indexed: list[ShardIndex], options: dict[str, Any]
) -> Manifest:
    skipped: list[Counter[str]] = [Counter() for _ in data.sources]
    invalid_utf8 = [0] * len(data.sources)
    for job, index in zip(jobs, indexed, strict=True):
        skipped[job.source].update(index.skipped)
        if index.truncated:
            skipped[job.source]["truncated-shard"] += 1
        invalid_utf8[job.source] += index.invalid_utf8
    # Shards without a sample are counted above, and of no use to the plan.
    kept = [(job, index) for job, index in zip(jobs, indexed, strict=True) if index.shard.samples]
    shards = [index.shard for _, index in kept]
    manifest = Manifest(
        source=np.array([job.source for job, _ in kept], np.int32),
        paths=Ragged.of_text([s.path for s in shards]),
        kinds=np.array([_KINDS.index(s.kind) for s in shards], np.int8),
        sizes=np.array([s.size for s in shards], np.int64),
        versions=Ragged.of_text([s.version for s in shards]),
        samples=np.array([s.samples for s in shards], np.int64),
        offsets=Ragged.of([s.offsets for s in shards], np.int64),
        held=Ragged.of([index.held for _, index in kept], np.int32),
        holdout=Ragged.of([index.holdout for _, index in kept], np.int32),
        rows_skipped=Ragged.of([s.rows_skipped for s in shards], np.int64),
        sources=tuple(source.path for source in data.sources),
        skipped_by_source=tuple(dict(sorted(counts.items())) for counts in skipped),
        invalid_utf8=tuple(invalid_utf8),
        options=options,
    )
    for number, row in enumerate(manifest.by_source()):
        if row["train"] == 0:
            raise DataError(_nothing_to_train_on(number, row, jobs, indexed))
    return manifest


def _nothing_to_train_on(
    number: int, row: dict[str, Any], jobs: list[Job], indexed: list[ShardIndex]
) -> str:
    mine = [index for job, index in zip(jobs, indexed, strict=True) if job.source == number]
    suffixes: Counter[str] = Counter()
    for index in mine:
        suffixes.update(index.unknown_suffixes)
    parts = [f"{count} {reason}" for reason, count in row["skipped"].items()]
    if row["held"]:
        parts.append(f"{row['held']} held out, excluded or not selected")
    if suffixes:
        names = ", ".join(f".{name} ({count})" for name, count in suffixes.most_common(5))
        parts.append(f"members of other suffixes: {names}")
    return (
        f"data.sources[{number}] {row['path']}: no sample to train on in {len(mine)} shards "
        f"({'; '.join(parts)}); check data.sources[].image and .caption, data.holdout, "
        "select and exclude"
    )
