"""Conditions on columns, by which samples of Parquet shards are chosen: "similarity >= 0.3"."""

from __future__ import annotations

import json
import re
from typing import NamedTuple

OPERATORS = ("<=", ">=", "==", "!=", "<", ">")
_CONDITION = re.compile(r"\s*(.+?)\s*(<=|>=|==|!=|<|>)\s*(.+?)\s*")


class Condition(NamedTuple):
    """A column, one of `OPERATORS`, and what its values are compared with."""

    column: str
    operator: str
    value: bool | float | str


def parse_condition(text: str) -> Condition:
    """Return a condition; its value is a number, true, false, or text (in quotes or not).

    Raises:
        ValueError: it is none.
    """
    match = _CONDITION.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is no condition; expected COLUMN, {' '.join(OPERATORS)}, VALUE")
    column, operator, value = match.groups()
    try:
        read = json.loads(value)
    except ValueError:
        read = value
    if isinstance(read, bool | int | float | str):
        return Condition(column, operator, read)
    raise ValueError(f"{text!r}: cannot compare with {value}; expected a number, true, false, text")
