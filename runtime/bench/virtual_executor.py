"""An executor whose steps last as long as a cost model says, on a clock of its own."""

from __future__ import annotations

from dataclasses import dataclass

from apar.runtime.bench.cost_model import CostModel, StepWork
from apar.runtime.bench.passing_executor import PassingExecutor
from apar.runtime.engine import Engine
from apar.runtime.executor.base import Executor
from apar.runtime.step import Float32Array, StepInputs


@dataclass(slots=True)
class StepRecord:
    """One step: what it was, how long it took, and the KV books while it ran."""

    work: StepWork
    seconds: float
    blocks: int
    """Blocks referenced."""
    listed: int
    """Blocks over all branches' tables: what they would hold if every branch had its whole path to itself."""


class VirtualExecutor(PassingExecutor):
    """Passes steps to another executor and moves a clock by what they would cost."""

    def __init__(self, executor: Executor, model: CostModel) -> None:
        super().__init__(executor)
        self._model = model
        self.engine: Engine | None = None
        """Whose books are recorded."""
        self.now = 0.0
        """Seconds."""
        self.records: list[StepRecord] = []

    def execute(self, inputs: StepInputs) -> Float32Array:
        """See Executor.execute."""
        logits = self._executor.execute(inputs)
        work = StepWork.of(inputs, self.manifest.block_size)
        seconds = self._model.seconds(work)
        self.now += seconds
        blocks = listed = 0
        if self.engine is not None:
            blocks = self.engine.cache.num_referenced
            listed = int(self.engine.scheduler.table.num_blocks.sum())
        self.records.append(StepRecord(work, seconds, blocks, listed))
        return logits
