"""Drafts by prompt lookup: no heads needed, so every checkpoint and executor can use them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from apar.export.manifest import TokenIds
from apar.runtime.booking import StepReport
from apar.runtime.branch import Branch, Request
from apar.runtime.branch_table import BranchTable
from apar.runtime.speculative.drafter import Drafter
from apar.runtime.speculative.lookup import LookupIndex
from apar.runtime.speculative.tree import DraftTree
from apar.runtime.step import Int32Array, IntArray


class NgramDrafter(Drafter):
    """One LookupIndex for each request, shared by its branches; drafts are chains.

    Args:
        table: live branches.
        tree: a chain.
        tokens: ids of [Fork], [Child] and the ends: a draft ends with a [Fork] or an end, and never holds [Child].
        shortest: tokens of the shortest run that is looked up.
        longest: of the longest.
    """

    def __init__(self, table: BranchTable, tree: DraftTree, tokens: TokenIds, shortest: int, longest: int) -> None:
        self.table = table
        self.tree = tree
        self.tokens_of = tokens
        self.shortest = shortest
        self.longest = longest
        self._last = {tokens.fork, *tokens.eos}
        self._found: dict[int, list[int]] = {}
        """Guesses of the step that is being planned, by slot."""

    def available(self, slots: IntArray) -> Int32Array:
        """See Drafter.available."""
        self._found.clear()
        counts = np.zeros(slots.size, dtype=np.int32)
        for row, slot in enumerate(slots.tolist()):
            branch = self.table.branches[slot]
            index = branch.request.lookup if branch is not None else None
            if index is None:
                continue
            assert branch is not None
            guesses = index.follow(branch.branch_id, self.tree.size)
            for place, token in enumerate(guesses):
                if token == self.tokens_of.child:
                    del guesses[place:]
                    break
                if token in self._last:
                    del guesses[place + 1 :]
                    break
            counts[row] = len(guesses)
            self._found[slot] = guesses
        return counts

    def tokens(self, slots: IntArray, sizes: Int32Array) -> Int32Array:
        """See Drafter.tokens."""
        drafts = [
            token
            for slot, size in zip(slots.tolist(), sizes.tolist(), strict=True)
            if size
            for token in self._found[slot][:size]
        ]
        return np.array(drafts, dtype=np.int32)

    def learn(self, report: StepReport, slots: IntArray, wanted: IntArray, children: Sequence[Branch]) -> None:
        """See Drafter.learn."""
        fresh = {branch.request.request_id for branch in report.branches if branch.request.lookup is None}
        for branch, token in zip(report.branches, report.tokens, strict=True):
            request = branch.request
            if request.lookup is None:
                request.lookup = self._index(request)
            elif request.request_id not in fresh:
                request.lookup.append(branch.branch_id, token)
        for child in children:
            if child.slot >= 0 and child.request.lookup is not None and child.request.request_id not in fresh:
                path = self.table.tokens[child.slot, : child.start]
                child.request.lookup.begin(child.branch_id, path[-self.longest :].tolist())
        for branch in report.ended:
            if branch.request.lookup is not None:
                branch.request.lookup.end(branch.branch_id)

    def rest(self, report: StepReport) -> None:
        """See Drafter.rest."""
        for branch in report.branches:
            branch.request.lookup = None

    def _index(self, request: Request) -> LookupIndex:
        """All that a request has said so far."""
        index = LookupIndex(request.prompt, self.shortest, self.longest)
        for branch in request.branches:
            said = branch.tokens
            if branch.slot >= 0:
                path = self.table.tokens[branch.slot, : self.table.length[branch.slot]]
                said = path[branch.start :].tolist()
            if branch.parent is not None:
                before = path[max(branch.start - self.longest, 0) : branch.start].tolist() if branch.slot >= 0 else ()
                index.begin(branch.branch_id, before)
            for token in said:
                index.append(branch.branch_id, token)
            if branch.finish_reason is not None:
                index.end(branch.branch_id)
        return index
