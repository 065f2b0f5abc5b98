"""Admission: which waiting requests begin to run."""

from __future__ import annotations

import numpy as np

from apar.runtime.branch import Request
from apar.runtime.branch_table import BranchTable
from apar.runtime.catching_up import CatchingUp
from apar.runtime.fork_policy import FirstCome
from apar.runtime.kv_cache import KVCache
from apar.runtime.lifecycle import Lifecycle
from apar.runtime.request_queues import RequestQueues
from apar.runtime.request_table import RequestTable


class Admission:
    """Moves waiting requests into the running set while rows and blocks allow, in the order of the policy.

    Args:
        queues: of requests.
        table: live branches.
        requests: admitted requests.
        cache: the books of the pool.
        catching: requests whose branches lack K/V; admitted ones begin there.
        lifecycle: gives new requests their root.
        policy: says who is next.
    """

    def __init__(
        self,
        queues: RequestQueues,
        table: BranchTable,
        requests: RequestTable,
        cache: KVCache,
        catching: CatchingUp,
        lifecycle: Lifecycle,
        policy: FirstCome,
    ) -> None:
        self.queues = queues
        self.table = table
        self.requests = requests
        self.cache = cache
        self.catching = catching
        self.lifecycle = lifecycle
        self.policy = policy

    def admit(self) -> None:
        """Let requests run, one after the other, until one does not fit."""
        queues = self.queues
        reserve: int | None = None
        while queues.waiting:
            request = self.policy.next_waiting() if queues.running else queues.waiting[0]
            if request is None:
                return
            resumed = bool(request.branches)
            if not resumed and not (self.table.num_free and self.requests.num_free):
                # All slots belong to preempted requests: one of those must go first.
                if queues.running:
                    return
                request = next(r for r in queues.waiting if r.branches)
                resumed = True
            if reserve is None:
                reserve = self._reserve()
            if queues.running and self._cost(request) > self.cache.available - reserve:
                return
            if not resumed:
                self.lifecycle.start(request)
            queues.run(request)
            self.catching.begin(request)
            reserve += self._owed(request)

    def _cost(self, request: Request) -> int:
        """Blocks that a waiting request will take until all its branches have sampled once more."""
        size = self.cache.block_size
        if not request.branches:
            return -(-(len(request.prompt) + 1) // size) + 1
        # Paths of a tree overlap: count each branch's own part, and the longest inherited one once.
        lengths = [int(self.table.length[branch.slot]) for branch in request.live]
        inherited = max(branch.start for branch in request.live)
        own = [length - branch.start for length, branch in zip(lengths, request.live, strict=True)]
        return -(-inherited // size) + sum(-(-n // size) + 1 for n in own)

    def _reserve(self) -> int:
        """Blocks to keep back from admission: what running requests are still to take for their prompts,
        and one for each live branch, since any of them may fill a block or fork."""
        table, size = self.table, self.cache.block_size
        rows = self.queues.rows()
        owed = -(-table.length[rows] // size) - table.num_blocks[rows]
        return int(np.maximum(owed, 0).sum()) + rows.size

    def _owed(self, request: Request) -> int:
        """What a request that has just begun to run, without blocks yet, adds to the reserve."""
        lengths = [int(self.table.length[branch.slot]) for branch in request.live]
        return sum(-(-length // self.cache.block_size) + 1 for length in lengths)
