"""Decides what every step computes, and books what it gave.

A branch has a path and `computed` (how many of its tokens have K/V). A step computes pending tokens of
some branches; prefill, chunked prefill, decoding, the birth of a child and the resumption of a preempted
tree are all that one thing. Two rules make results independent of load:

- the branches of a request advance in lockstep: they sample together or not at all, and a request some of
  whose branches still lack K/V (a prompt being prefilled, a tree being resumed) is *catching up*;
- everything that a step needs (blocks for new tokens, blocks for copy-on-write) is counted and taken
  before the step is promised, so no step can run out. What does not fit is preempted, youngest first.

The parts have modules of their own: `admission`, `preemption`, `catching_up`, `fork_bans`, `step_writer`,
`booking`, `lifecycle`. See docs/decoding.md for the rules of decoding and docs/step-contract.md for the arrays.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from apar.export.errors import CapacityError
from apar.export.manifest import TokenIds
from apar.runtime.adaptive import Adaptive
from apar.runtime.admission import Admission
from apar.runtime.booking import Booking, StepReport
from apar.runtime.branch import Branch, Request, RequestState
from apar.runtime.branch_blocks import BranchBlocks
from apar.runtime.branch_table import BranchTable
from apar.runtime.catching_up import CatchingUp
from apar.runtime.counters import SchedulerCounters
from apar.runtime.fork_bans import ForkBans
from apar.runtime.fork_policy import FirstCome
from apar.runtime.kv_cache import KVCache, KVCacheError
from apar.runtime.lifecycle import Lifecycle
from apar.runtime.limits import SchedulerLimits
from apar.runtime.outputs import FinishReason
from apar.runtime.preemption import Preemption
from apar.runtime.request_queues import RequestQueues
from apar.runtime.request_table import RequestTable
from apar.runtime.row_groups import RowGroups
from apar.runtime.sampler import Sampler
from apar.runtime.speculative.speculation import Speculation
from apar.runtime.step import BoolArray, Int32Array, IntArray
from apar.runtime.step_cost import StepCost, kv_read
from apar.runtime.step_writer import Plan, Step, StepWriter


class Scheduler:
    """Queue, running requests and what their branches do next.

    Args:
        tokens: ids of [Fork], [Child] and the ends.
        max_context: longest path, in tokens.
        cache: the books of the executor's KV pool.
        sampler: told of every branch that comes and goes.
        limits: sizes, fork policy, service level.
        cost: predicts steps for the fork policy `adaptive`.
    """

    def __init__(
        self,
        tokens: TokenIds,
        max_context: int,
        cache: KVCache,
        sampler: Sampler,
        limits: SchedulerLimits,
        cost: StepCost,
    ) -> None:
        self.cache = cache
        self.limits = limits
        self.max_context = min(max_context, cache.num_blocks * cache.block_size)
        self.table = table = BranchTable(limits.max_live_branches, self.max_context, cache.block_size)
        self.requests = requests = RequestTable(limits.max_live_branches)
        self.blocks = blocks = BranchBlocks(table, requests, cache)
        self.queues = queues = RequestQueues(table)
        self.catching = catching = CatchingUp(queues, table, requests, blocks, limits)
        self.counters = counters = SchedulerCounters()
        self.policy = policy = FirstCome(queues, counters, limits)
        if limits.fork_policy == "adaptive":
            self.policy = policy = Adaptive(queues, table, requests, catching, counters, limits, cost)
        self._cost = cost
        self._preemption = preemption = Preemption(queues, table, requests, blocks, cache, catching, counters)
        self._lifecycle = lifecycle = Lifecycle(
            tokens, self.max_context, queues, table, requests, blocks, catching, preemption, sampler, counters, limits
        )
        self._admission = Admission(queues, table, requests, cache, catching, lifecycle, policy)
        self._fork_bans = ForkBans(table, requests, tokens, policy, counters)
        self._writer = StepWriter(table, requests, self._fork_bans, limits.max_step_tokens)
        self.speculation: Speculation | None = None
        """Drafts for the rows of steps, where the engine speculates."""
        self._booking = Booking(queues, table, requests, lifecycle, tokens)

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
        self.queues.enter(request)

    def cancel(self, request: Request, reason: FinishReason = "cancelled", error: str | None = None) -> None:
        """End a request in whatever state it is; its blocks and slots are free when this returns."""
        self._lifecycle.cancel(request, reason, error)

    def expire(self, now: float) -> StepReport | None:
        """End the requests whose deadline has passed, with all their branches; None if there are none.

        To be called between two steps. `now` is the engine's clock, in seconds.
        """
        requests = self.queues.deadlines.passed(now)
        if not requests:
            return None
        report = StepReport(self.step_index)
        for request in requests:
            report.ended += request.live
            report.finished.append(request)
            self._lifecycle.cancel(request, "deadline")
        return report

    def finish_branch(self, branch: Branch, reason: FinishReason) -> bool:
        """End one branch between two steps; returns whether that ended its request."""
        self._lifecycle.finish([(branch, reason, False)])
        return branch.request.state is RequestState.FINISHED

    def preempt(self, request: Request) -> None:
        """Take a running request's blocks and queue it again; its branches keep their tokens."""
        self._preemption.preempt(request)

    def use_policy(self, policy: FirstCome) -> None:
        """Let another fork policy decide from the next step on: for those who study policies."""
        self.policy = self._admission.policy = self._fork_bans.policy = policy

    # ---------------------------------------------------------------- what there is

    @property
    def waiting(self) -> list[Request]:
        """Requests that wait, new and preempted ones, in their order."""
        return self.queues.waiting

    @property
    def running(self) -> list[Request]:
        """Requests that run, in their order."""
        return self.queues.running

    @property
    def idle(self) -> bool:
        """True when no request waits or runs."""
        return not self.queues.waiting and not self.queues.running

    @property
    def step_index(self) -> int:
        """Steps booked so far."""
        return self._lifecycle.step_index

    @property
    def forks(self) -> int:
        """Children born so far."""
        return self.counters.forks

    @property
    def preemptions(self) -> int:
        """Requests preempted so far."""
        return self.counters.preemptions

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
        self.queues.check()

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
            **({} if self.cache.host is None else self.cache.host.counters()),
            **({} if self.speculation is None else self.speculation.counters()),
        }

    # ---------------------------------------------------------------- the step

    def schedule(self, now: float = 0.0) -> Step | None:
        """Promise the next step, or None if there is nothing to compute.

        `now` is the engine's clock, in seconds; only the fork policy `adaptive` looks at it.
        """
        self.policy.begin_step(now)
        self._preemption.feed_starved()
        self._admission.admit()
        while True:
            rows = self.queues.rows()
            if not rows.size and not self.catching:
                return None
            plan = self._plan(rows)
            if plan is not None:
                return self._writer.write(plan, self.queues.groups_of(plan.rows), bool(self.catching))
            # Blocks found in the prefix cache may have been all that a request still lacked.
            if not self.catching.settle():
                self._preemption.relieve()

    def observe(self, step: Step, seconds: float) -> None:
        """Learn from a step that ran what steps take; `seconds` are the executor's and the sampler's."""
        if self.limits.fork_policy == "adaptive":
            self._cost.observe(step.inputs.input_ids.size, kv_read(step.inputs, self.table.block_size), seconds)

    def count_denials(self, slots: IntArray, denied: IntArray) -> None:
        """Count forks that did not happen, before tokens are booked.

        Args:
            slots: [n] branches whose bans were given last.
            denied: indices into `slots` where [Fork] was banned and would have been the likeliest token.
        """
        if denied.size:
            self._fork_bans.count_denials(slots, denied)

    def commit(self, step: Step, tokens: Int32Array, failed: Sequence[int] = ()) -> StepReport:
        """Book a step that ran: `tokens` [L] were sampled for `step.sampled`.

        `failed` lists rows of L whose logits were unusable (not finite): their requests end with an error.
        """
        report = self._booking.book(step, tokens, failed)
        self.catching.settle()
        return report

    def commit_runs(self, step: Step, slots: IntArray, counts: Int32Array, tokens: Int32Array) -> StepReport:
        """Begin to book a step with runs: `counts` [n] `tokens` each of `slots` [n] from which nothing follows."""
        return self._booking.book_runs(step, slots, counts, tokens)

    def commit_round(self, slots: IntArray, tokens: Int32Array, failed: Sequence[int] = ()) -> StepReport:
        """Book further tokens of the same step: `tokens` [n] were sampled behind accepted drafts of `slots` [n]."""
        report = self._booking.book_round(slots, tokens, failed)
        self.catching.settle()
        return report

    def fork_bans(self, slots: IntArray) -> BoolArray:
        """[n] which branches may not sample [Fork] next, siblings standing together."""
        table = self.table
        length = table.length[slots]
        groups = RowGroups.of(table.request[slots])
        return self._fork_bans.of(slots, groups, length, table.tokens[slots, length - 1])

    def requests_in(self, step: Step) -> list[Request]:
        """Whose rows are in a step that has not been booked."""
        return [self.requests.at(index) for index in dict.fromkeys(self.table.request[step.rows].tolist())]

    def fail(self, step: Step, message: str, requests: list[Request] | None = None) -> list[Request]:
        """Book a step that raised: every request in it ends with an error, its K/V is forgotten. Returns those.

        requests: `requests_in` the step, if it raised after it had been booked.
        """
        unsure = [*step.registered, *step.inputs.swap_in[:, 1].tolist()]
        self.cache.forget(unsure)
        if self.cache.host is not None:
            self.cache.host.distrust(step.inputs.swap_out[:, 1].tolist())
        if requests is None:
            requests = self.requests_in(step)
            # Accepted drafts of branches that wait may have been moved in it.
            moved = self.blocks.owners_of(step.inputs.slot_copies[:, 1]) if step.inputs.slot_copies.size else []
            requests += [other for index in moved if (other := self.requests.at(index)) not in requests]
        failed = [request for request in requests if request.state is not RequestState.FINISHED]
        for request in failed:
            self._lifecycle.fail(request, message)
        self.catching.distrust(set(unsure))
        return failed

    def _plan(self, rows: IntArray) -> Plan | None:
        """Choose rows and token counts and take their blocks; None if room must be made first."""
        table = self.table
        if self.catching:
            rows = rows[~self.requests.catching_up[table.request[rows]]]
        seats = self.limits.max_rows - self.policy.kept_seats(len(self.catching))
        keep = self.policy.take_turns(rows, seats) if rows.size else None
        if keep is not None:
            rows = rows[keep]
        reach = None
        if self.speculation is not None:
            reach = self.speculation.reach(rows)
            rows = reach.rows
        length = table.length[rows]
        counts = length - table.computed[rows]
        claim = self.blocks.claim(rows, length)
        if claim.total > self.cache.available:
            return None
        drafts = None
        if self.speculation is not None and reach is not None:
            drafts = self.speculation.draft(reach, counts, self.limits.max_step_tokens)
        if drafts is not None:
            more = self.blocks.claim(rows, length + drafts.sizes)
            if more.total <= self.cache.available - self._reserve():
                counts, claim = counts + drafts.sizes, more
            else:
                drafts = None
        plan = Plan(rows, counts, self.blocks.take(claim), drafts=drafts)
        if self.catching:
            self.catching.add_chunks(plan, self.policy.prompt_tokens(rows))
        if not plan.rows.size:
            return None
        if self.speculation is not None:
            moves = self.blocks.take_moves()
            plan.copies = np.concatenate((moves, plan.copies)) if moves.size else plan.copies
        if self.cache.host is not None:
            plan.swaps = self.cache.host.take_swaps()
        return plan

    def _reserve(self) -> int:
        """Blocks that drafts must leave: prompts and trees being resumed go first."""
        return self.limits.max_step_tokens // self.cache.block_size + 1 if self.catching else 0
