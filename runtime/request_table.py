"""Admitted requests in arrays: what a step must know of a request, indexed by `Request.index`."""

from __future__ import annotations

import numpy as np

from apar.runtime.branch import Request
from apar.runtime.sampling_params import SamplingParams


class RequestTable:
    """Structure of arrays over admitted requests, preempted ones included.

    Args:
        capacity: the most requests that can be admitted at once.
    """

    def __init__(self, capacity: int) -> None:
        self.requests: list[Request | None] = [None] * capacity
        self._free = list(range(capacity - 1, -1, -1))
        self.remaining = np.zeros(capacity, dtype=np.int64)
        """Tokens of `max_tokens` that are left to sample, over the whole tree."""
        self.max_branches = np.zeros(capacity, dtype=np.int64)
        self.live = np.zeros(capacity, dtype=np.int64)
        """Live branches."""
        self.held = np.zeros(capacity, dtype=np.int32)
        """Distinct blocks that the request's branches refer to."""
        self.peak = np.zeros(capacity, dtype=np.int32)
        """The most it ever held."""
        self.steps = np.zeros(capacity, dtype=np.int32)
        """Steps in which it sampled."""
        self.born = np.zeros(capacity, dtype=np.int32)
        """Branches born, ended ones included."""
        self.clock = np.zeros(capacity, dtype=np.int32)
        """The most advanced clock of any branch (`BranchTable.clock_base`); kept where drafts are made."""
        self.catching_up = np.zeros(capacity, dtype=bool)
        """Some branch lacks K/V that it needs before all can sample."""
        self.stop_tokens = np.zeros(capacity, dtype=bool)
        """Tokens other than end-of-sequence may end its branches."""
        self.stop_strings = np.zeros(capacity, dtype=bool)
        """What its branches say may end them between two tokens."""
        self.budget = np.zeros(capacity, dtype=np.int32)
        """`max_tokens`: what `remaining` began with."""
        self.prompt = np.zeros(capacity, dtype=np.int32)
        """Tokens of the prompt."""
        self.priority = np.zeros(capacity, dtype=np.int64)
        self.arrived = np.zeros(capacity, dtype=np.float64)
        """Seconds of the engine's clock."""
        self.late = np.zeros(capacity, dtype=bool)
        """`Request.late`."""

    @property
    def num_free(self) -> int:
        """Requests that `add` can still take."""
        return len(self._free)

    def add(self, request: Request, params: SamplingParams, max_branches: int) -> int:
        """Give a request an index; returns it."""
        index = self._free.pop()
        request.index = index
        self.requests[index] = request
        self.held[index] = self.peak[index] = self.steps[index] = 0
        self.live[index] = self.born[index] = 1
        self.clock[index] = 0
        self.remaining[index] = self.budget[index] = params.max_tokens
        self.prompt[index] = len(request.prompt)
        self.priority[index] = request.priority
        self.arrived[index] = request.arrived
        self.late[index] = request.late
        self.max_branches[index] = min(params.max_branches, max_branches)
        self.catching_up[index] = False
        self.stop_tokens[index] = bool(params.stop_token_ids)
        self.stop_strings[index] = bool(params.stop)
        return index

    def remove(self, request: Request) -> None:
        """Take a finished request out; its counts move to the request."""
        index = request.index
        request.sampled = request.params.max_tokens - int(self.remaining[index])
        request.peak_blocks = int(self.peak[index])
        request.steps = int(self.steps[index])
        self.catching_up[index] = False
        self.requests[index] = None
        self._free.append(index)

    def at(self, index: int) -> Request:
        """The request with an index."""
        request = self.requests[index]
        assert request is not None
        return request
