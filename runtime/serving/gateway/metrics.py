"""The gateway's own metrics, and those of the Triton server beside them, as Prometheus reads them."""

from __future__ import annotations

import asyncio

import aiohttp
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
FETCH_SECONDS = 3.0
_FIRST = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_WHOLE = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class GatewayMetrics:
    """Counters of one gateway."""

    def __init__(self) -> None:
        disable_created_metrics()  # a second series for each counter, which nobody asks for
        self.registry = CollectorRegistry()
        self.requests = Counter("apar:gateway_requests", "HTTP requests", ["route", "status"], registry=self.registry)
        self.rejected = Counter(
            "apar:gateway_rejected", "Requests refused before the engine saw them", ["code"], registry=self.registry
        )
        self.disconnects = Counter(
            "apar:gateway_disconnects",
            "Clients that went away before their answer was complete",
            registry=self.registry,
        )
        self.in_flight = Gauge("apar:gateway_answers_in_flight", "Answers in flight", registry=self.registry)
        self.draining = Gauge("apar:gateway_draining", "1 while the service shuts down", registry=self.registry)
        self.server_up = Gauge("apar:gateway_server_up", "1 while the Triton server answers", registry=self.registry)
        self.restarts = Gauge(
            "apar:gateway_server_restarts", "How often the Triton server was started again", registry=self.registry
        )
        self.first_token = Histogram(
            "apar:gateway_time_to_first_token_seconds",
            "From a request's last byte to its first token",
            buckets=_FIRST,
            registry=self.registry,
        )
        self.duration = Histogram(
            "apar:gateway_request_seconds",
            "From a request's last byte to the answer's end",
            buckets=_WHOLE,
            registry=self.registry,
        )

    async def text(self, session: aiohttp.ClientSession, server_url: str | None) -> bytes:
        """All of them, with the server's behind where it answers."""
        theirs = b""
        if server_url is not None:
            try:
                timeout = aiohttp.ClientTimeout(total=FETCH_SECONDS)
                async with session.get(server_url, timeout=timeout) as response:
                    theirs = await response.read() if response.status == 200 else b""
            except (aiohttp.ClientError, asyncio.TimeoutError, OSError):
                theirs = b""
        self.server_up.set(1 if theirs else 0)
        return generate_latest(self.registry) + theirs
