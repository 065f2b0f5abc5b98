"""A whole service: gateway and Triton server, from start to end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from apar.export.errors import ServingError
from apar.runtime.serving.gateway.app import Gateway
from apar.runtime.serving.gateway.listener import Listener
from apar.runtime.serving.gateway.settings import GatewaySettings
from apar.runtime.serving.supervisor import Supervisor
from apar.runtime.serving.triton_process import TritonAddresses, TritonSettings

logger = logging.getLogger("apar.serving")

DRAIN_SECONDS = 30.0
LAST_WORDS_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Urls:
    """Where a service listens."""

    gateway: str
    triton: TritonAddresses


class FullService:
    """Runs until it is told to end (SIGTERM, SIGINT, SIGHUP; a second signal ends it at once) or cannot go on."""

    def __init__(
        self,
        gateway: GatewaySettings,
        triton: TritonSettings,
        listener: socket.socket,
        fill: Callable[[Path], None],
        drain_seconds: float = DRAIN_SECONDS,
        version: str = "",
    ) -> None:
        self._supervisor = Supervisor(triton, fill)
        self._gateway = Gateway(gateway, self._supervisor, version)
        self._listener = Listener(self._gateway, listener)
        self._drain_seconds = drain_seconds
        host, port = listener.getsockname()[:2]
        self._url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        self._ending = asyncio.Event()
        self._hurry = asyncio.Event()

    async def run(self, ready: Callable[[Urls], None]) -> None:
        """Start, call `ready` when requests are answered, serve, and end. Raises ServingError where the start fails."""
        loop = asyncio.get_running_loop()
        # What the caller has ignored (nohup does so) stays ignored.
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(number) is signal.SIG_IGN:
                continue
            loop.add_signal_handler(number, self._signalled)
        await self._listener.start()
        try:
            if await self._start():
                assert self._supervisor.process is not None
                ready(Urls(self._url, self._supervisor.process.addresses))
                await self._ending.wait()
                await self._drain()
        finally:
            # The gateway first: its connections would delay the end of the server behind it.
            await self._listener.stop()
            await self._supervisor.stop(grace=not self._hurry.is_set())

    async def _start(self) -> bool:
        """Start the server; False where the service was told to end meanwhile."""
        starting = asyncio.create_task(self._supervisor.start())
        ending = asyncio.create_task(self._ending.wait())
        await asyncio.wait({starting, ending}, return_when=asyncio.FIRST_COMPLETED)
        ending.cancel()
        if not starting.done():
            starting.cancel()
            self._hurry.set()
            with contextlib.suppress(asyncio.CancelledError, ServingError):
                await starting
            return False
        starting.result()
        return True

    async def _drain(self) -> None:
        """Take nothing new and let what is in flight end, for a while."""
        admission = self._gateway.admission
        admission.draining = True
        if admission.in_flight:
            logger.info("ending: %d answers in flight get %g s", admission.in_flight, self._drain_seconds)
        idle = asyncio.create_task(admission.wait_idle())
        hurry = asyncio.create_task(self._hurry.wait())
        await asyncio.wait({idle, hurry}, timeout=self._drain_seconds, return_when=asyncio.FIRST_COMPLETED)
        for task in (idle, hurry):
            task.cancel()
        if admission.in_flight:
            logger.warning("ending: %d answers were not complete", admission.in_flight)
            # Without their server they end with an error that their clients see, not with a cut connection.
            await self._supervisor.stop(grace=False)
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(admission.wait_idle(), LAST_WORDS_SECONDS)

    def _signalled(self) -> None:
        if self._ending.is_set():
            self._hurry.set()
        self._ending.set()
