"""Samples that could not be used: what is recorded of them, and the sum of it for a message.

A row of the quarantine file holds names and reasons, never a caption or an image: the file is
read by people who need not be allowed to see the data.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class BadSample:
    """A sample whose row is void.

    Attributes:
        key: its key; `#ordinal` where the shard cannot be read.
        reason: the short name it is counted under, such as "truncated" or "shard-missing".
        detail: what was found, for a person.
        shard: path of its shard.
    """

    key: str
    reason: str
    detail: str = ""
    shard: str = ""


def summarise(rows: Iterable[BadSample], reasons: int = 3, examples: int = 2) -> str:
    """Return the most frequent reasons with examples, a line each, for the message of a stop."""
    counts: Counter[str] = Counter()
    shown: dict[str, list[str]] = {}
    for row in rows:
        counts[row.reason] += 1
        kept = shown.setdefault(row.reason, [])
        if len(kept) < examples:
            where = f" in {row.shard}" if row.shard else ""
            kept.append(f"{row.key}{where}" + (f" ({row.detail})" if row.detail else ""))
    # Ties by name: the message of a deterministic run is deterministic.
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    lines = [
        f"{count} x {reason}: {'; '.join(shown[reason])}" for reason, count in ranked[:reasons]
    ]
    rest = sum(count for _, count in ranked[reasons:])
    if rest:
        lines.append(f"{rest} for {len(ranked) - reasons} other reasons")
    return "\n".join(lines)


def count_reasons(
    rows: Iterable[Mapping[str, Any]], steps: Iterable[Mapping[str, Any]]
) -> dict[str, int]:
    """Return how many rows were void, by reason, the most frequent first.

    Args:
        rows: of the quarantine file; their `step` is the number of steps done before.
        steps: rows of the journal of the steps that count: what another attempt has recomputed is
            in the quarantine file twice.
    """
    counted = {(row["attempt"], row["step"]) for row in steps}
    counts = Counter(r["reason"] for r in rows if (r["attempt"], r["step"] + 1) in counted)
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
