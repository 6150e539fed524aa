"""Evaluates the part of PromQL that our alert rules use, on samples of a test.

After Prometheus's documentation of its query language and of `rate` (which extrapolates to the
window's ends); what is not here is an error, not a guess. test_alerts.py holds it against results
computed by hand.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

LOOKBACK_S = 300.0  # after which a series that has no new sample is gone
Labels = frozenset[tuple[str, str]]
Vector = dict[Labels, float]

_TOKEN = re.compile(
    r"\s*(?:(?P<number>\d+(?:\.\d+)?(?![\w:]))|(?P<duration>\d+[smhd])|(?P<name>[a-zA-Z_:][\w:]*)"
    r"|(?P<string>\"[^\"]*\")|(?P<op>=~|!~|!=|==|>=|<=|[-+*/<>=(){}\[\],]))"
)
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_PRECEDENCE = {"and": 1, "unless": 1, **dict.fromkeys(("==", "!=", ">", "<", ">=", "<="), 2)}
_PRECEDENCE |= {"+": 3, "-": 3, "*": 4, "/": 4}
_OPERATIONS: dict[str, Any] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b if b else (math.nan if a == 0 or math.isnan(a) else math.inf),
    "==": lambda a, b: a == b,
    "!=": lambda a, b: a != b,
    ">": lambda a, b: a > b,
    "<": lambda a, b: a < b,
    ">=": lambda a, b: a >= b,
    "<=": lambda a, b: a <= b,
}
_AGGREGATIONS: dict[str, Any] = {
    "sum": sum,
    "max": max,
    "min": min,
    "count": len,
    "avg": lambda values: sum(values) / len(values),
}


@dataclass
class Samples:
    """What Prometheus has scraped: series by name and labels, each with (time, value) pairs."""

    series: dict[tuple[str, Labels], list[tuple[float, float]]] = field(default_factory=dict)

    def add(self, name: str, time: float, value: float, **labels: str) -> None:
        """Add a sample; the times of a series rise."""
        key = (name, frozenset(labels.items()))
        self.series.setdefault(key, []).append((time, value))

    def gone(self, name: str, time: float, **labels: str) -> None:
        """Note that a scrape did not find a series that an earlier one had."""
        self.add(name, time, math.nan, **labels)

    def named(self, name: str) -> Iterator[tuple[Labels, list[tuple[float, float]]]]:
        """Yield the series of a name."""
        for (found, labels), samples in self.series.items():
            if found == name:
                yield labels, samples


def evaluate(expression: str, samples: Samples, at: float) -> Vector | float:
    """Return an expression's value at a time: a scalar, or the vector of its series."""
    tokens = _tokens(expression)
    parser = _Parser(tokens, samples, at)
    value = parser.binary(0)
    if parser.tokens:
        raise ValueError(f"{expression!r}: {parser.tokens[0][1]!r} is left over")
    return value


