"""Drafts of the rows of one step, and the arrays of the step contract that they change."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from apar.runtime.speculative.tree import DraftTree, causal_masks
from apar.runtime.step import BoolArray, Int32Array, IntArray


@dataclass(slots=True)
class RowDrafts:
    """What the first rows of a step drafted; rows behind them (prompts, trees being resumed) drafted nothing."""

    tree: DraftTree
    sizes: Int32Array
    """[R] nodes of each row: a prefix of the tree."""
    tokens: Int32Array
    """[M] their tokens, row after row."""
    together: BoolArray
    """[R] rows that accept a draft only if all live branches of their request do."""
    free: BoolArray
    """[R] rows for whose request no limit can be met in this step."""
    linear: bool
    """Whether no row drafted more than a chain, so that causal order is the mask."""
    rows: IntArray = field(init=False)
    """[M] which row each of the tokens belongs to,"""
    nodes: IntArray = field(init=False)
    """[M] and which node of the tree it is."""

    def __post_init__(self) -> None:
        self.rows = np.repeat(np.arange(self.sizes.size), self.sizes)
        self.nodes = np.arange(self.tokens.size) - (np.cumsum(self.sizes) - self.sizes)[self.rows]

    def pad(self, rows: int) -> None:
        """Take in rows that draft nothing, up to `rows`."""
        more = rows - self.sizes.size
        if more:
            self.sizes = np.concatenate((self.sizes, np.zeros(more, dtype=np.int32)))
            self.together = np.concatenate((self.together, np.zeros(more, dtype=bool)))
            self.free = np.concatenate((self.free, np.zeros(more, dtype=bool)))

    def places(self, query_start: Int32Array) -> IntArray:
        """[M] where the tokens stand among all tokens of the step: at the end of their rows."""
        places: IntArray = (query_start[1:] - self.sizes)[self.rows] + self.nodes
        return places

    def tree_mask(self, query_start: Int32Array, offsets: Int32Array) -> Int32Array:
        """`tree_mask` [T, W] of the step, `offsets` [T] being the tokens' places in their rows. A chain needs none."""
        counts = np.diff(query_start)
        mask = causal_masks(offsets, -(-int(counts.max()) // 32))
        places, nodes = self.places(query_start), self.nodes
        pending = (counts - self.sizes)[self.rows]
        for behind in np.unique(pending).tolist():
            chosen = pending == behind
            rows = self.tree.masks(behind)[nodes[chosen], : mask.shape[1]]
            mask[places[chosen]] = 0
            mask[places[chosen], : rows.shape[1]] = rows
        return mask
