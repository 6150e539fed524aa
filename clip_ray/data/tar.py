"""Tar shards: samples found by walking the headers, and read by byte ranges.

The walk is our own because `tarfile` ends silently at a cut, cannot start in the middle, and
costs more than decoding a small image. Names follow WebDataset: a sample's key is its members'
path up to the first dot of the file name, and its members lie side by side.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol
from zlib import adler32

import numpy as np

from clip_ray.data.quarantine import BadSample
from clip_ray.data.samples import (
    Caption,
    Ints,
    Sample,
    Scan,
    Suffixes,
    caption_in_json,
    caption_of,
)
from clip_ray.errors import DataError
from clip_ray.storage import Store

# Samples between recorded offsets. A read begins and ends at one: of 64 samples that begin
# anywhere, 1/64 more is read; with 8 it was 7/64.
STRIDE = 2
_STRIDE_BEFORE = 8  # in manifests of earlier versions
BLOCK = 512
_ZEROS = bytes(BLOCK)
_LOCAL_CHUNK = 8192  # captions, the next header and the head of an image at once
_TAIL = 1 << 20  # bytes after the end mark that are looked at; tar pads to 10 KiB by default
_HEAD = 2048  # bytes of an image that tell copies: JPEG's tables, and some of its pixels
_S3_CHUNK = 16 << 20  # a request costs ~50 ms: bytes are cheaper than round trips
_S3_AHEAD = 2  # chunks on their way while one is walked: one connection gives ~50-100 MB/s


class Bytes(Protocol):
    """Random access to (a part of) a file; a result is shorter only at the file's end."""

    def get(self, start: int, stop: int) -> bytes:
        """Return the bytes [start, stop) of the file."""


class Member(NamedTuple):
    """A regular file in a tar; `start` is where its first header (of any kind) begins."""

    name: str
    start: int
    payload: int
    size: int


class CutError(Exception):
    """The tar ends where it should go on; `between` when all its members are whole."""

    def __init__(self, where: str, between: bool = False) -> None:
        super().__init__(where)
        self.between = between


class DamageError(Exception):
    """Bytes that are no tar header where one should be."""


class ApartError(DataError):
    """A sample's members do not lie side by side."""


@dataclass
class Group:
    """Neighbouring members of one key: suffix -> (payload, size)."""

    key: str
    start: int
    end: int = 0
    parts: dict[str, tuple[int, int]] = field(default_factory=dict)


@dataclass
class Window:
    """A file of which pieces are read, going forward; the piece before the last is kept.

    A sample is looked at when the header after it has been seen: without the older piece, its
    beginning would be read again.
    """

    store: Store
    name: str
    size: int
    chunk: int
    _last: tuple[int, bytes] = (0, b"")
    _before: tuple[int, bytes] = (0, b"")

    @classmethod
    def over(cls, store: Store, name: str, size: int) -> Window:
        """Return a window with the chunk size that suits the store."""
        return cls(store, name, size, _S3_CHUNK if store.uri.startswith("s3://") else _LOCAL_CHUNK)

    def get(self, start: int, stop: int) -> bytes:  # noqa: D102 - see Bytes
        stop = min(stop, self.size)
        if start >= stop:
            return b""
        first, data = self._last
        if not first <= start <= stop <= first + len(data):
            first, data = self._before
        if first <= start <= stop <= first + len(data):
            return data[start - first : stop - first]
        end = min(max(stop, start + self.chunk), self.size)
        data = self.store.read(self.name, start, end)
        self._last, self._before = (start, data), self._last
        return data[: stop - start]