def firing(rule: dict[str, Any], samples: Samples, at: float, every_s: float = 15) -> set[Labels]:
    """Return the series for which an alert fires: its expression has held for all of `for`."""
    (number, unit) = re.fullmatch(r"(\d+)([smhd])", rule.get("for", "0s")).groups()  # type: ignore[union-attr]
    held = int(number) * _UNITS[unit]
    times = [at - held + every_s * i for i in range(int(held // every_s) + 1)]
    found: set[Labels] | None = None
    for time in times:
        value = evaluate(rule["expr"], samples, time)
        if not isinstance(value, dict):
            raise ValueError(f"{rule['alert']}: an alert's expression is a vector, not a number")
        found = set(value) if found is None else found & set(value)
    assert found is not None
    return found


def _tokens(expression: str) -> list[tuple[str, str]]:
    found, at = [], 0
    text = expression.strip()
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            raise ValueError(f"{expression!r}: cannot read {text[at : at + 20]!r}")
        assert match.lastgroup is not None
        found.append((match.lastgroup, match[match.lastgroup]))
        at = match.end()
    return found


class _Parser:
    """Reads and computes at once: the expressions are short."""

    def __init__(self, tokens: list[tuple[str, str]], samples: Samples, at: float) -> None:
        self.tokens, self._samples, self._at = tokens, samples, at

    def _next(self) -> str:
        return self.tokens[0][1] if self.tokens else ""

    def _take(self, expected: str | None = None) -> str:
        if not self.tokens or (expected is not None and self._next() != expected):
            raise ValueError(f"expected {expected!r}, found {self._next()!r}")
        return self.tokens.pop(0)[1]

    def binary(self, least: int) -> Vector | float:
        left = self._single()
        while self.tokens and _PRECEDENCE.get(self._next(), 0) > least:
            operator = self._take()
            on: list[str] | None = None
            if self._next() == "on":
                self._take()
                on = self._names()
            right = self.binary(_PRECEDENCE[operator])
            left = _combine(operator, left, right, on)
        return left

    def _single(self) -> Vector | float:
        kind, text = self.tokens[0]
        if kind == "number":
            return float(self._take())
        if text == "(":
            self._take()
            value = self.binary(0)
            self._take(")")
            return value
        if kind != "name":
            raise ValueError(f"unexpected {text!r}")
        self._take()
        if text in _AGGREGATIONS:
            return self._aggregation(text)
        if self._next() == "(":
            return self._function(text)
        return self._instant(text, self._matchers())

    def _names(self) -> list[str]:
        self._take("(")
        names = []
        while self._next() != ")":
            names.append(self._take())
            if self._next() == ",":
                self._take()
        self._take(")")
        return names

    def _matchers(self) -> list[tuple[str, str, str]]:
        found = []
        if self._next() == "{":
            self._take()
            while self._next() != "}":
                found.append((self._take(), self._take(), self._take().strip('"')))
                if self._next() == ",":
                    self._take()
            self._take("}")
        return found

    def _aggregation(self, how: str) -> Vector:
        by = []
        if self._next() == "by":
            self._take()
            by = self._names()
        self._take("(")
        inner = self.binary(0)
        self._take(")")
        groups: dict[Labels, list[float]] = {}
        for labels, value in _vector(inner).items():
            kept = frozenset(item for item in labels if item[0] in by)
            groups.setdefault(kept, []).append(value)
        return {labels: _AGGREGATIONS[how](values) for labels, values in groups.items()}

    def _function(self, name: str) -> Vector | float:
        self._take("(")
        if name == "time":
            self._take(")")
            return self._at
        if name in ("rate", "increase"):
            series = self._take()
            matchers = self._matchers()
            self._take("[")
            text = self._take()
            self._take("]")
            self._take(")")
            window = int(text[:-1]) * _UNITS[text[-1]]
            return self._range(series, matchers, window, is_rate=name == "rate")
        if name == "histogram_quantile":
            quantile = self.binary(0)
            self._take(",")
            buckets = self.binary(0)
            self._take(")")
            assert isinstance(quantile, float)
            return _quantile(quantile, _vector(buckets))
        raise ValueError(f"function {name} is not known here")

    def _selected(
        self, name: str, matchers: list[tuple[str, str, str]]
    ) -> Iterator[tuple[Labels, list[tuple[float, float]]]]:
        for labels, samples in self._samples.named(name):
            if all(_matches(dict(labels).get(label, ""), *rest) for label, *rest in matchers):
                yield labels, samples

    def _instant(self, name: str, matchers: list[tuple[str, str, str]]) -> Vector:
        found = {}
        for labels, samples in self._selected(name, matchers):
            recent = [v for t, v in samples if self._at - LOOKBACK_S < t <= self._at]
            if recent and not math.isnan(recent[-1]):
                found[labels] = recent[-1]
        return found

    def _range(
        self, name: str, matchers: list[tuple[str, str, str]], window: float, is_rate: bool
    ) -> Vector:
        found = {}
        for labels, samples in self._selected(name, matchers):
            inside = [
                (t, v)
                for t, v in samples
                if self._at - window < t <= self._at and not math.isnan(v)
            ]
            if len(inside) > 1:
                increase = _extrapolated(inside, self._at - window, self._at)
                found[labels] = increase / window if is_rate else increase
        return found


def _extrapolated(inside: list[tuple[float, float]], start: float, end: float) -> float:
    """Return a counter's increase over a window, as Prometheus extrapolates it to the ends."""
    resets = sum(a for (_, a), (_, b) in zip(inside, inside[1:], strict=False) if b < a)
    (first_time, first), (last_time, last) = inside[0], inside[-1]
    increase = last - first + resets
    sampled = last_time - first_time
    mean = sampled / (len(inside) - 1)
    before, after = first_time - start, end - last_time
    before = before if before < 1.1 * mean else mean / 2
    after = after if after < 1.1 * mean else mean / 2
    if increase > 0 and first >= 0:
        before = min(before, sampled * first / increase)  # a counter was never below 0
    return increase * (sampled + before + after) / sampled


def _quantile(quantile: float, buckets: Vector) -> Vector:
    groups: dict[Labels, list[tuple[float, float]]] = {}
    for labels, count in buckets.items():
        bound = float(dict(labels)["le"].replace("+Inf", "inf"))
        rest = frozenset(item for item in labels if item[0] != "le")
        groups.setdefault(rest, []).append((bound, count))
    found = {}
    for labels, pairs in groups.items():
        pairs.sort()
        total = pairs[-1][1]
        if not math.isinf(pairs[-1][0]) or len(pairs) < 2 or total == 0:
            continue  # NaN in Prometheus: compares as false
        rank, lower, below = quantile * total, 0.0, 0.0
        for bound, count in pairs:
            if count >= rank:
                last_finite = pairs[-2][0]
                inside = lower + (bound - lower) * (rank - below) / max(count - below, 1e-12)
                found[labels] = last_finite if math.isinf(bound) else inside
                break
            lower, below = bound, count
    return found


def _matches(value: str, operator: str, wanted: str) -> bool:
    if operator in ("=", "!="):
        return (value == wanted) == (operator == "=")
    return (re.fullmatch(wanted, value) is not None) == (operator == "=~")


def _vector(value: Vector | float) -> Vector:
    if not isinstance(value, dict):
        raise ValueError("expected a vector, found a number")
    return value


def _combine(
    operator: str, left: Vector | float, right: Vector | float, on: list[str] | None
) -> Vector | float:
    compares = _PRECEDENCE[operator] == 2
    if isinstance(left, float) and isinstance(right, float):
        if compares:
            raise ValueError("a comparison of two numbers needs `bool` in PromQL")
        return float(_OPERATIONS[operator](left, right))

    def key(labels: Labels) -> Labels:
        return labels if on is None else frozenset(item for item in labels if item[0] in on)

    if operator in ("and", "unless"):
        there, kept = {key(labels) for labels in _vector(right)}, operator == "and"
        return {ls: v for ls, v in _vector(left).items() if (key(ls) in there) == kept}
    pairs: list[tuple[Labels, float, float]]
    if isinstance(right, float):
        pairs = [(labels, value, right) for labels, value in _vector(left).items()]
    elif isinstance(left, float):
        pairs = [(labels, left, value) for labels, value in right.items()]
    else:
        others = {key(labels): value for labels, value in right.items()}
        pairs = [(key(ls), v, others[key(ls)]) for ls, v in left.items() if key(ls) in others]
    if compares:
        own = [(labels, a if isinstance(left, dict) else b, a, b) for labels, a, b in pairs]
        return {labels: value for labels, value, a, b in own if _OPERATIONS[operator](a, b)}
    return {labels: float(_OPERATIONS[operator](a, b)) for labels, a, b in pairs}
