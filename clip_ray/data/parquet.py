"""Parquet shards: an image column and a caption column, read by row groups.

The whole file is read through one small file object of our own, local or S3, so that a failing
disk or network (which is retried) and a damaged file (which is not) can be told apart: pyarrow
raises OSError for both.
"""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from clip_ray.config.conditions import Condition, parse_condition
from clip_ray.config.schema import SourceConfig
from clip_ray.data.quarantine import BadSample
from clip_ray.data.samples import Ints, Sample, Scan, caption_of, skip
from clip_ray.errors import DataError
from clip_ray.storage import FileInfo, Store, split_uri

IMAGE_COLUMNS = ("image", "jpg", "png", "webp", "bytes")
CAPTION_COLUMNS = ("txt", "caption", "text")
KEY_COLUMNS = ("key", "__key__")


_COMPARE = {
    "<": pc.less,
    "<=": pc.less_equal,
    ">": pc.greater,
    ">=": pc.greater_equal,
    "==": pc.equal,
    "!=": pc.not_equal,
}
_FOOTERS = 32  # of different files, kept by a process
_FOOTER_BYTES = 1 << 20  # of one of them; in memory it takes some times as much
_SPAN_BYTES = 32 << 20  # held in memory at a time, but for a column that is larger by itself
Span = tuple[int, int]  # bytes [start, stop) of a file


class DamageError(Exception):
    """A file that pyarrow cannot make sense of."""


@dataclass(frozen=True)
class Columns:
    """The columns that matter; `image` names a leaf where images are structs of bytes."""

    image: str
    caption: str
    key: str | None


class _RangeFile(io.RawIOBase):
    """A store's file as pyarrow wants one; the last I/O error is kept.

    Args:
        store: its directory.
        name: its name in it.
        size: bytes.
        expected: the file that it has to be; none = whatever is there.
    """

    def __init__(
        self, store: Store, name: str, size: int, expected: FileInfo | None = None
    ) -> None:
        self._store, self._name, self._size, self._expected = store, name, size, expected
        self._at = 0
        self._held: dict[Span, bytes] = {}
        self.failure: Exception | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def read(self, size: int = -1) -> bytes:
        stop = self._size if size < 0 else min(self._at + size, self._size)
        if stop <= self._at:
            return b""
        data = self._fetch(self._at, stop)
        self._at += len(data)
        return data

    def hold(self, spans: list[Span]) -> None:
        """Fetch some ranges, each at once, for the reads to come; others are let go."""
        # A damaged footer may point anywhere.
        inside = [(max(start, 0), min(stop, self._size)) for start, stop in spans]
        self._held = {
            span: self._held.get(span) or self._fetch(*span) for span in inside if span[0] < span[1]
        }

    def _fetch(self, start: int, stop: int) -> bytes:
        for (first, last), data in self._held.items():
            if first <= start and stop <= last:
                return data[start - first : stop - first]
        try:
            return self._store.read(self._name, start, stop, self._expected)
        except Exception as error:
            self.failure = error
            raise


@contextmanager
def open_parquet(
    raw: _RangeFile, footer: pq.FileMetaData | None = None
) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file.

    Args:
        raw: the file.
        footer: its footer, where it has been read before.

    Raises:
        OSError: the store failed.
        DamageError: the content is no Parquet file.
    """
    try:
        with pq.ParquetFile(pa.PythonFile(raw, mode="r"), metadata=footer, pre_buffer=True) as file:
            yield file
    except (pa.ArrowException, OSError) as error:
        if raw.failure is error:
            raise
        if raw.failure is not None:
            raise raw.failure from error
        raise DamageError(str(error)) from error


@functools.lru_cache(maxsize=_FOOTERS)
def _footer(store: Store, name: str, file: FileInfo) -> pq.FileMetaData | None:
    """Return a file's footer, read once a process; none where it is too large to be kept."""
    with open_parquet(_RangeFile(store, name, file.size, file)) as opened:
        footer = opened.metadata
    return footer if footer.serialized_size <= _FOOTER_BYTES else None


def find_columns(path: str, schema: pa.Schema, source: SourceConfig) -> Columns:
    """Return the columns that a source names, or the usual ones; checks those of conditions.

    Raises:
        DataError: a column is not there, or holds something else; the message lists the columns.
    """
    image = _choose(path, schema, source.image, IMAGE_COLUMNS, "image")
    caption = _choose(path, schema, source.caption, CAPTION_COLUMNS, "caption")
    kind = schema.field(image).type
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        image, kind = f"{image}.bytes", kind.field("bytes").type
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise DataError(
            f"shard {path}: column {image!r} is {kind}, expected the bytes of image files "
            "(binary, or a struct with a field 'bytes'); name another with data.sources[].image"
        )
    for text in source.where:
        column = _choose(path, schema, parse_condition(text).column, (), "where")
        times = schema.names.count(column)
        if times > 1:
            raise DataError(
                f"shard {path}: {times} columns are {column!r}; rename them, or name another in "
                "data.sources[].where"
            )
    key = next((name for name in KEY_COLUMNS if name in schema.names), None)
    return Columns(image, caption, key)


