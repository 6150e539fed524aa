"""The jobs of an index: one a shard, with what its source says about all of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from clip_ray.config.conditions import parse_condition
from clip_ray.config.schema import DataConfig, S3Options, SourceConfig
from clip_ray.data.details import Lists
from clip_ray.data.shards import IndexOptions, ShardIndex, identity, index_shard
from clip_ray.errors import DataError
from clip_ray.storage import FileInfo, expand, open_store, split_uri

RULES = 1  # of what a valid sample is: results of an index under another number are not kept


@dataclass(frozen=True)
class Scope:
    """How the shards of one source are indexed.

    Attributes:
        source: how its samples are named.
        s3: access to them.
        options: which samples are kept out of training.
        settings: digest of all that decides what an index finds in a shard.
    """

    source: SourceConfig
    s3: S3Options
    options: IndexOptions
    settings: str


@dataclass(frozen=True)
class Job:
    """One shard to index; picklable, so that a cluster can map over them.

    Attributes:
        number: its place among all shards.
        source: index of its source.
        file: the shard.
        sidecar: the table beside a tar on S3, if there is one.
    """

    number: int
    source: int
    file: FileInfo
    sidecar: FileInfo | None = None

    @property
    def identity(self) -> tuple[str, str, str]:
        """What stays the same as long as the shard and its sidecar do."""
        return self.file.path, identity(self.file), identity(self.sidecar)


@dataclass(frozen=True)
class Entry:
    """What a manifest keeps of a shard: a `ShardIndex` whose lists are packed.

    Attributes:
        path: as in `Shard`, like the next five.
        kind: "tar" or "parquet".
        size: bytes.
        version: ETag or modification time.
        samples: number of valid samples.
        keys: digest of their keys.
        marks: number of offsets.
        held: number of samples that are not trained on.
        holdout: those of them that are for evaluation.
        lists: `Lists.digest`.
        record: `Lists.pack`.
        skipped: as in `ShardIndex`, like the rest.
        invalid_utf8: captions that are no valid UTF-8.
        truncated: where the shard breaks off.
        unknown_suffixes: members of no known suffix.
        content: digest by which copies are told.
        sidecar: size and version of the sidecar.
    """

    path: str
    kind: str
    size: int
    version: str
    samples: int = 0
    keys: int = 0
    marks: int = 0
    held: int = 0
    holdout: int = 0
    lists: int = 0
    record: bytes = b""
    skipped: dict[str, int] = field(default_factory=dict)
    invalid_utf8: int = 0
    truncated: str = ""
    unknown_suffixes: dict[str, int] = field(default_factory=dict)
    content: int = 0
    sidecar: str = ""

    @classmethod
    def of(cls, index: ShardIndex) -> Entry:
        """Return what is kept of an index."""
        shard, lists = index.shard, Lists.of(index)
        return cls(
            path=shard.path,
            kind=shard.kind,
            size=shard.size,
            version=shard.version,
            samples=shard.samples,
            keys=shard.keys,
            marks=len(lists.offsets),
            held=len(lists.held),
            holdout=len(lists.holdout),
            lists=lists.digest(),
            record=lists.pack(),
            skipped=index.skipped,
            invalid_utf8=index.invalid_utf8,
            truncated=index.truncated,
            unknown_suffixes=index.unknown_suffixes,
            content=index.content,
            sidecar=index.sidecar,
        )

    def notes(self) -> str:
        """Return what was left out as JSON; empty where there is nothing to say."""
        notes = {
            "skipped": self.skipped,
            "truncated": self.truncated,
            "unknown_suffixes": self.unknown_suffixes,
        }
        present = {name: value for name, value in notes.items() if value}
        return json.dumps(present) if present else ""


def read_notes(notes: str) -> dict[str, Any]:
    """Return the fields of an `Entry` that `Entry.notes` has written."""
    return json.loads(notes) if notes else {}


@dataclass(frozen=True)
class Outcome:
    """A job's result, or its error as a value: a remote function would wrap what it raises."""

    number: int
    entry: Entry | None = None
    error: str = ""


