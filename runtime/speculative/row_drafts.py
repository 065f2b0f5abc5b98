"""Drafts of the rows of one step, and the arrays of the step contract that they change."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from apar.runtime.fork_bans import BoolArray
from apar.runtime.speculative.tree import DraftTree, causal_masks
from apar.runtime.step import Int32Array, IntArray


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

    def pad(self, rows: int) -> None:
        """Take in rows that draft nothing, up to `rows`."""
        more = rows - self.sizes.size
        if more:
            self.sizes = np.concatenate((self.sizes, np.zeros(more, dtype=np.int32)))
            self.together = np.concatenate((self.together, np.zeros(more, dtype=bool)))
            self.free = np.concatenate((self.free, np.zeros(more, dtype=bool)))

    def nodes(self) -> IntArray:
        """[M] which node of the tree each of the tokens is."""
        starts = np.cumsum(self.sizes) - self.sizes
        nodes: IntArray = np.arange(self.tokens.size) - np.repeat(starts, self.sizes)
        return nodes

    def places(self, query_start: Int32Array) -> IntArray:
        """[M] where the tokens stand among all tokens of the step: at the end of their rows."""
        places: IntArray = np.repeat(query_start[1:] - self.sizes, self.sizes) + self.nodes()
        return places

    def tree_mask(self, query_start: Int32Array, offsets: Int32Array) -> Int32Array:
        """`tree_mask` [T, W] of the step, `offsets` [T] being the tokens' places in their rows. A chain needs none."""
        counts = np.diff(query_start)
        mask = causal_masks(offsets, -(-int(counts.max()) // 32))
        places, nodes = self.places(query_start), self.nodes()
        pending = np.repeat(counts - self.sizes, self.sizes)
        for behind in np.unique(pending).tolist():
            chosen = pending == behind
            rows = self.tree.masks(behind)[nodes[chosen], : mask.shape[1]]
            mask[places[chosen]] = 0
            mask[places[chosen], : rows.shape[1]] = rows
        return mask
