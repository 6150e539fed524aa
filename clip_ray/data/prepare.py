"""Make shards from pictures that lie in a folder or that a table names; `rewrite`: from shards.

The rows are listed in one fixed order, and shards are cut from it one by one, so that an
interrupted run goes on at the first unfinished shard and ends with the same bytes. Every row is
either written or counted under the reason why it is not.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import simplejpeg

from clip_ray.config.schema import S3Options
from clip_ray.data.samples import IMAGE_SUFFIXES, caption_of
from clip_ray.errors import DataError
from clip_ray.images import (
    MIN_SIDE,
    ImageError,
    decode,
    measure,
    orientation,
    shrink,
    with_orientation,
)
from clip_ray.storage import Store, open_store, split_uri

FORMAT = 1
LOG = "prepare.json"
PATH_COLUMNS = ("path", "file", "filename", "file_name", "filepath", "image_path", "image")
CAPTION_COLUMNS = ("caption", "text", "txt", "title")
_TABLES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
_QUALITY = 90  # of re-encoded JPEG
BATCH = 64  # rows that are read together
_READERS = 16  # rows in flight: single files from S3 are all latency


@dataclass(frozen=True)
class PrepareOptions:
    """How shards are made.

    Attributes:
        image: column of the image paths; none = the usual names.
        caption: column of the captions; none = the usual names.
        samples_per_shard: samples after which a shard is full.
        bytes_per_shard: bytes after which it is; a shard is put together in memory.
        longest_side: pixels to which larger images are shrunk (and encoded as JPEG); none = kept.
        max_pixels: images above are skipped.
    """

    image: str | None = None
    caption: str | None = None
    samples_per_shard: int = 10_000
    bytes_per_shard: int = 256 << 20
    longest_side: int | None = None
    max_pixels: int = 64_000_000

    def __post_init__(self) -> None:
        sizes = (self.samples_per_shard, self.bytes_per_shard, self.longest_side or 1)
        if min(sizes) < 1:
            raise DataError(
                f"samples_per_shard {self.samples_per_shard}, bytes_per_shard "
                f"{self.bytes_per_shard}, longest_side {self.longest_side}: expected at least 1"
            )


@dataclass(frozen=True)
class Row:
    """One picture to pack: `caption` or, where it is a file of its own, `caption_path`."""

    path: str
    caption: str | list[Any] | None = None
    caption_path: str | None = None
    reason: str = ""


@dataclass
class Prepared:
    """What has been made; this is also what `prepare.json` holds.

    Attributes:
        rows: rows of the source.
        written: samples in the shards.
        skipped: rows that are in none, by reason; with `written` they sum up to `rows`.
        examples: up to three paths for each reason.
        shards: name, samples, bytes and next (the first row that is not in it) of each.
    """

    rows: int = 0
    written: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    shards: list[dict[str, Any]] = field(default_factory=list)

    def as_text(self) -> str:
        """Return the account, a line each."""
        lines = [f"{self.written:,} of {self.rows:,} samples written to {len(self.shards)} shards"]
        for reason, count in sorted(self.skipped.items()):
            lines.append(f"{count:,} skipped: {reason}, such as {self.examples[reason][0]}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Packed:
    """A sample on its way into a shard; `key` names it there, none = its row's number."""

    image: bytes
    captions: tuple[str, ...]
    origin: dict[str, str]
    key: str | None = None


# From a row on: where each row comes from, and its sample or the reason why it has none.
Walk = Callable[[int], Iterator[tuple[str, Packed | str]]]


@dataclass
class _Tar:
    """A shard in the making."""

    file: io.BytesIO = field(default_factory=io.BytesIO)
    keys: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        # Plain headers, but where a name needs more than they hold.
        self.tar = tarfile.open(fileobj=self.file, mode="w", format=tarfile.PAX_FORMAT)

    def add(self, key: str, sample: Packed) -> None:
        self.keys.add(key)
        self._member(f"{key}.{_suffix_of(sample.image)}", sample.image)
        if len(sample.captions) == 1:
            self._member(f"{key}.txt", sample.captions[0].encode())
            record: dict[str, Any] = dict(sample.origin)
        else:  # a .txt would be taken for the only one
            record = {"caption": sample.captions, **sample.origin}
        self._member(f"{key}.json", json.dumps(record).encode())

    def _member(self, name: str, data: bytes) -> None:
        member = tarfile.TarInfo(name)  # time 0: the same rows make the same bytes
        member.size = len(data)
        self.tar.addfile(member, io.BytesIO(data))

    def finish(self) -> bytes:
        self.tar.close()
        return self.file.getvalue()


