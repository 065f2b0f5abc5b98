"""Which rows of a step may not sample [Fork]."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from apar.export.manifest import TokenIds
from apar.runtime.branch_table import BranchTable
from apar.runtime.request_table import RequestTable
from apar.runtime.row_groups import RowGroups
from apar.runtime.step import Int32Array, IntArray

BoolArray = npt.NDArray[np.bool_]


class ForkBans:
    """Bans by the rules of docs/decoding.md, "Branches".

    Args:
        table: live branches.
        requests: admitted requests.
        tokens: ids of [Fork] and [Child].
    """

    def __init__(self, table: BranchTable, requests: RequestTable, tokens: TokenIds) -> None:
        self.table = table
        self.requests = requests
        self.tokens = tokens

    def of(self, slots: IntArray, groups: RowGroups, length: Int32Array, last: Int32Array) -> BoolArray:
        """[L] rows that may not fork now: where it is not allowed, and where it could overshoot a limit even if every
        row before it in the step forks too.

        Args:
            slots: [L] of the branches that sample.
            groups: their requests.
            length: [L] of their paths.
            last: [L] the last token of each.
        """
        requests, owners = self.requests, groups.requests
        live = requests.live[owners]
        banned: BoolArray = length > self.table.fork_limit[slots]
        banned |= last == self.tokens.fork
        banned |= last == self.tokens.child
        banned |= requests.remaining[owners] <= live
        # Rank among the rows that may still fork, all others of the request and of the step before it included.
        if not groups.single:
            candidates = ~banned
            before: IntArray = np.cumsum(candidates) - candidates
            live = live + before - np.repeat(before[groups.starts], groups.sizes)
        banned |= live >= requests.max_branches[owners]
        if banned.size - np.count_nonzero(banned) > self.table.num_free:
            candidates = ~banned
            banned |= np.cumsum(candidates) > self.table.num_free
        return banned
