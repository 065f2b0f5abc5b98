"""How requests and branches begin and end: slots, paths, limits, blocks and the sampler's books."""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence
from time import perf_counter

from apar.export.manifest import TokenIds
from apar.runtime.branch import Branch, Request, RequestState
from apar.runtime.branch_blocks import BranchBlocks
from apar.runtime.branch_table import NEVER, NOT_HERE, BranchTable
from apar.runtime.catching_up import CatchingUp
from apar.runtime.counters import SchedulerCounters
from apar.runtime.limits import SchedulerLimits
from apar.runtime.outputs import FinishReason
from apar.runtime.preemption import Preemption
from apar.runtime.random_stream import child_key, root_key
from apar.runtime.request_queues import RequestQueues
from apar.runtime.request_table import RequestTable
from apar.runtime.sampler import Sampler

Ending = tuple[Branch, FinishReason, bool]
"""A branch that ends, why, and whether its last token (an end-of-sequence) is left out of its own ones."""


def _by_order(branch: Branch) -> tuple[int, ...]:
    return branch.order


class Lifecycle:
    """Starts and ends requests, bears and ends their branches.

    Args:
        tokens: ids of [Fork] and [Child].
        max_context: longest path, in tokens.
        queues: of requests.
        table: live branches.
        requests: admitted requests.
        blocks: of the branches.
        catching: requests whose branches lack K/V.
        preemption: brings parked branches back when a sibling ends.
        sampler: told of every branch that comes and goes.
        counters: where births are counted.
        limits: sizes.
    """

    def __init__(
        self,
        tokens: TokenIds,
        max_context: int,
        queues: RequestQueues,
        table: BranchTable,
        requests: RequestTable,
        blocks: BranchBlocks,
        catching: CatchingUp,
        preemption: Preemption,
        sampler: Sampler,
        counters: SchedulerCounters,
        limits: SchedulerLimits,
    ) -> None:
        self.tokens = tokens
        self.max_context = max_context
        self.queues = queues
        self.table = table
        self.requests = requests
        self.blocks = blocks
        self.catching = catching
        self.preemption = preemption
        self.sampler = sampler
        self.counters = counters
        self.limits = limits
        self.step_index = 0
        """Steps booked so far; branches note in which they ended."""

    def start(self, request: Request) -> None:
        """Give a new request its row of arrays and its root branch."""
        request.started_at = perf_counter()
        table, params = self.table, request.params
        index = self.requests.add(request, params, max_branches=max(self.limits.max_rows - 1, 1))
        length = len(request.prompt)
        root = Branch(request, 0, None, 1, 0, length, root_key(request.seed))
        slot = table.take(root)
        table.tokens[slot, :length] = request.prompt
        table.length[slot] = length
        table.request[slot] = index
        table.start[slot] = table.clock_base[slot] = length
        self._set_limits(root)
        request.branches.append(root)
        request.live.append(root)
        self.sampler.attach(slot, request.prepared, root.key, length)

    def fork(self, parents: Sequence[Branch]) -> list[Branch]:
        """Bear a child at the [Fork] that each of `parents` has just sampled (docs/decoding.md, "Branches").

        A child's path is its parent's up to and including [Fork], then a forced [Child]; both are pending.
        """
        children = [self._child(parent) for parent in parents]
        self.blocks.inherit(children)
        self.queues.branches_born(children)
        self.counters.forks += len(children)
        return children

    def _child(self, parent: Branch) -> Branch:
        """A new branch among its siblings, without blocks."""
        table, request, source = self.table, parent.request, parent.slot
        length, clock = int(table.length[source]), int(table.clock_base[source])
        ordinal = len(parent.forks)
        child = Branch(
            request=request,
            branch_id=len(request.branches),
            parent=parent,
            depth=parent.depth + 1,
            ordinal=ordinal,
            start=length + 1,
            key=child_key(parent.key, ordinal),
            order=(length - clock, *parent.order),
            digests=parent.digests[: (length - 1) // table.block_size],
        )
        parent.forks.append(length - 1)
        parent.children.append(child)
        request.branches.append(child)
        insort(request.live, child, key=_by_order)
        slot = table.take(child)
        table.tokens[slot, :length] = table.tokens[source, :length]
        table.tokens[slot, length] = self.tokens.child
        table.length[slot] = table.start[slot] = length + 1
        table.request[slot] = request.index
        table.clock_base[slot] = clock + 1
        self._set_limits(child)
        self.sampler.inherit(slot, source, child.key)
        self.requests.live[request.index] += 1
        self.requests.born[request.index] += 1
        return child

    def finish(self, endings: Sequence[Ending]) -> None:
        """End branches, and with their last branches requests."""
        table, branches = self.table, [branch for branch, _, _ in endings]
        for branch, reason, drop in endings:
            slot = branch.slot
            branch.tokens = table.tokens[slot, branch.start : int(table.length[slot]) - drop].tolist()
            branch.finish_reason = reason
            branch.end_dropped = drop
            branch.first_step = int(table.first_step[slot])
            branch.last_step = self.step_index
        self.queues.branches_gone(branches)
        self.blocks.release(branches, [b for b in branches if b.parent is None and b.finish_reason != "error"])
        for branch in branches:
            self.sampler.detach(branch.slot)
            table.give_back(branch)
            branch.request.live.remove(branch)
            self.requests.live[branch.request.index] -= 1
        for request in dict.fromkeys(branch.request for branch in branches):
            if not request.live:
                self._finish_request(request)
            elif request.state is RequestState.RUNNING:
                self.preemption.unpark(request)

    def cancel(self, request: Request, reason: FinishReason, error: str | None = None) -> None:
        """End a request in whatever state it is; its blocks and slots are free when this returns."""
        if request.state is RequestState.FINISHED:
            return
        request.error = error
        if not request.branches:
            self.queues.leave(request)
            request.finish_reason = reason
            return
        self.finish([(branch, reason, False) for branch in request.live])

    def fail(self, request: Request, message: str) -> None:
        """End one request with an error and forget its K/V, which may be garbage."""
        for branch in request.live:
            self.blocks.cache.forget(self.table.blocks(branch.slot).tolist())
        self.cancel(request, "error", message)

    def _set_limits(self, branch: Branch) -> None:
        """Where a branch has to end, and how long it may fork: a child needs room for [Fork], [Child] and a token."""
        params, slot = branch.request.params, branch.slot
        limit = self.max_context
        if params.max_branch_tokens is not None:
            limit = min(limit, branch.start + params.max_branch_tokens)
        self.table.limit[slot] = limit
        levels = max(params.max_depth - branch.depth, 0) if params.fork else 0
        fork_limit = limit - 3 if levels else NOT_HERE
        if self.limits.fork_policy == "never":
            levels, fork_limit = 0, NEVER
        self.table.fork_levels[slot] = levels
        self.table.fork_limit[slot] = fork_limit

    def _finish_request(self, request: Request) -> None:
        reasons = [branch.finish_reason for branch in request.branches]
        worst: list[FinishReason] = ["error", "cancelled", "deadline", "length"]
        request.finish_reason = next((r for r in worst if r in reasons), request.root.finish_reason)
        self.queues.leave(request)
        self.catching.drop(request)
        self.requests.remove(request)
