"""Which rows of a step may not sample [Fork]."""

from __future__ import annotations

import numpy as np

from apar.export.manifest import TokenIds
from apar.runtime.branch_table import NEVER, NOT_HERE, BranchTable
from apar.runtime.counters import ForkDenial, SchedulerCounters
from apar.runtime.fork_policy import FirstCome
from apar.runtime.request_table import RequestTable
from apar.runtime.row_groups import RowGroups
from apar.runtime.step import BoolArray, Int32Array, IntArray


class ForkBans:
    """Bans by the rules of docs/decoding.md, "Branches".

    Args:
        table: live branches.
        requests: admitted requests.
        tokens: ids of [Fork] and [Child].
        policy: may ban more by load.
        counters: where denials are counted.
    """

    def __init__(
        self,
        table: BranchTable,
        requests: RequestTable,
        tokens: TokenIds,
        policy: FirstCome,
        counters: SchedulerCounters,
    ) -> None:
        self.table = table
        self.requests = requests
        self.tokens = tokens
        self.policy = policy
        self.counters = counters
        self._by_load: tuple[BoolArray, ForkDenial] | None = None

    def of(self, slots: IntArray, groups: RowGroups, length: Int32Array, last: Int32Array) -> BoolArray:
        """[L] rows that may not fork now: where it is not allowed, and where it could overshoot a limit even if every
        row before it in the step forks too.

        Args:
            slots: [L] of the branches that sample.
            groups: their requests.
            length: [L] of their paths.
            last: [L] the last token of each.
        """
        requests, owners = self.requests, groups.owners
        live = requests.live[owners]
        room = requests.max_branches[owners] - live
        full = (room <= 0) | (requests.remaining[owners] <= live)
        banned: BoolArray = full[groups.place]
        banned |= length > self.table.fork_limit[slots]
        banned |= last == self.tokens.fork
        banned |= last == self.tokens.child
        if np.count_nonzero(~full & (groups.sizes > room)):
            # Not all rows of some request may fork: the first ones, of those that nothing else forbids it.
            able = (~banned).astype(np.int64)
            before = able.cumsum() - able
            banned |= before >= (room + before[groups.starts])[groups.place]
        if banned.size - np.count_nonzero(banned) > self.table.num_free:
            candidates = ~banned
            banned |= candidates.cumsum() > self.table.num_free
        self._by_load = self.policy.deny_forks(~banned, groups)
        if self._by_load is not None:
            banned |= self._by_load[0]
        return banned

    def count_denials(self, slots: IntArray, rows: IntArray) -> None:
        """Count forks that did not happen: `rows` of the step whose bans were the last that `of` gave, whose likeliest
        token was [Fork]. `slots` are all its sampled rows. To be called before the step is booked.
        """
        denied = self.counters.forks_denied
        for row in rows.tolist():
            reason = self._reason(int(slots[row]), row)
            denied[reason] = denied.get(reason, 0) + 1

    def _reason(self, slot: int, row: int) -> ForkDenial:
        table, requests = self.table, self.requests
        index, length = int(table.request[slot]), int(table.length[slot])
        if table.fork_limit[slot] == NEVER:
            return "policy"
        if table.fork_limit[slot] == NOT_HERE:
            return "request"
        if table.tokens[slot, length - 1] in (self.tokens.fork, self.tokens.child):
            return "repeat"
        if length > table.fork_limit[slot] or requests.remaining[index] <= requests.live[index]:
            return "length"
        if self._by_load is not None and self._by_load[0][row]:
            return self._by_load[1]
        return "slots" if requests.live[index] < requests.max_branches[index] and not table.num_free else "branches"
