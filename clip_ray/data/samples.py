"""What a sample is made of: which member or column holds its image and which its caption."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clip_ray.config.schema import SourceConfig

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif")
JSON_KEYS = ("caption", "text")

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Sample:
    """One (image, caption) pair as it lies in a shard.

    Attributes:
        key: its name; unique in its shard.
        image: the image file, not decoded.
        caption: its first caption, white space at the ends removed, never blank.
        replaced_utf8: the caption was no valid UTF-8; U+FFFD stands for what could not be read.
        others: further captions, where the shard holds a list of them.
    """

    key: str
    image: bytes
    caption: str
    replaced_utf8: bool = False
    others: tuple[str, ...] = ()


@dataclass(frozen=True)
class Caption:
    """The captions of one sample, or the reason why it has none."""

    texts: tuple[str, ...] = ()
    replaced_utf8: bool = False
    reason: str = ""


@dataclass(frozen=True)
class Suffixes:
    """The suffixes of a tar's members that matter, in order of preference."""

    image: tuple[str, ...]
    caption: tuple[str, ...]
    json_keys: tuple[str, ...]

    @classmethod
    def of(cls, source: SourceConfig) -> Suffixes:
        """Return what a source names, or the usual suffixes."""
        image = (_suffix(source.image),) if source.image else IMAGE_SUFFIXES
        if source.caption is None:
            return cls(image, ("txt", "json"), JSON_KEYS)
        if source.caption.startswith("json:"):
            return cls(image, ("json",), (source.caption.removeprefix("json:"),))
        return cls(image, (_suffix(source.caption),), JSON_KEYS)


@dataclass
class Scan:
    """What one pass over a shard found.

    Attributes:
        keys: keys of the valid samples, in order.
        offsets: see `clip_ray.data.shards.Shard`.
        rows_skipped: rows of a Parquet file that are no valid sample, sorted.
        skipped: number of samples left out, by reason.
        invalid_utf8: number of valid samples whose caption is no valid UTF-8.
        truncated: where the shard breaks off; empty where it does not.
        unknown_suffixes: members whose suffix is none of the source's, counted.
        not_chosen: ordinals of the valid samples for which the source's conditions do not hold.
        content: a running hash of what the pass saw of the valid samples; see `saw`.
    """

    keys: list[str] = field(default_factory=list)
    offsets: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    rows_skipped: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    skipped: Counter[str] = field(default_factory=Counter)
    invalid_utf8: int = 0
    truncated: str = ""
    unknown_suffixes: Counter[str] = field(default_factory=Counter)
    not_chosen: list[int] = field(default_factory=list)
    content: hashlib.blake2b = field(default_factory=lambda: hashlib.blake2b(digest_size=8))

    def saw(self, *parts: str | bytes | int) -> None:
        """Add to the hash by which copies of a shard are told, whatever their names."""
        data = [
            part if isinstance(part, bytes) else str(part).encode(errors="backslashreplace")
            for part in parts
        ]
        lengths = " ".join([str(len(part)) for part in data])
        self.content.update(b"".join([lengths.encode(), b"\n", *data]))


def skip(places: Ints, left_out: Ints) -> Ints:
    """Map the i-th number that is not left out to the number itself.

    Args:
        places: (n,) indices among the numbers 0, 1, 2, ... that remain.
        left_out: sorted, distinct numbers that do not count.
    """
    # left_out[j] - j remaining numbers lie before left_out[j].
    before = left_out.astype(np.int64) - np.arange(len(left_out))
    return places + np.searchsorted(before, places, side="right")


def caption_of(value: Any) -> Caption:
    """Return the captions in a value: bytes, text, or a list of them."""
    if value is None:
        return Caption(reason="missing-caption")
    values = value if isinstance(value, list | tuple) else [value]
    texts, replaced = [], False
    for item in values:
        if isinstance(item, bytes):
            try:
                item = item.decode()
            except UnicodeDecodeError:
                item, replaced = item.decode(errors="replace"), True
        if isinstance(item, str) and (text := item.strip()):
            texts.append(text)
    if not texts:
        return Caption(reason="empty-caption")
    return Caption(tuple(texts), replaced)


def caption_in_json(data: bytes, keys: tuple[str, ...]) -> Caption:
    """Return the captions under the first of `keys` that a JSON object has."""
    try:
        text, replaced = data.decode(), False
    except UnicodeDecodeError:
        text, replaced = data.decode(errors="replace"), True
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return Caption(reason="bad-json")
    if not isinstance(found, dict):
        return Caption(reason="bad-json")
    for key in keys:
        if found.get(key) is not None:
            caption = caption_of(found[key])
            return Caption(caption.texts, replaced and not caption.reason, caption.reason)
    return Caption(reason="missing-caption")


def digest_keys(keys: list[str]) -> int:
    """Return a 64-bit digest of a shard's keys, in order."""
    text = "\0".join(keys).encode(errors="backslashreplace")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


def _suffix(name: str) -> str:
    return name.removeprefix(".").lower()
