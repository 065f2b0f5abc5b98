"""What bounds the gateway."""

from __future__ import annotations

from dataclasses import dataclass

MAX_CONNECTIONS = 4096


@dataclass(frozen=True, slots=True)
class GatewaySettings:
    """Limits and names; seconds where not said otherwise. `docs/serving.md` has the reasons."""

    model_name: str
    max_context: int
    """Tokens of a prompt and its answer together that the engine takes."""
    created: int
    """When the model was built or loaded, for /v1/models: seconds since 1970."""
    api_keys: tuple[str, ...] = ()
    """Keys of which a client must send one; none: everybody may."""
    max_requests: int = 256
    """Answers in flight, those that wait in the engine included; beyond it 429."""
    max_body_bytes: int = 4 << 20
    max_json_depth: int = 64
    max_choices: int = 16
    """Answers that one HTTP request may ask for (prompts times `n`)."""
    deadline: float = 600.0
    """For a whole answer."""
    idle_timeout: float = 60.0
    """Between two tokens, and for a client that does not read."""
    body_timeout: float = 30.0
    """For a request's body to arrive, and for the first request on a new connection."""
    keep_alive: float = 30.0
    """How long an unused connection stays open."""
    max_connections: int = MAX_CONNECTIONS
