"""The manifest: which shards a run reads, how many samples each has, and which it may train on.

Built once per data set, kept with the run, and small: a few hundred bytes a shard in flat arrays,
which travel through Ray's object store without a copy. What takes bytes a sample lies apart, see
`details`. It opens no shard: `shards` reads; `manifest_file` writes it and reads it back.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np

from clip_ray.config.schema import DataConfig
from clip_ray.data.details import Details, Spool, Words
from clip_ray.data.indexing import Entry, Job, Outcome, find_jobs, read_notes, run_job
from clip_ray.data.ragged import Ragged
from clip_ray.data.samples import Ints, skip
from clip_ray.data.shards import PARQUET, TAR, Shard
from clip_ray.data.tar import BLOCK
from clip_ray.errors import ConfigError, DataError

if TYPE_CHECKING:
    from clip_ray.data.earlier import Earlier

KINDS = (TAR, PARQUET)
_SHOWN = 5  # shards named in one message

MapShards = Callable[[Callable[[Job], Outcome], list[Job]], Iterable[Outcome]]
Progress = Callable[[int, int], None]


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
        held: (n,) int64, how many of them are not trained on.
        holdout: (n,) int64, how many of those are for evaluation.
        marks: (n,) int64, number of offsets; 0 where they are found when the shard is first read.
        lists: (n,) uint64, `Lists.digest` of each shard.
        details: the lists themselves.
        sources: path of each source, as configured.
        skipped: per source, what was left out, by reason.
        invalid_utf8: per source, valid samples whose caption is no valid UTF-8.
        options: what decided `held`: holdout, and digests of select (with where) and exclude.
        keys: (n,) uint64, digest of each shard's keys; zeros in a manifest of format 1.
        evidence: what a later index can use; none in a manifest of format 1.
        written_as: the digest under which an older format was written: it names its runs' data.
    """

    source: np.ndarray[Any, np.dtype[np.int32]]
    paths: Ragged
    kinds: np.ndarray[Any, np.dtype[np.int8]]
    sizes: Ints
    versions: Ragged
    samples: Ints
    held: Ints
    holdout: Ints
    marks: Ints
    lists: Words
    details: Details
    sources: tuple[str, ...]
    skipped_by_source: tuple[dict[str, int], ...]
    invalid_utf8: tuple[int, ...]
    options: dict[str, Any]
    keys: Words
    evidence: Evidence | None = None
    written_as: str = ""

    def __len__(self) -> int:
        return len(self.source)

    def shard(self, index: int) -> Shard:
        """Return what it takes to read from shard `index`."""
        kind, size = KINDS[self.kinds[index]], int(self.sizes[index])
        lists = self.details[index]
        offsets = lists.offsets
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
            lists.rows_skipped,
            int(self.source[index]),
            int(self.keys[index]),
        )

    def entry(self, row: int) -> Entry:
        """Return all that was found in shard `row`; not of format 1."""
        assert self.evidence is not None
        return Entry(
            path=self.paths.text(row),
            kind=KINDS[self.kinds[row]],
            size=int(self.sizes[row]),
            version=self.versions.text(row),
            samples=int(self.samples[row]),
            keys=int(self.keys[row]),
            marks=int(self.marks[row]),
            held=int(self.held[row]),
            holdout=int(self.holdout[row]),
            lists=int(self.lists[row]),
            record=self.details.record(row),
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
        return self.samples - self.held

    @property
    def total(self) -> int:
        """Number of training samples."""
        return int(self.train_counts.sum())

    def train_ordinals(self, index: int, places: Ints) -> Ints:
        """Map places among shard `index`'s training samples to ordinals; any shape, any order."""
        places = np.asarray(places, np.int64)
        return skip(places, self.details[index].held) if self.held[index] else places

    def holdout_items(self, limit: int | None = None) -> tuple[Ints, Ints]:
        """Return the first `limit` held-out samples, or all, as (shard, ordinal) arrays."""
        shards: list[Ints] = []
        ordinals: list[Ints] = []
        left = int(self.holdout.sum()) if limit is None else limit
        for shard in np.flatnonzero(self.holdout).tolist():
            if left <= 0:
                break
            ordinals.append(self.details[shard].holdout[:left])
            shards.append(np.full(len(ordinals[-1]), shard, np.int64))
            left -= len(ordinals[-1])
        none = [np.zeros(0, np.int64)]
        return np.concatenate(shards or none), np.concatenate(ordinals or none)

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
                    "holdout": int(self.holdout[mine].sum()),
                    "held": int(self.held[mine].sum()),
                    "invalid_utf8": self.invalid_utf8[number],
                    "skipped": self.skipped_by_source[number],
                }
            )
        return rows

    @cached_property
    def digest(self) -> str:
        """Sha256 over what decides which samples there are; 64 hex digits."""
        if self.written_as:
            return self.written_as
        # Not the file's format: what it gets beside does not move a sample.
        head = b"clip-ray manifest 2\n" + json.dumps(self.options, sort_keys=True).encode()
        texts = (a for r in (self.paths, self.versions) for a in (r.splits, r.values))
        return digest_of(
            head, self.source, self.kinds, self.sizes, self.samples, *texts, self.lists
        )


