"""Requests that wait, requests that run, and the rows of those that run."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator

import numpy as np

from apar.runtime.branch import Branch, Request, RequestState
from apar.runtime.branch_table import BranchTable
from apar.runtime.deadlines import Deadlines
from apar.runtime.kv_cache import KVCacheError
from apar.runtime.row_groups import RowGroups
from apar.runtime.step import IntArray

NOBODY: IntArray = np.zeros(0, dtype=np.int64)


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
        self.running: list[Request] = []
        # Rows change with almost every step of a busy server, by a branch or two: they are edited, and listed anew
        # only where requests change places or branches are parked.
        self._rows: IntArray = NOBODY
        self._stale = False
        self._groups: RowGroups | None = None
        self._branches: list[Branch] = []

    def enter(self, request: Request) -> None:
        """Queue a new request."""
        self.deadlines.add(request)
        self.wait(request)

    def wait(self, request: Request) -> None:
        """Queue a request at its place; it leaves the running ones if it was there."""
        if request.state is RequestState.RUNNING:
            self.running.remove(request)
            self._stale = True
        request.state = RequestState.WAITING
        insort(self.waiting, request, key=lambda r: r.sort_key)

    def run(self, request: Request) -> None:
        """Move a waiting request to the running ones."""
        self.waiting.remove(request)
        request.state = RequestState.RUNNING
        insort(self.running, request, key=lambda r: r.sort_key)
        if self.running[-1] is request:
            self._edit(self._rows.size, self._rows.size, [branch.slot for branch in request.live if not branch.parked])
        else:
            self._stale = True

    def leave(self, request: Request) -> None:
        """Take a request without live branches out for good."""
        self.deadlines.discard(request)
        (self.running if request.state is RequestState.RUNNING else self.waiting).remove(request)
        request.state = RequestState.FINISHED

    def set_late(self, request: Request, late: bool) -> None:
        """Mark a request as late, or as in time again, and move it to its place among the others."""
        queue = self.running if request.state is RequestState.RUNNING else self.waiting
        queue.remove(request)
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

    def branch_born(self, child: Branch) -> None:
        """To be called when a branch of a running request has joined its siblings."""
        live = child.request.live
        before = live.index(child) - 1
        while live[before].parked:
            before -= 1
        place = self._place(live[before].slot) + 1
        self._edit(place, place, [child.slot])

    def branch_gone(self, branch: Branch) -> None:
        """To be called before a live branch gives up its slot."""
        if branch.request.state is RequestState.RUNNING and not branch.parked:
            place = self._place(branch.slot)
            self._edit(place, place + 1, [])

    def parking_changed(self) -> None:
        """To be called when a branch of a running request was parked or unparked."""
        self._stale = True

    def rows(self) -> IntArray:
        """[R] slots of running branches that are not parked, by request. The same array until something changes."""
        if self._stale:
            self._stale = False
            self._edit(0, self._rows.size, self._listed())
        return self._rows

    def check(self) -> None:
        """Prove that `rows` are the slots of running branches. Raises KVCacheError."""
        if self.rows().tolist() != self._listed():
            raise KVCacheError("the rows of steps are not the branches of the running requests")

    def _listed(self) -> list[int]:
        return [b.slot for request in self.running for b in request.live if not b.parked]

    def _place(self, slot: int) -> int:
        """Where in the rows a slot stands; of no meaning where they are to be listed anew."""
        return int((self._rows == slot).argmax()) if not self._stale else 0

    def _edit(self, start: int, end: int, slots: list[int]) -> None:
        """Put `slots` in the place of rows `start` to `end`, in an array of its own."""
        if self._stale:
            return
        rows, count = self._rows, len(slots)
        self._rows = np.empty(rows.size - (end - start) + count, dtype=np.int64)
        self._rows[:start] = rows[:start]
        self._rows[start : start + count] = slots
        self._rows[start + count :] = rows[end:]
        self._groups = None
        self._branches = []

    def branches_at(self, slots: IntArray) -> list[Branch]:
        """The branches in `slots`; the list is the caller's."""
        if slots is not self._rows or self._stale:
            return self.table.branches_at(slots)
        if not self._branches:
            self._branches = self.table.branches_at(slots)
        return self._branches.copy()

    def groups_of(self, rows: IntArray) -> RowGroups:
        """Siblings among `rows`, whose branches stand together by request."""
        if rows is not self._rows:
            return RowGroups.of(self.table.request[rows])
        if self._groups is None:
            self._groups = RowGroups.of(self.table.request[rows])
        return self._groups
