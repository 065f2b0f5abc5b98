"""Keeps a Triton server running: starts it, starts it again when it dies or falls silent, leaves nothing behind.

What is left of a supervisor that is killed itself is removed by its watchdog (`traces`).
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import aiohttp

from apar.export.errors import ServingError
from apar.runtime.serving import traces
from apar.runtime.serving.probe import Probe
from apar.runtime.serving.triton_process import TritonProcess, TritonSettings

logger = logging.getLogger("apar.serving")

WATCH_SECONDS = 0.25
FIRST_DELAY, LONGEST_DELAY = 0.5, 30.0
"""Seconds before a restart: doubled as long as servers do not live for LONG_LIFE seconds."""
LONG_LIFE = 60.0
PROBE_EVERY = 10.0
SILENT_PROBES = 3
"""Probes in a row without any answer after which a server that runs is started anew."""


class Supervisor:
    """The server of one service.

    `async with Supervisor(settings) as supervisor` returns when the server answers; `settings.repository` is filled by
    `fill`, which gets the folder.
    """

    def __init__(self, settings: TritonSettings, fill: Callable[[Path], None] | None = None) -> None:
        self._settings = settings
        self._fill = fill
        self._identity = secrets.token_hex(6)
        self._folder = Path(tempfile.mkdtemp(prefix="apar-"))
        self._watchdog: subprocess.Popen[bytes] | None = None
        self._process: TritonProcess | None = None
        self._task: asyncio.Task[None] | None = None
        self._ready = False
        self.restarts = 0
        """How often the server had to be started again."""
        self.probe = Probe(keep=PROBE_EVERY)

    @property
    def process(self) -> TritonProcess | None:
        """The server, while it answers."""
        return self._process if self._ready else None

    @property
    def url(self) -> str | None:
        """Base URL of the server's HTTP interface, while it answers."""
        return self._process.addresses.http_url if self._ready and self._process else None

    @property
    def metrics_url(self) -> str | None:
        """URL of the server's metrics, while it answers."""
        return self._process.addresses.metrics_url if self._ready and self._process else None

    async def start(self) -> None:
        """Start the server and wait until it answers. Raises ServingError with the reason where it does not."""
        traces_program = [sys.executable, "-I", "-S", traces.__file__]
        mark = TritonProcess(self._settings, self._identity, self._folder)
        self._watchdog = subprocess.Popen(
            [*traces_program, self._identity, mark.shared_memory_prefix, str(self._folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        if self._fill is not None:
            repository = self._folder / "repository"
            self._fill(repository)
            self._settings = dataclasses.replace(self._settings, repository=repository)
        await self._start_server()
        self._task = asyncio.create_task(self._keep_running())

    async def stop(self, grace: bool = True) -> None:
        """End the server, at once without `grace`. Afterwards no process, shared memory or file of it is left.

        May be called again.
        """
        self._ready = False
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._task = None
        if self._process is not None:
            await (self._process.stop() if grace else self._process.kill())
            self._process = None
        await asyncio.to_thread(shutil.rmtree, self._folder, True)
        self._dismiss_watchdog()

    async def __aenter__(self) -> Supervisor:
        try:
            await self.start()
        except BaseException:
            await self.stop(grace=False)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop(grace=error is None)

    async def _start_server(self) -> None:
        self._process = TritonProcess(self._settings, self._identity, self._folder)
        began = time.monotonic()
        await self._process.start()
        await self._process.wait_ready()
        self.probe.forget()
        async with aiohttp.ClientSession() as session:
            health = await self.probe.check(session, self._process.addresses.http_url)
        if not (health.healthy and health.answered):
            raise ServingError(f"the Triton server is up, but a request for one token failed: {health.detail}")
        self._ready = True
        logger.debug("the server answers after %.1f s", time.monotonic() - began)

    async def _keep_running(self) -> None:
        delay = FIRST_DELAY
        while True:
            began = time.monotonic()
            reason = await self._watch()
            self._ready = False
            logger.error("the Triton server %s; it is started again", reason)
            if time.monotonic() - began > LONG_LIFE:
                delay = FIRST_DELAY
            while not self._ready:
                self.restarts += 1
                assert self._process is not None
                await self._process.kill()
                await asyncio.sleep(delay)
                delay = min(2 * delay, LONGEST_DELAY)
                try:
                    await self._start_server()
                except ServingError as error:
                    logger.error("%s", error)
                except Exception:  # whatever it is, trying again is better than a service without a server
                    logger.exception("the Triton server could not be started")
            logger.warning("the Triton server is back")

    async def _watch(self) -> str:
        """Wait until something is wrong with the server; returns what."""
        process = self._process
        assert process is not None
        silent, next_probe = 0, time.monotonic() + PROBE_EVERY
        async with aiohttp.ClientSession() as session:
            while True:
                await asyncio.sleep(WATCH_SECONDS)
                if not process.running:
                    return "died"
                if process.lost_stub():
                    return "lost a model's process"
                if time.monotonic() < next_probe:
                    continue
                health = await self.probe.check(session, process.addresses.http_url)
                # Healthy without an answer is busy, and has time of its own.
                silent = 0 if health.answered or health.healthy else silent + 1
                if silent >= SILENT_PROBES:
                    return f"has not answered for {self.probe.silence:.0f} s"
                next_probe = time.monotonic() + PROBE_EVERY

    def _dismiss_watchdog(self) -> None:
        if self._watchdog is not None:
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                self._watchdog.communicate(b"done\n", timeout=10)
            self._watchdog = None
