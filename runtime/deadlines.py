"""Deadlines of requests, soonest first."""

from __future__ import annotations

from bisect import bisect_left, insort

from apar.runtime.branch import Request


def _order(request: Request) -> tuple[float, int]:
    assert request.deadline is not None
    return (request.deadline, request.arrival)


class Deadlines:
    """Unfinished requests that have a deadline."""

    def __init__(self) -> None:
        self._requests: list[Request] = []

    def add(self, request: Request) -> None:
        """Note a request, if it has a deadline."""
        if request.deadline is not None:
            insort(self._requests, request, key=_order)

    def discard(self, request: Request) -> None:
        """Forget a request that has ended."""
        if request.deadline is not None:
            del self._requests[bisect_left(self._requests, _order(request), key=_order)]

    def passed(self, now: float) -> list[Request]:
        """Requests whose deadline is not after `now` (seconds of the engine's clock)."""
        count = 0
        for request in self._requests:
            if _order(request)[0] > now:
                break
            count += 1
        return self._requests[:count]
