"""The manifest's file: a Parquet table, a row per shard, with `details` in a file beside it.

Formats 1 and 2 held everything in the table. They are read, never written; their digests were
taken over all they held, and keep naming the data of the runs that were begun with them.
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clip_ray.data.details import Details, Lists, Spool, has_file
from clip_ray.data.manifest import KINDS, Evidence, Manifest, digest_of
from clip_ray.data.ragged import Ragged
from clip_ray.data.samples import Ints
from clip_ray.data.shards import TAR
from clip_ray.data.tar import BLOCK
from clip_ray.errors import DataError
from clip_ray.storage import Store

FORMAT = 3  # 2: what an index found, for a later one; 3: the lists of a shard in a file of details
_HEAD = "clip_ray_manifest"  # key of the table's metadata


def save_manifest(manifest: Manifest, store: Store, name: str) -> Manifest:
    """Write a manifest and its details; return it as it is read back.

    The details come first and have a name of their own, so that whoever reads meanwhile finds the
    old manifest or the new one, whole.
    """
    before = _details_name(store, name)
    details = manifest.details.save(store)
    store.write(name, to_bytes(manifest))
    if before is not None and before != details.name:
        store.delete(before)
    return replace(manifest, details=details)


def load_manifest(store: Store, name: str) -> Manifest:
    """Return the manifest that lies in a store.

    Raises:
        FileNotFoundError: there is none.
        DataError: it is no manifest, is damaged, or was written by newer code.
    """
    file, head = _open(store.read(name))
    try:
        manifest = _older(file, head) if head["format"] < 3 else _current(file, head, store)
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise _damaged(error) from error
    details = manifest.details
    if details.store is not None and not has_file(store, details.name, int(details.lengths.sum())):
        raise DataError(
            f"{store.uri}/{details.name}, which belongs to the manifest, is missing or not whole; "
            "copy it there, or delete the manifest and index again"
        )
    return manifest


def to_bytes(manifest: Manifest) -> bytes:
    """Return the table as a Parquet file; it names the file of the details and holds its checks."""
    evidence, details = manifest.evidence, manifest.details
    assert evidence is not None and not manifest.written_as, "older formats are never written"
    table = pa.table(
        {
            "source": manifest.source,
            "path": manifest.paths.to_arrow_text(),
            "kind": manifest.kinds,
            "size": manifest.sizes,
            "version": manifest.versions.to_arrow_text(),
            "samples": manifest.samples,
            "held": manifest.held,
            "holdout": manifest.holdout,
            "marks": manifest.marks,
            "lists": manifest.lists,
            "details": details.lengths,
            "check": details.checks,
            "keys": manifest.keys,
            "content": evidence.content,
            "invalid_utf8": evidence.invalid_utf8,
            "sidecar": evidence.sidecars.to_arrow_text(),
            "notes": evidence.notes.to_arrow_text(),
        }
    )
    head = {
        "format": FORMAT,
        "digest": manifest.digest,
        "details": details.file_name(),
        "sources": manifest.sources,
        "skipped": manifest.skipped_by_source,
        "invalid_utf8": manifest.invalid_utf8,
        "options": manifest.options,
        "empty": evidence.empty,
        "settings": evidence.settings,
    }
    sink = pa.BufferOutputStream()
    table = table.replace_schema_metadata({_HEAD: json.dumps(head)})
    pq.write_table(table, sink, compression="zstd", use_dictionary=False, write_page_checksum=True)
    return cast(bytes, sink.getvalue().to_pybytes())


def _open(data: bytes) -> tuple[pq.ParquetFile, dict[str, Any]]:
    try:
        file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
        head = json.loads((file.schema_arrow.metadata or {})[_HEAD.encode()])
        written = int(head["format"])
    except (pa.ArrowException, OSError, KeyError, ValueError, TypeError) as error:
        raise _damaged(error) from error
    if written > FORMAT:
        raise DataError(
            f"the manifest has format {written}, this code reads up to {FORMAT}; "
            "use the CLIP-Ray that wrote it, or index again"
        )
    return file, head


def _damaged(error: Exception) -> DataError:
    return DataError(f"no manifest, or a damaged one ({error}); delete it")


def _details_name(store: Store, name: str) -> str | None:
    """Return the name of the details of the manifest that lies there, if one does."""
    with suppress(FileNotFoundError, DataError):
        found = _open(store.read(name))[1].get("details")
        return str(found) if found else None
    return None


def _current(file: pq.ParquetFile, head: dict[str, Any], store: Store) -> Manifest:
    table = file.read()
    lengths, name = _flat(table, "details", np.int64), str(head["details"])
    manifest = _manifest(
        table,
        head,
        held=_flat(table, "held", np.int64),
        holdout=_flat(table, "holdout", np.int64),
        marks=_flat(table, "marks", np.int64),
        lists=_flat(table, "lists", np.uint64),
        details=Details.in_file(lengths, _flat(table, "check", np.uint64), store, name),
        keys=_flat(table, "keys", np.uint64),
        evidence=_evidence(table, head),
    )
    _compare(manifest.digest, head)
    _compare(manifest.details.file_name(), head, "details")
    return manifest


def _compare(found: str, head: dict[str, Any], name: str = "digest") -> None:
    if found != head[name]:
        raise DataError(
            f"by its content the manifest's {name} is {found}, it was written as {head[name]}; it "
            "is damaged: index again"
        )


def _older(file: pq.ParquetFile, head: dict[str, Any]) -> Manifest:
    """Return a manifest of format 1 or 2, its lists packed."""
    names = file.schema_arrow.names
    table = file.read(columns=[name for name in names if name != "offsets"])
    held, holdout = (Ragged.from_arrow(table[name], np.int32) for name in ("held", "holdout"))
    rows_skipped = Ragged.from_arrow(table["rows_skipped"], np.int64)
    kinds = _flat(table, "kind", np.int8)
    spool, marks, lists = Spool(), [], []
    row = 0
    # By row group: the offsets of all could be gigabytes.
    for group in range(file.num_row_groups):
        column = file.read_row_group(group, columns=["offsets"])["offsets"]
        for offsets in _rows(column):
            # Format 1 counts in bytes.
            unit = BLOCK if head["format"] == 1 and KINDS[kinds[row]] == TAR else 1
            mine = [values[row].astype(np.int64) for values in (held, holdout, rows_skipped)]
            one = Lists(-(-offsets // unit), *mine)
            spool.add(one.pack())
            marks.append(len(offsets))
            lists.append(one.digest())
            row += 1
    has_evidence = head["format"] > 1
    manifest = _manifest(
        table,
        head,
        held=held.lengths,
        holdout=holdout.lengths,
        marks=np.array(marks, np.int64),
        lists=np.array(lists, np.uint64),
        details=spool.details(),
        keys=_flat(table, "keys", np.uint64) if has_evidence else np.zeros(row, np.uint64),
        evidence=_evidence(table, head) if has_evidence else None,
        written_as=head["digest"],
    )
    flat = (manifest.source, manifest.kinds, manifest.sizes, manifest.samples)
    ragged = (manifest.paths, manifest.versions, held, holdout, rows_skipped)
    begin = b"clip-ray manifest 1\n" + json.dumps(manifest.options, sort_keys=True).encode()
    _compare(digest_of(begin, *flat, *(a for r in ragged for a in (r.splits, r.values))), head)
    return manifest


def _rows(column: pa.ChunkedArray) -> list[Ints]:
    rows = Ragged.from_arrow(column, np.int64)
    return [rows[row] for row in range(len(rows))]


def _manifest(table: pa.Table, head: dict[str, Any], **rest: Any) -> Manifest:
    return Manifest(
        source=_flat(table, "source", np.int32),
        paths=_text(table, "path"),
        kinds=_flat(table, "kind", np.int8),
        sizes=_flat(table, "size", np.int64),
        versions=_text(table, "version"),
        samples=_flat(table, "samples", np.int64),
        sources=tuple(head["sources"]),
        skipped_by_source=tuple(head["skipped"]),
        invalid_utf8=tuple(head["invalid_utf8"]),
        options=head["options"],
        **rest,
    )


def _evidence(table: pa.Table, head: dict[str, Any]) -> Evidence:
    return Evidence(
        _flat(table, "content", np.uint64),
        _flat(table, "invalid_utf8", np.int64),
        _text(table, "sidecar"),
        _text(table, "notes"),
        tuple(head["empty"]),
        tuple(head["settings"]),
    )


def _flat(table: pa.Table, name: str, dtype: type) -> np.ndarray[Any, Any]:
    return table[name].to_numpy().astype(dtype)


def _text(table: pa.Table, name: str) -> Ragged:
    return Ragged.of_text(table[name].to_pylist())
