"""An engine with no model behind, whose steps can be timed in parts."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter

from apar.runtime.bench.timed_executor import TimedExecutor
from apar.runtime.booking import StepReport
from apar.runtime.engine import Engine
from apar.runtime.executor.recorded_trees import Tree
from apar.runtime.executor.replay import ReplayExecutor
from apar.runtime.limits import SchedulerLimits
from apar.runtime.sampling_params import SamplingParams

BLOCK = 16

Parts = tuple[float, float, float, float]
"""Seconds of one step: schedule, model, sample, commit."""


class ReplayServer:
    """An engine that replays trees, with room for all its branches.

    Args:
        trees: recorded answers.
        context: tokens of the longest path.
        limits: of the scheduler.
        vocab_size: what the sampler goes through.
        params: of every request.
    """

    def __init__(
        self, trees: Sequence[Tree], context: int, limits: SchedulerLimits, vocab_size: int, params: SamplingParams
    ) -> None:
        blocks = limits.max_live_branches * (context // BLOCK + 2)
        self.params = params
        self._replay = ReplayExecutor(
            trees, num_blocks=blocks, block_size=BLOCK, vocab_size=vocab_size, max_context=context
        )
        self.executor = TimedExecutor(self._replay)
        self.engine = Engine(self.executor, limits)

    def prompt(self, tree: int) -> list[int]:
        """The prompt that a tree answers."""
        return self._replay.replay_prompt(tree)

    def submit(self, tree: int) -> None:
        """Ask for a tree."""
        self.engine.submit(str(tree), self.prompt(tree), self.params)

    def missing(self, rows: int) -> int:
        """How many requests more would make `rows` live branches, if each is one."""
        scheduler = self.engine.scheduler
        return max(0, rows - scheduler.load()["live_branches"] - len(scheduler.waiting))

    def step(self) -> tuple[StepReport, Parts]:
        """Run a step."""
        sampling = self.engine.sample_seconds
        began = perf_counter()
        report = self.engine.step()
        ended = perf_counter()
        if report is None:
            raise RuntimeError("the replayed answers ended before enough steps were measured")
        record = self.executor.records[-1]
        sampled = self.engine.sample_seconds - sampling
        return report, (record.started - began, record.ended - record.started, sampled, ended - record.ended - sampled)
