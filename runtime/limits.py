"""Sizes that bound the scheduler."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from apar.export.errors import CapacityError
from apar.runtime.service_level import ServiceLevel

ForkPolicy = Literal["always", "never", "adaptive"]
FORK_POLICIES: tuple[str, ...] = get_args(ForkPolicy)
LARGEST = {"max_rows": 1 << 16, "max_step_tokens": 1 << 24, "max_live_branches": 1 << 20}
"""Far beyond any machine's use; arrays are allocated by these."""


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """Sizes that bound the scheduler's arrays and steps."""

    max_rows: int = 256
    """Branches in one step."""
    max_step_tokens: int = 1024
    """Tokens in one step; prefill chunks take what decoding leaves."""
    max_live_branches: int = 1024
    """Branches alive in the server, those of preempted requests included."""
    prefix_caching: bool = True
    fork_policy: ForkPolicy = "always"
    """Who may fork, and who goes first when not all can be served in time (docs/scheduling.md)."""
    service_level: ServiceLevel = field(default_factory=ServiceLevel)
    """What `adaptive` keeps to."""

    def __post_init__(self) -> None:
        for name, most in LARGEST.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
                raise CapacityError(f"{name} must be a whole number from 1 to {most}, not {value!r}")
        if self.fork_policy not in FORK_POLICIES:
            raise CapacityError(f"fork_policy must be one of {', '.join(FORK_POLICIES)}, not {self.fork_policy!r}")
        if self.max_step_tokens < 2 * self.max_rows:
            raise CapacityError(
                f"max_step_tokens ({self.max_step_tokens}) must be at least twice max_rows ({self.max_rows}): "
                "a branch's first step has two tokens"
            )

    def within(self, step_limits: tuple[int, int] | None) -> SchedulerLimits:
        """These limits, but with steps of at most so many (rows, tokens)."""
        if step_limits is None:
            return self
        rows, tokens = step_limits
        return replace(
            self,
            max_rows=min(self.max_rows, rows),
            max_step_tokens=min(self.max_step_tokens, tokens),
        )

    @property
    def admitted_rows(self) -> int:
        """Live branches up to which requests are admitted: twice what a step takes, as far as half the slots allow.

        Whole requests then take turns. A row that waits its turn costs nothing but its blocks, while a request that
        waits for admission has not even a first token.
        """
        return max(self.max_rows, min(2 * self.max_rows, self.max_live_branches // 2))
