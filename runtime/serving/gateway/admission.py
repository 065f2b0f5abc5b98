"""How many answers may be in flight, and what those hear who come too many."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator

from apar.runtime.serving.gateway.errors import ApiError, draining

_WEIGHT = 0.1
"""Of the newest answer in the moving average of their seconds."""


class Admission:
    """Counts answers in flight; refuses when there are too many or the service is shutting down."""

    def __init__(self, limit: int) -> None:
        self.in_flight = 0
        self.draining = False
        self._limit = limit
        self._seconds = 1.0
        self._idle = asyncio.Event()
        self._idle.set()

    def check(self, count: int = 1) -> None:
        """Raise ApiError (429, 503) where `count` more answers would not be taken now."""
        if self.draining:
            raise draining()
        if self.in_flight + count > self._limit:
            raise ApiError(
                429,
                f"the service has {self.in_flight} of at most {self._limit} answers in flight; try again later",
                kind="rate_limit_error",
                code="overloaded",
                retry_after=self._retry_after(),
            )

    @contextlib.contextmanager
    def admit(self, count: int) -> Iterator[None]:
        """Count these answers while the block runs. Raises as `check` does."""
        self.check(count)
        began = time.monotonic()
        self.in_flight += count
        self._idle.clear()
        try:
            yield
        finally:
            self.in_flight -= count
            self._seconds += _WEIGHT * (time.monotonic() - began - self._seconds)
            if not self.in_flight:
                self._idle.set()

    async def wait_idle(self) -> None:
        """Wait until nothing is in flight."""
        await self._idle.wait()

    def _retry_after(self) -> int:
        """Seconds until about one in eight of the answers in flight has ended."""
        return max(1, min(60, round(self._seconds / 8)))
