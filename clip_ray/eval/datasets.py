"""Evaluation data sets in CLIP_benchmark's WebDataset layout, on a disk or on S3.

    classnames.txt                            one class a line, the line's number is the label
    zeroshot_classification_templates.txt     one prompt template a line, with {c}
    test/nshards.txt, test/0.tar, ...         or flat: nshards-test.txt, test-0000.tar, ...

A sample of a shard is an image (jpg, jpeg, png, webp, gif) with a class number (cls), captions
(txt, one a line), or both. The two lists are needed for classification only.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from clip_ray.config import S3Options
from clip_ray.data.samples import IMAGE_SUFFIXES, Suffixes
from clip_ray.data.tar import CutError, DamageError, Window, groups, members
from clip_ray.errors import DataError
from clip_ray.storage import Store, open_store

CLASSNAMES = "classnames.txt"
TEMPLATES = "zeroshot_classification_templates.txt"
_SUFFIXES = Suffixes(image=IMAGE_SUFFIXES, caption=("txt", "cls"), json_keys=())
_FLAT = re.compile(r"test-(\d+)\.tar")


@dataclass(frozen=True)
class Sample:
    """One image with what is known of it.

    Attributes:
        key: its name in the shard.
        image: the image file's bytes.
        label: class number, or None.
        captions: its texts; empty where there is none.
    """

    key: str
    image: bytes
    label: int | None
    captions: tuple[str, ...]


@dataclass(frozen=True)
class EvalDataset:
    """An evaluation data set, opened but not read.

    Attributes:
        store: its directory.
        shards: names of its tars, in order.
        classnames: by label; None where the data set has none.
        templates: prompt templates; None where the data set has none.
    """

    store: Store
    shards: tuple[str, ...]
    classnames: tuple[str, ...] | None
    templates: tuple[str, ...] | None

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.store.uri.rstrip("/").rsplit("/", 1)[-1]

    def samples(self) -> Iterator[Sample]:
        """Read all samples in the order of the shards.

        Raises:
            DataError: a shard is missing or damaged, or a label is no number of a class.
        """
        for shard in self.shards:
            yield from _read_shard(self.store, shard, self.classnames)


def open_dataset(uri: str, s3: S3Options | None = None) -> EvalDataset:
    """Open a data set by its directory or s3:// prefix.

    Raises:
        DataError: it is not in the layout; the message names the file that is missing.
    """
    store = open_store(uri, s3)
    shards = _shards(store)
    classnames, templates = _lines(store, CLASSNAMES), _lines(store, TEMPLATES)
    for name, lines in ((CLASSNAMES, classnames), (TEMPLATES, templates)):
        if lines is not None and not lines:
            raise DataError(f"{store.uri}/{name}: empty; expected one entry a line")
    for template in templates or ():
        if "{c}" not in template and "{}" not in template:
            raise DataError(
                f"{store.uri}/{TEMPLATES}: {template!r} has no {{c}} for the class name"
            )
    return EvalDataset(store, shards, classnames, templates)


def _lines(store: Store, name: str) -> tuple[str, ...] | None:
    try:
        text = store.read(name).decode("utf-8")
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as error:
        raise DataError(f"{store.uri}/{name}: not UTF-8: {error}") from error
    # Only newlines: str.splitlines would break at separators inside a class name.
    return tuple(line.strip() for line in text.split("\n") if line.strip())


def _shards(store: Store) -> tuple[str, ...]:
    for index in ("test/nshards.txt", "nshards-test.txt"):
        lines = _lines(store, index)
        if lines is None:
            continue
        if len(lines) != 1 or not lines[0].isdecimal() or int(lines[0]) < 1:
            raise DataError(
                f"{store.uri}/{index}: {' '.join(lines)[:40]!r}; expected the number of shards"
            )
        count = int(lines[0])
        if index == "test/nshards.txt":
            return tuple(f"test/{i}.tar" for i in range(count))
        found = sorted(name for name in store.files() if _FLAT.fullmatch(name))
        if len(found) != count:
            raise DataError(
                f"{store.uri}: {len(found)} files test-0000.tar ..., but {index} says {count}; "
                "copy the data set again"
            )
        return tuple(found)
    raise DataError(
        f"{store.uri}: neither test/nshards.txt nor nshards-test.txt is there; expected a data set "
        "in CLIP_benchmark's WebDataset layout (test/nshards.txt, test/0.tar, ..., classnames.txt)"
    )


def _read_shard(store: Store, shard: str, names: tuple[str, ...] | None) -> Iterator[Sample]:
    where = f"{store.uri}/{shard}"
    try:
        size = store.info(shard).size
        data = Window.over(store, shard, size)
        for group in groups(members(data, 0, size, complete=True), _SUFFIXES, None):
            parts = {s: data.get(at, at + length) for s, (at, length) in group.parts.items()}
            yield from _sample(group.key, parts, where, names)
    except FileNotFoundError as error:
        raise DataError(f"{where}: does not exist; copy the data set again") from error
    except (CutError, DamageError) as error:
        raise DataError(f"{where}: truncated or no tar ({error}); copy it again") from error


def _sample(
    key: str, parts: dict[str, bytes], where: str, names: tuple[str, ...] | None
) -> Iterator[Sample]:
    """Make a sample of a shard's files; files without an image are no sample."""
    image = next((parts[s] for s in _SUFFIXES.image if s in parts), None)
    if image is None:
        return
    label = None
    if "cls" in parts:
        text = parts["cls"].decode("utf-8", "replace").strip()
        if not text.isdecimal():
            raise DataError(f"{where}: {key}.cls is {text[:40]!r}; expected a class number")
        label = int(text)
        if names is not None and label >= len(names):
            raise DataError(
                f"{where}: {key}.cls is {label}, but {CLASSNAMES} has {len(names)} classes"
            )
    lines = parts.get("txt", b"").decode("utf-8", "replace").split("\n")
    captions = tuple(line.strip() for line in lines if line.strip())
    yield Sample(key, image, label, captions)
