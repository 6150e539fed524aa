"""What stored classifiers look like on disk: names of folders and files, and their bytes.

    <namespace>/<id>/definition.json
    <namespace>/<id>/<prompts' digest, 12 digits>-<model digest>.npy

Pure functions. Left out: reading and writing (serve.classifiers).
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from clip_ray.config.schema import Section
from serve.caches import prompts_digest
from serve.errors import ApiError

Floats = NDArray[np.float32]
Scoring = Literal["softmax", "sigmoid"]

ID_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
FORMAT = 1
DEFINITION = "definition.json"
_MATRIX = re.compile(r"([0-9a-f]{12})-([0-9a-f]{64})\.npy")
_SEAL_BYTES = 32
_PLAIN = frozenset(b"abcdefghijklmnopqrstuvwxyz0123456789-_")


@dataclass(frozen=True)
class Definition:
    """What a stored classifier is made of.

    Attributes:
        labels: class names, at least one.
        templates: prompt templates with `{c}` or `{}`, at least one.
        scoring: softmax over the labels, or a sigmoid for each.
        created: ISO time of its PUT, set by the store.
    """

    labels: tuple[str, ...]
    templates: tuple[str, ...]
    scoring: Scoring
    created: str = ""

    @cached_property
    def digest(self) -> str:
        """Digest of labels and templates: another scoring needs no other matrix."""
        return prompts_digest(self.labels, self.templates)


class UnreadableError(Exception):
    """A definition file that is damaged, or of a newer format; the message is for the caller."""


class _File(Section):
    format: Literal[1]
    labels: tuple[str, ...] = Field(min_length=1)
    templates: tuple[str, ...] = Field(min_length=1)
    scoring: Scoring
    created: str
    digest: str


def dump(definition: Definition) -> bytes:
    """Return the file of a definition."""
    return json.dumps(
        {
            "format": FORMAT,
            "labels": definition.labels,
            "templates": definition.templates,
            "scoring": definition.scoring,
            "created": definition.created,
            "digest": definition.digest,
        }
    ).encode()


def parse(raw: bytes) -> Definition:
    """Return the definition of a file.

    Raises:
        UnreadableError: with the reason.
    """
    try:
        fields = json.loads(raw)
        written = fields.get("format") if isinstance(fields, dict) else None
        if isinstance(written, int) and written > FORMAT:
            raise UnreadableError(
                f"its format {written} is of a newer version, this one reads {FORMAT}"
            )
        file = _File.model_validate(fields)
    except (ValueError, RecursionError) as error:
        raise UnreadableError("its file is damaged") from error
    definition = Definition(file.labels, file.templates, file.scoring, file.created)
    if definition.digest != file.digest:
        raise UnreadableError("its file is damaged: labels and templates have another digest")
    return definition


def matrix_name(place: str, definition: Definition, model_digest: str) -> str:
    """Return the file of a definition's matrix for a model."""
    return f"{place}/{definition.digest[:12]}-{model_digest}.npy"


def pack(matrix: Floats, owner: str) -> bytes:
    """Return the file of a matrix: .npy, and a seal behind it that numpy does not read.

    Args:
        matrix: (C, E).
        owner: the digests of its prompts and its model. A matrix under a wrong name is thus
            refused like a damaged one, and its shape needs no check.
    """
    stream = io.BytesIO()
    np.save(stream, matrix, allow_pickle=False)
    with stream.getbuffer() as body:
        seal = _seal(body, owner)
    stream.write(seal)
    return stream.getvalue()


def unpack(data: bytes, owner: str) -> Floats | None:
    """Return the matrix of a file, or None for one that is damaged or another owner's."""
    with memoryview(data) as view:
        if view[-_SEAL_BYTES:] != _seal(view[:-_SEAL_BYTES], owner):
            return None
    matrix: Floats = np.load(io.BytesIO(data), allow_pickle=False)
    return matrix


def _seal(body: memoryview, owner: str) -> bytes:
    digest = hashlib.sha256(owner.encode())
    digest.update(body)
    return digest.digest()


def folder_of(name: str) -> str:
    """Return a directory name for any string: another for each, even where case is ignored."""
    data = name.encode("utf-8", "surrogatepass")
    escaped = "".join(chr(byte) if byte in _PLAIN else f"={byte:02x}" for byte in data)
    # File systems take 255 bytes. No escaped name begins with "==".
    fits = 0 < len(escaped) <= 200
    return escaped if fits else "==" + hashlib.sha256(data).hexdigest()


def place_of(namespace: str, id: str) -> str:
    """Return the directory of a classifier.

    Args:
        namespace: any string.
        id: matches ID_PATTERN, so that a listing can tell it from the directory's name.

    Raises:
        ApiError: 400 for another id.
    """
    if not re.fullmatch(ID_PATTERN, id):
        raise ApiError(
            400,
            "invalid_classifier_id",
            f"classifier id {id[:100]!r}: expected 1 to 64 letters, digits, '.', '_' and '-', "
            "beginning with a letter or digit",
            param="id",
        )
    return f"{folder_of(namespace)}/{folder_of(id)}"


def id_of(place: str) -> str:
    """Return the id of a classifier's directory."""
    folder = place.split("/")[1]
    return re.sub("=([0-9a-f]{2})", lambda match: chr(int(match[1], 16)), folder)


def places_in(names: Iterable[str]) -> list[str]:
    """Return the directories of `names` that hold a definition; those not ours are left out."""
    places = []
    for name in names:
        place, _, file = name.rpartition("/")
        if file == DEFINITION and place.count("/") == 1:
            id = id_of(place)
            if re.fullmatch(ID_PATTERN, id) and place.endswith(f"/{folder_of(id)}"):
                places.append(place)
    return places


def is_stale(name: str, digests: Mapping[str, str], models: AbstractSet[str]) -> bool:
    """Tell whether a file is a matrix that nobody will ask for.

    Args:
        name: the file's.
        digests: prompts' digest of each place that has a definition; empty for an unreadable one.
        models: digests of the models that are served.
    """
    place, _, file = name.rpartition("/")
    match = _MATRIX.fullmatch(file)
    if match is None or place.count("/") != 1:
        return False
    prompts, model = match.groups()
    if model not in models or place not in digests:
        return True
    return digests[place] != "" and not digests[place].startswith(prompts)
