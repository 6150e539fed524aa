"""Make shards from pictures that lie in a folder, or that a table names.

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
from clip_ray.images import ImageError, decode, measure, shrink
from clip_ray.storage import Store, open_store, split_uri

FORMAT = 1
LOG = "prepare.json"
PATH_COLUMNS = ("path", "file", "filename", "file_name", "filepath", "image_path", "image")
CAPTION_COLUMNS = ("caption", "text", "txt", "title")
_TABLES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
_QUALITY = 90  # of re-encoded JPEG
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
    caption: str | None = None
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


@dataclass
class _Tar:
    """A shard in the making."""

    file: io.BytesIO = field(default_factory=io.BytesIO)
    samples: int = 0

    def __post_init__(self) -> None:
        self.tar = tarfile.open(fileobj=self.file, mode="w", format=tarfile.USTAR_FORMAT)

    def add(self, name: str, data: bytes) -> None:
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
            relative to the table) and captions; local or on s3://.
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
    store = open_store(out, s3)
    fingerprint = _fingerprint(rows, options)
    done = _resume(store, fingerprint)
    done.rows = len(rows)
    at = done.shards[-1]["next"] if done.shards else 0
    if progress is not None:
        progress(at, len(rows))
    with ThreadPoolExecutor(_READERS) as pool:
        while at < len(rows):
            at = _write_shard(rows, at, store, done, options, s3, pool, progress)
            log = {"format": FORMAT, "fingerprint": fingerprint, **vars(done)}
            store.write(LOG, json.dumps(log, indent=1).encode())
    if not done.written:
        raise DataError(f"{source}: none of {len(rows)} rows can be used\n{done.as_text()}")
    return done


def _write_shard(
    rows: list[Row],
    first: int,
    store: Store,
    done: Prepared,
    options: PrepareOptions,
    s3: S3Options | None,
    pool: ThreadPoolExecutor,
    progress: Callable[[int, int], None] | None,
) -> int:
    """Write the shard that begins at row `first`; return the row where the next one begins."""
    tar = _Tar()
    at = first
    for row, loaded in _loaded(rows, first, options, s3, pool):
        if isinstance(loaded, str):
            done.skipped[loaded] += 1
            kept = done.examples.setdefault(loaded, [])
            if len(kept) < 3:
                kept.append(row.path)
        else:
            suffix, image, caption = loaded
            tar.add(f"{at:09d}.{suffix}", image)
            tar.add(f"{at:09d}.txt", caption.encode())
            tar.add(f"{at:09d}.json", json.dumps({"path": row.path}).encode())
            tar.samples += 1
        at += 1
        if progress is not None:
            progress(at, len(rows))
        if tar.samples >= options.samples_per_shard or tar.file.tell() >= options.bytes_per_shard:
            break
    if tar.samples:
        name = f"{len(done.shards):05d}.tar"
        data = tar.finish()
        store.write(name, data)
        shard = {"name": name, "samples": tar.samples, "bytes": len(data), "next": at}
        done.shards.append(shard)
        done.written += tar.samples
    elif done.shards:
        done.shards[-1]["next"] = at
    return at


def _loaded(
    rows: list[Row],
    first: int,
    options: PrepareOptions,
    s3: S3Options | None,
    pool: ThreadPoolExecutor,
) -> Iterator[tuple[Row, tuple[str, bytes, str] | str]]:
    """Yield the rows from `first` on, in order, with what `_load` makes of them."""
    for start in range(first, len(rows), 4 * _READERS):
        batch = rows[start : start + 4 * _READERS]
        yield from zip(batch, pool.map(lambda row: _load(row, options, s3), batch), strict=True)


def _load(row: Row, options: PrepareOptions, s3: S3Options | None) -> tuple[str, bytes, str] | str:
    """Return (suffix, image, caption), or the reason why there is none."""
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
    try:
        pixels = decode(data, options.max_pixels)
    except ImageError as error:
        return error.reason
    if options.longest_side is not None and max(measure(data)) > options.longest_side:
        data = simplejpeg.encode_jpeg(
            shrink(pixels, options.longest_side), quality=_QUALITY, colorsubsampling="420"
        )
    return _suffix_of(data), data, caption.texts[0]


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
        elif text is None or not isinstance(text, str):
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


def _resume(store: Store, fingerprint: str) -> Prepared:
    """Return what an earlier run has finished in `store`."""
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
        return Prepared()
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{store.uri}/{LOG}: damaged ({error}); empty the directory") from error
    if found != (FORMAT, fingerprint):
        raise DataError(
            f"{store.uri}: was made from other rows or with other options; "
            "give an empty directory, or empty this one"
        )
    return done
