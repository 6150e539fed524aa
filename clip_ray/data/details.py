"""Details: what takes a number a sample, kept apart from the manifest's table of shards.

Where the samples of a shard lie, and which of them are not trained on, is wanted by the task that
reads the shard and by nobody else: half a gigabyte for a billion samples. They lie in one file
beside the manifest, a record a shard. On a disk a record is read where it lies; a file on S3 is
copied once a node. Records are read, not mapped: the pages of the file are as much shared by the
node's processes, and a shared disk that fails is an error, where a map of it ends the process.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import os
import struct
import tempfile
import time
import uuid
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from clip_ray.data.node import locked, shared_folder
from clip_ray.data.packed import check_of, pack, unpack
from clip_ray.data.samples import Ints
from clip_ray.data.shards import TAR, ShardIndex
from clip_ray.data.tar import BLOCK
from clip_ray.errors import DataError
from clip_ray.storage import LocalStore, Store

SUFFIX = ".details"
Words = NDArray[np.uint64]

_UNUSED_S = 7 * 86400.0  # a copy that nobody has read for as long goes when the next one comes
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


@dataclass(frozen=True)
class Lists:
    """The lists of one shard.

    Attributes:
        offsets: see `Shard.offsets`; of a tar in blocks of 512 bytes, rounded up.
        held: sorted ordinals that are not trained on.
        holdout: those of them that are for evaluation.
        rows_skipped: see `Shard.rows_skipped`.
    """

    offsets: Ints
    held: Ints
    holdout: Ints
    rows_skipped: Ints

    @classmethod
    def of(cls, index: ShardIndex) -> Lists:
        """Return the lists of what an index found."""
        shard = index.shard
        offsets = -(-shard.offsets // BLOCK) if shard.kind == TAR else shard.offsets
        held, holdout = index.held.astype(np.int64), index.holdout.astype(np.int64)
        return cls(offsets, held, holdout, shard.rows_skipped)

    def pack(self) -> bytes:
        """Return the record that holds them."""
        return pack([self.offsets, self.held, self.holdout, self.rows_skipped])

    def digest(self) -> int:
        """Return a 64-bit digest of what decides which samples there are: not of the offsets."""
        sha = hashlib.blake2b(digest_size=8)
        for values in (self.held, self.holdout, self.rows_skipped):
            sha.update(struct.pack("<Q", len(values)))
            sha.update(values.astype("<i8").tobytes())
        return int.from_bytes(sha.digest(), "little")


@functools.lru_cache(maxsize=8)  # a block asks twice in a row
def lists_of(record: bytes) -> Lists:
    """Return the lists of a record; they cannot be written to."""
    return Lists(*unpack(record, 4))


@dataclass(frozen=True)
class Details:
    """The records of a manifest's shards: at hand, or in a file.

    Attributes:
        starts: (n,) int64, the byte where each shard's record begins.
        lengths: (n,) int64 bytes.
        checks: (n,) uint64, see `check_of`.
        data: the bytes, where they are at hand.
        store: otherwise the directory of the file.
        name: its name in there.
    """

    starts: Ints
    lengths: Ints
    checks: Words
    data: NDArray[np.uint8] | None = None
    store: Store | None = None
    name: str = ""

    def __getitem__(self, row: int) -> Lists:
        return lists_of(self.record(row))

    def record(self, row: int) -> bytes:
        """Return the record of a shard.

        Raises:
            DataError: it is damaged.
            OSError: the store failed.
        """
        start, stop = int(self.starts[row]), int(self.starts[row] + self.lengths[row])
        check = int(self.checks[row])
        if self.data is not None:
            return self.data[start:stop].tobytes()
        assert self.store is not None
        near = _on_this_node(self.store, self.name)
        if near is not None:
            with contextlib.suppress(FileNotFoundError):  # cleared meanwhile
                found = near.read(self.name, start, stop)
                if check_of(found) == check:
                    return found
        found = self.store.read(self.name, start, stop)
        if check_of(found) != check:
            raise DataError(
                f"{self.store.uri}/{self.name}: damaged at byte {start}; delete the manifest and "
                "index again"
            )
        return found

    def take(self, rows: Ints) -> Details:
        """Return the records of some shards, in that order."""
        return replace(
            self, starts=self.starts[rows], lengths=self.lengths[rows], checks=self.checks[rows]
        )

    def file_name(self) -> str:
        """Return the name of their file: by its content, so that none is ever written over."""
        sha = hashlib.sha256()
        for column in (self.lengths, self.checks):
            sha.update(column.astype(column.dtype.newbyteorder("<")).tobytes())
        return f"manifest-{sha.hexdigest()[:16]}{SUFFIX}"

    def save(self, store: Store) -> Details:
        """Write the records to a file, in the order of the shards; return what reads it."""
        name = self.file_name()

        def fill(path: Path) -> None:
            with open(path, "wb") as file:
                file.writelines(self.record(row) for row in range(len(self.lengths)))

        # Also where there is one of that name: it may be the damaged one.
        store.put(name, fill)
        return Details.in_file(self.lengths, self.checks, store, name)

    @classmethod
    def in_file(cls, lengths: Ints, checks: Words, store: Store, name: str) -> Details:
        """Return the records in a file that `save` has written."""
        return cls(np.cumsum(lengths) - lengths, lengths, checks, store=store, name=name)


class Spool:
    """Records as they come, in a temporary file: in memory they could be half a gigabyte."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="clip-ray-")  # noqa: SIM115 - lives with this
        self._lengths, self._checks = array("q"), array("Q")

    def add(self, record: bytes) -> int:
        """Append a record; return its number."""
        self._file.write(record)
        self._lengths.append(len(record))
        self._checks.append(check_of(record))
        return len(self._lengths) - 1

    def details(self) -> Details:
        """Return all records in the order in which they were added; they outlive this object."""
        lengths, checks = np.array(self._lengths, np.int64), np.array(self._checks, np.uint64)
        data = np.zeros(0, np.uint8)
        if lengths.any():
            self._file.flush()
            data = np.asarray(np.memmap(self._file, np.uint8, "r"))
        return Details(np.cumsum(lengths) - lengths, lengths, checks, data)


def has_file(store: Store, name: str, size: int) -> bool:
    """Tell whether there is a file of that size."""
    try:
        return store.info(name).size == size
    except FileNotFoundError:
        return False


def _on_this_node(store: Store, name: str) -> Store | None:
    """Return a store that has the file close by; None where there is no room for a copy."""
    if not store.uri.startswith("s3://"):
        return store
    folder = shared_folder()
    if folder is None or not ((folder / name).exists() or _copy(store, name, folder)):
        return None
    return LocalStore(folder)


def _copy(store: Store, name: str, folder: Path) -> bool:
    path = folder / name
    with locked(path.with_suffix(".lock")):
        if path.exists():
            return True
        for unused in _unused(folder):
            unused.unlink(missing_ok=True)
        temporary = path.with_suffix(f".{uuid.uuid4().hex}.tmp")
        try:
            store.download(name, temporary)
            os.replace(temporary, path)
        except OSError as error:
            if error.errno not in _FULL:
                raise
            return False
        finally:
            temporary.unlink(missing_ok=True)
    return True


def _unused(folder: Path) -> Iterator[Path]:
    """Yield the copies that nobody has read for a week; who still wants one, copies it again."""
    for path in folder.glob(f"*{SUFFIX}"):
        with contextlib.suppress(OSError):
            if time.time() - max(path.stat().st_atime, path.stat().st_mtime) > _UNUSED_S:
                yield path
