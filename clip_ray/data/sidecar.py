"""Sidecars: a tar's keys and captions from the table that img2dataset writes beside it.

00000.parquet beside 00000.tar has a row for every download, in the order of the tar; the rows of
status "success" are its samples (img2dataset's writer.py, WebDatasetSampleWriter). That is all an
index needs but for the offsets, which `offsets` finds when a shard is first read. WebDataset's own
sidecars (wids' shard index, `sizes.json`, `__len__`) hold counts and no keys: which samples are
held out, or have a caption at all, cannot be told from them, so they are of no use here.
"""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq

from clip_ray.config.schema import S3Options, SourceConfig
from clip_ray.data.samples import Scan, Suffixes, caption_of
from clip_ray.data.tar import BLOCK, CutError, DamageError, Window, key_of, members
from clip_ray.storage import FileInfo, Store, open_store, split_uri

_EVIDENCE = ("sha256", "url")  # columns that tell one download from another
Row = dict[str, str | None]

_START = 4096  # bytes of the tar that are fetched for its first header


def scan_sidecar(
    tar: FileInfo, sidecar: FileInfo, s3: S3Options | None, source: SourceConfig
) -> Scan | None:
    """Return what a scan of the tar would find, without offsets; None where it cannot be told.

    Two short reads of the tar see that it has an end mark and begins with the sidecar's first
    sample; what does not is left to a scan, which says what is wrong.

    Raises:
        OSError: the store failed.
    """
    suffixes = Suffixes.of(source)
    caption = _caption_column(source, suffixes)
    if caption is None or sidecar.size > tar.size:
        return None
    begins, suffix = _first_member(tar, open_store(split_uri(tar.path)[0], s3))
    if source.image is not None and suffix not in suffixes.image:
        return None
    folder, name = split_uri(sidecar.path)
    table = _read(open_store(folder, s3).read(name), ("key", "status", caption))
    if table is None:
        return None
    scan = Scan()
    first: str | None = None
    for row in table:
        if row["status"] == "success":
            first = row["key"] if first is None else first
            # An absent caption is an empty .txt, and no entry of a .json.
            if row[caption] is None and suffixes.caption[0] == "txt":
                row[caption] = ""
            _add(scan, row, caption)
    return scan if first is not None and begins == first else None


def _read(data: bytes, needed: tuple[str, ...]) -> list[Row] | None:
    """Return the rows of a table, or None where it lacks a column or is damaged.

    It is taken whole: img2dataset's row groups have 100 rows, and a request each would be slower.
    """
    try:
        file = pq.ParquetFile(pa.BufferReader(data))
        schema = file.schema_arrow
        if any(
            name not in schema.names or not _is_text(schema.field(name).type) for name in needed
        ):
            return None
        rows: list[Row] = file.read(
            columns=[*needed, *(name for name in _EVIDENCE if name in schema.names)]
        ).to_pylist()
    except (pa.ArrowException, OSError, UnicodeDecodeError):
        return None
    return rows


def _caption_column(source: SourceConfig, suffixes: Suffixes) -> str | None:
    """Return the column that holds what the tar's captions say; None where there is none."""
    if source.caption is not None and source.caption.startswith("json:"):
        return suffixes.json_keys[0]
    # img2dataset writes a column "caption" where it writes .txt members.
    return "caption" if suffixes.caption[0] == "txt" else None


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _add(scan: Scan, row: Row, column: str) -> None:
    caption = caption_of(row[column])
    if caption.reason:
        scan.skipped[caption.reason] += 1
        return
    key = str(row["key"])
    scan.keys.append(key)
    scan.saw(key, *caption.texts, *(str(row.get(name)) for name in _EVIDENCE))


def _first_member(tar: FileInfo, store: Store) -> tuple[str, str]:
    """Return key and suffix of a tar's first member; empty ones where its start or end is none."""
    name = split_uri(tar.path)[1]
    start = Window(store, name, tar.size, _START)
    if store.read(name, max(tar.size - 2 * BLOCK, 0), tar.size).strip(b"\0"):
        return "", ""
    try:
        member = next(members(start, 0, tar.size, complete=False), None)
    except (CutError, DamageError):
        return "", ""
    return ("", "") if member is None else key_of(member.name)
