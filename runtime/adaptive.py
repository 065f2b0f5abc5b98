"""The fork policy `adaptive`: what the batch can afford, by the service level of those in it (docs/scheduling.md)."""

from __future__ import annotations

import math
from dataclasses import dataclass

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

AIM = 0.97
"""Part of the service level that is aimed at. Requests that wait for each other all end near what they are allowed, so
an aim at the limit itself would miss it, by little, for many."""
HORIZON = 100
"""Tokens within which a request is to make good what it is behind; also what it may spend of what it is ahead."""
LEAST_PACE = 0.9
"""Steps this much shorter than a request without branches is allowed are the shortest that are planned for: who needs
shorter ones is late."""
TIGHTEST = 0.1
"""Part of the requests in time that may find a step longer than they can afford. Short steps for the tightest of all
would cost everybody throughput; those go first in every step, and many make it nevertheless."""
TYPICAL = 50
"""Steps after which a request's own tokens a step count as much as those of others, where its speed is expected."""
MEMORY = 500
"""Steps after which the speed of a typical request has faded to a third."""
FULL = 0.95
"""Part of a step that requests in time may need before no more are admitted."""
LATE_SHARE = 0.05
"""Of the rows of a step, what late requests get whatever the others need: nobody starves."""
NEWCOMERS = 4
"""One of so many branch slots is kept from forks: new requests need one each."""
CROWDED = 1.2
"""Of the affordable rows, how many may live, late requests included."""


