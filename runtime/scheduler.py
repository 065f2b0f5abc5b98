"""Decides what every step computes, and books what it gave.

A branch has a path and `computed` (how many of its tokens have K/V). A step computes pending tokens of
some branches; prefill, chunked prefill, decoding, the birth of a child and the resumption of a preempted
tree are all that one thing. Two rules make results independent of load:

- the branches of a request advance in lockstep: they sample together or not at all, and a request some of
  whose branches still lack K/V (a prompt being prefilled, a tree being resumed) is *catching up*;
- everything that a step needs (blocks for new tokens, blocks for copy-on-write) is counted and taken
  before the step is promised, so no step can run out. What does not fit is preempted, youngest first.

See docs/decoding.md for the rules of decoding and docs/step-contract.md for the arrays.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter

import numpy as np
import numpy.typing as npt

from apar.export.errors import CapacityError
from apar.export.manifest import TokenIds
from apar.runtime.branch import Branch, Request, RequestState
from apar.runtime.branch_blocks import BranchBlocks
from apar.runtime.branch_table import BranchTable
from apar.runtime.catching_up import CatchingUp
from apar.runtime.kv_cache import KVCache, KVCacheError
from apar.runtime.limits import SchedulerLimits
from apar.runtime.outputs import FinishReason
from apar.runtime.random_stream import child_key, root_key
from apar.runtime.request_table import RequestTable
from apar.runtime.row_groups import RowGroups
from apar.runtime.sampler import Sampler
from apar.runtime.step import Int32Array, IntArray
from apar.runtime.step_writer import Plan, Step, StepWriter

BoolArray = npt.NDArray[np.bool_]


@dataclass(slots=True)
class StepReport:
    """What one commit changed, for those who turn it into text and events."""

    step: int
    branches: list[Branch] = field(default_factory=list)
    """Branches that grew by one token; those that it ended are listed too."""
    tokens: list[int] = field(default_factory=list)
    """Their tokens."""
    forked: list[Branch] = field(default_factory=list)
    """Children born."""
    ended: list[Branch] = field(default_factory=list)
    finished: list[Request] = field(default_factory=list)


class Scheduler:
    """Queue, running requests and what their branches do next.

    Args:
        tokens: ids of [Fork], [Child] and the ends.
        max_context: longest path, in tokens.
        cache: the books of the executor's KV pool.
        sampler: told of every branch that comes and goes.
        limits: sizes.
    """

    def __init__(
        self, tokens: TokenIds, max_context: int, cache: KVCache, sampler: Sampler, limits: SchedulerLimits
    ) -> None:
        self.tokens = tokens
        self.cache = cache
        self.sampler = sampler
        self.limits = limits
        self.max_context = min(max_context, cache.num_blocks * cache.block_size)
        self.table = BranchTable(limits.max_live_branches, self.max_context, cache.block_size)
        self.requests = RequestTable(limits.max_live_branches)
        self.blocks = BranchBlocks(self.table, self.requests, cache)
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.step_index = 0
        self.forks = 0
        self.preemptions = 0
        self.catching = CatchingUp(self.table, self.requests, self.blocks, limits)
        self._rows: IntArray = np.zeros(0, dtype=np.int64)
        self._groups = RowGroups.of(self._rows)
        self._rows_stale = False
        self._rotation = 0
        self._ends = np.array(tokens.eos, dtype=np.int32)
        self._writer = StepWriter(self.table, self.requests, tokens, limits.max_step_tokens)

    # ---------------------------------------------------------------- requests in and out

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises CapacityError if its prompt can never fit; nothing is queued then.
        """
        length = len(request.prompt)
        if length == 0:
            raise CapacityError("the prompt is empty; give at least one token")
        if length >= self.max_context:
            raise CapacityError(
                f"the prompt has {length} tokens; this engine's context holds {self.max_context} and an answer "
                "needs at least one: shorten the prompt, or give the engine a larger KV pool or context"
            )
        insort(self.waiting, request, key=lambda r: r.sort_key)

    @property
    def idle(self) -> bool:
        """True when no request waits or runs."""
        return not self.waiting and not self.running

    def cancel(self, request: Request, reason: FinishReason = "cancelled", error: str | None = None) -> None:
        """End a request in whatever state it is; its blocks and slots are free when this returns."""
        if request.state is RequestState.FINISHED:
            return
        request.error = error
        if not request.branches:
            self.waiting.remove(request)
            request.state = RequestState.FINISHED
            request.finish_reason = reason
            return
        for branch in list(request.live):
            self.finish_branch(branch, reason)

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
        self.blocks.release(branch, remember=branch.parent is None and reason != "error")
        self.sampler.detach(slot)
        table.give_back(branch)
        request.live.remove(branch)
        self.requests.live[request.index] -= 1
        self._rows_stale = True
        if not request.live:
            self._finish_request(request, reason)
            return True
        if request.state is RequestState.RUNNING:
            self._unpark(request)
        return False

    def check(self) -> None:
        """Prove the books: blocks, slots, queues. Raises KVCacheError."""
        table = self.table
        live = [branch for branch in table.branches if branch is not None]
        self.cache.check([table.blocks(branch.slot) for branch in live])
        if len(live) + table.num_free != table.capacity:
            raise KVCacheError("branch slots are lost")
        owned = sum(len(request.live) for request in (*self.running, *self.waiting))
        if owned != len(live):
            raise KVCacheError(f"{len(live)} branches hold slots, requests list {owned}")

    def load(self) -> dict[str, int]:
        """Gauges for people and metrics."""
        return {
            "running_requests": len(self.running),
            "waiting_requests": len(self.waiting),
            "live_branches": self.table.capacity - self.table.num_free,
            "kv_blocks_used": self.cache.num_referenced,
            "kv_blocks_cached": self.cache.num_cached,
            "kv_blocks_total": self.cache.num_blocks,
            "forks": self.forks,
            "preemptions": self.preemptions,
            "prefix_cache_hits": self.cache.hits,
        }

    # ---------------------------------------------------------------- the step

    def schedule(self) -> Step | None:
        """Promise the next step, or None if there is nothing to compute."""
        if self.catching.starved is not None:
            self._feed(self.catching.starved)
        self._admit()
        while True:
            rows = self._running_rows()
            if not rows.size and not self.catching:
                return None
            plan = self._plan(rows)
            if plan is not None:
                return self._writer.write(plan, self._groups if plan.rows is self._rows else None, bool(self.catching))
            # Blocks found in the prefix cache may have been all that a request still lacked.
            if not self.catching.settle():
                self._relieve()

    def _plan(self, rows: IntArray) -> Plan | None:
        """Choose rows and token counts and take their blocks; None if room must be made first."""
        table = self.table
        if self.catching:
            rows = rows[~self.requests.catching_up[table.request[rows]]]
        counts = table.length[rows] - table.computed[rows]
        seats = self.limits.max_rows - bool(self.catching)
        if rows.size > seats:
            rows, counts = self._rotate(rows, counts, seats)
        needed = self.blocks.needed(rows, counts)
        if needed.sum() > self.cache.available:
            return None
        plan = Plan(rows, counts, self.blocks.take(rows, needed))
        if self.catching:
            self.catching.add_chunks(plan)
        return plan if plan.rows.size else None

    def commit(self, step: Step, tokens: Int32Array, failed: Sequence[int] = ()) -> StepReport:
        """Book a step that ran: `tokens` [L] were sampled for `step.sampled`.

        `failed` lists rows of L whose logits were unusable (not finite): their requests end with an error.
        """
        table, requests = self.table, self.requests
        table.computed[step.rows] += step.counts
        self.step_index += 1
        report = StepReport(self.step_index)
        slots, counters, groups = step.sampled, step.counters, step.groups
        if failed:
            kept = self._fail_rows(report, slots, failed)
            slots, counters, tokens = slots[kept], counters[kept], tokens[kept]
            groups = RowGroups.of(groups.requests[kept])
        if slots.size:
            requests.remaining[groups.owners] -= groups.sizes
            requests.steps[groups.owners] += 1
            owners = groups.requests
            exhausted = requests.remaining[owners] <= 0
            surplus: list[int] = []
            if exhausted.any():
                kept = self._within_budget(groups)
                surplus = slots[~kept].tolist()
                slots, counters, tokens = slots[kept], counters[kept], tokens[kept]
                owners, exhausted = owners[kept], exhausted[kept]
            length = table.length[slots]
            table.tokens[slots, length] = tokens
            length += 1
            table.length[slots] = length
            table.first_step[slots[counters == 0]] = self.step_index
            ends = (tokens == self._ends[0]) if self._ends.size == 1 else np.isin(tokens, self._ends)
            happens = ends | (tokens == self.tokens.fork) | exhausted | (length >= table.limit[slots])
            happens |= requests.stop_tokens[owners]
            branches = table.branches
            report.branches = [branches[slot] for slot in slots.tolist()]
            report.tokens = tokens.tolist()
            dropped = [branch for slot in surplus if (branch := branches[slot]) is not None]
            self._book_events(report, np.flatnonzero(happens).tolist(), ends)
            for branch in dropped:
                self._end(report, branch, "length")
        self.catching.settle()
        return report

    def fail(self, step: Step, message: str) -> list[Request]:
        """Book a step that raised: every request in it ends with an error, its K/V is forgotten."""
        self.cache.forget(step.registered)
        indices = dict.fromkeys(self.table.request[step.rows].tolist())
        failed = [self.requests.at(index) for index in indices]
        for request in failed:
            self.fail_request(request, message)
        self.catching.distrust(set(step.registered))
        return failed

    def fail_request(self, request: Request, message: str) -> None:
        """End one request with an error and forget its K/V, which may be garbage."""
        for branch in request.live:
            self.cache.forget(self.table.blocks(branch.slot).tolist())
        self.cancel(request, "error", message)

    # ---------------------------------------------------------------- choosing

    def _running_rows(self) -> IntArray:
        if self._rows_stale:
            slots = [b.slot for request in self.running for b in request.live if not b.parked]
            self._rows = np.array(slots, dtype=np.int64)
            self._groups = RowGroups.of(self.table.request[self._rows])
            self._rows_stale = False
        return self._rows

    def _rotate(self, rows: IntArray, counts: Int32Array, seats: int) -> tuple[IntArray, Int32Array]:
        """Of more rows than a step takes, whole requests from a place that moves on every step."""
        groups = RowGroups.of(self.table.request[rows])
        count = groups.starts.size
        first = self._rotation % count
        order = np.roll(np.arange(count), -first)
        taken = int((np.cumsum(groups.sizes[order]) <= seats).sum())
        self._rotation = first + taken
        chosen = np.zeros(count, dtype=bool)
        chosen[order[:taken]] = True
        keep = np.repeat(chosen, groups.sizes)
        return rows[keep], counts[keep]

    # ---------------------------------------------------------------- admission and preemption

    def _admit(self) -> None:
        """Move waiting requests into the running set while rows and blocks allow, strictly in order."""
        while self.waiting:
            request = self.waiting[0]
            resumed = bool(request.branches)
            if not resumed and not (self.table.num_free and self.requests.num_free):
                # All slots belong to preempted requests: one of those must go first.
                if self.running:
                    return
                request = next(r for r in self.waiting if r.branches)
                resumed = True
            live_rows = self._running_rows().size
            if self.running:
                if live_rows + max(len(request.live), 1) > self.limits.admitted_rows:
                    return
                if self._admission_cost(request) > self.cache.available - self._reserve():
                    return
            self.waiting.remove(request)
            if not resumed:
                self._start(request)
            request.state = RequestState.RUNNING
            insort(self.running, request, key=lambda r: r.sort_key)
            self.catching.begin(request)
            self._rows_stale = True

    def _start(self, request: Request) -> None:
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
        table.start[slot] = length
        self._set_limits(root)
        request.branches.append(root)
        request.live.append(root)
        self.sampler.attach(slot, request.prepared, root.key, length)

    def _set_limits(self, branch: Branch) -> None:
        """Where a branch has to end, and how long it may fork: a child needs room for [Fork], [Child] and a token."""
        params, slot = branch.request.params, branch.slot
        limit = self.max_context
        if params.max_branch_tokens is not None:
            limit = min(limit, branch.start + params.max_branch_tokens)
        self.table.limit[slot] = limit
        self.table.fork_limit[slot] = limit - 3 if params.fork and branch.depth < params.max_depth else -1

    def _admission_cost(self, request: Request) -> int:
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
        rows = self._running_rows()
        owed = -(-table.length[rows] // size) - table.num_blocks[rows]
        return int(np.maximum(owed, 0).sum()) + rows.size

    def _relieve(self) -> None:
        """Make room: preempt the youngest request, or park the youngest branch of the only one."""
        if len(self.running) > 1:
            self._preempt(self.running[-1])
            return
        request = self.running[0]
        candidates = [b for b in request.live if not b.parked]
        if len(candidates) < 2:
            raise KVCacheError("a single branch does not fit into the KV pool that was sized for it")
        branch = candidates[-1]
        self.blocks.release(branch, remember=True)
        branch.parked = True
        self._rows_stale = True
        self.catching.settle()

    def _feed(self, request: Request) -> None:
        """Preempt the youngest request if an older one could not get a block in the last step."""
        self.catching.starved = None
        if self.requests.catching_up[request.index] and request in self.running and self.running[-1] is not request:
            self._preempt(self.running[-1])

    def _preempt(self, request: Request) -> None:
        """Take a running request's blocks and queue it again; its branches keep their tokens."""
        for branch in request.live:
            self.blocks.release(branch, remember=True)
            branch.parked = False
        self.running.remove(request)
        self.catching.drop(request)
        request.state = RequestState.WAITING
        request.preemptions += 1
        self.preemptions += 1
        insort(self.waiting, request, key=lambda r: r.sort_key)
        self._rows_stale = True

    def _unpark(self, request: Request) -> None:
        """Let parked branches of a request catch up as far as the blocks allow, at least one if all are parked."""
        parked = [branch for branch in request.live if branch.parked]
        active = len(request.live) - len(parked)
        for branch in parked:
            cost = -(-int(self.table.length[branch.slot]) // self.cache.block_size) + 2 * len(request.live)
            if active and cost > self.cache.available:
                return
            branch.parked = False
            active += 1
            self._rows_stale = True
            self.catching.begin(request)

    # ---------------------------------------------------------------- booking

    def _book_events(self, report: StepReport, rows: list[int], ends: BoolArray) -> None:
        """Handle rows whose token forked, ended a branch, or met a limit."""
        table, remaining = self.table, self.requests.remaining
        for i in rows:
            branch, token = report.branches[i], report.tokens[i]
            slot, request = branch.slot, branch.request
            index = request.index
            params = request.params
            if ends[i] or token in params.stop_token_ids:
                kept = params.include_stop_in_output and not ends[i]
                self._end(report, branch, "stop", drop_last=not kept)
            elif remaining[index] <= 0 or table.length[slot] >= table.limit[slot]:
                self._end(report, branch, "length")
            elif token == self.tokens.fork:
                report.forked.append(self._fork(request, branch))

    def _within_budget(self, groups: RowGroups) -> BoolArray:
        """Rows whose token still fits `max_tokens`: of a request's rows the first ones, by branch id.

        Takes the tokens that do not fit back out of the requests' counts.
        """
        requests, owners = self.requests, groups.owners
        surplus = np.maximum(-requests.remaining[owners], 0)
        requests.remaining[owners] += surplus
        kept: BoolArray = groups.rank() < np.repeat(groups.sizes - surplus, groups.sizes)
        return kept

    def _fail_rows(self, report: StepReport, slots: IntArray, failed: Sequence[int]) -> BoolArray:
        """End the requests of rows with unusable logits; returns which rows go on."""
        requests = self.table.request[slots]
        hit = np.unique(requests[list(failed)])
        for index in hit.tolist():
            request = self.requests.at(index)
            report.ended += request.live
            report.finished.append(request)
            self.fail_request(request, "the model's logits are not finite; check the checkpoint and its quantisation")
        kept: BoolArray = ~np.isin(requests, hit)
        return kept

    def _end(self, report: StepReport, branch: Branch, reason: FinishReason, drop_last: bool = False) -> None:
        request = branch.request
        report.ended.append(branch)
        if self.finish_branch(branch, reason, drop_last):
            report.finished.append(request)

    def _fork(self, request: Request, parent: Branch) -> Branch:
        """Bear a child at the [Fork] that `parent` has just sampled (docs/decoding.md, "Branches").

        The child's path is the parent's up to and including [Fork], then a forced [Child]; both are pending.
        """
        table, source = self.table, parent.slot
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
            digests=parent.digests[: position // self.cache.block_size],
        )
        slot = table.take(child)
        table.tokens[slot, : position + 1] = table.tokens[source, : position + 1]
        table.tokens[slot, position + 1] = self.tokens.child
        table.length[slot] = position + 2
        table.request[slot] = request.index
        table.start[slot] = child.start
        self._set_limits(child)
        self.blocks.inherit(slot, source, position)
        self.sampler.attach(slot, request.prepared, child.key, len(request.prompt), root=False)
        request.branches.append(child)
        request.live.append(child)
        parent.children.append(child)
        self.requests.live[request.index] += 1
        self._rows_stale = True
        self.forks += 1
        return child

    def _finish_request(self, request: Request, last_reason: FinishReason) -> None:
        reasons = [branch.finish_reason for branch in request.branches]
        worst: list[FinishReason] = ["error", "cancelled", "length"]
        request.finish_reason = next((r for r in worst if r in reasons), request.root.finish_reason or last_reason)
        (self.running if request.state is RequestState.RUNNING else self.waiting).remove(request)
        self.catching.drop(request)
        self.requests.remove(request)
        request.state = RequestState.FINISHED
        self._rows_stale = True
