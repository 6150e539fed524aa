"""Rows of different lengths in flat arrays: they travel through the object store without a copy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from clip_ray.data.samples import Ints


@dataclass(frozen=True)
class Ragged:
    """Rows of different lengths in one flat array: row i is values[splits[i] : splits[i + 1]]."""

    values: np.ndarray[Any, Any]
    splits: Ints

    @classmethod
    def of(cls, rows: Sequence[np.ndarray[Any, Any]], dtype: type) -> Ragged:
        """Return the rows, one after the other."""
        splits = np.zeros(len(rows) + 1, np.int64)
        np.cumsum([len(row) for row in rows], out=splits[1:])
        values = np.concatenate(rows) if rows else np.zeros(0)
        return cls(values.astype(dtype, copy=False), splits)

    @classmethod
    def of_text(cls, rows: Sequence[str]) -> Ragged:
        """Return texts as rows of UTF-8 bytes."""
        return cls.of([np.frombuffer(row.encode(), np.uint8) for row in rows], np.uint8)

    def __len__(self) -> int:
        return len(self.splits) - 1

    def __getitem__(self, row: int) -> np.ndarray[Any, Any]:
        return self.values[self.splits[row] : self.splits[row + 1]]

    def text(self, row: int) -> str:
        """Return a row of UTF-8 bytes as text."""
        return self[row].tobytes().decode()

    @property
    def lengths(self) -> Ints:
        """The rows' lengths."""
        return np.diff(self.splits)

    @classmethod
    def from_arrow(cls, lists: pa.ChunkedArray, dtype: type) -> Ragged:
        """Return the rows of a list column without nulls."""
        array = lists.combine_chunks()
        offsets = array.offsets.to_numpy()
        values = array.flatten().to_numpy(zero_copy_only=False).astype(dtype, copy=False)
        return cls(values, (offsets - offsets[0]).astype(np.int64))

    def to_arrow(self) -> pa.Array:
        """Return the rows as a list array."""
        return pa.LargeListArray.from_arrays(self.splits, pa.array(self.values))

    def to_arrow_text(self) -> pa.Array:
        """Return rows of UTF-8 bytes as a string array."""
        return pa.array([self.text(row) for row in range(len(self))], pa.string())
