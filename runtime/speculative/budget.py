"""How many draft tokens each row of a step gets: the one rule of docs/speculation.md.

A step bound by memory costs the same for few tokens as for more, up to a number that depends on the machine. What rows
leave of that number is the step's *budget* of draft nodes, and it goes to the nodes of largest expected gain,
whichever rows they belong to. The gain of a node is the probability that it is accepted: the tree's prior for its path
times s ** depth, s being the row's *skill*, the running share of its first guesses that held the token that came. So
rows share the budget as they become more, and a row whose drafts are accepted gets a larger part of it. Where steps
have been measured, no more of the budget is used than raises the tokens a second.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from apar.runtime.speculative.draft_cost import DraftCost
from apar.runtime.speculative.tree import DraftTree
from apar.runtime.step import Int32Array, IntArray

Float64Array = npt.NDArray[np.float64]

LEVELS = 8
"""Skills are told apart in so many steps, so that nodes of all rows can be ranked by one table."""
_FIRST_SKILL = 0.6
_WEIGHT = 0.15
_MIN_SKILL = 0.1
"""Below this nothing would ever be proposed again."""


class DraftBudget:
    """Sizes of drafts, and what rows' skills are.

    Args:
        tree: the largest draft of a row.
        adaptive: False: every row asks for all it can have, and the first rows get it.
        capacity: slots of the branch table.
        cost: of a step by its tokens; None: the budget is used up.
        min_gain: nodes less likely than this are not proposed, however much budget is left.
    """

    def __init__(
        self,
        tree: DraftTree,
        adaptive: bool,
        capacity: int,
        min_gain: float = 0.002,
        cost: DraftCost | None = None,
    ) -> None:
        self.tree = tree
        self.adaptive = adaptive
        self.cost = cost
        self.skill: Float64Array = np.full(capacity, _FIRST_SKILL)
        """[capacity] by slot."""
        skills = np.maximum((np.arange(LEVELS) + 0.5) / LEVELS, _MIN_SKILL)
        gain = skills[:, None] ** tree.depth * tree.share
        # Drafts are prefixes, so a node counts no more than the least likely before it.
        gain = np.minimum.accumulate(gain, axis=1)
        order = np.argsort(-gain.ravel(), kind="stable")
        order = order[gain.ravel()[order] >= min_gain]
        self._gains = gain.ravel()[order]
        self._trust = 1.0
        """Nodes accepted for each one that the gains promised."""
        self._promised = 0.0
        self._levels = order // tree.size
        self._nodes = order % tree.size

    def sizes(self, slots: IntArray, limits: Int32Array, budget: int, taken: int = 0) -> Int32Array:
        """[R] nodes for each row, at most `limits` [R] and in all at most `budget`, beside `taken` other tokens."""
        if budget <= 0 or not slots.size:
            return np.zeros(slots.size, dtype=np.int32)
        if not self.adaptive:
            before = np.cumsum(limits) - limits
            first: Int32Array = np.clip(budget - before, 0, limits).astype(np.int32)
            return first
        level = np.minimum((self.skill[slots] * LEVELS).astype(np.int64), LEVELS - 1)
        # Rows with room for a node, by level and node.
        width = self.tree.size + 1
        room = np.bincount(level * width + np.minimum(limits, self.tree.size), minlength=LEVELS * width)
        room = room.reshape(LEVELS, width)
        takers = room[:, ::-1].cumsum(axis=1)[:, ::-1][:, 1:]
        wanting_each = takers[self._levels, self._nodes]
        spent = np.cumsum(wanting_each)
        if self.cost is not None:
            promised = np.cumsum(wanting_each * self._gains)
            budget = self._paying(slots.size, taken, spent, promised, budget)
            self._promised = float(promised[max(0, int(np.searchsorted(spent, budget, side="right")) - 1)])
        stop = int(np.searchsorted(spent, budget, side="right"))
        # Nodes of a level stand in order.
        granted = np.bincount(self._levels[:stop], minlength=LEVELS)
        sizes: Int32Array = np.minimum(granted[level], limits).astype(np.int32)
        if stop < self._levels.size:
            # The node that no longer fits all rows of its level goes to the first of them.
            left = budget - int(spent[stop - 1] if stop else 0)
            node = int(self._nodes[stop])
            wanting = np.flatnonzero((level == self._levels[stop]) & (limits > node) & (sizes == node))
            sizes[wanting[:left]] += 1
        return sizes

    def _paying(self, rows: int, taken: int, spent: IntArray, promised: Float64Array, budget: int) -> int:
        """The part of the budget at which a step gives most tokens a second; each row gives one without drafts."""
        assert self.cost is not None
        if not self.cost.ready:
            return budget
        seconds = self.cost.base + self.cost.per_token * (taken + spent)
        rate = (rows + self._trust * promised) / seconds
        rate[spent > budget] = 0.0
        best = int(rate.argmax())
        return int(spent[best]) if rate[best] else budget

    def keep(self, accepted: int) -> None:
        """So many nodes of the step that was planned last were accepted."""
        if self._promised > 0:
            self._trust += 0.05 * (min(accepted / self._promised, 3.0) - self._trust)

    def begin(self, slots: IntArray) -> None:
        """Branches in `slots` start without a history."""
        self.skill[slots] = _FIRST_SKILL

    def inherit(self, child: int, parent: int) -> None:
        """A child begins with its parent's skill."""
        self.skill[child] = self.skill[parent]

    def learn(self, slots: IntArray, hits: npt.NDArray[np.bool_]) -> None:
        """Rows that had drafts: whether their next token was among the guesses for it."""
        self.skill[slots] += _WEIGHT * (hits - self.skill[slots])
