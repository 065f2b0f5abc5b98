"""Who is in time: what each request's service level leaves it for the tokens to come (docs/scheduling.md)."""

from __future__ import annotations

import numpy as np

from apar.runtime.branch import Request
from apar.runtime.counters import SchedulerCounters
from apar.runtime.limits import SchedulerLimits
from apar.runtime.request_table import RequestTable
from apar.runtime.step import BoolArray, IntArray
from apar.runtime.step_cost import Float64Array, StepCost

AIM = 0.97
"""Part of the service level that is aimed at. Requests that wait for each other all end near what they are allowed, so
an aim at the limit itself would miss it, by little, for many."""
HORIZON = 150
"""Tokens within which a request is to make good what it is behind; also what it may spend of what it is ahead."""
LEAST_PACE = 0.9
"""Steps this much shorter than a request without branches is allowed are the shortest that are planned for: who needs
shorter ones is late."""
TYPICAL = 50
"""Steps after which a request's own tokens a step count as much as those of others, where its speed is expected."""
MEMORY = 500
"""Steps after which what the speed of a typical request was learned from weighs a third."""
SLOWEST = 0.1
"""Part of the admitted requests that may be slower than what a new one is taken for while it waits."""
MOST_HASTE = 10
"""A request's tokens are taken to need at most so many times the plain pace."""


def at_rank(values: Float64Array, rank: int) -> float:
    """The value that stands at `rank` when `values` are sorted."""
    ordered = values.copy()
    ordered.partition(rank)
    return float(ordered[rank])


class Pacing:
    """Paces of requests, by request index.

    Args:
        requests: admitted requests.
        counters: where the speed of a typical request is learned from.
        limits: sizes and the service level.
        cost: predicts steps.
    """

    def __init__(
        self, requests: RequestTable, counters: SchedulerCounters, limits: SchedulerLimits, cost: StepCost
    ) -> None:
        self.requests = requests
        self.counters = counters
        self.cost = cost
        self.allowed = np.zeros(limits.max_live_branches)
        """Seconds that each step may take for the request to be in time."""
        self.need = np.zeros(limits.max_live_branches)
        """Tokens a second that it takes to be in time."""
        self.plain = 0.0
        """Seconds that each step may take for a typical request without branches."""
        self._first_token = limits.service_level.first_token_seconds
        self._factor = AIM * limits.service_level.latency_factor
        self.slow = 1.0
        """Tokens that the slowest requests, all but SLOWEST of them, say in a step."""
        self._said = self._took = 1.0
        """Fading means over steps of tokens and of requests; the quotient is what a typical request says in a step."""
        self._counted = (0, 0)

    def begin_step(self, mean_path: float) -> None:
        """Learn from the last step; `mean_path` is the mean length of the running branches' paths."""
        tokens, steps = self.counters.tokens, self.counters.request_steps
        said, took = tokens - self._counted[0], steps - self._counted[1]
        self._counted = tokens, steps
        if took:
            self._said += (said - self._said) / MEMORY
            self._took += (took - self._took) / MEMORY
        self.plain = self._factor * self.cost.one(1, mean_path)

    @property
    def shortest(self) -> float:
        """Seconds of the shortest steps that are planned for."""
        return LEAST_PACE * self.plain

    @property
    def typical(self) -> float:
        """Tokens that a typical request says in a step."""
        return max(1.0, self._said / self._took)

    @property
    def patience(self) -> float:
        """Seconds without a first token that nearly all requests, as fast as those admitted, could still make good."""
        return min(self._first_token, HORIZON * (1 - LEAST_PACE / self.slow) * self.plain)

    def need_of(self, waiting: Request) -> float:
        """Tokens a second that a waiting request will take."""
        return float(self.need[waiting.index]) if waiting.index >= 0 else 1 / self.plain

    def judge(self, owners: IntArray, now: float) -> BoolArray:
        """Work out what pace each admitted request of `owners` [G] needs; returns which of them are late.

        A request that has said n tokens is in time if they took no longer than the service level gives an answer of n
        tokens; what it is ahead or behind is spread over the next HORIZON tokens. That gives the seconds that each
        token may take, and with the tokens that it is likely to say in a step the seconds that each step may take.
        """
        requests = self.requests
        prompt, steps = requests.prompt[owners], requests.steps[owners]
        sampled = requests.budget[owners] - requests.remaining[owners]
        # Without forks, [Fork] and the ends of children would not have been said.
        said = np.maximum(sampled - 2 * (requests.born[owners] - 1), np.minimum(sampled, 1))
        alone = self.cost.seconds(1, prompt + said // 2)
        waited = now - requests.arrived[owners]
        ahead = self._factor * (self.cost.seconds(prompt, prompt) + said * alone) - waited
        token = self._factor * alone + ahead / HORIZON
        speed = np.maximum((sampled + TYPICAL * self.typical) / (steps + TYPICAL), 1.0)
        if owners.size:
            self.slow = at_rank(speed, int(SLOWEST * (owners.size - 1)))
        self.allowed[owners] = allowed = speed * token
        self.need[owners] = 1 / np.maximum(token, self.plain / MOST_HASTE)
        late: BoolArray = (allowed < self.shortest) | ((sampled == 0) & (waited > self.patience))
        return late
