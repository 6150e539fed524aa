"""Conditions on columns, by which samples of Parquet shards are chosen: "similarity >= 0.3"."""

from __future__ import annotations

import json
import math
import re
from typing import NamedTuple

OPERATORS = ("<=", ">=", "==", "!=", "<", ">")
_CONDITION = re.compile(r"\s*([^<>=!]+?)\s*(<=|>=|==|!=|<|>)\s*(.+?)\s*")
_PLAIN = re.compile(r"[^<>=!\"']+")  # text that needs no quotes


class Condition(NamedTuple):
    """A column, one of `OPERATORS`, and what its values are compared with."""

    column: str
    operator: str
    value: bool | int | float | str


def parse_condition(text: str) -> Condition:
    """Return a condition; its value is a number, true, false, or text.

    Text is in double quotes, which it needs where it would be read as something else.

    Raises:
        ValueError: it is none.
    """
    match = _CONDITION.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is no condition; expected COLUMN, {' '.join(OPERATORS)}, VALUE")
    column, operator, value = match.groups()
    return Condition(column, operator, _value(text, value))


def _value(text: str, value: str) -> bool | int | float | str:
    for read in (json.loads, float):
        try:
            found = read(value)
        except ValueError:
            continue
        # NaN is not what it is compared with, whatever that is; null, lists: nothing to compare.
        if isinstance(found, str | bool | int) or (
            isinstance(found, float) and math.isfinite(found)
        ):
            return found
        break
    else:
        if _PLAIN.fullmatch(value):
            return value
    raise ValueError(
        f"{text!r}: cannot compare with {value}; expected a number, true, false, or text, in "
        "double quotes where it is more than words; each condition is an entry of its own"
    )