def digest_of(head: bytes, *arrays: np.ndarray[Any, Any]) -> str:
    """Return the sha256 of some bytes and of arrays, each with its size."""
    sha = hashlib.sha256(head)
    for values in arrays:
        fixed = np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<"))
        sha.update(str(fixed.nbytes).encode() + b":")
        sha.update(fixed.tobytes())
    return sha.hexdigest()


def build_manifest(
    data: DataConfig,
    map_shards: MapShards = map,
    progress: Progress | None = None,
    earlier: Earlier | None = None,
    apart: bool = False,
) -> Manifest:
    """Index all sources.

    Args:
        data: the sources and what is kept out of training.
        map_shards: called with a function and a list of jobs; returns their results in any order.
        progress: called with (shards done, shards) at the start and after each.
        earlier: results of earlier indexes, which are not found again; takes the new ones.
        apart: see `IndexOptions`; such a shard has no offsets.

    Raises:
        ConfigError: there is no source.
        DataError: nothing matches, a shard is named twice, is truncated (without `data.salvage`),
            damaged, or a copy of another (without `data.copies`), or a source has no sample to
            train on.
    """
    if not data.sources:
        raise ConfigError("data.sources is empty; name at least one path, glob or s3:// prefix")
    jobs, scopes, options = find_jobs(data, apart)
    settings = tuple(scope.settings for scope in scopes)
    spool = Spool()
    found: list[tuple[Entry, int] | None] = [None] * len(jobs)

    def keep(number: int, entry: Entry) -> None:
        found[number] = replace(entry, record=b""), spool.add(entry.record)

    if earlier is not None:
        for job in jobs:
            known = earlier.find(job, settings[job.source])
            if known is not None:
                keep(job.number, known)
    todo = [job for job, entry in zip(jobs, found, strict=True) if entry is None]
    done = len(jobs) - len(todo)
    if progress is not None:
        progress(done, len(jobs))
    errors: dict[int, str] = {}
    with earlier.recording(settings) if earlier is not None else nullcontext(_forget) as record:
        for outcome in map_shards(partial(run_job, scopes), todo):
            if outcome.entry is None:
                errors[outcome.number] = outcome.error
            else:
                record(jobs[outcome.number], outcome.entry)
                keep(outcome.number, outcome.entry)
            done += 1
            if progress is not None:
                progress(done, len(jobs))
    _raise_errors([errors[number] for number in sorted(errors)])
    entries = [entry for entry, _ in filter(None, found)]
    assert len(entries) == len(jobs), "map_shards lost a job"
    if not data.salvage:
        _refuse_truncated(entries)
    if not data.copies:
        _refuse_copies(entries)
    details = spool.details().take(np.array([at for _, at in filter(None, found)], np.int64))
    paths = [source.path for source in data.sources]
    manifest = gather(jobs, entries, details, paths, settings, options)
    for number, row in enumerate(manifest.by_source()):
        if row["train"] == 0:
            raise DataError(_nothing_to_train_on(number, row, jobs, entries))
    return manifest


def _forget(job: Job, entry: Entry) -> None:
    """Take a result that nobody keeps."""


