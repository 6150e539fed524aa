"""Offsets found late: a tar that was indexed from its sidecar is walked when it is first read.

The task that comes first streams the whole tar, checks that its samples are those that the
sidecar named, and leaves the offsets in the temporary directory (about a byte a sample), where
every process of the node finds them. A tar that does not fit its sidecar is remembered too.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import uuid
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from clip_ray.config.schema import S3Options
from clip_ray.data.node import locked, shared_folder
from clip_ray.data.packed import check_of, pack, unpack
from clip_ray.data.samples import Ints, Suffixes, digest_keys
from clip_ray.data.tar import STRIDE, scan_tar
from clip_ray.errors import DataError
from clip_ray.storage import ChangedError, FileInfo, Store, open_store, split_uri

FORMAT = 2
_IN_MEMORY = 64  # shards; 40 kB each at 10,000 samples; the node has the rest
_RECORD = b"\0"  # begins what is no message
_CHECK = 8  # bytes


@dataclass(frozen=True)
class Tar:
    """A tar as its sidecar described it.

    Attributes:
        path: full path or s3:// URI.
        size: bytes.
        version: ETag or modification time when it was indexed.
        samples: number of valid samples.
        keys: `digest_keys` of them.
    """

    path: str
    size: int
    version: str
    samples: int
    keys: int


@dataclass(frozen=True)
class Found:
    """Where a tar's samples are (see `Shard.offsets`), or what is wrong with it."""

    offsets: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    problem: str = ""


@functools.lru_cache(maxsize=_IN_MEMORY)
def find_offsets(tar: Tar, suffixes: Suffixes, s3: S3Options | None) -> Found:
    """Return a tar's offsets: from this process, from this node, or from the tar itself.

    Raises:
        ChangedError: it is another tar by now.
        OSError: the store failed.
    """
    name = json.dumps([FORMAT, STRIDE, asdict(tar), asdict(suffixes)])
    folder = shared_folder()
    if folder is None:
        return _walk(tar, suffixes, s3)
    path = folder / f"{hashlib.sha256(name.encode()).hexdigest()}.offsets"
    found = _load(path)
    if found is not None:
        return found
    with locked(path.with_suffix(".lock")):
        found = _load(path)
        if found is None:
            found = _walk(tar, suffixes, s3)
            _save(path, found)
    return found


def _walk(tar: Tar, suffixes: Suffixes, s3: S3Options | None) -> Found:
    folder, name = split_uri(tar.path)
    store = open_store(folder, s3)
    _require(store, name, tar)
    found = _compare(tar, store, name, suffixes)
    if found.problem:
        # Of a tar that was replaced meanwhile, nothing is to be remembered.
        _require(store, name, tar)
    return found


def _require(store: Store, name: str, tar: Tar) -> None:
    now = store.info(name)
    if (now.size, now.version) != (tar.size, tar.version):
        raise ChangedError(FileInfo(tar.path, tar.size, tar.version), now)


def _compare(tar: Tar, store: Store, name: str, suffixes: Suffixes) -> Found:
    try:
        scan = scan_tar(tar.path, store, name, tar.size, suffixes)
    except DataError as error:
        return Found(problem=str(error))
    if scan.truncated:
        return Found(problem=scan.truncated)
    if len(scan.keys) != tar.samples or digest_keys(scan.keys) != tar.keys:
        return Found(
            problem=f"its sidecar names {tar.samples} samples, the tar has {len(scan.keys)} "
            "with other keys or captions; delete the sidecar, or set data.sidecars: false, and "
            "index again"
        )
    return Found(scan.offsets)


def _load(path: Path) -> Found | None:
    try:
        content = path.read_bytes()
    except OSError:
        return None
    check, body = content[:_CHECK], content[_CHECK:]
    if check != _check(body):
        return None
    if body[:1] != _RECORD:
        return Found(problem=body.decode())
    (offsets,) = unpack(body[1:], 1)
    return Found(offsets)


def _save(path: Path, found: Found) -> None:
    body = found.problem.encode() or _RECORD + pack([found.offsets])
    temporary = path.with_suffix(f".{uuid.uuid4().hex}.tmp")
    # A full disk costs another walk, no run.
    with contextlib.suppress(OSError):
        try:
            temporary.write_bytes(_check(body) + body)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def _check(body: bytes) -> bytes:
    return check_of(body).to_bytes(_CHECK, "little")
