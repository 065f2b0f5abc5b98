"""Drafts of Medusa heads: each head's likeliest tokens, laid out as the tree (arXiv 2401.10774)."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from apar.export.manifest import TokenIds
from apar.runtime.booking import StepReport
from apar.runtime.branch import Branch
from apar.runtime.branch_table import BranchTable
from apar.runtime.executor.base import Executor
from apar.runtime.speculative.drafter import Drafter
from apar.runtime.speculative.tree import DraftTree
from apar.runtime.step import Float32Array, Int32Array, IntArray

_UNKNOWN = -1


class MedusaDrafter(Drafter):
    """Keeps each branch's guesses until its next step.

    The hidden state that predicted a branch's last token gave them: head i guessed the token i + 1 after it. A child
    begins with what the state that predicted [Fork] guessed for its parent, shifted by the forced [Child].

    Args:
        executor: runs the heads.
        table: live branches.
        tree: no deeper than there are heads.
        vocab_size: tokens that may come out.
        tokens: ids of [Fork], [Child] and the ends.
    """

    def __init__(
        self, executor: Executor, table: BranchTable, tree: DraftTree, vocab_size: int, tokens: TokenIds
    ) -> None:
        executor.load_draft_heads()
        self.executor = executor
        self.table = table
        self.tree = tree
        self.vocab_size = vocab_size
        self.tokens_of = tokens
        width = tree.max_rank + 1
        self._guesses = np.full((table.capacity, tree.max_depth, width), _UNKNOWN, dtype=np.int32)
        self._depth = np.zeros(table.capacity, dtype=np.int32)
        """Heads with guesses, by slot."""
        self._length = np.full(table.capacity, -1, dtype=np.int32)
        """Path length behind which the guesses belong."""
        self._size = np.zeros(table.capacity, dtype=np.int32)
        """Nodes that the guesses suffice for, as far as their ranks go."""

    def available(self, slots: IntArray) -> Int32Array:
        """See Drafter.available."""
        depth = np.where(self._length[slots] == self.table.length[slots], self._depth[slots], 0)
        return np.minimum(self.tree.upto_depth[depth], self._size[slots])

    def tokens(self, slots: IntArray, sizes: Int32Array) -> Int32Array:
        """See Drafter.tokens."""
        rows = np.repeat(slots, sizes)
        node = np.arange(rows.size) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        return self._guesses[rows, self.tree.depth[node] - 1, self.tree.rank[node]]

    def learn(self, report: StepReport, slots: IntArray, wanted: IntArray, children: Sequence[Branch]) -> None:
        """See Drafter.learn."""
        if not slots.size:
            return
        table, tree = self.table, self.tree
        began = time.perf_counter()
        logits = self.executor.draft_logits(wanted)[:, : tree.max_depth, : self.vocab_size]
        self.model_seconds += time.perf_counter() - began
        ranks = int(np.searchsorted(tree.upto_rank, min(self.most, tree.size)))
        self._guesses[slots, :, :ranks] = self._best(logits, table.fork_limit[slots] < 0, ranks)
        self._size[slots] = size = tree.upto_rank[ranks]
        self._depth[slots] = tree.max_depth
        self._length[slots] = table.length[slots]
        for child in children:
            parent = child.parent
            assert parent is not None
            if parent.slot >= 0 and child.slot >= 0 and tree.max_depth > 1:
                self._guesses[child.slot, :-1] = self._guesses[parent.slot, 1:]
                self._depth[child.slot] = tree.max_depth - 1
                self._size[child.slot] = size
                self._length[child.slot] = table.length[child.slot]

    def rest(self, report: StepReport) -> None:
        """See Drafter.rest. Guesses know behind how long a path they belong, so old ones are left where they are."""

    def _best(
        self, logits: Float32Array, no_fork: np.ndarray[tuple[int, ...], np.dtype[np.bool_]], ranks: int
    ) -> Int32Array:
        """[n, depth, ranks] likeliest tokens of each head, [Child] never, [Fork] not where a branch cannot fork.

        Overwrites `logits`.
        """
        logits[:, :, self.tokens_of.child] = -np.inf
        if no_fork.any():
            logits[no_fork, :, self.tokens_of.fork] = -np.inf
        best = np.empty((*logits.shape[:2], ranks), dtype=np.int32)
        rows, heads = np.ogrid[: logits.shape[0], : logits.shape[1]]
        for rank in range(ranks):
            top = logits.argmax(axis=2)
            best[:, :, rank] = top
            logits[rows, heads, top] = -np.inf
        return best
