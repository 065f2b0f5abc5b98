"""The fork policy `adaptive`: what the batch can afford, by the service level of those in it (docs/scheduling.md)."""

from __future__ import annotations

import math

import numpy as np

from apar.runtime.branch import Request
from apar.runtime.branch_table import BranchTable
from apar.runtime.catching_up import CatchingUp
from apar.runtime.counters import ForkDenial, SchedulerCounters
from apar.runtime.fork_policy import BoolArray, FirstCome
from apar.runtime.limits import SchedulerLimits
from apar.runtime.request_queues import RequestQueues
from apar.runtime.request_table import RequestTable
from apar.runtime.row_groups import RowGroups
from apar.runtime.step import IntArray
from apar.runtime.step_cost import Float64Array, StepCost

HORIZON = 100
"""Tokens within which a request is to make good what it is behind; also what it may spend of what it is ahead."""
LEAST_PACE = 0.9
"""Steps this much faster than the service level asks are the fastest that are planned for: who needs faster ones is
late. The rest is for what a step's prediction leaves out."""
LATE_SHARE = 0.05
"""Of the rows of a step, what late requests get whatever the others need: nobody starves."""
FULL = 0.9
"""Part of the affordable rows up to which requests in time are admitted; their forks take the rest."""
CROWDED = 1.2
"""Of the affordable rows, how many may live, late requests included."""
STRAINED = 0.5
"""Late requests for each running one from which on the server counts as strained, whatever the others can afford."""


