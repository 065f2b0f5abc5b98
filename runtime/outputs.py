"""What a request gives back: branch events while it runs, one typed result at its end."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "stop_string", "length", "deadline", "cancelled", "error"]
"""Why a branch or request ended: end-of-sequence or a stop token; a stop string; a limit (tokens,
branch tokens, context); its time was up; cancelled by the caller; an executor failure."""


@dataclass(slots=True)
class Logprob:
    """Log-probability of one sampled token under the model's own distribution (before any sampling rule)."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]] = field(default_factory=list)
    """The most likely (token id, log-probability) pairs, best first, as many as the request asked for."""


@dataclass(slots=True)
class ForkEvent:
    """A branch was born."""

    request_id: str
    branch_id: int
    parent_id: int
    depth: int
    step: int


@dataclass(slots=True)
class DeltaEvent:
    """A branch grew. `text` may be empty while a multi-byte character or a stop string is incomplete."""

    request_id: str
    branch_id: int
    depth: int
    text: str
    token_ids: list[int]
    step: int


@dataclass(slots=True)
class FinishEvent:
    """A branch ended; nothing more comes from it."""

    request_id: str
    branch_id: int
    depth: int
    reason: FinishReason
    step: int


BranchEvent = ForkEvent | DeltaEvent | FinishEvent


@dataclass(slots=True)
class BranchOutput:
    """One branch, finished. Branch 0 is the root; a parent's id is below its children's."""

    branch_id: int
    parent_id: int | None
    depth: int
    token_ids: list[int]
    """Tokens of this branch alone: sampled ones, [Fork]s included, the forced [Child] and a final
    end-of-sequence token left out."""
    segments: list[str]
    """Text between the branch's forks: a branch that forked n times has n + 1 segments."""
    children: list[int]
    """Branch ids in fork order: `children[i]` was forked at the end of `segments[i]`."""
    finish_reason: FinishReason
    first_step: int
    last_step: int
    logprobs: list[Logprob] | None = None
    segment_tokens: list[int] = field(default_factory=list)
    """How many of `token_ids` each segment has; [Fork]s belong to none."""


@dataclass(slots=True)
class Usage:
    """Token counts of a request."""

    prompt_tokens: int
    completion_tokens: int
    """Sampled tokens over the whole tree (forced [Child]s not counted, [Fork]s and ends counted)."""
    cached_tokens: int = 0
    """Prompt tokens whose K/V came from the prefix cache."""


@dataclass(slots=True)
class Timing:
    """Seconds and steps of a request."""

    queued: float
    """From arrival to the first step that computed something for it."""
    time_to_first_token: float
    total: float
    steps: int
    """Steps in which it sampled: plain decoding needs `completion_tokens`."""
    preemptions: int = 0


@dataclass(slots=True)
class RequestOutput:
    """The answer to one prompt."""

    request_id: str
    text: str
    """The tree in reading order, by the rule of docs/decoding.md."""
    branches: list[BranchOutput]
    finish_reason: FinishReason
    """The root's reason, or `length`/`deadline`/`cancelled`/`error` if that ended any branch."""
    usage: Usage
    timing: Timing
    peak_kv_blocks: int
    seed: int
    prompt_token_ids: list[int] = field(default_factory=list)
    error: str | None = None
