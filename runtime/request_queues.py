"""Requests that wait, requests that run, and the rows of those that run."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence

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
        # Rows change with almost every step of a busy server, by a few branches: they are edited, once for all that
        # changed, and listed anew only where requests change places or branches are parked.
        self._rows: IntArray = NOBODY
        self._stale = False
        self._gone: list[int] = []
        """Slots to be taken out of the rows, before those of `_come` are put in."""
        self._come: list[int] = []
        """Slots to be put in: each behind the last row of its request, or at the end if that has none."""
        self._place = np.zeros(table.capacity, dtype=np.int64)
        """Scratch, by slot or request index: a place in the rows."""
        self._kept = np.ones(table.capacity, dtype=bool)
        """Scratch, by place in the rows; true between two uses."""
        self._numbers = np.arange(table.capacity)
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
            self._come += [branch.slot for branch in request.live if not branch.parked]
        else:
            self._stale = True

    def leave(self, request: Request) -> None:
        """Take a request without live branches out for good."""
        self.deadlines.discard(request)
        (self.running if request.state is RequestState.RUNNING else self.waiting).remove(request)
        request.state = RequestState.FINISHED

    def set_late(self, request: Request, late: bool) -> None:
        """Mark a request as late, or as in time again, and move it to its place among the others."""
        runs = request.state is RequestState.RUNNING
        queue = self.running if runs else self.waiting
        queue.remove(request)
        request.late = late
        insort(queue, request, key=lambda r: r.sort_key)
        self._stale = self._stale or runs

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

    def branches_born(self, children: Sequence[Branch]) -> None:
        """To be called when branches of running requests have joined their siblings."""
        for child in children:
            self._come.append(child.slot)
            self._stale = self._stale or child.request.live[-1] is not child

    def branches_gone(self, branches: Sequence[Branch]) -> None:
        """To be called before live branches give up their slots."""
        if self._come:
            self.rows()
        self._gone += [b.slot for b in branches if b.request.state is RequestState.RUNNING and not b.parked]

    def parking_changed(self) -> None:
        """To be called when a branch of a running request was parked or unparked."""
        self._stale = True

    def rows(self) -> IntArray:
        """[R] slots of running branches that are not parked, by request. The same array until something changes."""
        if self._stale or self._gone or self._come:
            self._rows = np.array(self._listed(), dtype=np.int64) if self._stale else self._edited()
            self._stale = False
            self._gone.clear()
            self._come.clear()
            self._groups = None
            self._branches = []
        return self._rows

    @property
    def num_rows(self) -> int:
        """How many `rows` there are."""
        return self.rows().size if self._stale else self._rows.size - len(self._gone) + len(self._come)

    def check(self) -> None:
        """Prove that `rows` are the slots of running branches. Raises KVCacheError."""
        if self.rows().tolist() != self._listed():
            raise KVCacheError("the rows of steps are not the branches of the running requests")

    def _listed(self) -> list[int]:
        return [b.slot for request in self.running for b in request.live if not b.parked]

    def _edited(self) -> IntArray:
        """The rows without those that are gone and with those that have come."""
        rows, place = self._rows, self._place
        if self._gone:
            place[rows] = self._numbers[: rows.size]
            gone = place[np.array(self._gone)]
            self._kept[gone] = False
            rows = rows[self._kept[: rows.size]]
            self._kept[gone] = True
        if not self._come:
            return rows
        come = np.array(self._come)
        old, new = self.table.request[rows], self.table.request[come]
        place[new] = rows.size
        place[old] = self._numbers[: rows.size]  # of a request's rows the last one is written last
        order = np.concatenate((self._numbers[: rows.size], place[new])).argsort(kind="stable")
        edited: IntArray = np.concatenate((rows, come))[order]
        return edited

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
