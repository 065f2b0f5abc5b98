"""A real executor whose sampled tokens are those of recorded answers.

Each step runs twice: on the real engine, whose logits are thrown away, and on the replay executor, which says what
the recorded answer goes on with and checks the K/V books. So a model of random weights works on the paths, the forks
and the block tables that real answers have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter

from apar.runtime.bench.passing_executor import PassingExecutor
from apar.runtime.engine import Engine
from apar.runtime.executor.base import Executor
from apar.runtime.executor.recorded_trees import Tree
from apar.runtime.executor.replay import ReplayExecutor
from apar.runtime.step import Float32Array, StepInputs


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One step: what it was, how long the real engine took, and the KV books while it ran."""

    rows: int
    tokens: int
    seconds: float
    blocks: int
    """Blocks referenced."""
    listed: int
    """Blocks over all branches' tables: what they would hold if every branch had its whole path to itself."""


class ForcedExecutor(PassingExecutor):
    """Computes steps with `executor`, answers with recorded trees. Closes `executor`."""

    def __init__(self, executor: Executor, trees: Sequence[Tree]) -> None:
        """Raises ExecutorError if a tree is malformed or the engine's vocabulary is too small to tell trees apart."""
        super().__init__(executor)
        shape, size = executor.manifest.decoder, executor.manifest.block_size
        self._replay = ReplayExecutor(
            trees,
            num_blocks=executor.num_blocks,
            block_size=size,
            vocab_size=shape.vocab_size,
            max_context=shape.max_context,
        )
        self.manifest = self._replay.manifest
        self.engine: Engine | None = None
        """Whose books are recorded."""
        self.records: list[StepRecord] = []
        self.foreign_seconds = 0.0
        """Time spent on replay and records, which a server would not spend."""

    def prompt(self, tree: int, salt: int = 0) -> list[int]:
        """Prompt of a tree; `salt` varies its filler."""
        return self._replay.replay_prompt(tree, salt)

    def execute(self, inputs: StepInputs) -> Float32Array:
        """See Executor.execute."""
        began = perf_counter()
        self._executor.execute(inputs)
        ended = perf_counter()
        logits = self._replay.execute(inputs)
        blocks = listed = 0
        if self.engine is not None:
            blocks = self.engine.cache.num_referenced
            listed = int(self.engine.scheduler.table.num_blocks.sum())
        record = StepRecord(inputs.kv_len.size, inputs.input_ids.size, ended - began, blocks, listed)
        self.records.append(record)
        self.foreign_seconds += perf_counter() - ended
        return logits

    def close(self) -> None:
        """See Executor.close."""
        self._executor.close()
        self._replay.close()
