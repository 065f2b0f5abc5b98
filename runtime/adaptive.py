"""The fork policy `adaptive`: what the batch can afford, by the service level of those in it (docs/scheduling.md)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from apar.runtime.branch import Request
from apar.runtime.branch_table import BranchTable
from apar.runtime.catching_up import CatchingUp
from apar.runtime.counters import ForkDenial, SchedulerCounters
from apar.runtime.fork_policy import FirstCome
from apar.runtime.limits import SchedulerLimits
from apar.runtime.pacing import Pacing, at_rank
from apar.runtime.request_queues import RequestQueues
from apar.runtime.request_table import RequestTable
from apar.runtime.row_groups import RowGroups
from apar.runtime.step import BoolArray, IntArray
from apar.runtime.step_cost import Float64Array, StepCost

TIGHTEST = 0.1
"""Part of the requests in time that may find a step longer than they can afford. Short steps for the tightest of all
would cost everybody throughput; those go first in every step, and many make it nevertheless."""
FULL = 0.95
"""Part of a step that requests in time may need before no more are admitted."""
LATE_SHARE = 0.05
"""Of the rows of a step, what late requests get whatever the others need: nobody starves."""
NEWCOMERS = 4
"""One of so many branch slots is kept from forks: new requests need one each."""
LEAST_CHUNK = 8
"""One of so many tokens that fit a step may be a prompt's even where the step then lasts too long."""
CROWDED = 1.2
"""Of the affordable rows, how many may live, late requests included."""
UNKNOWN_PATH = 256.0
"""Tokens that a row reads, where there is none to tell."""
STANDS = 8
"""Steps for which a judgement stands while nobody waits, nobody is late and a step has room for all rows."""


@dataclass(slots=True)
class _Load:
    """What the running requests take, those included that were admitted since."""

    rows: int = 0
    """Live branches of requests in time."""
    late_rows: int = 0
    tokens: float = 0.0
    """Tokens a second that the requests in time need."""
    kv_per_token: float = UNKNOWN_PATH
    """K/V tokens that a step reads for each of them."""


