"""How requests and branches begin and end: slots, paths, limits, blocks and the sampler's books."""

from __future__ import annotations

from bisect import insort
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

    def fork(self, parent: Branch) -> Branch:
        """Bear a child at the [Fork] that `parent` has just sampled (docs/decoding.md, "Branches").

        The child's path is the parent's up to and including [Fork], then a forced [Child]; both are pending.
        """
        table, request, source = self.table, parent.request, parent.slot
        position = int(table.length[source]) - 1
        ordinal = len(parent.forks)
        parent.forks.append(position)
        child = Branch(
            request=request,
            branch_id=len(request.branches),
            parent=parent,
            depth=parent.depth + 1,
            ordinal=ordinal,
            start=position + 2,
            key=child_key(parent.key, ordinal),
            order=(position + 1 - int(table.clock_base[source]), *parent.order),
            digests=parent.digests[: position // table.block_size],
        )
        slot = table.take(child)
        table.tokens[slot, : position + 1] = table.tokens[source, : position + 1]
        table.tokens[slot, position + 1] = self.tokens.child
        table.length[slot] = position + 2
        table.request[slot] = request.index
        table.start[slot] = child.start
        table.clock_base[slot] = table.clock_base[source] + 1
        self._set_limits(child)
        self.blocks.inherit(slot, source, position)
        self.sampler.attach(slot, request.prepared, child.key, len(request.prompt), root=False)
        request.branches.append(child)
        insort(request.live, child, key=lambda branch: branch.order)
        parent.children.append(child)
        self.requests.live[request.index] += 1
        self.requests.born[request.index] += 1
        self.queues.branch_born(child)
        self.counters.forks += 1
        return child

    def finish_branch(self, branch: Branch, reason: FinishReason, drop_last: bool = False) -> bool:
        """End one branch; returns whether that ended its request.

        `drop_last` leaves the last token (an end-of-sequence) out of the branch's own tokens.
        """
        table, slot = self.table, branch.slot
        request = branch.request
        end = int(table.length[slot]) - (1 if drop_last else 0)
        branch.tokens = table.tokens[slot, branch.start : end].tolist()
        branch.finish_reason = reason
        branch.end_dropped = drop_last
        branch.first_step = int(table.first_step[slot])
        branch.last_step = self.step_index
        self.queues.branch_gone(branch)
        self.blocks.release(branch, remember=branch.parent is None and reason != "error")
        self.sampler.detach(slot)
        table.give_back(branch)
        request.live.remove(branch)
        self.requests.live[request.index] -= 1
        if not request.live:
            self._finish_request(request, reason)
            return True
        if request.state is RequestState.RUNNING:
            self.preemption.unpark(request)
        return False

    def cancel(self, request: Request, reason: FinishReason, error: str | None = None) -> None:
        """End a request in whatever state it is; its blocks and slots are free when this returns."""
        if request.state is RequestState.FINISHED:
            return
        request.error = error
        if not request.branches:
            self.queues.leave(request)
            request.finish_reason = reason
            return
        for branch in list(request.live):
            self.finish_branch(branch, reason)

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

    def _finish_request(self, request: Request, last_reason: FinishReason) -> None:
        reasons = [branch.finish_reason for branch in request.branches]
        worst: list[FinishReason] = ["error", "cancelled", "deadline", "length"]
        request.finish_reason = next((r for r in worst if r in reasons), request.root.finish_reason or last_reason)
        self.queues.leave(request)
        self.catching.drop(request)
        self.requests.remove(request)
