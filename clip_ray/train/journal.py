"""A run's journals: JSON lines that are on storage before anything depends on them.

On a local disk a journal is one file. On S3, where nothing can be appended to, it is numbered
parts, joined under the stable name when the run ends. Rows are only ever added: when steps are
recomputed after a crash, the later attempt's rows supersede the earlier ones.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from clip_ray.storage import LocalStore, Store
from clip_ray.train.checkpoint import Commit

Row = dict[str, Any]
_TAIL_BYTES = 64 << 10  # many times a row's length


class Journal:
    """Appends rows to `<run>/<name>.jsonl`. One process writes a journal at a time.

    In it one thread may append while another flushes.
    """

    def __init__(self, run: Store, name: str) -> None:
        self._run, self._name = run, name
        self._pending: list[str] = []
        self._part = b""  # a part that may have been written: it is tried again as it is
        # Asked for when the first is written: a storage that is away keeps no journal from opening.
        self._next_part: int | None = None
        self._path = Path(run.uri) / f"{name}.jsonl" if isinstance(run, LocalStore) else None
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            _cut_torn_line(self._path)

    def append(self, rows: Iterable[Row]) -> None:
        """Add rows; they are durable after `flush`."""
        self._pending += [json.dumps(row, separators=(",", ":")) + "\n" for row in rows]
        if self._path is not None and self._pending:
            lines, self._pending = "".join(self._pending).encode(), []
            before = self._path.stat().st_size if self._path.exists() else 0
            try:
                with open(self._path, "ab") as file:
                    file.write(lines)
            except OSError:
                # A full disk may have taken half a line: what follows must not be joined to it.
                os.truncate(self._path, before)
                raise

    def flush(self) -> None:
        """Make all rows durable that were appended before.

        Raises:
            OSError: it failed; the next call tries again.
        """
        if self._path is not None:
            if self._path.exists():
                with open(self._path, "rb+") as file:
                    os.fsync(file.fileno())
            return
        if self._part:
            self._create_part()
        lines = list(self._pending)
        if lines:
            self._part = "".join(lines).encode()
            del self._pending[: len(lines)]
            self._create_part()

    def _create_part(self) -> None:
        if self._next_part is None:
            parts = self._run.child(f"{self._name}.parts").files()
            self._next_part = 1 + max((int(p.split(".")[0]) for p in parts), default=0)
        # Exclusively: a recorder that was thought dead must not write over its successor.
        self._run.create(f"{self._name}.parts/{self._next_part:08d}.jsonl", self._part)
        self._next_part += 1
        self._part = b""

    def join(self) -> None:
        """Write the whole journal under its stable name, where it is in parts."""
        self.flush()
        parts = _parts(self._run, self._name) if self._path is None else []
        if parts:
            self._run.write(f"{self._name}.jsonl", b"".join(parts))


def read_journal(run: Store, name: str) -> Iterator[Row]:
    """Yield a journal's rows, in the order in which they were added; a torn last line is left out.

    Yields nothing where there is no such journal.
    """
    if isinstance(run, LocalStore):
        pieces: Iterable[bytes] = [run.read(f"{name}.jsonl")] if run.exists(f"{name}.jsonl") else []
    else:
        pieces = _parts(run, name)
    for piece in pieces:
        for line in piece.splitlines(keepends=True):
            if line.endswith(b"\n"):
                yield json.loads(line)


def last_rows(run: Store, name: str) -> list[Row]:
    """Return some of a journal's last whole rows, without reading the rest; empty without any."""
    if isinstance(run, LocalStore):
        if not run.exists(f"{name}.jsonl"):
            return []
        size = run.info(f"{name}.jsonl").size
        start = max(size - _TAIL_BYTES, 0)
        # The first line of a tail is a part of one.
        lines = run.read(f"{name}.jsonl", start, size).splitlines(keepends=True)[start > 0 :]
    else:
        parts = run.child(f"{name}.parts").files()
        tail = run.child(f"{name}.parts").read(parts[-1]) if parts else b""
        lines = tail.splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith(b"\n")]


def last_row(run: Store, name: str) -> Row | None:
    """Return a journal's last whole row, without reading the rest; None where there is none."""
    rows = last_rows(run, name)
    return rows[-1] if rows else None


def lineage(rows: Iterable[Row], starts: Mapping[int, Commit] | None = None) -> list[Row]:
    """Return the rows of the steps that led to the final weights, by step.

    From the newest attempt back: its rows, those up to the commit that it started from of the
    attempt that made that, and so on.

    Args:
        rows: of the journal of steps.
        starts: the commit that each attempt started from (`Checkpoints.starts`). An attempt that
            is not in it went on from what was there at the step before its first row.
    """
    attempts: dict[int, dict[int, Row]] = {}
    for row in rows:
        attempts.setdefault(row["attempt"], {})[row["step"]] = row
    kept: dict[int, Row] = {}
    attempt, upto = max(attempts, default=0), math.inf
    while attempt > 0:
        own = attempts.get(attempt, {})
        kept |= {step: row for step, row in own.items() if step <= upto}
        start = (starts or {}).get(attempt)
        if start is None:
            upto = min([upto, *(step - 1 for step in own)])
            attempt = max((number for number in attempts if number < attempt), default=0)
        else:
            attempt, upto = min(start.attempt, attempt - 1), min(upto, start.step)
    return [kept[step] for step in sorted(kept)]


def _parts(run: Store, name: str) -> list[bytes]:
    folder = run.child(f"{name}.parts")
    return [folder.read(part) for part in folder.files()]


def _cut_torn_line(path: Path) -> None:
    """Remove what a killed writer left after the last newline."""
    if not path.exists():
        return
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        with open(path, "rb+") as file:
            file.truncate(whole)
