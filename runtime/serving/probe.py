"""The deep health check: does the service answer a request for one token?"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass

import aiohttp

from apar.runtime.serving.model_responses import FAILED, UNAVAILABLE, TritonError
from apar.runtime.serving.triton_stream import stream_model

PROBE_SECONDS = 20.0
KEEP_BAD_SECONDS = 1.0
"""How long a bad outcome is kept: what is started again should not be called unhealthy for long."""
BUSY_SECONDS = 300.0
"""How long an engine with requests in it may say nothing: a step that reads a long prompt takes its time."""
PROMPT = "Hello"


@dataclass(frozen=True, slots=True)
class Health:
    """Outcome of a check."""

    healthy: bool
    detail: str
    at: float
    """time.monotonic() at its end."""
    answered: bool = True
    """Whether the server said anything at all; an error is an answer too."""


class Probe:
    """Asks for one token, at most once every `keep` seconds (sooner after a failure) and never twice at a time.

    Tokens that users get count as well: a service under load is not asked more. An engine that is busy and says nothing
    is taken for healthy for a while.
    """

    def __init__(self, keep: float, seconds: float = PROBE_SECONDS, busy_seconds: float = BUSY_SECONDS) -> None:
        self._keep = keep
        self._seconds = seconds
        self._busy_seconds = busy_seconds
        self._last: Health | None = None
        self._good = 0.0
        self._lock = asyncio.Lock()
        self.busy: Callable[[], bool] = lambda: False
        """Whether requests are in flight; whoever knows sets it."""

    @property
    def silence(self) -> float:
        """Seconds since the last token."""
        return time.monotonic() - self._good

    def saw_tokens(self) -> None:
        """Somebody has just been given tokens."""
        self._good = time.monotonic()
        self._last = Health(True, "tokens are flowing", self._good)

    def forget(self) -> None:
        """What was known no longer holds: the server was started anew."""
        self._last = None

    def saw_error(self, error: TritonError) -> None:
        """Somebody's request failed. If the engine may be gone, the next check asks."""
        if error.code in (FAILED, UNAVAILABLE):
            self.forget()

    async def check(self, session: aiohttp.ClientSession, url: str | None) -> Health:
        """The latest outcome, if it is fresh; otherwise a new one. `url`: of the server; None while there is none."""
        async with self._lock:
            if url is None:
                return Health(False, "the server is starting", time.monotonic(), answered=False)
            keep = self._keep if self._last is None or self._last.healthy else min(self._keep, KEEP_BAD_SECONDS)
            if self._last is None or time.monotonic() - self._last.at > keep:
                self._last = await self._ask(session, url)
                if not self._last.answered and self.busy() and self.silence < self._busy_seconds:
                    detail = f"busy: no token for {self.silence:.0f} s"
                    self._last = Health(True, detail, time.monotonic(), answered=False)
            return self._last

    async def _ask(self, session: aiohttp.ClientSession, url: str) -> Health:
        inputs = {
            "id": f"probe-{uuid.uuid4().hex}",
            "text_input": PROMPT,
            "chat": False,
            "max_tokens": 1,
            "fork": False,
        }
        try:
            async for _ in stream_model(session, url, inputs, deadline=self._seconds):
                pass
        except TritonError as error:
            # Overloaded means alive and busy; an engine that is starting again will answer by and by.
            return Health(error.code == "overloaded", str(error), time.monotonic(), answered=not error.silent)
        self._good = time.monotonic()
        return Health(True, "one token was generated", self._good)