def _choose(
    path: str, schema: pa.Schema, given: str | None, usual: tuple[str, ...], what: str
) -> str:
    for name in (given,) if given else usual:
        if name in schema.names:
            return name
    wanted = repr(given) if given else "any of " + ", ".join(usual)
    raise DataError(
        f"shard {path}: no {what} column: looked for {wanted}; it has "
        f"{', '.join(schema.names) or 'no columns'}; set data.sources[].{what}"
    )


def scan_parquet(path: str, store: Store, name: str, size: int, source: SourceConfig) -> Scan:
    """Read a shard's footer, captions, keys and columns of conditions; images where some are null.

    Raises:
        DataError: it is no Parquet file, lacks a column, or has one that a condition cannot be on.
    """
    scan = Scan()
    skipped_rows: list[int] = []
    try:
        with open_parquet(_RangeFile(store, name, size)) as file:
            columns = find_columns(path, file.schema_arrow, source)
            starts = [0]
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                skipped_rows += _scan_group(file, group, starts[-1], columns, source, path, scan)
                starts.append(starts[-1] + rows)
    except DamageError as error:
        raise DataError(
            f"shard {path}: no Parquet file, or truncated: {error}; re-copy it"
        ) from error
    scan.offsets = np.array(starts, dtype=np.int64)
    scan.rows_skipped = np.array(skipped_rows, dtype=np.int64)
    return scan


def _scan_group(
    file: pq.ParquetFile,
    group: int,
    first: int,
    columns: Columns,
    source: SourceConfig,
    path: str,
    scan: Scan,
) -> list[int]:
    rows = file.metadata.row_group(group).num_rows
    conditions = [parse_condition(text) for text in source.where]
    names = {columns.caption, columns.key or columns.caption, *(c.column for c in conditions)}
    table = file.read_row_group(group, columns=sorted(names))
    chosen = _chosen(table, conditions, path)
    captions = _values(table, columns.caption)
    no_image = _null_images(file, group, columns.image)
    keys = _keys(table, columns, path, np.arange(first, first + rows))
    bad = []
    for row in range(rows):
        caption = caption_of(captions[row])
        reason = "missing-image" if no_image[row] else caption.reason
        if reason:
            scan.skipped[reason] += 1
            bad.append(first + row)
        else:
            if not chosen[row]:
                scan.not_chosen.append(len(scan.keys))
            scan.keys.append(keys[row])
            scan.saw(keys[row] if columns.key else "", *caption.texts)
            scan.invalid_utf8 += caption.replaced_utf8
    meta = file.metadata.row_group(group)
    for number in range(meta.num_columns):
        if meta.column(number).path_in_schema == columns.image:
            scan.saw(meta.column(number).total_compressed_size)
    return bad


