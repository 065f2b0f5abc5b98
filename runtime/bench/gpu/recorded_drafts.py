"""Draft tokens for recorded answers, as good as the runtime's own prior says that Medusa heads are."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from apar.runtime.booking import StepReport
from apar.runtime.branch import Branch
from apar.runtime.branch_table import BranchTable
from apar.runtime.executor.replay_script import ANY, FORK, TEXT, Script
from apar.runtime.speculative.drafter import Drafter
from apar.runtime.speculative.tree import DraftTree, rank_share
from apar.runtime.step import Int32Array, IntArray


class RecordedDrafter(Drafter):
    """Knows what a recorded answer goes on with, and guesses it as often as `rank_share` says: the token that comes
    is a depth's r-th guess with that probability, and each depth is drawn alone.

    Args:
        script: the automaton of the recorded answers.
        table: live branches.
        tree: the largest draft of a row.
        vocab_size: tokens from TEXT up to this one are text.
    """

    def __init__(self, script: Script, table: BranchTable, tree: DraftTree, vocab_size: int) -> None:
        self.tree = tree
        self.foreign_seconds = 0.0
        """Time that real heads would not spend on the host."""
        self._script = script
        self._table = table
        self._text = vocab_size - TEXT
        self._random = np.random.default_rng(0)
        self._shares = np.cumsum([rank_share(rank) for rank in range(tree.max_rank + 1)])
        self._state: Int32Array = np.zeros(table.capacity, np.int32)
        self._length: Int32Array = np.zeros(table.capacity, np.int32)
        self._branches: list[Branch | None] = [None] * table.capacity
        self._guesses: Int32Array = np.zeros((0, tree.max_depth, tree.max_rank + 1), np.int32)

    def available(self, slots: IntArray) -> Int32Array:
        """See Drafter.available: the whole tree, always."""
        began = time.perf_counter()
        self._catch_up(slots)
        self._guesses = self._guess(slots)
        self._slots = slots
        self.foreign_seconds += time.perf_counter() - began
        return np.full(slots.size, self.tree.size, np.int32)

    def tokens(self, slots: IntArray, sizes: Int32Array) -> Int32Array:
        """See Drafter.tokens."""
        assert np.array_equal(slots, self._slots)
        row = np.repeat(np.arange(slots.size), sizes)
        node = np.arange(row.size) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        return self._guesses[row, self.tree.depth[node] - 1, self.tree.rank[node]]

    def learn(self, report: StepReport, slots: IntArray, wanted: IntArray, children: Sequence[Branch]) -> None:
        """See Drafter.learn: there is nothing to learn."""

    def rest(self, report: StepReport) -> None:
        """See Drafter.rest."""

    def _catch_up(self, slots: IntArray) -> None:
        """Follow what branches have said since they were last asked about."""
        for slot in slots.tolist():
            if self._branches[slot] is not self._table.branches[slot]:
                self._branches[slot] = self._table.branches[slot]
                self._state[slot], self._length[slot] = self._script.start, 0
        behind = slots[self._length[slots] < self._table.length[slots]]
        while behind.size:
            token = self._table.tokens[behind, self._length[behind]]
            self._state[behind] = self._script.next(self._state[behind], token)
            self._length[behind] += 1
            behind = behind[self._length[behind] < self._table.length[behind]]

    def _guess(self, slots: IntArray) -> Int32Array:
        """[n, depth, ranks]: the recorded token in the place that was drawn for it, other text elsewhere."""
        script, state = self._script, self._state[slots]
        banned = self._table.fork_limit[slots] < 0
        ranks = np.arange(self.tree.max_rank + 1)
        guesses = np.empty((slots.size, self.tree.max_depth, ranks.size), np.int32)
        for depth in range(self.tree.max_depth):
            first, second = script.first_token[state], script.second_token[state]
            inline = banned & (first == FORK)
            right = np.where(inline, np.where(second == ANY, TEXT, second), first)
            state = np.where(inline, script.second_state[state], script.first_state[state])
            guesses[:, depth] = TEXT + (np.maximum(right, TEXT)[:, None] - TEXT + 1 + ranks) % self._text
            drawn = np.searchsorted(self._shares, self._random.random(slots.size), side="right")
            known = np.flatnonzero((drawn < ranks.size) & (right >= 0))
            guesses[known, depth, drawn[known]] = right[known]
        return guesses
