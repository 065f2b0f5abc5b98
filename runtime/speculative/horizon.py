"""How far branches of one request may run ahead of each other without changing what the request says.

Plain decoding moves all live branches of a request together: in its turn c every branch samples its c-th token. A
branch's *clock* is the number of turns that its path stands for, so a child's clock starts at its parent's. With
drafts branches move at different speeds, and three rules of decoding look at several branches at once: `max_tokens`
(which tokens still fit), `max_branches`, and the [Fork] ban where no token is left for a child. Their outcome must be
that of plain decoding, so before every step each request is in one of three states:

- *free*: even if every branch advanced as far as it can in this step, and forked as often as it may, none of these
  limits could be met. Each branch goes its own way.
- *together*: a limit might be met, and all branches stand at the same clock. They go on as in plain decoding: a round
  of drafts is taken only if all branches of the request take it.
- *catching*: a limit might be met, and branches stand at different clocks, all of them certified when they got there.
  Those behind go on up to the most advanced clock, the others wait.

The bounds on births: a branch forks at most every other token, and a child born after i of g tokens has g - i left.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from apar.runtime.branch_table import BranchTable
from apar.runtime.request_table import RequestTable
from apar.runtime.row_groups import RowGroups
from apar.runtime.step import Int32Array, IntArray

BoolArray = npt.NDArray[np.bool_]

_GAPS = 128
_LEVELS = 8
_FAR = 1 << 24


def _birth_bounds() -> tuple[IntArray, IntArray]:
    """[levels, gap] most descendants that a branch can bear within a gap of tokens, and most tokens of theirs."""
    births = np.zeros((_LEVELS + 1, _GAPS + 1), dtype=np.int64)
    tokens = np.zeros_like(births)
    for level in range(1, _LEVELS + 1):
        for gap in range(1, _GAPS + 1):
            left = gap - np.arange(1, gap + 1, 2)
            births[level, gap] = min(int((1 + births[level - 1, left]).sum()), _FAR)
            tokens[level, gap] = min(int((left + tokens[level - 1, left]).sum()), _FAR)
    # Beyond the table, a branch that may fork is never certified.
    births[1:, _GAPS] = tokens[1:, _GAPS] = _FAR
    return births, tokens


@dataclass(slots=True)
class Reach:
    """What rows of a step may do."""

    rows: IntArray
    """[R] slots of the rows that take part."""
    allowance: Int32Array
    """[R] most tokens that each may grow by."""
    together: BoolArray
    """[R] rows that go on to a further token only if all live branches of their request do."""
    free: BoolArray
    """[R] rows for whose request no limit can be met in this step."""


def _plain(rows: IntArray) -> Reach:
    """All grow by one token."""
    nobody = np.zeros(rows.size, dtype=bool)
    return Reach(rows, np.ones(rows.size, dtype=np.int32), nobody, nobody)


class Horizon:
    """Applies the rule before every step.

    Args:
        table: live branches.
        requests: admitted requests.
        max_advance: most tokens that a row can grow by in a step.
    """

    def __init__(self, table: BranchTable, requests: RequestTable, max_advance: int) -> None:
        self.table = table
        self.requests = requests
        self.max_advance = max_advance
        self._births, self._birth_tokens = _birth_bounds()
        self._even: tuple[IntArray, IntArray] | None = None
        """Rows, and generations of their slots, that had the same clocks in the last step, which nobody drafts in."""

    def reach(self, rows: IntArray, drafting: bool = True) -> Reach:
        """Which of `rows` (siblings together, parked branches left out) take part in the next step, and how.

        drafting: False: no row grows by more than a token.
        """
        table, requests = self.table, self.requests
        if drafting:
            self._even = None
        elif self._even is not None:
            before, generation = self._even
            # The same branches, all a token further: clocks are as they were to each other.
            if np.array_equal(rows, before) and np.array_equal(table.generation[rows], generation):
                return _plain(rows)
        groups = RowGroups.of(table.request[rows])
        allowance = np.full(rows.size, self.max_advance, dtype=np.int32)
        if not rows.size:
            return Reach(rows, allowance, np.zeros(0, dtype=bool), np.zeros(0, dtype=bool))
        owners, starts = groups.owners, groups.starts
        clock = table.length[rows] - table.clock_base[rows]
        slowest = np.minimum.reduceat(clock, starts)
        level = slowest == requests.clock[owners]
        if not drafting:
            self._even = None
            if level.all():
                self._even = rows.copy(), table.generation[rows]
                return _plain(rows)
        alone = (requests.live[owners] == 1) & level
        free = alone if alone.all() else alone | self._certified(rows, groups, clock, slowest)
        if free.all():
            return Reach(rows, allowance, np.zeros(rows.size, dtype=bool), np.ones(rows.size, dtype=bool))
        catching = np.repeat(~free & ~level, groups.sizes)
        together = np.repeat(~free & level, groups.sizes)
        behind = np.repeat(requests.clock[owners], groups.sizes) - clock
        allowance[catching] = np.minimum(behind, self.max_advance)[catching]
        taking = allowance > 0
        return Reach(rows[taking], allowance[taking], together[taking], np.repeat(free, groups.sizes)[taking])

    def advanced(self, slots: IntArray) -> None:
        """Note that the branches in `slots` are about to grow by a token."""
        clock = self.table.length[slots] - self.table.clock_base[slots] + 1
        np.maximum.at(self.requests.clock, self.table.request[slots], clock)

    def advanced_to(self, slots: IntArray) -> None:
        """Note how far the branches in `slots` have grown."""
        clock = self.table.length[slots] - self.table.clock_base[slots]
        np.maximum.at(self.requests.clock, self.table.request[slots], clock)

    def _certified(self, rows: IntArray, groups: RowGroups, clock: Int32Array, slowest: Int32Array) -> BoolArray:
        """[G] requests none of whose limits can be met by the clock `max_advance` after their most advanced one."""
        table, requests = self.table, self.requests
        owners, starts = groups.owners, groups.starts
        horizon = requests.clock[owners] + self.max_advance
        ahead = np.repeat(horizon, groups.sizes) - clock
        gap = np.minimum(ahead, _GAPS)
        levels = np.minimum(table.fork_levels[rows], _LEVELS)
        births = self._births[levels, gap]
        tokens = np.add.reduceat(ahead + self._birth_tokens[levels, gap], starts)
        forkers = np.add.reduceat((levels > 0) + np.where(levels > 1, births, 0), starts)
        # Branches that ran ahead and ended still lived, in plain decoding, at the clock of the slowest.
        skewed = slowest < requests.clock[owners]
        lives = np.where(skewed, requests.born[owners], requests.live[owners]) + np.add.reduceat(births, starts)
        certified: BoolArray = tokens + lives < requests.remaining[owners]
        certified &= (lives + np.maximum(forkers - 1, 0) < requests.max_branches[owners]) | (forkers == 0)
        return certified
