"""Verifying the drafts of one step: which nodes each row goes on from, round after round.

In round 0 every row samples behind its last token, as in a step without drafts. A row whose token is one of its draft
nodes there has the logits behind it as well, so it samples again in the next round, from that node; and so on. The
tokens are booked round by round like those of a step, so all rules of decoding hold for them unchanged, and a row's
rounds end where its branch forks or ends.
"""

from __future__ import annotations

import numpy as np

from apar.runtime.branch_blocks import BranchBlocks
from apar.runtime.branch_table import BranchTable
from apar.runtime.request_table import RequestTable
from apar.runtime.speculative.row_drafts import RowDrafts
from apar.runtime.step import Int32Array, IntArray
from apar.runtime.step_writer import Step

_NOTHING = -2


class Verification:
    """Follows the rows of one step through their drafts. To be made before the step is booked.

    Args:
        step: whose logits are there.
        table: live branches.
        requests: admitted requests.
        blocks: of the branches; gets the copies that move accepted nodes' keys and values together.
        fork: id of [Fork].
    """

    def __init__(self, step: Step, table: BranchTable, requests: RequestTable, blocks: BranchBlocks, fork: int) -> None:
        self.table = table
        self.requests = requests
        self.blocks = blocks
        self.fork = fork
        self.slots = step.sampled
        count = self.slots.size
        self.wanted: IntArray = np.arange(count)
        """[S] where among the step's logits each row's last token was sampled from."""
        self.accepted: IntArray = np.zeros(count, dtype=np.int64)
        """[S] nodes accepted."""
        self._generation = table.generation[self.slots]
        self._length = table.length[self.slots]
        drafts: RowDrafts | None = step.drafts
        sizes = np.zeros(count, dtype=np.int32)
        self._together = np.zeros(count, dtype=bool)
        self.free = np.zeros(count, dtype=bool)
        """[S] rows for whose request no limit can be met in the step."""
        self.tokens = np.zeros(0, dtype=np.int32)
        """[M] draft tokens, row after row."""
        parents = np.zeros(0, dtype=np.int64)
        if drafts is not None:
            # Rows with drafts are level, so all of them sample; their places among the sampled rows:
            sizes, self._together, self.free = drafts.sizes, drafts.together, drafts.free
            if step.rows is not self.slots:
                inside = np.isin(step.rows, self.slots)
                sizes, self._together, self.free = sizes[inside], self._together[inside], self.free[inside]
            self.tokens, parents = drafts.tokens, drafts.tree.parent
        self.sizes = sizes
        if drafts is not None and step.rows is self.slots:
            self._row, self._node = drafts.rows, drafts.nodes
        else:
            self._row = np.repeat(np.arange(count), sizes)
            self._node = np.arange(self._row.size) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        self._parent = parents[self._node]
        self._here = np.full(count, -1, dtype=np.int64)

    def behind(self) -> dict[tuple[int, int, int], tuple[int, int]]:
        """(row, node that it stands at or -1, token) -> the node that holds the token there: its place, itself."""
        keys = zip(self._row.tolist(), self._parent.tolist(), self.tokens.tolist(), strict=True)
        return dict(zip(keys, enumerate(self._node.tolist()), strict=True))

    def live(self, rows: IntArray) -> IntArray:
        """Those of `rows` whose branches live."""
        return rows[self.table.generation[self.slots[rows]] == self._generation[rows]]

    def guessed(self, rows: IntArray) -> IntArray:
        """[n] places in `tokens` of the nodes that hold the tokens which `rows` sampled last; -1: none does."""
        slots = self.slots[rows]
        said = np.full(self.slots.size, _NOTHING, dtype=np.int32)
        said[rows] = self.table.tokens[slots, self.table.length[slots] - 1]
        hits = np.flatnonzero((self._parent == self._here[self._row]) & (self.tokens == said[self._row]))
        found = np.full(self.slots.size, -1, dtype=np.int64)
        found[self._row[hits]] = hits
        guessed: IntArray = found[rows]
        return guessed

    def guesses(self, row: int) -> Int32Array:
        """Draft tokens that may come where a row stands."""
        return self.tokens[(self._row == row) & (self._parent == self._here[row])]

    def run(self, rows: IntArray, accepted: IntArray, nodes: IntArray) -> None:
        """Runs of `rows` [n] have been booked, along `accepted` [n] `nodes`, given as places [sum of accepted]."""
        if not nodes.size:
            return
        slots = self.slots[rows]
        owner = np.repeat(np.arange(rows.size), accepted)
        order = np.arange(nodes.size) - np.repeat(np.cumsum(accepted) - accepted, accepted)
        source = self._length[rows][owner] + self._node[nodes]
        self.blocks.move(slots[owner], source, self.table.computed[slots][owner] + order)
        self.table.computed[slots] += accepted.astype(np.int32)
        self.accepted[rows] += accepted
        some = accepted > 0
        last = nodes[np.cumsum(accepted)[some] - 1]
        self._here[rows[some]] = self._node[last]
        self.wanted[rows[some]] = self.slots.size + last

    def follow(self, rows: IntArray, guessed: IntArray) -> IntArray:
        """Of live `rows` whose tokens have been booked, those that sample once more; `wanted` says from where."""
        slots = self.slots[rows]
        going = guessed >= 0
        # After [Fork] the parent goes on in the next step, together with its child.
        going &= self.table.tokens[slots, self.table.length[slots] - 1] != self.fork
        together = self._together[rows]
        if together.any():
            owners = self.table.request[slots]
            everyone = np.bincount(owners[going], minlength=self.requests.live.size) == self.requests.live
            going &= ~together | everyone[owners]
        rows, hits = rows[going], guessed[going]
        if not rows.size:
            return rows
        slots = self.slots[rows]
        source, target = self._length[rows] + self._node[hits], self.table.computed[slots]
        self.blocks.move(slots, source, target)
        self.table.computed[slots] += 1
        self._here[rows] = self._node[hits]
        self.accepted[rows] += 1
        self.wanted[rows] = self.slots.size + hits
        return rows