UNKNOWN_PATH = 256.0
"""Tokens that a row reads, where there is none to tell."""
SHORTEST = 1e-3
"""Seconds that a token is taken to need at least."""


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
        self.budget = math.inf
        """Seconds that a step may take."""
        self.affordable_rows = limits.max_rows
        """Rows that a step of `budget` seconds has."""
        self._allowed = np.zeros(limits.max_live_branches)
        """By request index: seconds that each step may take for the request to be in time; see `_judge_admitted`."""
        self._need = np.zeros(limits.max_live_branches)
        """By request index: tokens a second that it takes to be in time."""
        self._pace = 0.0
        """Seconds that each step may take for a typical request without branches."""
        self._speed = np.ones(2)
        """Fading sums over steps of tokens and of requests; the quotient is what a typical request says in a step."""
        self._counted = (0, 0)
        self._sizes = np.arange(1, limits.max_rows + 1)
        self._running = _Load()
        self._late_credit = 0.0
        self._turn = 0
        self._last_turn = np.zeros(limits.max_live_branches, dtype=np.int64)
        """By request index: when it last took part in a step that had no room for all."""

    # ---------------------------------------------------------------- looking at the load

    def begin_step(self, now: float) -> None:
        """See FirstCome.begin_step."""
        if not self.cost.ready:
            return
        self._learn_speed()
        rows = self.queues.rows()
        groups = self.queues.groups_of(rows)
        kv = self._kv(rows, groups)
        mean_path = float(self.table.length[rows].mean()) if rows.size else UNKNOWN_PATH
        self._pace = self._aim * float(self.cost.seconds(1, mean_path))
        self._judge_waiting(now)
        self._judge_admitted(now, groups.owners)
        # Marking requests may have moved them: sum up in the order that holds now.
        if self.queues.rows() is not rows:
            rows = self.queues.rows()
            groups = self.queues.groups_of(rows)
            kv = self._kv(rows, groups)
        self._set_budget(groups, kv)

    @property
    def _aim(self) -> float:
        return AIM * self.limits.service_level.latency_factor

    @property
    def _patience(self) -> float:
        """Seconds without a first token that a request without branches could still make good."""
        return min(self.limits.service_level.first_token_seconds, HORIZON * (1 - LEAST_PACE) * self._pace)

    def _learn_speed(self) -> None:
        """Let what the last step gave flow into the speed of a typical request."""
        count = (self.counters.tokens, self.counters.request_steps)
        last = np.subtract(count, self._counted)
        self._counted = count
        if last[1]:
            self._speed += (last - self._speed) / MEMORY

    def _judge_waiting(self, now: float) -> None:
        """Requests that waited longer than could be made good are late."""
        patience = self._patience
        for request in self.queues.waiting_in_time():
            if request.index < 0 and now - request.arrived > patience:
                self._mark(request, True)

    def _judge_admitted(self, now: float, owners: IntArray) -> None:
        """Work out what pace each admitted request needs, and who is late.

        A request that has said n tokens is in time if they took no longer than the service level gives an answer of n
        tokens; what it is ahead or behind is spread over the next HORIZON tokens. That gives the seconds that each
        token may take, and with the tokens that it is likely to say in a step the seconds that each step may take.
        """
        requests = self.requests
        preempted = [request.index for request in self.queues.waiting_in_time() if request.index >= 0]
        if preempted:
            owners = np.concatenate((owners, preempted))
        prompt, steps = requests.prompt[owners], requests.steps[owners]
        sampled = requests.budget[owners] - requests.remaining[owners]
        # Without forks, [Fork] and the ends of children would not have been said.
        said = np.maximum(sampled - 2 * (requests.born[owners] - 1), np.minimum(sampled, 1))
        alone = self.cost.seconds(1, prompt + said // 2)
        waited = now - requests.arrived[owners]
        ahead = self._aim * (self.cost.seconds(prompt, prompt) + said * alone) - waited
        token = self._aim * alone + ahead / HORIZON
        typical = max(1.0, float(self._speed[0] / self._speed[1]))
        speed = np.maximum((sampled + TYPICAL * typical) / (steps + TYPICAL), 1.0)
        self._allowed[owners] = allowed = speed * token
        self._need[owners] = 1 / np.maximum(token, SHORTEST)
        late = (allowed < LEAST_PACE * self._pace) | ((sampled == 0) & (waited > self._patience))
        for index in owners[late != requests.late[owners]].tolist():
            request = requests.at(index)
            self._mark(request, not request.late)

    def _mark(self, request: Request, late: bool) -> None:
        self.queues.set_late(request, late)
        self.catching.reorder(request)
        if request.index >= 0:
            self.requests.late[request.index] = late
        self.counters.late += late

    def _set_budget(self, groups: RowGroups, kv: Float64Array) -> None:
        """Find out how long a step may take, how large it gets, and how much of it those in time need."""
        late, in_time = self.requests.late[groups.owners], self._running
        owners = groups.owners[~late]
        rows = groups.requests.size
        self.budget, self.affordable_rows = math.inf, self.limits.max_rows
        if owners.size or next(self.queues.waiting_in_time(), None) is not None:
            self.budget = LEAST_PACE * self._pace
            if owners.size:
                tight = int(TIGHTEST * (owners.size - 1))
                self.budget = max(self.budget, float(np.partition(self._allowed[owners], tight)[tight]))
            per_row = float(kv.sum()) / rows if rows else UNKNOWN_PATH
            seconds = self.cost.seconds(self._sizes, self._sizes * per_row)
            self.affordable_rows = max(1, int(np.searchsorted(seconds, self.budget, "right")))
        in_time.late_rows = int(groups.sizes[late].sum())
        in_time.rows = rows - in_time.late_rows
        need = self._need[owners]
        in_time.tokens = float(need.sum())
        said = need @ (kv[~late] / groups.sizes[~late])
        in_time.kv_per_token = float(said) / in_time.tokens if owners.size else UNKNOWN_PATH

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
        if not self.cost.ready:
            return super().next_waiting()
        request, load = self._choose(), self._running
        if request is not None:
            branches = max(1, len(request.live))
            if request.late:
                load.late_rows += branches
            else:
                load.rows += branches
                load.tokens += self._need_of(request)
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
        tokens = self.budget * (load.tokens + self._need_of(first))
        seconds = float(self.cost.seconds(tokens, tokens * load.kv_per_token))
        return first if seconds <= FULL * self.budget and tokens <= FULL * self.limits.max_rows else None

    def _need_of(self, waiting: Request) -> float:
        """Tokens a second that a waiting request will take."""
        return float(self._need[waiting.index]) if waiting.index >= 0 else 1 / self._pace

    def take_turns(self, rows: IntArray, groups: RowGroups, seats: int) -> BoolArray | None:
        """See FirstCome.take_turns. Late requests first take their share, in turn; then those in time, the tightest
        first; then the other late ones. They go into the step until its seats or its seconds are used up.
        """
        if not self.cost.ready:
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
        slots = self.limits.max_live_branches
        room = max(0, self.table.num_free - slots // NEWCOMERS)
        if int(np.count_nonzero(candidates)) <= room:
            return None
        denied: BoolArray = candidates & (np.cumsum(candidates) > room)
        return denied, "rows"
