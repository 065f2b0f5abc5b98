"""Requests and their branches, as people think of them. The numbers of live branches are in `branch_table`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from apar.runtime.outputs import FinishReason, Logprob
from apar.runtime.sampling_params import SamplingParams
from apar.runtime.speculative.lookup import LookupIndex


class RequestState(Enum):
    """Where a request is. A preempted request waits again; its branches keep their tokens."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Branch:
    """One decoding path of a request.

    While the branch lives, its path (token ids from the prompt on) stands in the branch table at `slot`;
    when it ends, its own tokens move to `tokens` and the slot is free for another branch.
    """

    request: Request
    branch_id: int
    parent: Branch | None
    depth: int
    ordinal: int
    """How many forks of the parent came before this one."""
    start: int
    """Path position of the first token that this branch sampled itself."""
    key: int
    """Key of the branch's random stream."""
    order: tuple[int, ...] = (0,)
    """Sorts siblings as plain decoding bears them: by the turn of birth, then by their parents' order."""
    slot: int = -1
    forks: list[int] = field(default_factory=list)
    """Path positions of this branch's [Fork]s."""
    children: list[Branch] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    """Own tokens, filled in when the branch ends: sampled ones, without a final end-of-sequence token."""
    finish_reason: FinishReason | None = None
    end_dropped: bool = False
    """The last token sampled ended the branch and is not among `tokens`."""
    first_step: int = -1
    last_step: int = -1
    logprobs: list[Logprob] | None = None
    digests: list[bytes] = field(default_factory=list)
    """Chain digests of the path's leading full blocks, as far as anyone has asked for them."""
    parked: bool = False
    """Its blocks were taken because the pool is too small for all branches of its request at once."""


@dataclass(slots=True, eq=False)
class Request:
    """A prompt and the tree of branches that answers it."""

    request_id: str
    prompt: Sequence[int]
    params: SamplingParams
    seed: int
    prepared: Any
    """The sampler's digest of `params`, shared by all branches."""
    arrival: int
    """Order of arrival, which decides among equals; see `sort_key`."""
    priority: int = 0
    arrived: float = 0.0
    """When it arrived, in seconds of the engine's clock."""
    deadline: float | None = None
    """When it is ended if it still runs, in seconds of the engine's clock."""
    late: bool = False
    """It cannot meet its service level any more, as far as the fork policy `adaptive` can tell."""
    state: RequestState = RequestState.WAITING
    index: int = -1
    """Row of the scheduler's per-request arrays while admitted."""
    branches: list[Branch] = field(default_factory=list)
    live: list[Branch] = field(default_factory=list)
    """Live branches by `Branch.order`: the order of rows in a step."""
    sampled: int = 0
    """Tokens sampled over the whole tree; filled in when the request ends, as are `peak_blocks` and `steps`."""
    cached_tokens: int = 0
    peak_blocks: int = 0
    preemptions: int = 0
    started_at: float = 0.0
    """`time.perf_counter()` when it was first admitted."""
    steps: int = 0
    """Steps in which the request sampled at least one token."""
    finish_reason: FinishReason | None = None
    error: str | None = None
    lookup: LookupIndex | None = None
    """What drafts by prompt lookup are found in."""

    @property
    def root(self) -> Branch:
        """Branch 0."""
        return self.branches[0]

    @property
    def sort_key(self) -> tuple[int, bool, int]:
        """First come, first served within a priority, late requests after the others; a lower priority goes first."""
        return (self.priority, self.late, self.arrival)
