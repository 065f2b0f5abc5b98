"""Requests that wait, requests that run, and the rows of those that run."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator

import numpy as np

from apar.runtime.branch import Request, RequestState
from apar.runtime.branch_table import BranchTable
from apar.runtime.deadlines import Deadlines
from apar.runtime.row_groups import RowGroups
from apar.runtime.step import IntArray


class RequestQueues:
    """Two lists in order of `Request.sort_key`, and which rows the second one gives.

    Args:
        table: live branches.
    """

    def __init__(self, table: BranchTable) -> None:
        self.table = table
        self.waiting: list[Request] = []
        """New requests and preempted ones."""
        self.deadlines = Deadlines()
        self.num_late = 0
        """Late requests, waiting and running."""
        self.running: list[Request] = []
        self._rows: IntArray = np.zeros(0, dtype=np.int64)
        self._groups = RowGroups.of(self._rows)
        self._stale = False

    def enter(self, request: Request) -> None:
        """Queue a new request."""
        self.deadlines.add(request)
        self.wait(request)

    def wait(self, request: Request) -> None:
        """Queue a request at its place; it leaves the running ones if it was there."""
        if request.state is RequestState.RUNNING:
            self.running.remove(request)
        request.state = RequestState.WAITING
        insort(self.waiting, request, key=lambda r: r.sort_key)
        self._stale = True

    def run(self, request: Request) -> None:
        """Move a waiting request to the running ones."""
        self.waiting.remove(request)
        request.state = RequestState.RUNNING
        insort(self.running, request, key=lambda r: r.sort_key)
        self._stale = True

    def leave(self, request: Request) -> None:
        """Take a request out for good."""
        self.deadlines.discard(request)
        self.num_late -= request.late
        (self.running if request.state is RequestState.RUNNING else self.waiting).remove(request)
        request.state = RequestState.FINISHED
        self._stale = True

    def set_late(self, request: Request, late: bool) -> None:
        """Mark a request as late, or as in time again, and move it to its place among the others."""
        queue = self.running if request.state is RequestState.RUNNING else self.waiting
        queue.remove(request)
        self.num_late += late - request.late
        request.late = late
        insort(queue, request, key=lambda r: r.sort_key)
        self._stale = True

    def waiting_in_time(self) -> Iterator[Request]:
        """Waiting requests of the first priority that are not late; a copy, so that they may be marked."""
        if not self.waiting:
            return iter(())
        return iter(self.waiting[: self._first_late()])

    def oldest_late_waiting(self) -> Request | None:
        """The oldest late one among the waiting requests of the first priority."""
        first = self._first_late()
        if first < len(self.waiting) and self.waiting[first].priority == self.waiting[0].priority:
            return self.waiting[first]
        return None

    def _first_late(self) -> int:
        """Index of the first waiting request that is late or of another priority than the first."""
        key = (self.waiting[0].priority, True, -1) if self.waiting else (0, True, -1)
        return bisect_left(self.waiting, key, key=lambda r: r.sort_key)

    def branches_changed(self) -> None:
        """To be called when a branch of a running request came, went, was parked or unparked."""
        self._stale = True

    def rows(self) -> IntArray:
        """[R] slots of running branches that are not parked, by request. The same array until something changes."""
        if self._stale:
            slots = [b.slot for request in self.running for b in request.live if not b.parked]
            self._rows = np.array(slots, dtype=np.int64)
            self._groups = RowGroups.of(self.table.request[self._rows])
            self._stale = False
        return self._rows

    def groups_of(self, rows: IntArray) -> RowGroups:
        """Siblings among `rows`, whose branches stand together by request."""
        return self._groups if rows is self._rows else RowGroups.of(self.table.request[rows])
