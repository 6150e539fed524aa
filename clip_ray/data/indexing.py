"""The jobs of an index: one a shard, with what its source says about all of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from clip_ray.config.schema import DataConfig, S3Options, SourceConfig
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
class Outcome:
    """A job's result, or its error as a value: a remote function would wrap what it raises."""

    number: int
    index: ShardIndex | None = None
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
    return Outcome(job.number, index)


def find_jobs(data: DataConfig) -> tuple[list[Job], tuple[Scope, ...], dict[str, Any]]:
    """Return the jobs of all sources, the sources' scopes, and a manifest's `options`.

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
        selects.append(_keys_digest(select))
        kept_out = IndexOptions(data.holdout, select, exclude or frozenset())
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


def _keys_digest(keys: frozenset[str] | None) -> str | None:
    if keys is None:
        return None
    return hashlib.sha256("\n".join(sorted(keys)).encode()).hexdigest()
