"""What a user puts up with."""

from __future__ import annotations

from dataclasses import dataclass

from apar.export.errors import RequestError


@dataclass(frozen=True, slots=True)
class ServiceLevel:
    """Limits within which an answer is in time. What ends within them counts as goodput.

    Raises RequestError if a limit is not above 0.
    """

    first_token_seconds: float = 0.5
    """From arrival to the first token, at most."""
    latency_factor: float = 2.5
    """From arrival to the end, at most this many times what the request takes alone and without forks."""

    def __post_init__(self) -> None:
        if not (self.first_token_seconds > 0 and self.latency_factor > 0):
            raise RequestError(
                "the limits of a service level must be above 0, not "
                f"{self.first_token_seconds} s and {self.latency_factor}"
            )
