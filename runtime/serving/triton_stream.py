"""Requests to a model of the Triton server over HTTP `generate_stream`: JSON out, server-sent events in.

Every request has a connection of its own; closing it cancels the request in the engine. (gRPC calls must not be
cancelled and no header of a client may reach the server: NVIDIA's server 2.51 crashes on either.)
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from typing import Any

import aiohttp

from apar.runtime.serving.model_responses import (
    DEADLINE,
    FAILED,
    MODEL,
    UNAVAILABLE,
    ModelResponse,
    TritonError,
    join,
    model_error,
    read_response,
)

_QUICK: int | None = getattr(socket, "TCP_QUICKACK", None)
CONNECT_SECONDS = 10.0
MAX_EVENT_BYTES = 16 << 20
"""Of one server-sent event: far more than any response has."""


class IdleWatch:
    """Calls `stop` when nothing has moved for `seconds`. One timer, re-armed only when it fires."""

    def __init__(self, seconds: float) -> None:
        self.expired = False
        self._seconds = seconds
        self._loop = asyncio.get_running_loop()
        self._last = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._stops: list[Any] = []

    def on_expiry(self, stop: Any) -> None:
        """Add something to call."""
        self._stops.append(stop)

    def moved(self) -> None:
        """Something came or went; the first call starts the watch."""
        self._last = self._loop.time()
        if self._timer is None and not self.expired:
            self._timer = self._loop.call_at(self._last + self._seconds, self._check)

    def close(self) -> None:
        """End the watch."""
        self._stops.clear()
        if self._timer is not None:
            self._timer.cancel()

    def _check(self) -> None:
        due = self._last + self._seconds
        if self._loop.time() < due:
            self._timer = self._loop.call_at(due, self._check)
            return
        self._timer = None
        self.expired = True
        for stop in self._stops:
            stop()


async def stream_model(
    session: aiohttp.ClientSession,
    base_url: str,
    inputs: Mapping[str, Any],
    *,
    deadline: float,
    watch: IdleWatch | None = None,
) -> AsyncGenerator[ModelResponse, None]:
    """Responses of the model `apar` to one request; the last has `final`.

    `inputs`: tensors by name (plus `id`), without `stream`. `deadline`: seconds in all. `watch` is told of everything
    that comes, and ends the request when it expires. Raises TritonError. Leaving the loop, or cancelling the task,
    cancels the request. What comes together is one response.
    """
    body = encode(dict(inputs) | {"stream": True})
    timeout = aiohttp.ClientTimeout(total=deadline, sock_connect=CONNECT_SECONDS)
    began = False
    try:
        url = f"{base_url}/v2/models/{MODEL}/generate_stream"
        headers = {"Content-Type": "application/json"}
        async with session.post(url, data=body, headers=headers, timeout=timeout) as response:
            if watch is not None:
                watch.on_expiry(response.close)
            try:
                if response.status != 200:
                    raise _triton_error((await response.text(errors="replace"))[:2000])
                async for messages in _events(response):
                    if watch is not None:
                        watch.moved()
                    began = True
                    for found in join(map(read_response, messages)):
                        yield found
                        if found.final is not None:
                            return
            finally:
                # Closed, not released: what is still to come is not read, and the server sees it at once.
                response.close()
    except asyncio.TimeoutError as error:
        raise TritonError(DEADLINE, f"no complete answer within {deadline:g} s", silent=not began) from error
    except (aiohttp.ClientError, ConnectionError) as error:
        if watch is not None and watch.expired:
            raise TritonError(
                DEADLINE, "nothing moved between two tokens for too long; the request was ended"
            ) from error
        if began:
            raise TritonError(
                FAILED, "the server went away in the middle of the answer; send the request again"
            ) from error
        raise TritonError(
            UNAVAILABLE, "the engine's server does not answer; try again in a moment", silent=True
        ) from error
    raise TritonError(FAILED, "the server ended the answer before it was complete; send the request again")


def encode(inputs: Mapping[str, Any]) -> bytes:
    """A request's body. Raises TritonError `invalid_request` where a text cannot be UTF-8."""
    try:
        return json.dumps(inputs, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    except UnicodeEncodeError as error:
        raise TritonError("invalid_request", "a text holds a lone surrogate (half a UTF-16 pair)") from error


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[list[dict[str, Any]]]:
    """JSON of the server-sent events that came together."""
    connection = response.connection
    transport = connection.transport if connection is not None else None
    connected = transport.get_extra_info("socket") if transport is not None else None
    held = b""
    _acknowledge(connected)
    async for chunk in response.content.iter_any():
        _acknowledge(connected)
        held += chunk
        if len(held) > MAX_EVENT_BYTES:
            raise TritonError("internal", "a response of the server is longer than any response may be")
        *whole, held = held.split(b"\n\n")
        messages = [json.loads(event[5:]) for event in whole if event.startswith(b"data:")]
        if messages:
            yield messages


def _acknowledge(connected: Any) -> None:
    """Acknowledge what has come at once (Linux).

    The server leaves Nagle's algorithm on: it holds a token back until the one before is acknowledged, which the system
    would put off for 40 ms or more. The option lasts for one acknowledgement only.
    """
    if connected is not None and _QUICK is not None:
        with contextlib.suppress(OSError):
            connected.setsockopt(socket.IPPROTO_TCP, _QUICK, 1)


def _triton_error(body: str) -> TritonError:
    try:
        # An error before the first response has a status of its own, but is written as an event all the same.
        return model_error(str(json.loads(body.removeprefix("data:"))["error"]))
    except (ValueError, KeyError, TypeError):
        return TritonError("internal", f"the server answered: {body[:200]}")
