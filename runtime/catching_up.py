"""Requests some of whose branches lack K/V that they need to sample: prompts being prefilled, trees being resumed."""

from __future__ import annotations

from bisect import insort

import numpy as np

from apar.runtime.branch import Branch, Request
from apar.runtime.branch_blocks import BranchBlocks
from apar.runtime.branch_table import BranchTable
from apar.runtime.limits import SchedulerLimits
from apar.runtime.request_queues import RequestQueues
from apar.runtime.request_table import RequestTable
from apar.runtime.step_writer import Plan

NEWBORN = 2
"""Pending tokens of a child: [Fork] and [Child]."""


class CatchingUp:
    """Gives chunks of missing tokens to requests, in their order, until all their branches are level.

    Args:
        queues: of requests.
        table: live branches.
        requests: admitted requests; `catching_up` marks those that are listed here.
        blocks: of the branches.
        limits: of a step.
    """

    def __init__(
        self,
        queues: RequestQueues,
        table: BranchTable,
        requests: RequestTable,
        blocks: BranchBlocks,
        limits: SchedulerLimits,
    ) -> None:
        self.queues = queues
        self.table = table
        self.requests = requests
        self.blocks = blocks
        self.limits = limits
        self.starved: Request | None = None
        """The first request that got no block in the last step."""
        self._listed: list[Request] = []
        self._new: list[Request] = []
        """Those of them that have not been looked at by `add_chunks`."""

    def __bool__(self) -> bool:
        return bool(self._listed)

    def __len__(self) -> int:
        return len(self._listed)

    def begin(self, request: Request) -> None:
        """List a request. Idempotent."""
        if not self.requests.catching_up[request.index]:
            self.requests.catching_up[request.index] = True
            insort(self._listed, request, key=lambda r: r.sort_key)
            self._new.append(request)

    def drop(self, request: Request) -> None:
        """Take a request off the list, if it is there."""
        if self.requests.catching_up[request.index]:
            self.requests.catching_up[request.index] = False
            self._listed.remove(request)
            if request in self._new:
                self._new.remove(request)

    def reorder(self, request: Request) -> None:
        """Move a request to its place after its `sort_key` changed, if it is listed."""
        if request.index >= 0 and self.requests.catching_up[request.index]:
            self._listed.remove(request)
            insort(self._listed, request, key=lambda r: r.sort_key)

    def settle(self) -> bool:
        """Take those off the list that are level; returns whether there were any."""
        if not self._listed:
            return False
        rows = self.queues.rows()
        groups = self.queues.groups_of(rows)
        pending = self.table.length[rows] - self.table.computed[rows]
        allowed = np.where(self.requests.live[groups.owners] > 1, NEWBORN, 1)
        behind = np.maximum.reduceat(pending, groups.starts) > allowed
        level = groups.owners[self.requests.catching_up[groups.owners] & ~behind].tolist()
        for index in level:
            self.drop(self.requests.at(index))
        return bool(level)

    def distrust(self, blocks: set[int]) -> None:
        """Release every branch that found one of `blocks` in the prefix cache before it was filled, and list it."""
        for request in self.queues.running:
            for branch in request.live:
                if blocks.intersection(self.table.blocks(branch.slot).tolist()):
                    self.blocks.release([branch])
                    self.begin(request)

    def add_chunks(self, plan: Plan, most: int) -> None:
        """Add what is missing to a plan, at most `most` tokens, as far as its tokens, rows and the blocks allow."""
        table, blocks = self.table, self.blocks
        rows: list[int] = []
        counts: list[int] = []
        copies = [plan.copies]
        budget = min(most, self.limits.max_step_tokens - int(plan.counts.sum()))
        seats = self.limits.max_rows - plan.rows.size
        for request in self._listed:
            if not seats or not budget:
                break
            for branch, missing in self._missing(request):
                if not seats or not budget:
                    break
                count = min(missing, budget, blocks.room(branch.slot))
                if count <= 0:
                    self.starved = self.starved or request
                    continue
                end = int(table.computed[branch.slot]) + count
                copies.append(blocks.extend(branch.slot, end))
                plan.registered += blocks.register(branch, end)
                rows.append(branch.slot)
                counts.append(count)
                budget -= count
                seats -= 1
        # Requests that have to wait hold what the prefix cache has of them, lest it be evicted before their turn.
        for request in self._new:
            self._missing(request)
        self._new.clear()
        if rows:
            plan.rows = np.concatenate((plan.rows, np.array(rows)))
            plan.counts = np.concatenate((plan.counts, np.array(counts, dtype=np.int32)))
            plan.copies = np.concatenate(copies)

    def _missing(self, request: Request) -> list[tuple[Branch, int]]:
        """Branches of a request that should compute now, with the tokens they may compute.

        The branch with the longest inherited path leads; when it has its K/V, the others find their
        shared blocks in the prefix cache and follow together.
        """
        branches = [branch for branch in request.live if not branch.parked]
        if len(request.live) == 1:
            self.blocks.attach_prefix(branches[0])
            return [(branches[0], self._pending(branches[0]))]
        leader = branches[0] if branches[0].parent is None else max(branches, key=lambda b: b.start)
        if self._attached_lag(leader):
            return [(leader, self._lag(leader))]
        return [(branch, self._lag(branch)) for branch in branches if self._attached_lag(branch)]

    def _attached_lag(self, branch: Branch) -> int:
        """A branch's lag after it took from the prefix cache what is there."""
        if self._lag(branch):
            self.blocks.attach_prefix(branch)
        return self._lag(branch)

    def _pending(self, branch: Branch) -> int:
        return int(self.table.length[branch.slot] - self.table.computed[branch.slot])

    def _lag(self, branch: Branch) -> int:
        """Tokens that a branch must compute before it can sample together with its siblings.

        A branch is level with one pending token, a newborn child with two.
        """
        pending = self._pending(branch)
        return pending - 1 if pending > NEWBORN else 0
