"""What is the same for both foreign layouts: what they tell us, and how a setting is refused.

Whatever would make our model compute something else than theirs is refused by name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from clip_ray.config import ModelConfig
from clip_ray.config.zoo import ARCHITECTURES
from clip_ray.errors import RegistryError
from clip_ray.storage import Store

if TYPE_CHECKING:
    from torch import Tensor

OPEN_CLIP, HUGGING_FACE = "open_clip", "huggingface"
OPEN_CLIP_CONFIG, HUGGING_FACE_CONFIG = "open_clip_config.json", "config.json"
OPEN_CLIP_WEIGHTS, HUGGING_FACE_WEIGHTS = "open_clip_model.safetensors", "model.safetensors"

Rgb = tuple[float, float, float]
OFF = (None, False)  # of a setting that must not be on


@dataclass(frozen=True)
class Foreign:
    """A model in a foreign layout.

    Attributes:
        layout: OPEN_CLIP or HUGGING_FACE.
        config: its architecture.
        mean: per channel, of RGB in [0, 1].
        std: likewise.
        weights: name of the safetensors file; one in several parts has an index beside it.
        rename: from its tensors by name to ours.
        end_id: the token that text features are taken at; None = the highest id of a text.
    """

    layout: str
    config: ModelConfig
    mean: Rgb
    std: Rgb
    weights: str
    rename: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
    end_id: int | None = None


def read_json(store: Store, name: str) -> dict[str, Any]:
    """Return a JSON object.

    Raises:
        RegistryError: the file holds something else.
    """
    try:
        document = json.loads(store.read(name))
    except ValueError as error:
        raise RegistryError(f"{store.uri}/{name}: not JSON: {error}") from error
    if not isinstance(document, dict):
        raise RegistryError(f"{store.uri}/{name}: holds {type(document).__name__}, not an object")
    return document


class Settings:
    """A JSON object of settings; every refusal names the file and the key."""

    def __init__(self, where: str, values: Mapping[str, Any]) -> None:
        self.where = where
        self.values = values

    def refuse(self, key: str, expected: str) -> RegistryError:
        """Return the error that a setting is not ours to do."""
        return RegistryError(
            f"{self.where}: {key} is {self.values.get(key)!r}, which CLIP-Ray's model does not do; "
            f"expected {expected}: serve this model with the library that it comes from"
        )

    def child(self, key: str) -> Settings:
        """Return the object under a key."""
        value = self.values.get(key)
        if not isinstance(value, dict):
            raise self.refuse(key, "an object")
        return Settings(f"{self.where}: {key}", value)

    def only(self, allowed: Mapping[str, tuple[Any, ...]]) -> None:
        """Refuse other values than the allowed ones; a key that is not there has the first."""
        for key, values in allowed.items():
            if self.values.get(key, values[0]) not in values:
                expected = " or ".join(json.dumps(value) for value in values)
                raise self.refuse(key, expected)

    def nothing_else(self, known: frozenset[str]) -> None:
        """Refuse an unknown key that switches something on."""
        for key in sorted(self.values.keys() - known):
            if self.values[key] not in (None, False, {}):
                raise self.refuse(key, "no such key")

    def number(self, key: str, default: int | None = None) -> int:
        """Return a positive integer; [n, n] and {"height": n, "width": n} are n."""
        value = self.values.get(key)
        value = default if value is None else value
        if isinstance(value, dict) and value.keys() == {"height", "width"}:
            value = list(value.values())
        if isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
            value = value[0]
        if type(value) is not int or value < 1:
            raise self.refuse(key, "a positive integer")
        return value

    def rgb(self, key: str, default: Rgb) -> Rgb:
        """Return three numbers; one number stands for all three."""
        value = self.values.get(key)
        value = default if value is None else value
        value = [value] * 3 if isinstance(value, int | float) else value
        if (
            not isinstance(value, list | tuple)
            or len(value) != 3
            or not all(type(x) in (int, float) and math.isfinite(x) for x in value)
        ):
            raise self.refuse(key, "three numbers")
        if key.endswith("std") and min(value) <= 0:
            raise self.refuse(key, "positive numbers")
        return float(value[0]), float(value[1]), float(value[2])


def model_config(where: str, fields: dict[str, Any]) -> ModelConfig:
    """Build an architecture, under the zoo's name for it where there is one."""
    try:
        for name in ARCHITECTURES:
            known = ModelConfig(name=name)
            if ModelConfig.model_validate({**fields, "name": name}) == known:
                return known
        return ModelConfig.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise RegistryError(f"{where}: {place}: {first['msg']}") from error
