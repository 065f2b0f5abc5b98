"""What the scheduler has done so far, as plain numbers for metrics."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

ForkDenial = Literal["policy", "request", "repeat", "length", "branches", "slots", "rows"]
"""Why a branch did not fork where [Fork] was its likeliest token: the policy is `never`; the request's `fork` or
`max_depth`; right after [Fork] or [Child]; no room before a limit of tokens or context; `max_branches`; the server's
branch slots; under `adaptive`: what is left of them is for new requests."""


@dataclass(slots=True)
class SchedulerCounters:
    """Totals since the engine was loaded."""

    forks: int = 0
    """Children born."""
    forks_denied: dict[ForkDenial, int] = field(default_factory=dict)
    """Steps of branches whose likeliest token was a banned [Fork], by reason; a reason that never applied is absent."""
    tokens: int = 0
    """Tokens sampled."""
    request_steps: int = 0
    """Steps, each counted once for every request that sampled in it."""
    pauses: int = 0
    """Steps that running branches sat out because others took the rows."""
    parked: int = 0
    """Branches whose blocks were taken while the rest of their request went on."""
    preemptions: int = 0
    """Requests whose blocks were all taken."""
    late: int = 0
    """Times that a request fell behind its service level (`adaptive` only)."""