def _chosen(
    table: pa.Table, conditions: Sequence[Condition], path: str
) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Tell for which rows all conditions hold; for a null, none does.

    Raises:
        DataError: a column holds what cannot be compared so.
    """
    chosen = np.ones(table.num_rows, dtype=bool)
    for column, operator, value in conditions:
        values = table[column]
        if pa.types.is_dictionary(values.type):
            values = values.cast(values.type.value_type)
        try:
            holds = _COMPARE[operator](*_comparable(values, value))
        except (pa.ArrowException, OverflowError) as error:
            raise DataError(
                f"shard {path}: column {column!r} is {values.type}, and cannot be compared with "
                f"{json.dumps(value)} ({error}); columns of numbers compare with numbers, bool "
                'with true and false, strings with text ("5" in quotes): data.sources[].where'
            ) from error
        chosen &= holds.fill_null(False).to_numpy()
    return chosen


def _comparable(
    values: pa.ChunkedArray, value: bool | int | float | str
) -> tuple[pa.ChunkedArray, pa.Scalar]:
    """Return values and what they are compared with in one type: the column's where it has it.

    As doubles, no float32 would be 0.3, and integers beyond 2^53 would be refused.
    """
    kind = values.type
    if isinstance(value, bool | str):
        return values, pa.scalar(value)
    if pa.types.is_float16(kind):
        return values.cast(pa.float32()), pa.scalar(value, pa.float32())
    if pa.types.is_floating(kind):
        return values, pa.scalar(float(value), kind)
    if pa.types.is_decimal(kind):
        return values.cast(pa.float64()), pa.scalar(float(value))
    if pa.types.is_integer(kind) and isinstance(value, int):
        with suppress(pa.ArrowException, OverflowError):
            return values, pa.scalar(value, kind)
    return values, pa.scalar(value)


def _null_images(file: pq.ParquetFile, group: int, column: str) -> np.ndarray[Any, Any]:
    """Tell which rows have no image: from the statistics where they settle it."""
    meta = file.metadata.row_group(group)
    for number in range(meta.num_columns):
        chunk = meta.column(number)
        stats = chunk.statistics
        if chunk.path_in_schema == column and stats is not None and stats.has_null_count:
            if stats.null_count in (0, meta.num_rows):
                return np.full(meta.num_rows, stats.null_count > 0)
    images = _images(file.read_row_group(group, columns=[column]), column)
    return np.asarray(pc.is_null(images).to_numpy(zero_copy_only=False), dtype=bool)


def read_parquet(
    file: FileInfo,
    store: Store,
    name: str,
    source: SourceConfig,
    offsets: Ints,
    rows_skipped: Ints,
    ordinals: Ints,
    gap: int,
) -> dict[int, Sample | BadSample]:
    """Return the samples with these ordinals, sorted; reads the row groups they lie in.

    Args:
        file: the shard, as it was indexed.
        store: its directory.
        name: its name in it.
        source: which columns are read.
        offsets: see `Shard`.
        rows_skipped: see `Shard`.
        ordinals: the samples.
        gap: bytes that are rather read than asked around; 0 = each column by itself.

    Raises:
        ChangedError: it is another file by now.
        OSError: the store failed.
    """
    rows = skip(ordinals, rows_skipped)
    row_groups = np.searchsorted(offsets, rows, side="right") - 1
    result: dict[int, Sample | BadSample] = {}
    path, raw = file.path, _RangeFile(store, name, file.size, file)
    try:
        with open_parquet(raw, _footer(store, name, file)) as opened:
            columns = find_columns(path, opened.schema_arrow, source)
            names = [c for c in (columns.image, columns.caption, columns.key) if c]
            wanted = np.unique(row_groups).tolist()
            chunks = {group: _chunks(opened.metadata.row_group(group), names) for group in wanted}
            spans = _merge([span for group in wanted for span in chunks[group]], gap)
            for group in wanted:
                if gap:
                    raw.hold([s for s in spans if any(s[0] <= c[0] < s[1] for c in chunks[group])])
                mine = row_groups == group
                local = rows[mine] - offsets[group]
                table = opened.read_row_group(group, columns=names).take(pa.array(local))
                images = _images(table, columns.image).to_pylist()
                captions = _values(table, columns.caption)
                keys = _keys(table, columns, path, rows[mine])
                for place, ordinal in enumerate(ordinals[mine].tolist()):
                    result[ordinal] = _sample(path, keys[place], images[place], captions[place])
    except (DamageError, DataError, IndexError) as error:
        for ordinal in ordinals.tolist():
            result.setdefault(ordinal, BadSample(f"#{ordinal}", "shard-damaged", str(error), path))
    return result


def _chunks(group: pq.RowGroupMetaData, names: list[str]) -> list[Span]:
    """Return the byte ranges of some columns of a row group."""
    spans = []
    for number in range(group.num_columns):
        chunk = group.column(number)
        if any(f"{chunk.path_in_schema}.".startswith(f"{name}.") for name in names):
            begin = chunk.data_page_offset
            if chunk.has_dictionary_page:
                begin = min(begin, chunk.dictionary_page_offset)
            spans.append((begin, begin + chunk.total_compressed_size))
    return spans


def _merge(spans: list[Span], gap: int) -> list[Span]:
    """Merge ranges that lie at most `gap` bytes apart, as long as they are no more than a GET."""
    merged: list[Span] = []
    for start, stop in sorted(spans):
        if merged and start - merged[-1][1] <= gap and stop - merged[-1][0] <= _SPAN_BYTES:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return merged


def _sample(path: str, key: str, image: bytes | None, text: Any) -> Sample | BadSample:
    caption = caption_of(text)
    if caption.reason or not image:
        # Null rows are left out by the index; an empty image shows only here.
        return BadSample(key, caption.reason or "empty-image", shard=path)
    return Sample(key, image, caption.texts[0], caption.replaced_utf8, caption.texts[1:])


def _images(table: pa.Table, column: str) -> pa.ChunkedArray:
    name, _, leaf = column.rpartition(".") if column not in table.column_names else (column, "", "")
    return pc.struct_field(table[name], leaf) if leaf else table[column]


def _values(table: pa.Table, column: str) -> list[Any]:
    """Return a caption column as Python values: bytes where it is text, valid UTF-8 or not."""
    array = table[column]
    kind = array.type
    if pa.types.is_string(kind):
        array = array.cast(pa.binary())
    elif pa.types.is_large_string(kind):
        array = array.cast(pa.large_binary())
    elif pa.types.is_list(kind) and pa.types.is_string(kind.value_type):
        array = array.cast(pa.list_(pa.binary()))
    elif pa.types.is_dictionary(kind):
        array = array.cast(pa.binary())
    values: list[Any] = array.to_pylist()
    return values


def _keys(table: pa.Table, columns: Columns, path: str, rows: Ints) -> list[str]:
    """Return the keys of some rows; without a key column: file name / row number."""
    stem = split_uri(path)[1].rpartition(".")[0]
    if columns.key is None:
        return [f"{stem}/{row}" for row in rows.tolist()]
    return [
        f"{stem}/{row}"
        if key is None
        else key.decode(errors="backslashreplace")
        if isinstance(key, bytes)
        else str(key)
        for key, row in zip(_values(table, columns.key), rows.tolist(), strict=True)
    ]
