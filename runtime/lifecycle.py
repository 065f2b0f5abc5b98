"""How requests and branches begin and end: slots, paths, limits, blocks and the sampler's books."""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence
from time import perf_counter

import numpy as np

from apar.export.manifest import TokenIds
from apar.runtime.branch import Branch, Request, RequestState
from apar.runtime.branch_blocks import BranchBlocks
from apar.runtime.branch_table import NEVER, NOT_HERE, BranchTable
from apar.runtime.catching_up import CatchingUp
from apar.runtime.counters import SchedulerCounters
from apar.runtime.kv_cache import ONE
from apar.runtime.limits import SchedulerLimits
from apar.runtime.outputs import FinishReason
from apar.runtime.preemption import Preemption
from apar.runtime.random_stream import child_key, root_key
from apar.runtime.request_queues import RequestQueues
from apar.runtime.request_table import RequestTable
from apar.runtime.sampler import Sampler
from apar.runtime.step import Int32Array, IntArray


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
        most = max(self.limits.max_rows - 1, 1)
        index = self.requests.add(request, params, most, self.max_context)
        length = len(request.prompt)
        root = Branch(request, 0, None, 1, 0, length, root_key(request.seed))
        slots = table.take([root])
        slot = root.slot
        table.tokens[slot, :length] = request.prompt
        table.length[slot] = length
        table.request[slot] = index
        table.start[slot] = table.clock_base[slot] = length
        levels = max(params.max_depth - 1, 0) if params.fork and self.limits.fork_policy != "never" else 0
        self._set_limits(slots, np.array([levels]), NEVER if self.limits.fork_policy == "never" else NOT_HERE)
        request.branches.append(root)
        request.live.append(root)
        self.sampler.attach(slot, request.prepared, root.key, length)

    def fork(self, parents: Sequence[Branch]) -> list[Branch]:
        """Bear a child at the [Fork] that each of `parents` has just sampled (docs/decoding.md, "Branches").

        A child's path is its parent's up to and including [Fork], then a forced [Child]; both are pending.
        """
        table = self.table
        sources = np.array([parent.slot for parent in parents])
        positions = table.length[sources] - 1
        turns = positions + 1 - table.clock_base[sources]
        children = [
            self._child(parent, position, turn)
            for parent, position, turn in zip(parents, positions.tolist(), turns.tolist(), strict=True)
        ]
        slots = table.take(children)
        width = int(positions.max()) + 1
        table.tokens[slots, :width] = table.tokens[sources, :width]
        table.tokens[slots, positions + 1] = self.tokens.child
        table.length[slots] = table.start[slots] = positions + 2
        table.request[slots] = owners = table.request[sources]
        table.clock_base[slots] = table.clock_base[sources] + 1
        self._set_limits(slots, table.fork_levels[sources] - 1, NOT_HERE)
        self.blocks.inherit(slots, sources, positions)
        self.sampler.inherit(slots, sources, [child.key for child in children])
        np.add.at(self.requests.live, owners, ONE)
        np.add.at(self.requests.born, owners, ONE)
        self.queues.branches_born(children)
        self.counters.forks += len(children)
        return children

    def _child(self, parent: Branch, position: int, turn: int) -> Branch:
        """A new branch among its siblings, born in the given turn of its parent, whose [Fork] stands at `position`."""
        request, ordinal = parent.request, len(parent.forks)
        child = Branch(
            request=request,
            branch_id=len(request.branches),
            parent=parent,
            depth=parent.depth + 1,
            ordinal=ordinal,
            start=position + 2,
            key=child_key(parent.key, ordinal),
            order=(turn, *parent.order),
            digests=parent.digests[: position // self.table.block_size],
        )
        parent.forks.append(position)
        parent.children.append(child)
        request.branches.append(child)
        if request.live[-1].order < child.order:
            request.live.append(child)
        else:
            insort(request.live, child, key=lambda branch: branch.order)
        return child

    def finish(self, branches: Sequence[Branch], reasons: Sequence[FinishReason], dropped: Sequence[bool]) -> None:
        """End branches, and with their last branches requests.

        reasons: of each. dropped: whether its last token (an end-of-sequence) is left out of the branch's own tokens.
        """
        table = self.table
        slots = np.array([branch.slot for branch in branches])
        length, first_step = table.length[slots].tolist(), table.first_step[slots].tolist()
        for i, branch in enumerate(branches):
            branch.tokens = table.tokens[branch.slot, branch.start : length[i] - dropped[i]].tolist()
            branch.finish_reason = reasons[i]
            branch.end_dropped = dropped[i]
            branch.first_step = first_step[i]
            branch.last_step = self.step_index
        self.queues.branches_gone(branches)
        self.blocks.release(branches, [b for b in branches if b.parent is None and b.finish_reason != "error"])
        np.subtract.at(self.requests.live, table.request[slots], ONE)
        self.sampler.detach(slots)
        table.give_back(branches)
        for branch in branches:
            branch.request.live.remove(branch)
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
        branches = list(request.live)
        self.finish(branches, [reason] * len(branches), [False] * len(branches))

    def fail(self, request: Request, message: str) -> None:
        """End one request with an error and forget its K/V, which may be garbage."""
        for branch in request.live:
            self.blocks.cache.forget(self.table.blocks(branch.slot).tolist())
        self.cancel(request, "error", message)

    def _set_limits(self, slots: IntArray, levels: Int32Array | IntArray, without: int) -> None:
        """Say where branches have to end, how many `levels` [n] may descend from them, and how long they may fork:
        a child needs room for [Fork], [Child] and a token. `without` levels stands in the place of that."""
        table = self.table
        limit = np.minimum(table.start[slots] + self.requests.branch_tokens[table.request[slots]], self.max_context)
        table.limit[slots] = limit
        table.fork_levels[slots] = levels
        table.fork_limit[slots] = np.where(levels > 0, limit - 3, without)

    def _finish_request(self, request: Request) -> None:
        reasons = [branch.finish_reason for branch in request.branches]
        worst: list[FinishReason] = ["error", "cancelled", "deadline", "length"]
        request.finish_reason = next((r for r in worst if r in reasons), request.root.finish_reason)
        self.queues.leave(request)
        self.catching.drop(request)
        self.requests.remove(request)
