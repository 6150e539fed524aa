"""The manifest: which shards a run reads, how many samples each has, and which it may train on.

Built once per data set, kept with the run, and small: everything is flat numpy arrays, so that it
travels through Ray's object store without a copy. It opens no file: `shards` reads.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clip_ray.config.schema import DataConfig
from clip_ray.data.indexing import Job, Outcome, find_jobs, run_job
from clip_ray.data.ragged import Ragged
from clip_ray.data.samples import Ints, skip
from clip_ray.data.shards import PARQUET, TAR, Shard, ShardIndex
from clip_ray.data.tar import BLOCK
from clip_ray.errors import ConfigError, DataError

if TYPE_CHECKING:
    from clip_ray.data.earlier import Earlier

FORMAT = 2  # 2: what an index found in each shard, so that a later index need not scan it again
_KINDS = (TAR, PARQUET)
_ROW_GROUP = 4096  # shards that are decoded at a time: 20 MB at 10,000 samples a shard
_SHOWN = 5  # shards named in one message

MapShards = Callable[[Callable[[Job], Outcome], list[Job]], Iterable[Outcome]]
Progress = Callable[[int, int], None]
Words = np.ndarray[Any, np.dtype[np.uint64]]


@dataclass(frozen=True)
class Evidence:
    """What an index found in each shard beyond what training needs.

    Attributes:
        content: (n,) uint64, see `ShardIndex.content`.
        invalid_utf8: (n,) int64, see `ShardIndex.invalid_utf8`.
        sidecars: text per shard, see `ShardIndex.sidecar`.
        notes: text per shard, JSON of what was left out; empty where there is nothing to say.
        empty: shards without a valid sample, which are no part of the manifest otherwise.
        settings: per source, a digest of the settings that its shards were indexed with.
    """

    content: Words
    invalid_utf8: Ints
    sidecars: Ragged
    notes: Ragged
    empty: tuple[dict[str, Any], ...]
    settings: tuple[str, ...]


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
        offsets: uint32 per shard, `Shard.offsets` in blocks of 512 bytes (rounded up) for tars.
        held: sorted int32 ordinals per shard that are not trained on.
        holdout: those of them that are for evaluation.
        rows_skipped: int64 per shard.
        sources: path of each source, as configured.
        skipped: per source, what was left out, by reason.
        invalid_utf8: per source, valid samples whose caption is no valid UTF-8.
        options: what decided `held`: holdout, and digests of the select and exclude lists.
        keys: (n,) uint64, digest of each shard's keys; zeros in a manifest of format 1.
        evidence: what a later index can use; none in a manifest of format 1.
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
    options: dict[str, Any]
    keys: Words
    evidence: Evidence | None = None

    def __len__(self) -> int:
        return len(self.source)

    def shard(self, index: int) -> Shard:
        """Return what it takes to read from shard `index`."""
        kind, size = _KINDS[self.kinds[index]], int(self.sizes[index])
        offsets = self.offsets[index].astype(np.int64)
        if kind == TAR:
            # The end may have been rounded to one that a truncated tar does not reach.
            offsets = np.minimum(offsets * BLOCK, size)
        return Shard(
            self.paths.text(index),
            kind,
            size,
            self.versions.text(index),
            int(self.samples[index]),
            offsets,
            self.rows_skipped[index],
            int(self.source[index]),
            int(self.keys[index]),
        )

    def index(self, row: int) -> ShardIndex:
        """Return all that was found in shard `row`, as `index_shard` did; not of format 1."""
        assert self.evidence is not None
        return ShardIndex(
            replace(self.shard(row), source=0),
            self.held[row],
            self.holdout[row],
            **read_notes(self.evidence.notes.text(row)),
            invalid_utf8=int(self.evidence.invalid_utf8[row]),
            content=int(self.evidence.content[row]),
            sidecar=self.evidence.sidecars.text(row),
        )

    def same_keys(self) -> list[list[int]]:
        """Return the groups of shards that have the same sample keys, in the same order."""
        return equals(self.keys, self.samples.astype(np.uint64)) if self.evidence else []

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
        # Not FORMAT: what was added since does not move a sample, and digests stay comparable.
        sha = hashlib.sha256(b"clip-ray manifest 1\n")
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
        assert self.evidence is not None, "a manifest of format 1 is read, never written"
        table = pa.table(
            {
                "source": self.source,
                "path": self.paths.to_arrow_text(),
                "kind": self.kinds,
                "size": self.sizes,
                "version": self.versions.to_arrow_text(),
                "samples": self.samples,
                "offsets": self.offsets.to_arrow(),
                "held": self.held.to_arrow(),
                "holdout": self.holdout.to_arrow(),
                "rows_skipped": self.rows_skipped.to_arrow(),
                "keys": self.keys,
                "content": self.evidence.content,
                "invalid_utf8": self.evidence.invalid_utf8,
                "sidecar": self.evidence.sidecars.to_arrow_text(),
                "notes": self.evidence.notes.to_arrow_text(),
            }
        )
        head = {
            "format": FORMAT,
            "digest": self.digest,
            "sources": self.sources,
            "skipped": self.skipped_by_source,
            "invalid_utf8": self.invalid_utf8,
            "options": self.options,
            "empty": self.evidence.empty,
            "settings": self.evidence.settings,
        }
        sink = pa.BufferOutputStream()
        table = table.replace_schema_metadata({"clip_ray_manifest": json.dumps(head)})
        pq.write_table(
            table,
            sink,
            compression="zstd",
            use_dictionary=False,
            # Steps between offsets, not offsets: 2 bytes each instead of 4.
            column_encoding={"offsets.list.element": "DELTA_BINARY_PACKED"},
            row_group_size=_ROW_GROUP,
            write_page_checksum=True,
        )
        return cast(bytes, sink.getvalue().to_pybytes())

    @classmethod
    def from_bytes(cls, data: bytes) -> Manifest:
        """Return the manifest in a file of `to_bytes`.

        Raises:
            DataError: it is no manifest, is damaged, or was written by newer code.
        """
        try:
            table = pq.read_table(pa.BufferReader(data), page_checksum_verification=True)
            head = json.loads((table.schema.metadata or {})[b"clip_ray_manifest"])
            if head["format"] == 1:
                table = _in_blocks(table)
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
            offsets=Ragged.from_arrow(table["offsets"], np.uint32),
            held=Ragged.from_arrow(table["held"], np.int32),
            holdout=Ragged.from_arrow(table["holdout"], np.int32),
            rows_skipped=Ragged.from_arrow(table["rows_skipped"], np.int64),
            sources=tuple(head["sources"]),
            skipped_by_source=tuple(head["skipped"]),
            invalid_utf8=tuple(head["invalid_utf8"]),
            options=head["options"],
            keys=np.zeros(len(table), np.uint64),
        )
        if head["format"] > 1:
            manifest = replace(
                manifest, keys=_flat(table, "keys", np.uint64), evidence=_evidence(table, head)
            )
        if manifest.digest != head["digest"]:
            raise DataError(
                f"the manifest's content has digest {manifest.digest}, it was written as "
                f"{head['digest']}; it is damaged: index again"
            )
        return manifest


def _in_blocks(table: pa.Table) -> pa.Table:
    """Turn the offsets of format 1, bytes, into blocks."""
    rows = Ragged.from_arrow(table["offsets"], np.int64)
    unit = np.where(
        np.repeat(table["kind"].to_numpy() == _KINDS.index(TAR), rows.lengths), BLOCK, 1
    )
    offsets = Ragged((-(-rows.values // unit)).astype(np.uint32), rows.splits)
    number = table.schema.get_field_index("offsets")
    return table.set_column(number, "offsets", offsets.to_arrow())


def _packed(shard: Shard) -> np.ndarray[Any, Any]:
    """Return a shard's offsets as the manifest holds them."""
    packed = -(-shard.offsets // BLOCK) if shard.kind == TAR else shard.offsets
    if len(packed) and packed[-1] >= 2**32:
        raise DataError(
            f"shard {shard.path}: {shard.size} bytes; shards beyond 2 TiB or 4e9 rows cannot be "
            "indexed: split it with jobs/prepare.py"
        )
    return packed


def _evidence(table: pa.Table, head: dict[str, Any]) -> Evidence:
    return Evidence(
        _flat(table, "content", np.uint64),
        _flat(table, "invalid_utf8", np.int64),
        Ragged.of_text(table["sidecar"].to_pylist()),
        Ragged.of_text(table["notes"].to_pylist()),
        tuple(head["empty"]),
        tuple(head["settings"]),
    )


def _flat(table: pa.Table, name: str, dtype: type) -> np.ndarray[Any, Any]:
    return table[name].to_numpy().astype(dtype)


def build_manifest(
    data: DataConfig,
    map_shards: MapShards = map,
    progress: Progress | None = None,
    earlier: Earlier | None = None,
) -> Manifest:
    """Index all sources.

    Args:
        data: the sources and what is kept out of training.
        map_shards: called with a function and a list of jobs; returns their results in any order.
        progress: called with (shards done, shards) at the start and after each.
        earlier: results of earlier indexes, which are not found again; takes the new ones.

    Raises:
        ConfigError: there is no source.
        DataError: nothing matches, a shard is named twice, is truncated (without `data.salvage`),
            damaged, or a copy of another (without `data.copies`), or a source has no sample to
            train on.
    """
    if not data.sources:
        raise ConfigError("data.sources is empty; name at least one path, glob or s3:// prefix")
    jobs, scopes, options = find_jobs(data)
    settings = tuple(scope.settings for scope in scopes)
    found: list[ShardIndex | None] = [None] * len(jobs)
    if earlier is not None:
        found = [earlier.find(job, settings[job.source]) for job in jobs]
    todo = [job for job, index in zip(jobs, found, strict=True) if index is None]
    done = len(jobs) - len(todo)
    if progress is not None:
        progress(done, len(jobs))
    errors: dict[int, str] = {}
    with earlier.recording(settings) if earlier is not None else nullcontext(_forget) as record:
        for outcome in map_shards(partial(run_job, scopes), todo):
            found[outcome.number] = outcome.index
            if outcome.index is None:
                errors[outcome.number] = outcome.error
            else:
                record(jobs[outcome.number], outcome.index)
            done += 1
            if progress is not None:
                progress(done, len(jobs))
    _raise_errors([errors[number] for number in sorted(errors)])
    indexed = [index for index in found if index is not None]
    assert len(indexed) == len(jobs), "map_shards lost a job"
    if not data.salvage:
        _refuse_truncated(indexed)
    if not data.copies:
        _refuse_copies(indexed)
    manifest = gather(jobs, indexed, [source.path for source in data.sources], settings, options)
    for number, row in enumerate(manifest.by_source()):
        if row["train"] == 0:
            raise DataError(_nothing_to_train_on(number, row, jobs, indexed))
    return manifest


def _forget(job: Job, index: ShardIndex) -> None:
    """Take a result that nobody keeps."""


def gather(
    jobs: Sequence[Job],
    indexed: Sequence[ShardIndex],
    sources: Sequence[str],
    settings: tuple[str, ...],
    options: dict[str, Any],
) -> Manifest:
    """Return the manifest of some shards and what was found in them."""
    skipped: list[Counter[str]] = [Counter() for _ in sources]
    invalid_utf8 = [0] * len(sources)
    for job, index in zip(jobs, indexed, strict=True):
        skipped[job.source].update(index.skipped)
        if index.truncated:
            skipped[job.source]["truncated-shard"] += 1
        invalid_utf8[job.source] += index.invalid_utf8
    # Shards without a sample are counted above, and of no use to the plan.
    both = list(zip(jobs, indexed, strict=True))
    kept = [(job, index) for job, index in both if index.shard.samples]
    empty = [(job, index) for job, index in both if not index.shard.samples]
    shards = [index.shard for _, index in kept]
    return Manifest(
        source=np.array([job.source for job, _ in kept], np.int32),
        paths=Ragged.of_text([s.path for s in shards]),
        kinds=np.array([_KINDS.index(s.kind) for s in shards], np.int8),
        sizes=np.array([s.size for s in shards], np.int64),
        versions=Ragged.of_text([s.version for s in shards]),
        samples=np.array([s.samples for s in shards], np.int64),
        offsets=Ragged.of([_packed(s) for s in shards], np.uint32),
        held=Ragged.of([index.held for _, index in kept], np.int32),
        holdout=Ragged.of([index.holdout for _, index in kept], np.int32),
        rows_skipped=Ragged.of([s.rows_skipped for s in shards], np.int64),
        sources=tuple(sources),
        skipped_by_source=tuple(dict(sorted(counts.items())) for counts in skipped),
        invalid_utf8=tuple(invalid_utf8),
        options=options,
        keys=np.array([s.keys for s in shards], np.uint64),
        evidence=Evidence(
            content=np.array([index.content for _, index in kept], np.uint64),
            invalid_utf8=np.array([index.invalid_utf8 for _, index in kept], np.int64),
            sidecars=Ragged.of_text([index.sidecar for _, index in kept]),
            notes=Ragged.of_text([_notes(index) for _, index in kept]),
            empty=tuple(_as_empty(job, index) for job, index in empty),
            settings=settings,
        ),
    )


def _notes(index: ShardIndex) -> str:
    notes = {
        "skipped": index.skipped,
        "truncated": index.truncated,
        "unknown_suffixes": index.unknown_suffixes,
    }
    present = {name: value for name, value in notes.items() if value}
    return json.dumps(present) if present else ""


def read_notes(notes: str) -> dict[str, Any]:
    """Return the fields of `ShardIndex` that a text of `Evidence.notes` holds."""
    return json.loads(notes) if notes else {}


def _as_empty(job: Job, index: ShardIndex) -> dict[str, Any]:
    shard = index.shard
    return {
        "source": job.source,
        "path": shard.path,
        "kind": shard.kind,
        "size": shard.size,
        "version": shard.version,
        "sidecar": index.sidecar,
        "notes": _notes(index),
    }


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


def _refuse_copies(indexed: list[ShardIndex]) -> None:
    full = [index for index in indexed if index.shard.samples]
    paths = [index.shard.path for index in full]
    _raise_errors(
        [
            f"shard {paths[copy]}: the same samples as in {paths[first]}; delete one of them or "
            "leave it out of data.sources, or data.copies: true trains on both"
            for first, *copies in equals(
                np.array([index.content for index in full], np.uint64),
                np.array([index.shard.samples for index in full], np.uint64),
            )
            for copy in copies
        ]
    )


def equals(*columns: Words) -> list[list[int]]:
    """Return the groups of rows, sorted, that are equal in all columns."""
    if not len(columns[0]):
        return []
    rows = np.stack(columns, axis=1)
    _, group, counts = np.unique(rows, axis=0, return_inverse=True, return_counts=True)
    order = np.argsort(group.ravel(), kind="stable")
    starts = np.cumsum(counts) - counts
    several = np.flatnonzero(counts > 1)
    return sorted(order[starts[g] : starts[g] + counts[g]].tolist() for g in several)


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
