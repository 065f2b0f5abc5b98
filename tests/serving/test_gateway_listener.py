"""Connections that bring nothing, too slowly, or in too great a number. The server behind is not there: a double."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from apar.runtime.serving.gateway.app import Gateway
from apar.runtime.serving.gateway.listener import Listener, bind
from apar.runtime.serving.gateway.settings import GatewaySettings
from apar.runtime.serving.probe import Probe

SETTINGS = GatewaySettings("tiny", 1024, 0, body_timeout=1.0, keep_alive=1.0, max_connections=3)


class Nothing:
    """A server that is not there."""

    def __init__(self) -> None:
        self.url = self.metrics_url = None
        self.restarts = 0
        self.probe = Probe(10)


@asynccontextmanager
async def listening() -> AsyncIterator[int]:
    """Port of a gateway with SETTINGS."""
    socket = bind("127.0.0.1", 0)
    listener = Listener(Gateway(SETTINGS, Nothing()), socket)
    await listener.start()
    try:
        yield socket.getsockname()[1]
    finally:
        await listener.stop()


async def exchange(port: int, sent: bytes) -> bytes:
    """Everything that comes back until the gateway closes the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(sent)
    try:
        return await asyncio.wait_for(reader.read(), 60)
    except ConnectionError:
        return b""
    finally:
        writer.close()


def test_silent_and_slow_connections_are_closed() -> None:
    async def run() -> None:
        async with listening() as port:
            assert await exchange(port, b"") == b""
            assert await exchange(port, b"GET /v1/models HTTP/1.1\r\nHost:") == b""
            slow = await exchange(port, b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
            assert slow.startswith(b"HTTP/1.1 408")
            idle = await exchange(port, b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n")
            assert idle.startswith(b"HTTP/1.1 200"), "answered, and closed when unused for too long"

    asyncio.run(run())


def test_rude_clients_are_no_defects(caplog: pytest.LogCaptureFixture) -> None:
    """They leave in the middle of a body, or send what is no HTTP: neither a 500 nor a line in the log."""
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"

    async def run() -> None:
        async with listening() as port:
            for left in (head + b"Content-Length: 100\r\n\r\n{", head + b"Transfer-Encoding: chunked\r\n\r\n5\r\n{"):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(left.replace(b"Host: x", b"Host: x\r\nExpect: 100-continue"))
                assert b" 100 " in await asyncio.wait_for(reader.readline(), 60)  # its body is being read
                writer.close()
            assert (await exchange(port, b"GARBAGE\r\n\r\n")).startswith(b"HTTP/1.0 400")
            assert b" 400 " in await exchange(port, head + b"Content-Length: x\r\n\r\n")
            bad = await exchange(port, head + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{")
            assert b" 400 " in bad.partition(b"\r\n")[0], bad
            counted = b""
            for _ in range(100):
                ask = b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
                counted = await exchange(port, ask)
                if b"apar:gateway_disconnects_total 2.0" in counted:
                    break
                await asyncio.sleep(0.05)
            assert b"apar:gateway_disconnects_total 2.0" in counted and b'status="500"' not in counted

    asyncio.run(run())
    assert not caplog.records


def test_number_of_connections_is_bounded() -> None:
    async def run() -> None:
        async with listening() as port:
            opened = [await asyncio.open_connection("127.0.0.1", port) for _ in range(SETTINGS.max_connections)]
            await asyncio.sleep(0.05)
            assert await exchange(port, b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n") == b""
            for _, writer in opened:
                writer.close()
            answer = b""
            for _ in range(100):
                answer = await exchange(port, b"GET /health/live HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                if answer:
                    break
                await asyncio.sleep(0.05)
            assert answer.startswith(b"HTTP/1.1 200")

    asyncio.run(run())


def test_without_a_server_requests_are_told_to_come_again() -> None:
    async def run() -> None:
        async with listening() as port:
            body = b'{"model": "tiny", "prompt": "a"}'
            head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"
            answer = await exchange(port, head % len(body) + body)
            assert answer.startswith(b"HTTP/1.1 503") and b"Retry-After: 2" in answer
            health = await exchange(port, b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            assert health.startswith(b"HTTP/1.1 503")
            metrics = await exchange(port, b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            assert b"apar:gateway_server_up 0.0" in metrics

    asyncio.run(run())
