"""Requests to a model of the Triton server over HTTP `generate_stream`: JSON out, server-sent events in.

Every request has a connection of its own; closing it cancels the request in the engine. (gRPC calls must not be
cancelled and no header of a client may reach the server: NVIDIA's server 2.51 crashes on either.)
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from apar.export.errors import AparError

MODEL = "apar"
CONNECT_SECONDS = 10.0
MAX_EVENT_BYTES = 16 << 20
"""Of one server-sent event: far more than any response has."""

UNAVAILABLE, FAILED, DEADLINE = "engine_unavailable", "engine_failed", "deadline_exceeded"
CODES = {
    "invalid_request",
    "context_exceeded",
    "overloaded",
    UNAVAILABLE,
    FAILED,
    DEADLINE,
    "cancelled",
    "internal",
}
"""What the model puts in front of an error's sentence."""


class TritonError(AparError):
    """The server answered with an error, or not at all (`silent`).

    `code` is one of CODES, or "" for an error of Triton's own.
    """

    def __init__(self, code: str, message: str, silent: bool = False) -> None:
        super().__init__(message)
        self.code = code
        self.silent = silent


@dataclass(slots=True)
class BranchStep:
    """What one branch did."""

    kind: str
    """`fork`, `delta` or `finish`."""
    branch_id: int
    parent_id: int
    """-1 for the root."""
    depth: int
    text: str
    """Of a delta; of a finish the reason."""
    tokens: int
    """Tokens of a delta."""
    step: int
    """The engine's step."""


@dataclass(slots=True)
class Final:
    """The last response's figures."""

    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    branches: int
    steps: int
    seed: int


@dataclass(slots=True)
class ModelResponse:
    """One response: text in reading order that is new, and what else was asked for."""

    text: str
    events: list[BranchStep] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    final: Final | None = None


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
) -> AsyncIterator[ModelResponse]:
    """Responses of the model `apar` to one request; the last has `final`.

    `inputs`: tensors by name (plus `id`), without `stream`. `deadline`: seconds in all. `watch` is told of everything
    that comes, and ends the request when it expires. Raises TritonError. Leaving the loop, or cancelling the task,
    cancels the request.
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
                async for message in _events(response.content):
                    if watch is not None:
                        watch.moved()
                    began = True
                    found = read_response(message)
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


def read_response(message: Mapping[str, Any]) -> ModelResponse:
    """One response from its tensors by name. Raises TritonError where it is an error."""
    if "error" in message:
        raise _model_error(str(message["error"]))
    events: list[BranchStep] = []
    kinds = _vector(message.get("event"))
    if kinds:
        columns = [_vector(message[name]) for name in ("branch_id", "parent_id", "depth", "event_text", "event_tokens")]
        steps = _vector(message.get("event_step")) or [0] * len(kinds)
        events = [BranchStep(*row) for row in zip(kinds, *columns, steps, strict=True)]
    final = None
    if message.get("finish_reason"):
        counts = ("prompt_tokens", "completion_tokens", "cached_tokens", "branches", "steps", "seed")
        final = Final(str(message["finish_reason"]), *(int(message.get(name, 0)) for name in counts))
    logprobs = json.loads(message["logprobs"]) if message.get("logprobs") else []
    return ModelResponse(str(message.get("text_output", "")), events, logprobs, final)


async def _events(content: aiohttp.StreamReader) -> AsyncIterator[dict[str, Any]]:
    """JSON of each server-sent event."""
    held = b""
    async for chunk in content.iter_any():
        held += chunk
        if len(held) > MAX_EVENT_BYTES:
            raise TritonError("internal", "a response of the server is longer than any response may be")
        *whole, held = held.split(b"\n\n")
        for event in whole:
            if event.startswith(b"data:"):
                yield json.loads(event[5:])


def _vector(value: Any) -> list[Any]:
    """Triton writes a vector of one element as a scalar."""
    return value if isinstance(value, list) else [] if value is None else [value]


def _triton_error(body: str) -> TritonError:
    try:
        return _model_error(str(json.loads(body)["error"]))
    except (ValueError, KeyError, TypeError):
        return TritonError("internal", f"the server answered: {body[:200]}")


def _model_error(text: str) -> TritonError:
    code, colon, sentence = text.partition(": ")
    if colon and code in CODES:
        return TritonError(code, sentence)
    return TritonError("", text)
