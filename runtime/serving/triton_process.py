"""One run of the Triton server: start it, wait until it answers, watch it, end it with everything it started."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

from apar.export.errors import ServingError
from apar.runtime.serving import launch, traces
from apar.runtime.serving.server_log import ServerLog
from apar.runtime.serving.triton_server import TritonServer

logger = logging.getLogger("apar.serving")

LOOPBACK = "127.0.0.1"
POLL_SECONDS = 0.05
KILL_MARGIN_SECONDS = 3.0
"""How long after its own exit timeout a server is killed: with live streams it may crash and then hang for ever."""
_OF_THE_SHELL = re.compile(r"[\s'\"`$&|;<>(){}\[\]*?!\\~#]")


@dataclass(frozen=True, slots=True)
class TritonSettings:
    """How the server is run. Ports of 0 are chosen anew at every start."""

    server: TritonServer
    repository: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables for the models, besides those of this process."""
    address: str = LOOPBACK
    http_port: int = 0
    grpc_port: int | None = None
    """None: no gRPC."""
    metrics_port: int = 0
    exit_timeout: int = 10
    """Seconds that the server gives its live requests once it is told to stop."""
    startup_timeout: float = 600.0


@dataclass(frozen=True, slots=True)
class TritonAddresses:
    """Where a running server listens, as `host:port`."""

    http: str
    metrics: str
    grpc: str | None

    @property
    def http_url(self) -> str:
        """Base URL of its HTTP interface."""
        return f"http://{self.http}"

    @property
    def metrics_url(self) -> str:
        """Its Prometheus metrics."""
        return f"http://{self.metrics}/metrics"


