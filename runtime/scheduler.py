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
from apar.runtime.branch_table import NO_LIMIT, BranchTable
from apar.runtime.kv_cache import ROOT_DIGEST, KVCache, KVCacheError, chain_digest
from apar.runtime.outputs import FinishReason
from apar.runtime.random_stream import child_key, root_key
from apar.runtime.sampler import Sampler
from apar.runtime.step import Int32Array, StepInputs

BoolArray = npt.NDArray[np.bool_]
NO_BLOCKS = np.zeros(0, dtype=np.int32)


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """Sizes that bound the scheduler's arrays and steps."""

    max_rows: int = 256
    """Branches in one step."""
    max_step_tokens: int = 1024
    """Tokens in one step; prefill chunks take what decoding leaves."""
    max_live_branches: int = 1024
    """Branches alive in the server, those of preempted requests included."""
    prefix_caching: bool = True

    def __post_init__(self) -> None:
        for name in ("max_rows", "max_step_tokens", "max_live_branches"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise CapacityError(f"{name} must be a whole number of at least 1, not {value!r}")
        if self.max_step_tokens < 2 * self.max_rows:
            raise CapacityError(
                f"max_step_tokens ({self.max_step_tokens}) must be at least twice max_rows ({self.max_rows}): "
                "a branch's first step has two tokens"
            )


@dataclass(slots=True)
class Step:
    """One promised step: what the executor gets, and what `commit` needs to book it."""

    inputs: StepInputs
    rows: Int32Array
    """[R] slots of the branches in the step."""
    counts: Int32Array
    """[R] tokens of each row."""
    sampled: Int32Array
    """[L] slots whose logits are wanted, in the order of the logits."""
    counters: Int32Array
    """[L] index of the token to be sampled within its branch."""
    fork_banned: BoolArray
    """[L] rows that may not sample [Fork] in this step."""
    registered: list[int]
    """Blocks that became findable in the prefix cache on the promise that this step fills them."""


@dataclass(slots=True)
class StepReport:
    """What one commit changed, for those who turn it into text and events."""

    step: int
    sampled: list[tuple[Branch, int]] = field(default_factory=list)
    """Branches that grew by one token, with the token; those that ended are listed too."""
    forked: list[Branch] = field(default_factory=list)
    """Children born."""
    ended: list[Branch] = field(default_factory=list)
    finished: list[Request] = field(default_factory=list)


class Scheduler:
    """Queue, running requests, their branches and blocks.

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
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.step_index = 0
        self.forks = 0
        self.preemptions = 0
        capacity = limits.max_live_branches
        self._requests: list[Request | None] = [None] * capacity
        self._free_requests = list(range(capacity - 1, -1, -1))
        self._sampled = np.zeros(capacity, dtype=np.int32)
        self._max_tokens = np.zeros(capacity, dtype=np.int32)
        self._max_branches = np.zeros(capacity, dtype=np.int32)
        self._max_depth = np.zeros(capacity, dtype=np.int32)
        self._live = np.zeros(capacity, dtype=np.int32)
        self._held = np.zeros(capacity, dtype=np.int32)
        self._peak = np.zeros(capacity, dtype=np.int32)
        self._steps = np.zeros(capacity, dtype=np.int32)
        self._catching_up = np.zeros(capacity, dtype=bool)
        self._special_ends = np.zeros(capacity, dtype=bool)
        self._catching: list[Request] = []
        self._rows = np.zeros(0, dtype=np.int32)
        self._rows_stale = False
        self._rotation = 0
        self._starved: Request | None = None
        self._copies = np.zeros((0, 2), dtype=np.int32)
        self._ends = np.array(tokens.eos, dtype=np.int32)
        self._arange = np.arange(limits.max_step_tokens + 1, dtype=np.int32)
        self._no_mask = np.zeros((limits.max_step_tokens, 0), dtype=np.int32)

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
        self._release(branch, remember=branch.parent is None and reason != "error")
        self.sampler.detach(slot)
        table.give_back(branch)
        request.live.remove(branch)
        self._live[request.index] -= 1
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
        if self._starved is not None:
            self._feed(self._starved)
        self._admit()
        while True:
            rows = self._running_rows()
            if not rows.size and not self._catching:
                return None
            plan = self._plan(rows)
            if plan is not None:
                return self._build(*plan)
            behind = len(self._catching)
            self._book_catching_up()  # blocks found in the prefix cache may have been all that was missing
            if len(self._catching) == behind:
                self._relieve()

    def _plan(self, rows: Int32Array) -> tuple[Int32Array, Int32Array, list[int]] | None:
        """Choose rows and token counts and take their blocks; None if room must be made first."""
        table = self.table
        if self._catching:
            rows = rows[~self._catching_up[table.request[rows]]]
        counts = table.length[rows] - table.computed[rows]
        seats = self.limits.max_rows - bool(self._catching)
        if rows.size > seats:
            rows, counts = self._rotate(rows, counts, seats)
        if self._blocks_needed(rows, counts).sum() > self.cache.available:
            return None
        self._take_blocks(rows, counts)
        if not self._catching:
            return rows, counts, []
        extra_rows: list[int] = []
        extra_counts: list[int] = []
        registered: list[int] = []
        budget = self.limits.max_step_tokens - int(counts.sum())
        seats = self.limits.max_rows - rows.size
        for request in self._catching:
            for branch, pending in self._catch_up(request):
                if not seats or not budget:
                    break
                count = self._chunk(branch, min(pending, budget))
                if not count:
                    self._starved = self._starved or request
                    continue
                registered += self._register_prefix(branch, int(table.computed[branch.slot]) + count)
                extra_rows.append(branch.slot)
                extra_counts.append(count)
                budget -= count
                seats -= 1
        if not extra_rows:
            return (rows, counts, registered) if rows.size else None
        rows = np.concatenate((rows, np.array(extra_rows, dtype=np.int32)))
        counts = np.concatenate((counts, np.array(extra_counts, dtype=np.int32)))
        return rows, counts, registered

    def _build(self, rows: Int32Array, counts: Int32Array, registered: list[int]) -> Step:
        """Write the arrays of the step contract for chosen rows whose blocks are taken."""
        table, size = self.table, self.cache.block_size
        num_rows = rows.size
        query_start = np.zeros(num_rows + 1, dtype=np.int32)
        np.cumsum(counts, out=query_start[1:])
        num_tokens = int(query_start[-1])
        computed = table.computed[rows]
        kv_len = computed + counts
        if num_tokens == num_rows:
            token_rows, positions = rows, computed
        else:
            row_of_token = np.repeat(self._arange[:num_rows], counts)
            token_rows = rows[row_of_token]
            positions = (computed - query_start[:-1])[row_of_token] + self._arange[:num_tokens]
        slots = table.block_table[token_rows, positions // size] * size + positions % size
        request_of_row = table.request[rows]
        starts = np.flatnonzero(np.diff(request_of_row, prepend=-1)).astype(np.int32)
        prefix_rows = np.append(starts, np.int32(num_rows))
        shared = np.minimum.reduceat(table.share[rows], starts)
        shared[np.diff(prefix_rows) == 1] = 0
        length = table.length[rows]
        complete = kv_len == length
        if self._catching:
            # A tree that is being resumed samples only when all its branches have caught up.
            complete &= ~(self._catching_up[request_of_row] & (self._live[request_of_row] > 1))
        wanted = np.flatnonzero(complete)
        sampled = rows[wanted]
        inputs = StepInputs(
            input_ids=table.tokens[token_rows, positions],
            position_ids=positions,
            query_start=query_start,
            kv_len=kv_len,
            block_table=table.block_table[rows, : int(table.num_blocks[rows].max())],
            slot_mapping=slots,
            slot_copies=self._copies,
            prefix_rows=prefix_rows,
            prefix_blocks=shared,
            tree_mask=self._no_mask[:num_tokens],
            logits_rows=(query_start[1:] - 1)[wanted],
        )
        return Step(
            inputs=inputs,
            rows=rows,
            counts=counts,
            sampled=sampled,
            counters=length[wanted] - table.start[sampled],
            fork_banned=self._fork_bans(sampled),
            registered=registered,
        )

    def commit(self, step: Step, tokens: Int32Array, failed: Sequence[int] = ()) -> StepReport:
        """Book a step that ran: `tokens` [L] were sampled for `step.sampled`.

        `failed` lists rows of L whose logits were unusable (not finite): their requests end with an error.
        """
        table = self.table
        table.computed[step.rows] += step.counts
        self.step_index += 1
        report = StepReport(self.step_index)
        slots, counters = step.sampled, step.counters
        if failed:
            kept = self._fail_rows(report, slots, failed)
            slots, counters, tokens = slots[kept], counters[kept], tokens[kept]
        if slots.size:
            requests = table.request[slots]
            np.add.at(self._sampled, requests, 1)
            self._steps[requests[np.flatnonzero(np.diff(requests, prepend=-1))]] += 1
            exhausted = self._sampled[requests] >= self._max_tokens[requests]
            surplus: list[Branch] = []
            if exhausted.any():
                kept = self._within_budget(slots, requests)
                surplus = [branch for slot in slots[~kept].tolist() if (branch := table.branches[slot]) is not None]
                slots, counters, tokens = slots[kept], counters[kept], tokens[kept]
                requests, exhausted = requests[kept], exhausted[kept]
            length = table.length[slots]
            table.tokens[slots, length] = tokens
            length += 1
            table.length[slots] = length
            table.first_step[slots[counters == 0]] = self.step_index
            ends = (tokens == self._ends[0]) if self._ends.size == 1 else np.isin(tokens, self._ends)
            special = self._special_ends[requests]
            forks = tokens == self.tokens.fork
            events = np.flatnonzero(ends | forks | exhausted | special | (length >= table.limit[slots]))
            branches = table.branches
            report.sampled = [(branches[s], t) for s, t in zip(slots.tolist(), tokens.tolist(), strict=True)]
            self._book_events(report, events.tolist(), ends)
            for branch in surplus:
                self._end(report, branch, "length")
        if self._catching:
            self._book_catching_up()
        return report

    def fail(self, step: Step, message: str) -> list[Request]:
        """Book a step that raised: every request in it ends with an error, its K/V is forgotten."""
        self.cache.forget(step.registered)
        indices = dict.fromkeys(self.table.request[step.rows].tolist())
        failed = [request for index in indices if (request := self._requests[index]) is not None]
        for request in failed:
            self.fail_request(request, message)
        promised = set(step.registered)
        for request in self._catching:
            for branch in request.live:
                # It found blocks in the prefix cache that the failed step was to fill.
                if promised.intersection(self.table.blocks(branch.slot).tolist()):
                    self._release(branch, remember=False)
        return failed

    def fail_request(self, request: Request, message: str) -> None:
        """End one request with an error and forget its K/V, which may be garbage."""
        for branch in request.live:
            self.cache.forget(self.table.blocks(branch.slot).tolist())
        self.cancel(request, "error", message)

    # ---------------------------------------------------------------- choosing

    def _running_rows(self) -> Int32Array:
        if self._rows_stale:
            slots = [b.slot for request in self.running for b in request.live if not b.parked]
            self._rows = np.array(slots, dtype=np.int32)
            self._rows_stale = False
        return self._rows

    def _rotate(self, rows: Int32Array, counts: Int32Array, seats: int) -> tuple[Int32Array, Int32Array]:
        """Of more rows than a step takes, whole requests from a place that moves on every step."""
        requests = self.table.request[rows]
        starts = np.flatnonzero(np.diff(requests, prepend=-1))
        first = self._rotation % starts.size
        order = np.roll(np.arange(starts.size), -first)
        sizes = np.diff(np.append(starts, rows.size))
        taken = int((np.cumsum(sizes[order]) <= seats).sum())
        self._rotation = first + taken
        chosen = np.sort(order[:taken])
        keep = np.concatenate([np.arange(starts[g], starts[g] + sizes[g]) for g in chosen])
        return rows[keep], counts[keep]

    def _blocks_needed(self, rows: Int32Array, counts: Int32Array) -> Int32Array:
        """Blocks that each row must take to hold its next `counts` tokens, copies of shared tails included."""
        table, size = self.table, self.cache.block_size
        end = table.computed[rows] + counts
        needed: Int32Array = (end + (size - 1)) // size - table.num_blocks[rows] + table.copy_tail[rows]
        return needed

    def _take_blocks(self, rows: Int32Array, counts: Int32Array) -> None:
        """Extend the rows' tables for their next `counts` tokens and note the copies that un-share tails."""
        table = self.table
        needed = self._blocks_needed(rows, counts)
        tails = rows[table.copy_tail[rows] != 0]
        sources = table.block_table[tails, table.num_blocks[tails] - 1]
        table.num_blocks[tails] -= 1
        table.copy_tail[tails] = 0
        takers = np.flatnonzero(needed)
        if takers.size:
            slots, sizes = rows[takers], needed[takers]
            total = int(sizes.sum())
            blocks = self.cache.allocate(total)
            if total == takers.size:
                table.block_table[slots, table.num_blocks[slots]] = blocks
            else:
                first = np.cumsum(sizes) - sizes
                columns = np.arange(total) - np.repeat(first - table.num_blocks[slots], sizes)
                table.block_table[np.repeat(slots, sizes), columns] = blocks
            table.num_blocks[slots] += sizes
            requests = table.request[slots]
            np.add.at(self._held, requests, sizes)
            self._peak[requests] = np.maximum(self._peak[requests], self._held[requests])
        self._copies = self._tail_copies(tails, sources) if tails.size else np.zeros((0, 2), dtype=np.int32)

    def _tail_copies(self, tails: Int32Array, sources: Int32Array) -> Int32Array:
        """Slot copies of the filled part of parents' last blocks into the children's own."""
        table, size = self.table, self.cache.block_size
        filled = table.computed[tails] % size
        targets = table.block_table[tails, table.computed[tails] // size]
        offsets = np.concatenate([self._arange[:n] for n in filled.tolist()])
        copies = np.stack((np.repeat(sources, filled), np.repeat(targets, filled)), axis=1) * size + offsets[:, None]
        # The copies come first in the step, so a source may already be somebody else's target of writes.
        for source, request in zip(sources, table.request[tails].tolist(), strict=True):
            if self.cache.references[source] == 1:
                self._held[request] -= 1
            self.cache.release(np.array([source], dtype=np.int32))
        return np.ascontiguousarray(copies, dtype=np.int32)

    def _fork_bans(self, slots: Int32Array) -> BoolArray:
        """Rows that may not fork now (APAR.md, Decoding 1): where it is not allowed, and where it could
        overshoot a limit even if every row before it in the step forks too."""
        table = self.table
        length = table.length[slots]
        requests = table.request[slots]
        last = table.tokens[slots, length - 1]
        banned: BoolArray = (last == self.tokens.fork) | (last == self.tokens.child)
        banned |= table.depth[slots] >= self._max_depth[requests]
        banned |= length + 3 > table.limit[slots]
        live = self._live[requests]
        banned |= self._max_tokens[requests] - self._sampled[requests] <= live
        if slots.size:
            candidates = (~banned).astype(np.int32)
            before = np.cumsum(candidates) - candidates
            starts = np.flatnonzero(np.diff(requests, prepend=-1))
            rank = before - np.repeat(before[starts], np.diff(np.append(starts, slots.size)))
            banned |= live + rank >= self._max_branches[requests]
            banned |= before >= table.num_free
        return banned

    # ---------------------------------------------------------------- catching up

    def _catch_up(self, request: Request) -> list[tuple[Branch, int]]:
        """Branches of a catching-up request that should compute now, with the tokens they may compute.

        The branch with the longest inherited path leads; when it has its K/V, the others find their
        shared blocks in the prefix cache and follow together.
        """
        table = self.table
        branches = [branch for branch in request.live if not branch.parked]
        if len(request.live) == 1:
            branch = branches[0]
            self._attach_prefix(branch)
            return [(branch, int(table.length[branch.slot] - table.computed[branch.slot]))]
        leader = branches[0] if branches[0].parent is None else max(branches, key=lambda b: b.start)
        if self._lag(leader) > 0:
            self._attach_prefix(leader)
            if self._lag(leader) > 0:
                return [(leader, self._lag(leader))]
        followers = []
        for branch in branches:
            if self._lag(branch) > 0:
                self._attach_prefix(branch)
                if self._lag(branch) > 0:
                    followers.append((branch, self._lag(branch)))
        return followers

    def _lag(self, branch: Branch) -> int:
        """Tokens that a branch must compute before it can sample together with its siblings.

        A branch is level with one pending token, a newborn child with two ([Fork] and [Child]).
        """
        pending = int(self.table.length[branch.slot] - self.table.computed[branch.slot])
        return pending - 1 if pending > 2 else 0

    def _attach_prefix(self, branch: Branch) -> None:
        """Give a branch without blocks the longest cached prefix of its path, leaving a token to compute."""
        table, slot = self.table, branch.slot
        if table.num_blocks[slot]:
            return
        request = branch.request
        usable = (int(table.length[slot]) - 1) // self.cache.block_size
        blocks = self.cache.match(self._path_digests(branch, usable)) if self.cache.prefix_caching else NO_BLOCKS
        count = blocks.size
        siblings = [table.blocks(b.slot) for b in request.live if b is not branch and table.num_blocks[b.slot]]
        table.block_table[slot, :count] = blocks
        table.num_blocks[slot] = count
        table.computed[slot] = count * self.cache.block_size
        known = set(np.concatenate(siblings).tolist()) if siblings else set()
        self._held[request.index] += sum(block not in known for block in blocks.tolist())
        self._peak[request.index] = max(self._peak[request.index], self._held[request.index])
        table.share[slot] = self._common_blocks(branch, request)
        if branch.parent is None and len(request.branches) == 1:
            request.cached_tokens = int(table.computed[slot])

    def _common_blocks(self, branch: Branch, request: Request) -> int:
        """Leading blocks that `branch` has in common with what its siblings share among themselves."""
        table = self.table
        mine = table.blocks(branch.slot)
        for other in request.live:
            theirs = table.blocks(other.slot)
            if other is branch or not theirs.size:
                continue
            width = min(mine.size, theirs.size)
            differs = np.flatnonzero(mine[:width] != theirs[:width])
            common = int(differs[0]) if differs.size else width
            return min(common, int(table.share[other.slot]))
        return NO_LIMIT  # the first to have blocks: the others will be compared with it

    def _chunk(self, branch: Branch, count: int) -> int:
        """Take blocks for up to `count` tokens of a branch; returns how many can be computed."""
        table, size = self.table, self.cache.block_size
        slot = branch.slot
        room = (int(table.num_blocks[slot]) + self.cache.available) * size - int(table.computed[slot])
        count = min(count, room)
        if count <= 0:
            return 0
        copies = self._copies
        self._take_blocks(np.array([slot], dtype=np.int32), np.array([count], dtype=np.int32))
        self._copies = np.concatenate((copies, self._copies)) if self._copies.size else copies
        return count

    def _register_prefix(self, branch: Branch, end: int) -> list[int]:
        """Make the full blocks of `path[:end]` findable; returns those that were not before."""
        if not self.cache.prefix_caching:
            return []
        full = end // self.cache.block_size
        blocks = self.table.block_table[branch.slot, :full].tolist()
        fresh = []
        for block, digest in zip(blocks, self._path_digests(branch, full), strict=True):
            if not self.cache.is_registered(block):
                self.cache.register(block, digest)
                fresh.append(block)
        return fresh

    def _path_digests(self, branch: Branch, count: int) -> list[bytes]:
        """Chain digests of the first `count` full blocks of a branch's path."""
        digests, size = branch.digests, self.cache.block_size
        path = self.table.tokens[branch.slot]
        for i in range(len(digests), count):
            parent = digests[-1] if digests else ROOT_DIGEST
            digests.append(chain_digest(parent, path[i * size : (i + 1) * size]))
        return digests[:count]

    def _book_catching_up(self) -> None:
        table = self.table
        still = []
        for request in self._catching:
            if request.state is not RequestState.RUNNING:
                continue
            branches = [branch for branch in request.live if not branch.parked]
            if len(request.live) == 1:
                behind = int(table.length[branches[0].slot] - table.computed[branches[0].slot]) > 1
            else:
                behind = any(self._lag(branch) > 0 for branch in branches)
            self._catching_up[request.index] = behind
            if behind:
                still.append(request)
        self._catching = still

    # ---------------------------------------------------------------- admission and preemption

    def _admit(self) -> None:
        """Move waiting requests into the running set while rows and blocks allow, strictly in order."""
        while self.waiting:
            request = self.waiting[0]
            resumed = bool(request.branches)
            if not resumed and not (self.table.num_free and self._free_requests):
                # All slots belong to preempted requests: one of those must go first.
                if self.running:
                    return
                request = next(r for r in self.waiting if r.branches)
                resumed = True
            live_rows = self._running_rows().size
            if self.running:
                if live_rows + max(len(request.live), 1) > self.limits.max_rows:
                    return
                if self._admission_cost(request) > self.cache.available - self._reserve():
                    return
            self.waiting.remove(request)
            if not resumed:
                self._start(request)
            request.state = RequestState.RUNNING
            insort(self.running, request, key=lambda r: r.sort_key)
            self._begin_catching_up(request)
            self._rows_stale = True

    def _start(self, request: Request) -> None:
        """Give a new request its row of arrays and its root branch."""
        request.started_at = perf_counter()
        table, params = self.table, request.params
        index = self._free_requests.pop()
        request.index = index
        self._requests[index] = request
        self._sampled[index] = 0
        self._max_tokens[index] = params.max_tokens
        self._max_branches[index] = min(params.max_branches, max(self.limits.max_rows - 1, 1))
        self._max_depth[index] = params.max_depth if params.fork else 1
        self._live[index] = 1
        self._held[index] = self._peak[index] = self._steps[index] = 0
        self._special_ends[index] = bool(params.stop_token_ids) or params.ignore_eos
        length = len(request.prompt)
        root = Branch(request, 0, None, 1, 0, length, root_key(request.seed))
        slot = table.take(root)
        table.tokens[slot, :length] = request.prompt
        table.length[slot] = length
        table.depth[slot] = 1
        table.request[slot] = index
        table.start[slot] = length
        table.limit[slot] = self._limit(length, params.max_branch_tokens)
        request.branches.append(root)
        request.live.append(root)
        self.sampler.attach(slot, request.prepared, root.key, length)

    def _limit(self, start: int, max_branch_tokens: int | None) -> int:
        return self.max_context if max_branch_tokens is None else min(self.max_context, start + max_branch_tokens)

    def _begin_catching_up(self, request: Request) -> None:
        self._catching_up[request.index] = True
        insort(self._catching, request, key=lambda r: r.sort_key)

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
        self._release(branch, remember=True)
        branch.parked = True
        self._rows_stale = True
        self._book_catching_up()

    def _feed(self, request: Request) -> None:
        """Preempt the youngest request if an older one could not get a block in the last step."""
        self._starved = None
        if self._catching_up[request.index] and request in self.running and self.running[-1] is not request:
            self._preempt(self.running[-1])

    def _preempt(self, request: Request) -> None:
        """Take a running request's blocks and queue it again; its branches keep their tokens."""
        for branch in request.live:
            self._release(branch, remember=True)
            branch.parked = False
        self.running.remove(request)
        if request in self._catching:
            self._catching.remove(request)
        self._catching_up[request.index] = False
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
            if not self._catching_up[request.index]:
                self._begin_catching_up(request)

    def _release(self, branch: Branch, remember: bool) -> None:
        """Give up a branch's blocks; `remember` keeps the full ones findable in the prefix cache."""
        table, slot = self.table, branch.slot
        if remember and self.cache.prefix_caching:
            # A newborn's last block is its parent's: it is not filled by this path.
            full = int(table.computed[slot]) // self.cache.block_size
            self._register_prefix(branch, full * self.cache.block_size)
        blocks = table.blocks(slot).copy()
        index = int(table.request[slot])
        self._held[index] -= int((self.cache.references[blocks] == 1).sum())
        self.cache.release(blocks)
        table.block_table[slot, : blocks.size] = -1
        table.num_blocks[slot] = 0
        table.computed[slot] = 0
        table.copy_tail[slot] = 0
        table.share[slot] = NO_LIMIT

    # ---------------------------------------------------------------- booking

    def _book_events(self, report: StepReport, rows: list[int], ends: BoolArray) -> None:
        """Handle rows whose token forked, ended a branch, or met a limit."""
        table = self.table
        for i in rows:
            branch, token = report.sampled[i]
            slot = branch.slot
            request = branch.request
            index = request.index
            params = request.params
            if ends[i] or token in params.stop_token_ids:
                kept = params.include_stop_in_output and not ends[i]
                self._end(report, branch, "stop", drop_last=not kept)
            elif self._sampled[index] >= self._max_tokens[index] or table.length[slot] >= table.limit[slot]:
                self._end(report, branch, "length")
            elif token == self.tokens.fork:
                report.forked.append(self._fork(request, branch))

    def _within_budget(self, slots: Int32Array, requests: Int32Array) -> BoolArray:
        """Rows whose token still fits `max_tokens`: of a request's rows the first ones, by branch id.

        Takes the tokens that do not fit back out of the requests' counts.
        """
        starts = np.flatnonzero(np.diff(requests, prepend=-1))
        sizes = np.diff(np.append(starts, slots.size))
        surplus = np.maximum(self._sampled[requests[starts]] - self._max_tokens[requests[starts]], 0)
        self._sampled[requests[starts]] -= surplus
        rank = np.arange(slots.size) - np.repeat(starts, sizes)
        kept: BoolArray = rank < np.repeat(sizes - surplus, sizes)
        return kept

    def _fail_rows(self, report: StepReport, slots: Int32Array, failed: Sequence[int]) -> BoolArray:
        """End the requests of rows with unusable logits; returns which rows go on."""
        requests = self.table.request[slots]
        hit = np.unique(requests[list(failed)])
        for index in hit.tolist():
            request = self._requests[index]
            assert request is not None
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
        """Bear a child at the [Fork] that `parent` has just sampled (APAR.md, Decoding 2).

        The child's path is the parent's up to and including [Fork], then a forced [Child]. It shares every
        full block and refers to the partly filled one until its first step copies the filled slots.
        """
        table, size = self.table, self.cache.block_size
        source = parent.slot
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
            digests=parent.digests[: position // size],
        )
        slot = table.take(child)
        table.tokens[slot, : position + 1] = table.tokens[source, : position + 1]
        table.tokens[slot, position + 1] = self.tokens.child
        table.length[slot] = position + 2
        table.computed[slot] = position
        num_blocks = -(-position // size)
        blocks = table.block_table[source, :num_blocks]
        table.block_table[slot, :num_blocks] = blocks
        table.num_blocks[slot] = num_blocks
        table.copy_tail[slot] = 1 if position % size else 0
        table.share[slot] = min(int(table.share[source]), position // size)
        table.depth[slot] = child.depth
        table.request[slot] = request.index
        table.start[slot] = child.start
        table.limit[slot] = self._limit(child.start, request.params.max_branch_tokens)
        self.cache.share(blocks)
        self.sampler.attach(slot, request.prepared, child.key, len(request.prompt), root=False)
        request.branches.append(child)
        request.live.append(child)
        parent.children.append(child)
        self._live[request.index] += 1
        self._rows_stale = True
        self.forks += 1
        return child

    def _finish_request(self, request: Request, last_reason: FinishReason) -> None:
        index = request.index
        request.sampled = int(self._sampled[index])
        request.peak_blocks = int(self._peak[index])
        request.steps = int(self._steps[index])
        reasons = [branch.finish_reason for branch in request.branches]
        worst: list[FinishReason] = ["error", "cancelled", "length"]
        request.finish_reason = next((r for r in worst if r in reasons), request.root.finish_reason or last_reason)
        (self.running if request.state is RequestState.RUNNING else self.waiting).remove(request)
        if request in self._catching:
            self._catching.remove(request)
        self._catching_up[index] = False
        request.state = RequestState.FINISHED
        self._requests[index] = None
        self._free_requests.append(index)
        self._rows_stale = True