class Adaptive(FirstCome):
    """Lets everybody in while all keep their pace; beyond that protects those who still can.

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
        self.strained = False
        """Whether not everybody can be in time."""
        self.budget = math.inf
        """Seconds that a step may take."""
        self.affordable_rows = limits.max_rows
        """Rows that a step of `budget` seconds has."""
        self._allowed = np.zeros(limits.max_live_branches)
        """By request index: seconds that each step may take for the request to be in time; see `_judge_running`."""
        self._pace = 0.0
        self._late_credit = 0.0
        self._turn = 0
        self._last_turn = np.zeros(limits.max_live_branches, dtype=np.int64)
        """By request index: when it last took part in a step that had no room for all."""

    # ---------------------------------------------------------------- looking at the load

    def begin_step(self, now: float) -> None:
        """See FirstCome.begin_step."""
        if not self.cost.ready:
            return
        rows = self.queues.rows()
        groups = self.queues.groups_of(rows)
        mean_path = float(self.table.length[rows].mean()) if rows.size else 256.0
        self._pace = self.limits.service_level.latency_factor * float(self.cost.seconds(1, mean_path))
        self._judge_waiting(now)
        self._judge_running(now, groups.owners)
        self._set_budget()

    def _judge_waiting(self, now: float) -> None:
        """Requests that waited longer than a later step could make good are late."""
        patience = min(self.limits.service_level.first_token_seconds, HORIZON * (1 - LEAST_PACE) * self._pace)
        for request in self.queues.waiting_in_time():
            if now - request.arrived > patience:
                self._mark(request, True)

    def _judge_running(self, now: float, owners: IntArray) -> None:
        """Work out what pace each running request needs, and who is late.

        A request that has said n tokens is in time if they took no longer than the service level gives an answer of n
        tokens; what it is ahead or behind is spread over the next HORIZON tokens. A request with k branches says k
        tokens a step, so what it is ahead grows k times as fast.
        """
        requests, level = self.requests, self.limits.service_level
        prompt = requests.prompt[owners]
        sampled = requests.budget[owners] - requests.remaining[owners]
        said = sampled + 1
        alone = self.cost.seconds(1, prompt + said // 2)
        waited = now - requests.arrived[owners]
        ahead = level.latency_factor * (self.cost.seconds(prompt, prompt) + said * alone) - waited
        pace = level.latency_factor * alone
        allowed = pace + ahead / HORIZON
        self._allowed[owners] = allowed
        late = (allowed < LEAST_PACE * pace) | ((sampled == 0) & (waited > level.first_token_seconds))
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
        """Find out whether all can keep their pace together; if not, how long a step may take and how large it gets."""
        queues, most = self.queues, self.limits.max_rows
        rows = queues.rows()
        groups = queues.groups_of(rows)
        protected = ~self.requests.late[groups.owners]
        in_time = self._allowed[groups.owners[protected]]
        kv = self._kv(rows, groups)
        per_row = float(kv.sum()) / rows.size if rows.size else 256.0
        together = min(rows.size, most)
        seconds = float(self.cost.seconds(together, together * per_row)) * max(1.0, rows.size / most)
        self.strained = queues.num_late > STRAINED * len(queues.running)
        self.strained |= in_time.size > 0 and float(np.median(in_time * groups.sizes[protected])) < seconds
        self.budget, self.affordable_rows = math.inf, most
        if not self.strained:
            return
        sizes = np.arange(1, most + 1)
        least = LEAST_PACE * self._pace
        pace = max(least, float(in_time.min())) if in_time.size else least
        self.affordable_rows = max(1, int(np.searchsorted(self.cost.seconds(sizes, sizes * per_row), pace, "right")))
        if in_time.size or next(queues.waiting_in_time(), None) is not None:
            self.budget = pace

    def _kv(self, rows: IntArray, groups: RowGroups) -> Float64Array:
        """[G] tokens whose K/V each request's rows read; what siblings share counts once."""
        if not rows.size:
            return np.zeros(0)
        table = self.table
        kv: Float64Array = np.add.reduceat(table.length[rows], groups.starts).astype(float)
        if not groups.single:
            several = groups.sizes > 1
            shared = np.minimum.reduceat(table.share[rows], groups.starts)[several] * float(table.block_size)
            kv[several] -= shared * (groups.sizes[several] - 1)
        return kv

    # ---------------------------------------------------------------- decisions

    def next_waiting(self) -> Request | None:
        """See FirstCome.next_waiting."""
        if not self.strained:
            return super().next_waiting()
        queues, rows = self.queues, self.affordable_rows
        late_rows = sum(len(request.live) for request in queues.running if request.late)
        rows_in_time = sum(len(request.live) for request in queues.running) - late_rows
        first, oldest_late = queues.waiting[0], queues.oldest_late_waiting()
        share = max(1, int(LATE_SHARE * rows))
        if oldest_late is not None and late_rows < share and rows_in_time + late_rows < CROWDED * rows:
            return oldest_late
        if not first.late:
            return first if rows_in_time < FULL * rows - min(share, late_rows) else None
        return first if rows_in_time + late_rows < rows else None

    def take_turns(self, rows: IntArray, groups: RowGroups, seats: int) -> BoolArray | None:
        """See FirstCome.take_turns. Late requests first take their share, in turn; then those in time, the tightest
        first; then the other late ones. They go into the step until its seats or its seconds are used up.
        """
        if not self.strained:
            return super().take_turns(rows, groups, seats)
        owners, kv = groups.owners, self._kv(rows, groups)
        if rows.size <= seats and float(self.cost.seconds(rows.size, kv.sum())) <= self.budget:
            return None
        late = self.requests.late[owners]
        urgency = np.where(late, self._last_turn[owners], self._allowed[owners])
        order = np.lexsort((urgency, late, self.requests.priority[owners]))
        order = np.concatenate((self._late_turns(order[late[order]], groups.sizes, seats), order))
        order = order[np.sort(np.unique(order, return_index=True)[1])]
        size = np.cumsum(groups.sizes[order])
        fits = (size <= seats) & (self.cost.seconds(size, np.cumsum(kv[order])) <= self.budget)
        taken = max(1, int(np.argmin(fits)) if not fits.all() else fits.size)
        self._turn += 1
        self._last_turn[owners[order[:taken]]] = self._turn
        return self._mask(groups, order[:taken])

    def _late_turns(self, late: IntArray, sizes: IntArray, seats: int) -> IntArray:
        """The late requests, of those in `late` by their turn, whom the share suffices for; saves up for large ones."""
        if not late.size:
            self._late_credit = 0.0
            return late
        self._late_credit = min(self._late_credit + LATE_SHARE * seats, float(self.limits.max_rows))
        turns = late[: int((np.cumsum(sizes[late]) <= self._late_credit).sum())]
        self._late_credit -= float(sizes[turns].sum())
        return turns

    def kept_seats(self, catching: int) -> int:
        """See FirstCome.kept_seats."""
        return min(catching, max(1, self.limits.max_rows // 8))

    def deny_forks(self, candidates: BoolArray, groups: RowGroups) -> tuple[BoolArray, ForkDenial] | None:
        """See FirstCome.deny_forks."""
        room = max(0, self.limits.admitted_rows - self.queues.rows().size)
        if int(np.count_nonzero(candidates)) <= room:
            return None
        denied: BoolArray = candidates & (np.cumsum(candidates) > room)
        return denied, "rows"
