"""Sorted numbers in few bytes: the steps between neighbours, compressed."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from clip_ray.data.samples import Ints

_WIDTHS = (np.uint8, np.uint16, np.uint32, np.uint64)


def _head(lists: int) -> struct.Struct:
    return struct.Struct("<" + lists * "IB")  # length of each list, bytes of a step


def pack(lists: Sequence[Ints]) -> bytes:
    """Return a record that holds some sorted lists of numbers of at least 0."""
    head: list[int] = []
    parts: list[bytes] = []
    for values in lists:
        steps = np.diff(values, prepend=0)
        largest = int(steps.max(initial=0))
        width = next(w for w in _WIDTHS if largest <= np.iinfo(w).max)
        parts.append(steps.astype(np.dtype(width).newbyteorder("<")).tobytes())
        head += [len(values), np.dtype(width).itemsize]
    plain = b"".join([_head(len(lists)).pack(*head), *parts])
    packed: bytes = pa.compress(plain, codec="zstd", asbytes=True)
    return struct.pack("<I", len(plain)) + packed


def unpack(record: bytes, lists: int) -> list[Ints]:
    """Return the lists of a record, so many of them; they cannot be written to."""
    (size,) = struct.unpack_from("<I", record)
    plain = pa.decompress(record[4:], decompressed_size=size, codec="zstd", asbytes=True)
    head = _head(lists).unpack_from(plain)
    at = _head(lists).size
    found = []
    for length, width in zip(head[::2], head[1::2], strict=True):
        steps = np.frombuffer(plain, f"<u{width}", length, at)
        at += length * width
        found.append(np.cumsum(steps, dtype=np.int64))
        found[-1].setflags(write=False)
    return found


def check_of(record: bytes) -> int:
    """Return the 64 bits by which a damaged record is told."""
    return int.from_bytes(hashlib.blake2b(record, digest_size=8).digest(), "little")
