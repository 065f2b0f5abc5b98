"""What a worker is asked and answers: one JSON object a line. Standard library only."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class Task:
    """What a worker loads, once."""

    config: dict[str, Any]
    """`config.json` of the shape."""
    weights: str
    """f32, bf16, int8 or int4."""
    threads: int
    context: int
    """Tokens that each row has behind it before its first measured step."""
    most_rows: int
    most_steps: int
    folder: str
    """Where the worker may keep files."""
    seed: int = 0
    engine: str = ""
    """Engine directory, for apar's own workers."""


class Peer(Protocol):
    """One loaded model."""

    detail: str
    """Version, threads, weight type, for people."""

    def begin(self, rows: int) -> None:
        """Forget everything and give each of `rows` separate sequences `context` tokens."""

    def step(self) -> None:
        """Compute one more token of each row, logits included."""


def serve(make: Callable[[Task], Peer]) -> None:
    """Load what the first line asks for, then measure steps until the input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever libraries print goes elsewhere

    def answer(content: dict[str, Any]) -> None:
        answers.write(json.dumps(content) + "\n")

    try:
        peer = make(Task(**json.loads(sys.stdin.readline())))
    except ModuleNotFoundError as error:
        answer({"missing": error.name})
        return
    except Exception as error:  # whatever a peer raises is its result
        answer({"failed": f"{type(error).__name__}: {error}"})
        return
    answer({"ready": peer.detail})
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            peer.begin(asked["rows"])
            seconds = []
            for _ in range(asked["steps"] + 1):
                began = time.perf_counter()
                peer.step()
                seconds.append(time.perf_counter() - began)
        except Exception as error:
            answer({"failed": f"{type(error).__name__}: {error}"})
            return
        answer({"seconds": seconds[1:]})  # the first one still warms up