def gather(
    jobs: Sequence[Job],
    entries: Sequence[Entry],
    details: Details,
    sources: Sequence[str],
    settings: tuple[str, ...],
    options: dict[str, Any],
) -> Manifest:
    """Return the manifest of some shards: what was found in each, and its record."""
    skipped: list[Counter[str]] = [Counter() for _ in sources]
    invalid_utf8 = [0] * len(sources)
    for job, entry in zip(jobs, entries, strict=True):
        skipped[job.source].update(entry.skipped)
        if entry.truncated:
            skipped[job.source]["truncated-shard"] += 1
        invalid_utf8[job.source] += entry.invalid_utf8
    # Shards without a sample are counted above, and of no use to the plan.
    full = [row for row, entry in enumerate(entries) if entry.samples]
    kept = [entries[row] for row in full]
    empty = [(j, entry) for j, entry in zip(jobs, entries, strict=True) if not entry.samples]

    def flat(name: str, dtype: type) -> np.ndarray[Any, Any]:
        return np.array([getattr(entry, name) for entry in kept], dtype)

    def text(name: str) -> Ragged:
        return Ragged.of_text([getattr(entry, name) for entry in kept])

    return Manifest(
        source=np.array([jobs[row].source for row in full], np.int32),
        paths=text("path"),
        kinds=np.array([KINDS.index(entry.kind) for entry in kept], np.int8),
        sizes=flat("size", np.int64),
        versions=text("version"),
        samples=flat("samples", np.int64),
        held=flat("held", np.int64),
        holdout=flat("holdout", np.int64),
        marks=flat("marks", np.int64),
        lists=flat("lists", np.uint64),
        details=details.take(np.array(full, np.int64)),
        sources=tuple(sources),
        skipped_by_source=tuple(dict(sorted(counts.items())) for counts in skipped),
        invalid_utf8=tuple(invalid_utf8),
        options=options,
        keys=flat("keys", np.uint64),
        evidence=Evidence(
            content=flat("content", np.uint64),
            invalid_utf8=flat("invalid_utf8", np.int64),
            sidecars=text("sidecar"),
            notes=Ragged.of_text([entry.notes() for entry in kept]),
            empty=tuple(_as_empty(job, entry) for job, entry in empty),
            settings=settings,
        ),
    )


def _as_empty(job: Job, entry: Entry) -> dict[str, Any]:
    return {
        "source": job.source,
        "path": entry.path,
        "kind": entry.kind,
        "size": entry.size,
        "version": entry.version,
        "sidecar": entry.sidecar,
        "notes": entry.notes(),
    }


def _raise_errors(errors: list[str]) -> None:
    if not errors:
        return
    rest = len(errors) - _SHOWN
    more = f"\n... and {rest} more shards" if rest > 0 else ""
    raise DataError("\n".join(errors[:_SHOWN]) + more)


def _refuse_truncated(entries: list[Entry]) -> None:
    _raise_errors(
        [
            f"shard {entry.path}: {entry.truncated}; re-copy it, or data.salvage: true "
            "takes its whole samples"
            for entry in entries
            if entry.truncated
        ]
    )


def _refuse_copies(entries: list[Entry]) -> None:
    full = [entry for entry in entries if entry.samples]
    paths = [entry.path for entry in full]
    _raise_errors(
        [
            f"shard {paths[copy]}: the same samples as in {paths[first]}; delete one of them or "
            "leave it out of data.sources, or data.copies: true trains on both"
            for first, *copies in equals(
                np.array([entry.content for entry in full], np.uint64),
                np.array([entry.samples for entry in full], np.uint64),
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
    number: int, row: dict[str, Any], jobs: list[Job], entries: list[Entry]
) -> str:
    mine = [entry for job, entry in zip(jobs, entries, strict=True) if job.source == number]
    suffixes: Counter[str] = Counter()
    for entry in mine:
        suffixes.update(entry.unknown_suffixes)
    parts = [f"{count} {reason}" for reason, count in row["skipped"].items()]
    if row["held"]:
        parts.append(f"{row['held']} held out, excluded or not selected")
    if suffixes:
        names = ", ".join(f".{name} ({count})" for name, count in suffixes.most_common(5))
        parts.append(f"members of other suffixes: {names}")
    return (
        f"data.sources[{number}] {row['path']}: no sample to train on in {len(mine)} shards "
        f"({'; '.join(parts)}); check data.sources[].image and .caption, data.holdout, "
        "select, where and exclude"
    )