def run_job(scopes: Sequence[Scope], job: Job) -> Outcome:
    """Index one shard; `scopes` has one entry a source."""
    scope = scopes[job.source]
    try:
        index = index_shard(job.file, scope.source, scope.s3, scope.options, job.sidecar)
    except DataError as error:
        return Outcome(job.number, error=str(error))
    except FileNotFoundError:
        return Outcome(job.number, error=f"shard {job.file.path}: vanished while it was indexed")
    return Outcome(job.number, Entry.of(index))


def find_jobs(
    data: DataConfig, apart: bool = False
) -> tuple[list[Job], tuple[Scope, ...], dict[str, Any]]:
    """Return the jobs of all sources, the sources' scopes, and a manifest's `options`.

    Args:
        data: the sources and what is kept out of training.
        apart: see `IndexOptions`.

    Raises:
        DataError: nothing matches, a shard is named twice, or a list of keys is missing.
    """
    exclude = _read_keys(data.exclude, data.s3, "data.exclude")
    options: dict[str, Any] = {"holdout": data.holdout, "exclude": _keys_digest(exclude)}
    selects: list[str | None] = []
    scopes: list[Scope] = []
    owner: dict[str, int] = {}
    jobs: list[Job] = []
    for number, source in enumerate(data.sources):
        select = _read_keys(source.select, data.s3, f"data.sources[{number}].select")
        selects.append(_choice_digest(select, source.where))
        kept_out = IndexOptions(data.holdout, select, exclude or frozenset(), apart)
        rules = [RULES, source.image, source.caption, *options.values(), selects[-1]]
        settings = hashlib.sha256(json.dumps(rules).encode()).hexdigest()
        scopes.append(Scope(source, data.s3, kept_out, settings))
        files = expand(source.path, data.s3)
        sidecars = _sidecars(files, data.s3) if data.sidecars else {}
        for file in _without_metadata(files):
            if file.path in owner:
                raise DataError(
                    f"shard {file.path} is in data.sources[{owner[file.path]}] and again in "
                    f"[{number}]; name each shard once (weights repeat a source)"
                )
            owner[file.path] = number
            jobs.append(Job(len(jobs), number, file, sidecars.get(_stem(file.path))))
    options["select"] = selects
    return jobs, tuple(scopes), options


def _stem(path: str) -> str | None:
    """Return a tar's path without its suffix; None for other files."""
    return path[: -len(".tar")] if path.lower().endswith(".tar") else None


def _without_metadata(files: list[FileInfo]) -> list[FileInfo]:
    """Drop 00000.parquet beside 00000.tar: img2dataset's record of the tar, without images."""
    tars = {_stem(file.path) for file in files}
    return [file for file in files if file.path.removesuffix(".parquet") not in tars]


def _sidecars(files: list[FileInfo], s3: S3Options) -> dict[str | None, FileInfo]:
    """Return the Parquet files beside S3 tars, by path without suffix.

    Whole folders are listed, once each: a request a tar would be 100,000 of them. Local tars are
    walked faster than a sidecar is read, and their offsets are wanted anyway.
    """
    tars = {_stem(file.path) for file in files if file.path.startswith("s3://")} - {None}
    found: dict[str | None, FileInfo] = {}
    for folder in sorted({stem.rpartition("/")[0] for stem in tars if stem}):
        try:
            beside = expand(f"{folder}/*.parquet", s3)
        except DataError:
            continue  # nothing matches
        found.update({file.path.removesuffix(".parquet"): file for file in beside})
    return {stem: file for stem, file in found.items() if stem in tars}


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


def _choice_digest(select: frozenset[str] | None, where: tuple[str, ...]) -> str | None:
    """Return a digest of what a source's samples are chosen by; none = all are."""
    keys = _keys_digest(select)
    if not where:
        return keys
    return hashlib.sha256(json.dumps([keys, *map(parse_condition, where)]).encode()).hexdigest()


def _keys_digest(keys: frozenset[str] | None) -> str | None:
    if keys is None:
        return None
    return hashlib.sha256("\n".join(sorted(keys)).encode()).hexdigest()