class Adaptive(FirstCome):
    """Admits as many requests as can be in time together, and lets those go first that have least time left.

    Args:
        queues: of requests.
        table: live branches.
        requests: admitted requests.
        catching: requests whose branches lack K/V.
        counters: where decisions are counted.
        limits: sizes and the service level.
        cost: predicts steps.
    """

    def __init__(
        self,
        queues: RequestQueues,
        table: BranchTable,
        requests: RequestTable,
        catching: CatchingUp,
        counters: SchedulerCounters,
        limits: SchedulerLimits,
        cost: StepCost,
    ) -> None:
        super().__init__(queues, counters, limits)
        self.table = table
        self.requests = requests
        self.catching = catching
        self.cost = cost
        self.pacing = Pacing(requests, counters, limits, cost)
        self.budget = math.inf
        """Seconds that a step may take."""
        self.affordable_rows = limits.max_rows
        """Rows that a step of `budget` seconds has."""
        self._sizes = np.arange(1, limits.max_rows + 1)
        self._running = _Load()
        self._last_kv: tuple[IntArray, Float64Array] | None = None
        self._last_paths: tuple[IntArray, int] | None = None
        self._age = 0
        """Steps since requests were judged."""
        self._late_credit = 0.0
        self._turn = 0
        self._last_turn = np.zeros(limits.max_live_branches, dtype=np.int64)
        """By request index: when it last took part in a step that had no room for all."""

    # ---------------------------------------------------------------- looking at the load

    def begin_step(self, now: float) -> None:
        """See FirstCome.begin_step."""
        if not self.cost.ready:
            return
        self._last_kv = self._last_paths = None
        rows = self.queues.rows()
        self.pacing.begin_step(self._paths(rows) / rows.size if rows.size else UNKNOWN_PATH)
        self._age += 1
        owners = self.queues.groups_of(rows).owners
        stands = self._age < STANDS and not self.queues.waiting and self._all_fit(rows)
        if stands and not np.count_nonzero(self.requests.late[owners]):
            return
        self._age = 0
        self._judge_waiting(now)
        self._judge_admitted(now, owners)
        self._set_budget()

    def _judge_waiting(self, now: float) -> None:
        """Requests that waited longer than could be made good are late."""
        patience = self.pacing.patience
        for request in self.queues.waiting_in_time():
            if request.index < 0 and now - request.arrived > patience:
                self._mark(request, True)

    def _judge_admitted(self, now: float, owners: IntArray) -> None:
        """Mark those of the running and of the preempted requests that became late, or came to be in time again."""
        requests = self.requests
        preempted = [request.index for request in self.queues.waiting_in_time() if request.index >= 0]
        if preempted:
            owners = np.concatenate((owners, preempted))
        late = self.pacing.judge(owners, now)
        for index in owners[late != requests.late[owners]].tolist():
            request = requests.at(index)
            self._mark(request, not request.late)

    def _mark(self, request: Request, late: bool) -> None:
        self.queues.set_late(request, late)
        self.catching.reorder(request)
        if request.index >= 0:
            self.requests.late[request.index] = late
        self.counters.late += late

    def _set_budget(self) -> None:
        """Find out how long a step may take; and where requests wait, how much of it those in time need."""
        queues = self.queues
        groups = queues.groups_of(queues.rows())
        late = self.requests.late[groups.owners]
        owners = groups.owners[~late]
        self.budget, self.affordable_rows = math.inf, self.limits.max_rows
        if owners.size or next(queues.waiting_in_time(), None) is not None:
            self.budget = self.pacing.plain
        if owners.size:
            tightest = at_rank(self.pacing.allowed[owners], int(TIGHTEST * (owners.size - 1)))
            self.budget = max(self.pacing.shortest, tightest)
        if queues.waiting:
            self._sum_up(groups, late)

    def _sum_up(self, groups: RowGroups, late: BoolArray) -> None:
        """Work out what admission looks at: how large a step gets, and what the running requests need of it."""
        load, rows = self._running, groups.requests.size
        kv = self._kv(self.queues.rows(), groups)
        if math.isfinite(self.budget):
            per_row = float(kv.sum()) / rows if rows else UNKNOWN_PATH
            most = self.limits.max_rows
            if self.cost.one(most, most * per_row) > self.budget:
                seconds = self.cost.seconds(self._sizes, self._sizes * per_row)
                self.affordable_rows = max(1, int(np.searchsorted(seconds, self.budget, "right")))
        load.late_rows = int(groups.sizes[late].sum())
        load.rows = rows - load.late_rows
        need = self.pacing.need[groups.owners[~late]]
        load.tokens = float(need.sum())
        said = need @ (kv[~late] / groups.sizes[~late])
        load.kv_per_token = float(said) / load.tokens if need.size else UNKNOWN_PATH

    def _paths(self, rows: IntArray) -> int:
        """Tokens of the paths of `rows`: the most whose K/V they can read."""
        if self._last_paths is None or self._last_paths[0] is not rows:
            self._last_paths = rows, int(np.add.reduce(self.table.length[rows]))
        return self._last_paths[1]

    def _all_fit(self, rows: IntArray, more: int = 0) -> bool:
        """Whether a step of `rows`, and of so many tokens more, surely takes no longer than it may: what siblings share
        counts for each of them here."""
        return self.cost.one(rows.size + more, self._paths(rows) + more) <= self.budget

    def _kv(self, rows: IntArray, groups: RowGroups) -> Float64Array:
        """[G] tokens whose K/V each request's rows read; what siblings share counts once."""
        if not rows.size:
            return np.zeros(0)
        if self._last_kv is not None and self._last_kv[0] is rows:
            return self._last_kv[1]
        table = self.table
        kv: Float64Array = np.add.reduceat(table.length[rows], groups.starts).astype(float)
        if not groups.single:
            several = groups.sizes > 1
            shared = np.minimum.reduceat(table.share[rows], groups.starts)[several] * float(table.block_size)
            kv[several] -= shared * (groups.sizes[several] - 1)
        self._last_kv = rows, kv
        return kv

    # ---------------------------------------------------------------- decisions

    def next_waiting(self) -> Request | None:
        """See FirstCome.next_waiting."""
        if not self.cost.ready:
            return super().next_waiting()
        request, load = self._choose(), self._running
        if request is not None:
            branches = max(1, len(request.live))
            if request.late:
                load.late_rows += branches
            else:
                load.rows += branches
                load.tokens += self.pacing.need_of(request)
        return request

    def _choose(self) -> Request | None:
        """Late requests up to their share, then those in time as long as all can stay so, then late ones."""
        load, rows = self._running, self.affordable_rows
        first, oldest_late = self.queues.waiting[0], self.queues.oldest_late_waiting()
        living = load.rows + load.late_rows
        if oldest_late is not None and load.late_rows < max(1, int(LATE_SHARE * rows)) and living < CROWDED * rows:
            return oldest_late
        if first.late:
            return first if living < rows else None
        tokens = self.budget * (load.tokens + self.pacing.need_of(first))
        seconds = self.cost.one(tokens, tokens * load.kv_per_token)
        return first if seconds <= FULL * self.budget and tokens <= FULL * self.limits.max_rows else None

    def take_turns(self, rows: IntArray, seats: int) -> BoolArray | None:
        """See FirstCome.take_turns. Late requests first take their share, in turn; then those in time, the tightest
        first; then the other late ones. They go into the step until its seats or its seconds are used up.
        """
        if not self.cost.ready:
            return super().take_turns(rows, seats)
        if rows.size <= seats and self._all_fit(rows):
            return None
        groups = self.queues.groups_of(rows)
        owners, kv = groups.owners, self._kv(rows, groups)
        if rows.size <= seats and self.cost.one(rows.size, float(kv.sum())) <= self.budget:
            return None
        late = self.requests.late[owners]
        urgency = np.where(late, self._last_turn[owners], self.pacing.allowed[owners])
        order = np.lexsort((urgency, late, self.requests.priority[owners]))
        if late.any():
            turns = self._late_turns(order[late[order]], groups.sizes, seats)
            later = np.ones(order.size, dtype=bool)
            later[turns] = False
            order = np.concatenate((turns, order[later[order]]))
        else:
            self._late_credit = 0.0
        size = np.cumsum(groups.sizes[order])
        fits = (size <= seats) & (self.cost.seconds(size, np.cumsum(kv[order])) <= self.budget)
        taken = max(1, int(np.argmin(fits)) if not fits.all() else fits.size)
        self._turn += 1
        self._last_turn[owners[order[:taken]]] = self._turn
        return self._mask(groups, order[:taken])

    def _late_turns(self, late: IntArray, sizes: IntArray, seats: int) -> IntArray:
        """The late requests, of those in `late` by their turn, whom the share suffices for; saves up for large ones."""
        self._late_credit = min(self._late_credit + LATE_SHARE * seats, float(self.limits.max_rows))
        turns = late[: int((np.cumsum(sizes[late]) <= self._late_credit).sum())]
        self._late_credit -= float(sizes[turns].sum())
        return turns

    def kept_seats(self, catching: int) -> int:
        """See FirstCome.kept_seats."""
        return min(catching, max(1, self.limits.max_rows // 8))

    def prompt_tokens(self, rows: IntArray) -> int:
        """See FirstCome.prompt_tokens. As many as the step's seconds leave."""
        most = super().prompt_tokens(rows)
        if math.isinf(self.budget):
            return most
        whole = most - most % self.table.block_size
        if self._all_fit(rows, whole):
            return max(whole, most // LEAST_CHUNK, 1)
        kv = float(self._kv(rows, self.queues.groups_of(rows)).sum())
        chunks = np.arange(0, most + 1, self.table.block_size)
        seconds = self.cost.seconds(rows.size + chunks, kv + chunks)
        fitting = max(1, int(np.searchsorted(seconds, self.budget, "right")))
        return max(int(chunks[fitting - 1]), most // LEAST_CHUNK, 1)

    def deny_forks(self, candidates: BoolArray, groups: RowGroups) -> tuple[BoolArray, ForkDenial] | None:
        """See FirstCome.deny_forks."""
        slots = self.limits.max_live_branches
        room = max(0, self.table.num_free - slots // NEWCOMERS)
        if candidates.size <= room or int(np.count_nonzero(candidates)) <= room:
            return None
        denied: BoolArray = candidates & (np.cumsum(candidates) > room)
        return denied, "rows"