def prepare(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    options: PrepareOptions | None = None,
    s3: S3Options | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Prepared:
    """Pack a folder of images with same-named .txt files, or a table's rows, into tar shards.

    Args:
        source: a folder, or a .csv, .tsv, .jsonl or .parquet table of paths (absolute, s3://, or
            relative to the table) and captions (one or, in .jsonl, a list); local or on s3://.
        out: directory of the shards, local or on s3://; finished shards there are kept.
        options: sizes and names.
        s3: access to both.
        progress: called with (rows done, rows).

    Raises:
        DataError: there is nothing to pack, or `out` holds something else.
    """
    options = options or PrepareOptions()
    source = os.fspath(source)
    rows = list_rows(source, options, s3)
    with ThreadPoolExecutor(_READERS) as pool:
        return pack(
            source,
            lambda first: _loaded(rows, first, options, s3, pool),
            Prepared(rows=len(rows)),
            len(rows),
            open_store(out, s3),
            _fingerprint(rows, options),
            options,
            progress,
        )


def pack(
    source: str,
    walk: Walk,
    fresh: Prepared,
    rows: int,
    store: Store,
    fingerprint: str,
    options: PrepareOptions,
    progress: Callable[[int, int], None] | None,
) -> Prepared:
    """Write the shards that are not there yet; `rows` is what the walk goes through."""
    done = _resume(store, fingerprint) or fresh
    at = done.shards[-1]["next"] if done.shards else 0
    if progress is not None:
        progress(at, rows)
    while at < rows:
        at = _write_shard(walk, at, rows, store, done, options, progress)
        log = {"format": FORMAT, "fingerprint": fingerprint, **vars(done)}
        store.write(LOG, json.dumps(log, indent=1).encode())
    if not done.written:
        raise DataError(f"{source}: none of {done.rows} rows can be used\n{done.as_text()}")
    return done


def _write_shard(
    walk: Walk,
    first: int,
    rows: int,
    store: Store,
    done: Prepared,
    options: PrepareOptions,
    progress: Callable[[int, int], None] | None,
) -> int:
    """Write the shard that begins at row `first`; return the row where the next one begins."""
    tar = _Tar()
    at = first
    for path, sample in walk(first):
        if isinstance(sample, str):
            done.skipped[sample] += 1
            kept = done.examples.setdefault(sample, [])
            if len(kept) < 3:
                kept.append(path)
        else:
            key = f"{at:09d}" if sample.key is None else sample.key
            if key in tar.keys:  # from two shards; in one, no reader could tell them apart
                break
            tar.add(key, sample)
        at += 1
        if progress is not None:
            progress(at, rows)
        if len(tar.keys) >= options.samples_per_shard or tar.file.tell() >= options.bytes_per_shard:
            break
    if tar.keys:
        name = f"{len(done.shards):05d}.tar"
        data = tar.finish()
        store.write(name, data)
        shard = {"name": name, "samples": len(tar.keys), "bytes": len(data), "next": at}
        done.shards.append(shard)
        done.written += len(tar.keys)
    elif done.shards:
        done.shards[-1]["next"] = at
    return at


def _loaded(
    rows: list[Row],
    first: int,
    options: PrepareOptions,
    s3: S3Options | None,
    pool: ThreadPoolExecutor,
) -> Iterator[tuple[str, Packed | str]]:
    """Yield the rows from `first` on, in order, with what `_load` makes of them."""
    for start in range(first, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        loaded = pool.map(lambda row: _load(row, options, s3), batch)
        yield from zip([row.path for row in batch], loaded, strict=True)


def _load(row: Row, options: PrepareOptions, s3: S3Options | None) -> Packed | str:
    """Return a row's sample, or the reason why there is none."""
    if row.reason:
        return row.reason
    text: Any = row.caption
    if row.caption_path is not None:
        text = _read(row.caption_path, s3)
    caption = caption_of(text)
    if caption.reason:
        return caption.reason
    data = _read(row.path, s3)
    if data is None:
        return "missing-file"
    image = fitted(data, options)
    if isinstance(image, str):
        return image
    return Packed(image, caption.texts, {"path": row.path})


def fitted(data: bytes, options: PrepareOptions) -> bytes | str:
    """Return an image as it is packed, or the reason why it cannot be used."""
    try:
        pixels = decode(data, options.max_pixels)
    except ImageError as error:
        return error.reason
    if options.longest_side is None or max(measure(data)) <= options.longest_side:
        return data
    small = shrink(pixels, options.longest_side)
    if min(small.shape[:2]) < MIN_SIDE:
        return "too-small"
    packed = simplejpeg.encode_jpeg(small, quality=_QUALITY, colorsubsampling="420")
    return with_orientation(packed, orientation(data))


def _read(path: str, s3: S3Options | None) -> bytes | None:
    folder, name = split_uri(path)
    try:
        return open_store(folder, s3).read(name)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        return None


def _suffix_of(data: bytes) -> str:
    magics = {b"\xff\xd8": "jpg", b"\x89P": "png", b"RI": "webp", b"GI": "gif"}
    return magics[data[:2]]


def list_rows(source: str, options: PrepareOptions, s3: S3Options | None) -> list[Row]:
    """Return all rows of a folder or table, in their fixed order.

    Raises:
        DataError: there are none, or a table lacks the columns.
    """
    if source.lower().endswith(_TABLES):
        rows = list(_table_rows(source, options, s3))
    else:
        if options.image or options.caption:
            raise DataError(f"{source}: a folder has no columns to name; leave image and caption")
        rows = list(_folder_rows(open_store(source, s3)))
    if not rows:
        raise DataError(
            f"{source}: nothing to pack; expected a folder of images ({', '.join(IMAGE_SUFFIXES)}) "
            f"with .txt files of the same names, or a table ({', '.join(_TABLES)})"
        )
    return rows


def _folder_rows(store: Store) -> Iterator[Row]:
    names = store.files()
    texts = {name[:-4]: name for name in names if name.lower().endswith(".txt")}
    used = set()
    for name in names:
        stem, _, suffix = name.rpartition(".")
        if suffix.lower() not in IMAGE_SUFFIXES or not stem:
            continue
        used.add(stem)
        path = f"{store.uri}/{name}"
        if stem in texts:
            yield Row(path, caption_path=f"{store.uri}/{texts[stem]}")
        else:
            yield Row(path, reason="missing-caption")
    for stem, name in texts.items():
        if stem not in used:
            yield Row(f"{store.uri}/{name}", reason="missing-image")


def _table_rows(source: str, options: PrepareOptions, s3: S3Options | None) -> Iterator[Row]:
    absolute = source if source.startswith("s3://") else os.path.abspath(source)
    data = _read(absolute, s3)
    if data is None:
        raise DataError(f"{source}: the table does not exist")
    columns, records = _records(source, data)
    image = _choose(source, columns, options.image, PATH_COLUMNS, "image")
    caption = _choose(source, columns, options.caption, CAPTION_COLUMNS, "caption")
    folder = split_uri(absolute)[0]
    for number, record in enumerate(records):
        path, text = record.get(image), record.get(caption)
        if not isinstance(path, str) or not path.strip():
            yield Row(f"{source}, row {number}", reason="missing-path")
        elif not isinstance(text, str | list):
            yield Row(path, reason="missing-caption")
        else:
            whole = path if path.startswith(("/", "s3://")) else f"{folder}/{path}"
            yield Row(whole, caption=text)


def _records(source: str, data: bytes) -> tuple[list[str], list[dict[str, Any]]]:
    """Return a table's columns and rows."""
    kind = source.lower().rpartition(".")[2]
    try:
        if kind == "parquet":
            table = pq.read_table(pa.BufferReader(data))
            names = [n for n in table.column_names if pa.types.is_string(table[n].type)]
            return table.column_names, table.select(names).to_pylist()
        text = data.decode("utf-8-sig")
        if kind in ("csv", "tsv"):
            reader = csv.DictReader(io.StringIO(text), delimiter="\t" if kind == "tsv" else ",")
            rows = [dict(row) for row in reader]
            return list(reader.fieldnames or []), rows
        rows = [json.loads(line) for line in text.split("\n") if line.strip()]
        if not all(isinstance(row, dict) for row in rows):
            raise ValueError("a line is no JSON object")
        return list(dict.fromkeys(name for row in rows for name in row)), rows
    except (ValueError, csv.Error, pa.ArrowException, OSError) as error:
        raise DataError(f"{source}: no {kind} table: {error}") from error


def _choose(
    source: str, columns: list[str], given: str | None, usual: tuple[str, ...], what: str
) -> str:
    for name in (given,) if given else usual:
        if name in columns:
            return name
    wanted = repr(given) if given else "any of " + ", ".join(usual)
    raise DataError(
        f"{source}: no {what} column: looked for {wanted}; it has {', '.join(columns) or 'none'}; "
        f"name it with --{what}"
    )


def _fingerprint(rows: list[Row], options: PrepareOptions) -> str:
    sha = hashlib.sha256(json.dumps(asdict(options), sort_keys=True).encode())
    for row in rows:
        sha.update(repr((row.path, row.caption, row.caption_path, row.reason)).encode())
    return sha.hexdigest()


def _resume(store: Store, fingerprint: str) -> Prepared | None:
    """Return what an earlier run has finished in `store`, None where there was none."""
    try:
        log = json.loads(store.read(LOG))
        found = log.pop("format"), log.pop("fingerprint")
        done = Prepared(**{**log, "skipped": Counter(log["skipped"])})
    except FileNotFoundError:
        # Shards without a log: a first shard that was interrupted is written again.
        if set(store.files()) - {"00000.tar"}:
            raise DataError(
                f"{store.uri}: holds files but no {LOG}; give an empty directory"
            ) from None
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{store.uri}/{LOG}: damaged ({error}); empty the directory") from error
    if found != (FORMAT, fingerprint):
        raise DataError(
            f"{store.uri}: was made from other rows or with other options; "
            "give an empty directory, or empty this one"
        )
    return done
