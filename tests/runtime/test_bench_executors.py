"""Executors of measurements stand in front of real ones: an engine must not see a difference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from path_executor import PathExecutor

from apar.runtime.bench.cost_model import COST_MODELS
from apar.runtime.bench.passing_executor import PassingExecutor
from apar.runtime.bench.timed_executor import TimedExecutor
from apar.runtime.bench.virtual_executor import VirtualExecutor
from apar.runtime.engine import Engine
from apar.runtime.executor.base import Executor
from apar.runtime.sampling_params import SamplingParams


class Special(PathExecutor):
    """Differs from the defaults in all that an engine may ask an executor for."""

    name = "special"
    memory_bound_tokens = 77
    mixes_drafts = True

    def __init__(self) -> None:
        super().__init__(64, 4, 96)
        self.told: list[Any] = []

    @property
    def step_limits(self) -> tuple[int, int]:
        return 5, 20

    def expect_drafts(self, chains: bool) -> None:
        self.told.append(("expect_drafts", chains))

    def load_draft_heads(self) -> None:
        self.told.append("load_draft_heads")

    def draft_logits(self, wanted: np.ndarray) -> np.ndarray:
        return np.full((wanted.size, 1, 2), 5, np.float32)

    def close(self) -> None:
        self.told.append("close")


@pytest.mark.parametrize("kind", [PassingExecutor, TimedExecutor, VirtualExecutor])
def test_everything_but_the_step_is_passed_on(kind: type[PassingExecutor]) -> None:
    inner = Special()
    front = kind(inner, COST_MODELS["7b-h200"]) if kind is VirtualExecutor else kind(inner)
    # Whatever the interface has or will have, but for `logits`, which goes through `execute`.
    mentioned = {name for name in vars(Executor) if not name.startswith("_")} - {"logits"}
    assert mentioned <= {*vars(PassingExecutor), *vars(front)}
    for name in ("name", "manifest", "num_blocks", "detail", "memory_bound_tokens", "mixes_drafts", "step_limits"):
        assert getattr(front, name) == getattr(inner, name), name
    engine = Engine(front, draft="ngram")
    assert (engine.scheduler.limits.max_rows, engine.scheduler.limits.max_step_tokens) == (5, 20)
    assert engine.scheduler.speculation is not None and engine.scheduler.speculation.mixes_drafts
    engine.submit("a", [3, 4, 5], SamplingParams(max_tokens=20))
    while engine.step() is not None:
        pass
    front.load_draft_heads()
    assert front.draft_logits(np.zeros(3, np.int64)).shape == (3, 1, 2)
    engine.close()
    assert inner.told == [("expect_drafts", True), "load_draft_heads", "close"]
    assert inner.computed_tokens > 0
