"""An executor that notes when each step ran and how large it was."""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter

from apar.runtime.bench.passing_executor import PassingExecutor
from apar.runtime.device_logits import DeviceLogits
from apar.runtime.executor.base import Executor
from apar.runtime.step import Float32Array, StepInputs


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One executed step."""

    rows: int
    tokens: int
    started: float
    """`time.perf_counter()`."""
    ended: float

    @property
    def decodes(self) -> bool:
        """Whether every row had one token: no prompt, no child's first step."""
        return self.rows == self.tokens


class TimedExecutor(PassingExecutor):
    """Passes everything to another executor; `records` holds a StepRecord a step."""

    def __init__(self, executor: Executor) -> None:
        super().__init__(executor)
        self.records: list[StepRecord] = []

    def execute(self, inputs: StepInputs) -> Float32Array:
        """See Executor.execute."""
        rows, tokens = inputs.kv_len.size, inputs.input_ids.size
        started = perf_counter()
        logits = self._executor.execute(inputs)
        self.records.append(StepRecord(rows, tokens, started, perf_counter()))
        return logits

    def logits(self, inputs: StepInputs) -> Float32Array | DeviceLogits:
        """See Executor.logits. The record ends where the call returns: a device may still be at work."""
        rows, tokens = inputs.kv_len.size, inputs.input_ids.size
        started = perf_counter()
        logits = self._executor.logits(inputs)
        self.records.append(StepRecord(rows, tokens, started, perf_counter()))
        return logits
