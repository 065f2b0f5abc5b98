"""The gateway on a socket: how many connections, and how long one may stay silent."""

from __future__ import annotations

import asyncio
import logging
import socket

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from apar.export.errors import ServingError
from apar.runtime.serving.gateway.app import Gateway

LINGER_SECONDS = 2.0
"""How long a client that was refused before its body had come may go on sending it, and so get to read why."""

BACKLOG = 1024
"""Connections that may wait to be accepted; asyncio's own 100 lets a burst of clients wait for seconds."""


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. Raises ServingError where the address cannot be used."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise ServingError(
            f"cannot listen on {host} port {port}: {error.strerror}; choose another with --host or --port"
        ) from error
    listener.setblocking(False)
    return listener


class _Defects(logging.Filter):
    """Leaves out what clients do wrong: whoever sends no HTTP must not fill the log."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a record of aiohttp's is about something of ours."""
        return not (record.exc_info and isinstance(record.exc_info[1], HttpProcessingError))


logger = logging.getLogger("apar.serving.http")
logger.addFilter(_Defects())


class Listener:
    """Runs a gateway on a listening socket."""

    def __init__(self, gateway: Gateway, listener: socket.socket) -> None:
        self._gateway = gateway
        self._socket = listener
        self._server: asyncio.Server | None = None
        self._runner = web.AppRunner(
            gateway.app,
            access_log=None,
            # Leaving a client's handler as soon as it goes away is what cancels its request.
            handler_cancellation=True,
            keepalive_timeout=gateway.settings.keep_alive,
            auto_decompress=False,
            shutdown_timeout=0.0,
            lingering_time=LINGER_SECONDS,
            logger=logger,
        )
        self._unused: dict[asyncio.BaseProtocol, asyncio.TimerHandle] = {}
        """Connections that have brought no request yet, and when that becomes too long."""

    async def start(self) -> None:
        """Accept connections."""
        await self._runner.setup()
        self._gateway.seen = self._seen
        self._server = await asyncio.get_running_loop().create_server(
            self._connection, sock=self._socket, backlog=BACKLOG
        )

    async def refuse(self) -> None:
        """Accept no further connection; those that are there go on."""
        if self._server is not None:
            self._server.close()

    async def stop(self) -> None:
        """Close every connection."""
        await self.refuse()
        await self._runner.cleanup()

    def _connection(self) -> asyncio.BaseProtocol:
        server = self._runner.server
        assert server is not None
        if len(server.connections) >= self._gateway.settings.max_connections:
            return _Refusal()
        protocol = server()
        loop = asyncio.get_running_loop()
        timer = loop.call_later(self._gateway.settings.body_timeout, self._give_up, protocol)
        self._unused[protocol] = timer
        return protocol

    def _seen(self, request: web.Request) -> None:
        timer = self._unused.pop(request.protocol, None)
        if timer is not None:
            timer.cancel()

    def _give_up(self, protocol: web.RequestHandler) -> None:
        """Close a connection that has brought no complete request head in time."""
        del self._unused[protocol]
        if protocol.transport is not None:
            protocol.transport.abort()


class _Refusal(asyncio.Protocol):
    """Closes the connection it is given."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.close()
