"""Fork policies: who may fork, who is admitted next, and who takes part in a step when not all can.

This module holds the two that do not look at load, `always` and `never`; `adaptive` has a module of its own.
docs/scheduling.md says what each is for.
"""

from __future__ import annotations

import numpy as np

from apar.runtime.branch import Request
from apar.runtime.counters import ForkDenial, SchedulerCounters
from apar.runtime.limits import SchedulerLimits
from apar.runtime.request_queues import RequestQueues
from apar.runtime.row_groups import RowGroups
from apar.runtime.step import BoolArray, IntArray


class FirstCome:
    """First come, first served: `always`, and `never`, which bans [Fork] altogether.

    Args:
        queues: of requests.
        counters: where pauses are counted.
        limits: sizes.
    """

    def __init__(self, queues: RequestQueues, counters: SchedulerCounters, limits: SchedulerLimits) -> None:
        self.queues = queues
        self.counters = counters
        self.limits = limits
        self._rotation = 0

    def begin_step(self, now: float) -> None:
        """Look at the load before a step is planned; `now` is the engine's clock, in seconds."""

    def next_waiting(self) -> Request | None:
        """The waiting request to be admitted next, if its blocks are there; None if no other should run now."""
        request = self.queues.waiting[0]
        rows = self.queues.num_rows + max(len(request.live), 1)
        return request if rows <= self.limits.admitted_rows else None

    def take_turns(self, rows: IntArray, seats: int) -> BoolArray | None:
        """Which rows take part in a step of `seats` rows; None: all. Requests take part whole or not at all.

        Where there are more, they take turns from a place that moves on with every step.
        """
        if rows.size <= seats:
            return None
        groups = self.queues.groups_of(rows)
        count = groups.starts.size
        first = self._rotation % count
        order = np.arange(first, first + count) % count
        # The first one even where it takes kept seats, too: a request never has more branches than a step has rows.
        taken = max(1, int(np.add.accumulate(groups.sizes[order]).searchsorted(seats, "right")))
        self._rotation = first + taken
        return self._mask(groups, order[:taken])

    def kept_seats(self, catching: int) -> int:
        """Rows of a step to keep for `catching` requests that compute prompts or resume."""
        return min(catching, 1)

    def prompt_tokens(self, rows: IntArray) -> int:
        """The most tokens of prompts, and of trees being resumed, that a step may compute beside `rows` [R]."""
        return self.limits.max_step_tokens

    def deny_forks(self, candidates: BoolArray, groups: RowGroups) -> tuple[BoolArray, ForkDenial] | None:
        """[L] rows of a step that may not fork because of load, and why; `candidates` [L] otherwise could."""
        return None

    def _mask(self, groups: RowGroups, chosen: IntArray) -> BoolArray:
        """[R] rows of the chosen groups; counts the others as paused."""
        kept = np.zeros(groups.starts.size, dtype=bool)
        kept[chosen] = True
        rows: BoolArray = kept[groups.place]
        self.counters.pauses += rows.size - int(np.count_nonzero(rows))
        return rows
