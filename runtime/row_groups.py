"""Rows of a step in groups of siblings: runs of equal request indices."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from apar.runtime.step import Int32Array, IntArray

NO_ROWS: IntArray = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True, eq=False)
class RowGroups:
    """Groups of consecutive rows that belong to one request."""

    requests: IntArray
    """[R] request index of each row."""
    starts: IntArray
    """[G] first row of each group."""
    sizes: IntArray
    """[G] rows of each group."""
    owners: IntArray
    """[G] request index of each group; all different."""
    bounds: Int32Array
    """[G + 1] `prefix_rows` of the step contract: starts, and the number of rows."""

    @classmethod
    def of(cls, requests: IntArray) -> RowGroups:
        """Group rows by their requests, whose rows must stand together."""
        count = requests.size
        if not count:
            return cls(requests, NO_ROWS, NO_ROWS, NO_ROWS, np.zeros(1, dtype=np.int32))
        edges = (requests[1:] != requests[:-1]).nonzero()[0]
        bounds = np.empty(edges.size + 2, dtype=np.int64)
        bounds[0] = 0
        np.add(edges, 1, out=bounds[1:-1])
        bounds[-1] = count
        starts = bounds[:-1]
        return cls(requests, starts, bounds[1:] - starts, requests[starts], bounds.astype(np.int32))

    @property
    def single(self) -> bool:
        """Whether every group has one row."""
        return self.starts.size == self.requests.size

    @cached_property
    def place(self) -> IntArray:
        """[R] group of each row: `values[place]` gives what groups [G] have in common to their rows."""
        return np.arange(self.starts.size).repeat(self.sizes)

    def rank(self) -> IntArray:
        """[R] place of each row in its group."""
        ranks: IntArray = np.arange(self.requests.size) - self.starts[self.place]
        return ranks