class TritonProcess:
    """A server that was started. `folder` is its TMPDIR, `identity` the mark of all its processes."""

    def __init__(self, settings: TritonSettings, identity: str, folder: Path) -> None:
        self.settings = settings
        self.identity = identity
        self.shared_memory_prefix = f"apar-{identity}_"
        self.log = ServerLog()
        self._folder = folder
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self._stubs: set[int] = set()
        self.addresses = TritonAddresses("", "", None)

    @property
    def pid(self) -> int:
        """Process id, which is also that of its group."""
        assert self._process is not None
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether the server's process has not ended."""
        return self._process is not None and self._process.returncode is None

    async def start(self) -> None:
        """Start the process; returns before it answers. Raises ServingError where it cannot be started."""
        settings = self.settings
        _check_path(settings.repository, "the model repository", "choose another folder for it with TMPDIR")
        if settings.server.backends is not None:
            _check_path(settings.server.backends, "the server", "install it elsewhere ($APAR_CACHE), and name it")
        http, metrics = self._port("HTTP", settings.http_port), self._port("metrics", settings.metrics_port)
        grpc = None if settings.grpc_port is None else self._port("gRPC", settings.grpc_port)
        host = {"0.0.0.0": LOOPBACK, "::": "::1"}.get(settings.address, settings.address)
        host = f"[{host}]" if ":" in host else host
        self.addresses = TritonAddresses(f"{host}:{http}", f"{host}:{metrics}", f"{host}:{grpc}" if grpc else None)
        # libevent and gRPC write IPv6 addresses in ways of their own.
        ipv6 = ":" in settings.address
        plain, bracketed = (f"ipv6:{settings.address}", f"[{settings.address}]") if ipv6 else (settings.address,) * 2
        options = [
            f"--model-repository={settings.repository}",
            "--disable-auto-complete-config",
            f"--http-address={plain}",
            f"--http-port={http}",
            f"--metrics-address={plain}",
            f"--metrics-port={metrics}",
            f"--exit-timeout-secs={settings.exit_timeout}",
            f"--backend-config=python,shm-region-prefix-name={self.shared_memory_prefix}",
        ]
        options += [f"--grpc-address={bracketed}", f"--grpc-port={grpc}"] if grpc else ["--allow-grpc=false"]
        command = settings.server.command(*options)
        environment = settings.server.environment()
        environment |= {**settings.environment, traces.VARIABLE: self.identity, "TMPDIR": str(self._folder)}
        launcher = [sys.executable, "-I", "-S", launch.__file__, str(os.getpid()), str(int(signal.SIGKILL))]
        logger.debug("starting %s", " ".join(command))
        try:
            self._process = await asyncio.create_subprocess_exec(
                *launcher,
                *command,
                env=environment,
                cwd=self._folder,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            raise ServingError(f"{settings.server.binary} cannot be started: {error.strerror}") from error
        self._reader = asyncio.create_task(self._read())

    async def wait_ready(self) -> None:
        """Wait until the server says that it and its models are ready.

        Raises ServingError with the model's own sentence where one does not load, where the server ends, or when the
        time limit is over: some load failures hang.
        """
        end = time.monotonic() + self.settings.startup_timeout
        url = f"{self.addresses.http_url}/v2/health/ready"
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5)) as session:
            while True:
                if not self.running:
                    await self._drain_log()
                    raise ServingError(self._why_it_ended())
                with contextlib.suppress(aiohttp.ClientError, asyncio.TimeoutError):
                    async with session.get(url) as response:
                        if response.status == 200:
                            break
                if time.monotonic() > end:
                    raise ServingError(
                        f"the Triton server was not ready after {self.settings.startup_timeout:g} s. "
                        f"Its last lines:\n{self.log.tail()}"
                    )
                await asyncio.sleep(POLL_SECONDS)
        self._stubs = {pid for pid in traces.processes_of(self.identity) if traces.parent_of(pid) == self.pid}

    def lost_stub(self) -> bool:
        """Whether a model's process has gone. The server does not notice, and requests in it would hang for ever."""
        return any(traces.parent_of(pid) != self.pid for pid in self._stubs)

    async def wait(self) -> None:
        """Wait until the server's process ends."""
        if self._process is not None:
            await self._process.wait()

    async def stop(self) -> None:
        """Let the server finish its live requests, as long as its exit timeout says; then nothing of it is left."""
        if self.running:
            assert self._process is not None
            self._process.terminate()
            patience = self.settings.exit_timeout + KILL_MARGIN_SECONDS
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._process.wait(), patience)
        await self.kill()

    async def kill(self) -> None:
        """End every process of this server at once, and delete its shared memory."""
        self.log.expects_death = True
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
        left = await asyncio.to_thread(traces.kill_all, self.identity)
        if left:
            logger.error("processes %s of the Triton server could not be ended", left)
        if self._process is not None:
            await self._process.wait()
        await self._drain_log()
        traces.remove_shared_memory(self.shared_memory_prefix)

    async def _read(self) -> None:
        assert self._process is not None and self._process.stdout is not None
        pipe = self._process.stdout
        while True:
            try:
                line = await pipe.readline()
            except ValueError:  # longer than the reader's limit
                continue
            if not line:
                return
            self.log.add(line.decode(errors="replace"))

    async def _drain_log(self) -> None:
        if self._reader is not None:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._reader, 1.0)

    def _why_it_ended(self) -> str:
        failure = self.log.load_failure()
        if failure:
            return f"the Triton server could not load {failure}"
        assert self._process is not None
        code = self._process.returncode or 0
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return f"the Triton server {how} before it was ready. Its last lines:\n{self.log.tail()}"

    def _port(self, what: str, wanted: int) -> int:
        """A free port, or the one that is wanted if it is free."""
        family = socket.AF_INET6 if ":" in self.settings.address else socket.AF_INET
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((self.settings.address, wanted))
            except OSError as error:
                raise ServingError(
                    f"Triton's {what} port {wanted} on {self.settings.address} cannot be used: {error.strerror}; "
                    f"choose another with --triton-{what.lower()}-port"
                ) from error
            return int(probe.getsockname()[1])


def _check_path(path: Path, what: str, remedy: str) -> None:
    """Raise ServingError for a path that Triton's Python backend, which starts stubs with `bash -c`, takes apart."""
    if found := _OF_THE_SHELL.search(str(path)):
        raise ServingError(
            f"{what} lies in {path}, and Triton's Python backend starts no model from a path with {found[0]!r} in it; "
            f"{remedy}"
        )
