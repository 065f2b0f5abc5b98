"""Connections that bring nothing, too slowly, or in too great a number. The server behind is not there: a double."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from apar.runtime.serving.gateway.app import Gateway
from apar.runtime.serving.gateway.listener import Listener, bind
from apar.runtime.serving.gateway.settings import GatewaySettings
from apar.runtime.serving.probe import Probe

SETTINGS = GatewaySettings("tiny", 1024, 0, body_timeout=1.0, keep_alive=1.0, max_connections=3)


class Nothing:
    """A server that is not there."""

    def __init__(self) -> None:
        self.url: str | None = None
        self.metrics_url: str | None = None
        self.restarts = 0
        self.probe = Probe(10)


@asynccontextmanager
async def listening(upstream: Nothing | None = None) -> AsyncIterator[int]:
    """Port of a gateway with SETTINGS."""
    socket = bind("127.0.0.1", 0)
    listener = Listener(Gateway(SETTINGS, upstream or Nothing()), socket)
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


class Mortal(Nothing):
    """In place of the Triton server: gives one token, or says that the engine is gone."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = True
        self.asked = 0

    async def generate(self, request: web.Request) -> web.Response:
        self.asked += 1
        said: dict[str, Any] = {"text_output": "a", "finish_reason": "stop", "prompt_tokens": 1, "completion_tokens": 1}
        said |= {"cached_tokens": 0, "branches": 1, "steps": 1, "seed": 1}
        if not self.alive:
            said = {"error": "engine_failed: the engine process ended while it worked on this request"}
        return web.Response(text=f"data: {json.dumps(said)}\n\n", content_type="text/event-stream")


@asynccontextmanager
async def mortal() -> AsyncIterator[Mortal]:
    upstream = Mortal()
    app = web.Application()
    app.router.add_post("/v2/models/apar/generate_stream", upstream.generate)
    async with TestServer(app) as server:
        upstream.url = str(server.make_url("")).rstrip("/")
        yield upstream


@pytest.mark.parametrize("stream", [False, True])
def test_health_knows_of_a_dead_engine_at_once_and_soon_of_a_new_one(stream: bool) -> None:
    async def ask(port: int) -> bytes:
        body = json.dumps({"model": "tiny", "prompt": "a", "stream": stream}).encode()
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"
        return await exchange(port, head % len(body) + body)

    async def health(port: int) -> bytes:
        answer = await exchange(port, b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        return answer[9:12]

    async def run() -> None:
        async with mortal() as upstream, listening(upstream) as port:
            assert b" 200 " in await ask(port)
            assert await health(port) == b"200" and upstream.asked == 1, "tokens that users got count"
            upstream.alive = False
            await ask(port)
            assert await health(port) == b"503"
            asked = upstream.asked
            assert await health(port) == b"503" and upstream.asked == asked, "not asked at every look"
            upstream.alive = True
            for _ in range(100):
                if await health(port) == b"200":
                    break
                await asyncio.sleep(0.05)
            else:
                pytest.fail("the engine is back, and is still called unhealthy")

    asyncio.run(run())