@dataclass
class Stream:
    """A file read as a whole, going forward, in chunks of which some are on their way."""

    store: Store
    name: str
    size: int
    chunk: int = _S3_CHUNK
    _coming: dict[int, Future[bytes]] = field(default_factory=dict)
    _pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1 + _S3_AHEAD))

    def get(self, start: int, stop: int) -> bytes:  # noqa: D102 - see Bytes
        stop = min(stop, self.size)
        if start >= stop:
            return b""
        first, last = start // self.chunk, (stop - 1) // self.chunk
        data = self._piece(first)
        if last > first:
            data = b"".join([data, *(self._piece(n) for n in range(first + 1, last + 1))])
        return data[start - first * self.chunk : stop - first * self.chunk]

    def _piece(self, number: int) -> bytes:
        for wanted in range(number, min(number + _S3_AHEAD, (self.size - 1) // self.chunk) + 1):
            if wanted not in self._coming:
                self._coming[wanted] = self._pool.submit(self._fetch, wanted)
        # As in a window, one piece back is asked for once in a while.
        for old in [n for n in self._coming if n < number - 1]:
            del self._coming[old]
        return self._coming[number].result()

    def _fetch(self, number: int) -> bytes:
        start = number * self.chunk
        return self.store.read(self.name, start, min(start + self.chunk, self.size))

    def close(self) -> None:
        """Drop what is on its way."""
        self._pool.shutdown(wait=False, cancel_futures=True)


@dataclass
class Slab:
    """A part of a file that lies in memory."""

    start: int
    data: bytes

    def get(self, start: int, stop: int) -> bytes:  # noqa: D102 - see Bytes
        return self.data[start - self.start : stop - self.start]


def scan_tar(
    path: str, store: Store, name: str, size: int, suffixes: Suffixes, apart: bool = False
) -> Scan:
    """Walk a whole tar and return its valid samples.

    Args:
        path: for messages.
        store: the tar's directory.
        name: its name in there.
        size: bytes.
        suffixes: which members matter.
        apart: a tar whose samples' members lie apart is read whole, into memory, and its samples
            are counted in the order of their first members; they have no offsets.

    Raises:
        DataError: it is no tar, is damaged, or a sample's members do not lie side by side.
    """
    try:
        if not store.uri.startswith("s3://"):
            return _scan(path, Window.over(store, name, size), size, suffixes)
        with closing(Stream(store, name, size)) as data:
            return _scan(path, data, size, suffixes)
    except ApartError:
        if not apart:
            raise
    scan = _scan(path, Slab(0, store.read(name)), size, suffixes, apart=True)
    scan.offsets = np.zeros(0, np.int64)
    return scan


def _scan(path: str, data: Bytes, size: int, suffixes: Suffixes, apart: bool = False) -> Scan:
    scan, starts, end = Scan(), [], 0
    seen: set[str] = set()
    walk = members(data, 0, size, complete=True)
    try:
        for group in gathered(walk, suffixes, scan) if apart else groups(walk, suffixes, scan):
            if group.key in seen and not apart:
                raise ApartError(
                    f"shard {path}: the members of sample {group.key!r} do not lie side by side; "
                    f"rewrite it: python jobs/prepare.py --shards {shlex.quote(path)} --out FOLDER"
                )
            if group.key in seen:  # no reader could tell them apart
                scan.skipped["duplicate-key"] += 1
                continue
            seen.add(group.key)
            caption = examine(group, data, suffixes)
            if caption.reason:
                scan.skipped[caption.reason] += 1
                continue
            scan.invalid_utf8 += caption.replaced_utf8
            if len(scan.keys) % STRIDE == 0:
                starts.append(group.start)
            scan.keys.append(group.key)
            at, length = group.parts[_pick(group, suffixes.image)]
            head = data.get(at, at + min(length, _HEAD))
            scan.saw(group.key, length, head, *caption.texts)
            end = group.end
    except CutError as error:
        whole = len(scan.keys)
        least = whole if error.between else whole + 1
        scan.truncated = f"truncated after sample {whole} of at least {least} ({error})"
    except DamageError as error:
        hint = "; gunzip it" if data.get(0, 2) == b"\x1f\x8b" else "; re-copy it"
        raise DataError(f"shard {path}: no tar, or damaged: {error}{hint}") from error
    scan.offsets = np.array([*starts, end] if starts else [], dtype=np.int64)
    return scan


def read_tar(
    path: str, data: Slab, suffixes: Suffixes, first: int, wanted: set[int]
) -> dict[int, Sample | BadSample]:
    """Return the wanted samples of a slab that begins with the valid sample `first`."""
    result: dict[int, Sample | BadSample] = {}
    ordinal = first
    stop = data.start + len(data.data)
    try:
        for group in groups(members(data, data.start, stop, complete=False), suffixes, None):
            caption = examine(group, data, suffixes)
            if caption.reason:
                continue
            if ordinal in wanted:
                result[ordinal] = _sample(group, caption, data, suffixes)
                if len(result) == len(wanted):
                    break
            ordinal += 1
    except (CutError, DamageError) as error:
        for lost in wanted - result.keys():
            result[lost] = BadSample(f"#{lost}", "shard-damaged", str(error), path)
    return result


def _sample(group: Group, caption: Caption, data: Bytes, suffixes: Suffixes) -> Sample:
    at, size = group.parts[_pick(group, suffixes.image)]
    return Sample(
        group.key,
        data.get(at, at + size),
        caption.texts[0],
        caption.replaced_utf8,
        caption.texts[1:],
    )


def samples_apart(data: Slab, suffixes: Suffixes) -> Iterator[Sample]:
    """Yield the valid samples of a whole tar whose samples' members lie apart, as counted.

    Raises:
        CutError: it ends early.
        DamageError: it is none.
    """
    seen: set[str] = set()
    for group in gathered(members(data, 0, len(data.data), complete=True), suffixes, None):
        if group.key in seen:
            continue
        seen.add(group.key)
        caption = examine(group, data, suffixes)
        if not caption.reason:
            yield _sample(group, caption, data, suffixes)


def ranges(offsets: Ints, samples: int, ordinals: Ints, gap: int) -> list[tuple[int, int, int]]:
    """Return the byte ranges that hold the ordinals: (start, stop, first ordinal), merged.

    Args:
        offsets: a tar shard's offsets.
        samples: number of its valid samples.
        ordinals: sorted samples.
        gap: bytes that are rather read than jumped over.
    """
    stride = STRIDE if len(offsets) - 1 == -(-samples // STRIDE) else _STRIDE_BEFORE
    merged: list[tuple[int, int, int]] = []
    for block in np.unique(ordinals // stride).tolist():
        start, stop = int(offsets[block]), int(offsets[block + 1])
        if merged and start - merged[-1][1] <= gap:
            merged[-1] = (merged[-1][0], stop, merged[-1][2])
        else:
            merged.append((start, stop, block * stride))
    return merged


def groups(walk: Iterator[Member], suffixes: Suffixes, scan: Scan | None) -> Iterator[Group]:
    """Group neighbouring members by key; members of no known suffix are passed over."""
    known = {*suffixes.image, *suffixes.caption}
    group: Group | None = None
    cut: CutError | None = None
    try:
        for member in walk:
            key, suffix = key_of(member.name)
            if suffix not in known or not key or key.endswith("/"):
                if scan is not None:
                    scan.unknown_suffixes[suffix] += 1
                continue
            if group is None or group.key != key or suffix in group.parts:
                if group is not None:
                    yield group
                group = Group(key, member.start)
            group.parts[suffix] = (member.payload, member.size)
            group.end = member.payload + member.size
    except CutError as error:
        cut = error
    # The last group before a cut inside a member may lack that member: it is not whole.
    if group is not None and (cut is None or cut.between):
        yield group
    if cut is not None:
        raise cut


def gathered(walk: Iterator[Member], suffixes: Suffixes, scan: Scan | None) -> Iterator[Group]:
    """Group all members of a tar by key, wherever they lie; in the order of their first ones.

    A key that has a suffix twice has two groups.
    """
    found: dict[str, list[Group]] = {}
    for group in groups(walk, suffixes, scan):
        mine = found.setdefault(group.key, [])
        for suffix, part in group.parts.items():
            lacking = next((one for one in mine if suffix not in one.parts), None)
            if lacking is None:
                lacking = Group(group.key, group.start)
                mine.append(lacking)
            lacking.parts[suffix] = part
    for mine in found.values():
        yield from mine


def key_of(name: str) -> tuple[str, str]:
    """Split a member's name into the sample's key and the suffix, in lower case."""
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return folder + slash + stem, suffix.lower()


def examine(group: Group, data: Bytes, suffixes: Suffixes) -> Caption:
    """Return a group's caption, or the reason why the group is no valid sample.

    The index and the reader both ask here: they must agree on which sample is the n-th.
    """
    image = _pick(group, suffixes.image)
    if not image:
        return Caption(reason="missing-image")
    if group.parts[image][1] == 0:
        return Caption(reason="empty-image")
    suffix = _pick(group, suffixes.caption)
    if not suffix:
        return Caption(reason="missing-caption")
    at, size = group.parts[suffix]
    text = data.get(at, at + size)
    return caption_in_json(text, suffixes.json_keys) if suffix == "json" else caption_of(text)


def _pick(group: Group, suffixes: tuple[str, ...]) -> str:
    return next((suffix for suffix in suffixes if suffix in group.parts), "")


def members(data: Bytes, start: int, stop: int, complete: bool) -> Iterator[Member]:
    """Walk the regular files of a tar between two header positions.

    Args:
        data: the bytes.
        start: where a header begins.
        stop: where the file, or the part of it, ends.
        complete: the end-of-archive mark must be there: a file that was cut just between two
            members shows in nothing else.

    Raises:
        CutError: the tar ends early.
        DamageError: a header is none.
    """
    at = first = start
    long_name: str | None = None
    pax: dict[str, str] = {}
    while at < stop:
        header = data.get(at, at + BLOCK)
        if len(header) < BLOCK:
            raise CutError(f"in a header, at byte {stop}")
        if header == _ZEROS:
            # Readers stop here without a word, and what `cat a.tar b.tar` appended is lost.
            if complete and data.get(at, min(at + _TAIL, stop)).strip(b"\0"):
                raise DamageError(f"data follow the end mark at byte {at} (concatenated tars?)")
            return
        kind, size = _check(header, at)
        payload = at + BLOCK
        if "size" in pax and kind not in b"xgLK":
            size = int(pax["size"])
        after = payload + -(-size // BLOCK) * BLOCK
        if payload + size > stop:
            raise CutError(f"in a member of {size} bytes, at byte {stop}")
        if kind == b"L":
            long_name = _text(data.get(payload, payload + size))
        elif kind == b"x":
            pax = _pax(data.get(payload, payload + size), at)
        elif kind not in b"gK":
            name = pax.get("path") or long_name or _name(header)
            if kind in b"0\x007" and not name.endswith("/"):
                yield Member(name, first, payload, size)
            long_name, pax, first = None, {}, after
        if after > stop and complete:
            raise CutError(f"in padding, at byte {stop}")
        at = after
    if complete:
        raise CutError(f"without an end mark, at byte {stop}", between=True)


def _check(header: bytes, at: int) -> tuple[bytes, int]:
    """Verify a header's checksum; return its type flag and size."""
    try:
        total = int(header[148:156].strip(b" \0") or b"0", 8)
        # Eight times as fast as sum(): half of an Adler-32 is the bytes' sum and 1, modulo 65,521.
        rest = adler32(header[156:], adler32(header[:148])) & 0xFFFF
        if rest != (total - 8 * 0x20 + 1) % 65_521:
            raise ValueError("checksum")
        if header[124] & 0x80:  # GNU base-256, for members of 8 GiB and more
            size = int.from_bytes(header[125:136], "big")
        else:
            size = int(header[124:136].strip(b" \0") or b"0", 8)
        if size < 0:  # the walk would go backwards
            raise ValueError("size")
    except ValueError as error:
        raise DamageError(f"no header at byte {at}") from error
    return header[156:157], size


def _name(header: bytes) -> str:
    name = _text(header[:100])
    # Only POSIX headers have a prefix: GNU's ("ustar  ") hold times in its place.
    if header[257:263] == b"ustar\0" and header[345]:
        return f"{_text(header[345:500])}/{name}"
    return name


def _text(data: bytes) -> str:
    return data.split(b"\0", 1)[0].decode(errors="backslashreplace")


def _pax(data: bytes, at: int) -> dict[str, str]:
    """Parse pax records, a length, a key and a value each."""
    found: dict[str, str] = {}
    place = 0
    try:
        while place < len(data) and data[place] != 0:
            space = data.index(b" ", place)
            length = int(data[place:space])
            if length <= 0 or place + length > len(data):
                raise ValueError("length")
            key, _, value = data[space + 1 : place + length - 1].partition(b"=")
            found[key.decode(errors="replace")] = value.decode(errors="backslashreplace")
            place += length
        if int(found.get("size", 0)) < 0:
            raise ValueError("size")
    except ValueError as error:
        raise DamageError(f"malformed pax header at byte {at}") from error
    return found
