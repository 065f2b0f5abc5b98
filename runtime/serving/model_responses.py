"""What the models of the repository answer: text, branch events, figures and errors, whichever way they came."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from apar.export.errors import AparError
from apar.runtime.outputs import BranchEvent, DeltaEvent, FinishEvent, FinishReason, ForkEvent

MODEL = "apar"
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

    def event(self, request_id: str = "") -> BranchEvent:
        """The same as the runtime's type; token ids, which the model does not send, are all 0."""
        if self.kind == "fork":
            return ForkEvent(request_id, self.branch_id, self.parent_id, self.depth, self.step)
        if self.kind == "delta":
            return DeltaEvent(request_id, self.branch_id, self.depth, self.text, [0] * self.tokens, self.step)
        return FinishEvent(request_id, self.branch_id, self.depth, cast(FinishReason, self.text), self.step)


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

    def add(self, later: ModelResponse) -> None:
        """Take in the next response of the same answer."""
        self.text += later.text
        self.events += later.events
        self.logprobs += later.logprobs
        self.final = later.final


def join(responses: Iterable[ModelResponse]) -> Iterator[ModelResponse]:
    """Responses of one answer as one. Where reading them ends in a TritonError, those before it come first."""
    whole: ModelResponse | None = None
    try:
        for response in responses:
            if whole is None:
                whole = response
            else:
                whole.add(response)
    except TritonError:
        if whole is not None:
            yield whole
        raise
    if whole is not None:
        yield whole


def read_response(message: Mapping[str, Any]) -> ModelResponse:
    """One response from its tensors by name. Raises TritonError where it is an error."""
    if "error" in message:
        raise model_error(str(message["error"]))
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


def model_error(text: str) -> TritonError:
    """An error from the text that came with it."""
    code, colon, sentence = text.partition(": ")
    if colon and code in CODES:
        return TritonError(code, sentence)
    return TritonError("", text)


def _vector(value: Any) -> list[Any]:
    """Triton writes a vector of one element as a scalar."""
    return value if isinstance(value, list) else [] if value is None else [value]
