"""Preemption: who gives up blocks when a step's blocks are not there, and when parked branches come back."""

from __future__ import annotations

from apar.runtime.branch import Request
from apar.runtime.branch_blocks import BranchBlocks
from apar.runtime.branch_table import BranchTable
from apar.runtime.catching_up import CatchingUp
from apar.runtime.counters import SchedulerCounters
from apar.runtime.kv_cache import KVCache, KVCacheError
from apar.runtime.request_queues import RequestQueues
from apar.runtime.request_table import RequestTable


class Preemption:
    """Takes blocks from the youngest request, or parks branches of the only one.

    Args:
        queues: of requests.
        table: live branches.
        requests: admitted requests.
        blocks: of the branches.
        cache: the books of the pool.
        catching: requests whose branches lack K/V.
        counters: where both are counted.
    """

    def __init__(
        self,
        queues: RequestQueues,
        table: BranchTable,
        requests: RequestTable,
        blocks: BranchBlocks,
        cache: KVCache,
        catching: CatchingUp,
        counters: SchedulerCounters,
    ) -> None:
        self.queues = queues
        self.table = table
        self.requests = requests
        self.blocks = blocks
        self.cache = cache
        self.catching = catching
        self.counters = counters

    def relieve(self) -> None:
        """Make room: preempt the youngest request, or park the youngest branch of the only one."""
        running = self.queues.running
        if len(running) > 1:
            self.preempt(running[-1])
            return
        candidates = [b for b in running[0].live if not b.parked]
        if len(candidates) < 2:
            raise KVCacheError("a single branch does not fit into the KV pool that was sized for it")
        branch = candidates[-1]
        self.blocks.release([branch], remember=[branch])
        branch.parked = True
        self.counters.parked += 1
        self.queues.parking_changed()
        self.catching.settle()

    def feed_starved(self) -> None:
        """Preempt the youngest request if an older one could not get a block in the last step."""
        request, running = self.catching.starved, self.queues.running
        if request is None:
            return
        self.catching.starved = None
        if self.requests.catching_up[request.index] and request in running and running[-1] is not request:
            self.preempt(running[-1])

    def preempt(self, request: Request) -> None:
        """Take a running request's blocks and queue it again; its branches keep their tokens."""
        self.blocks.release(request.live, remember=request.live)
        for branch in request.live:
            branch.parked = False
        # `release` leaves blocks in the count that other requests refer to as well.
        self.requests.held[request.index] = 0
        self.catching.drop(request)
        request.preemptions += 1
        self.counters.preemptions += 1
        self.queues.wait(request)

    def unpark(self, request: Request) -> None:
        """Let parked branches of a request catch up as far as the blocks allow, at least one if all are parked."""
        parked = [branch for branch in request.live if branch.parked]
        active = len(request.live) - len(parked)
        for branch in parked:
            cost = -(-int(self.table.length[branch.slot]) // self.cache.block_size) + 2 * len(request.live)
            if active and cost > self.cache.available:
                return
            branch.parked = False
            active += 1
            self.queues.parking_changed()
            self.catching.begin(request)
