"""What executors that stand in front of another one have in common: everything but the step is passed on."""

from __future__ import annotations

from apar.runtime.executor.base import Executor
from apar.runtime.step import Float32Array, IntArray, StepInputs


class PassingExecutor(Executor):
    """Looks like another executor and does what it does. `logits` goes through `execute`, which subclasses change."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self.name = executor.name
        self.manifest = executor.manifest
        self.num_blocks = executor.num_blocks
        self.host_blocks = executor.host_blocks
        self.detail = executor.detail
        self.memory_bound_tokens = executor.memory_bound_tokens
        self.mixes_drafts = executor.mixes_drafts

    @property
    def step_limits(self) -> tuple[int, int] | None:
        """See Executor.step_limits."""
        return self._executor.step_limits

    def execute(self, inputs: StepInputs) -> Float32Array:
        """See Executor.execute."""
        return self._executor.execute(inputs)

    def expect_drafts(self, chains: bool) -> None:
        """See Executor.expect_drafts."""
        self._executor.expect_drafts(chains)

    def load_draft_heads(self) -> None:
        """See Executor.load_draft_heads."""
        self._executor.load_draft_heads()

    def draft_logits(self, wanted: IntArray) -> Float32Array:
        """See Executor.draft_logits."""
        return self._executor.draft_logits(wanted)

    def close(self) -> None:
        """See Executor.close."""
        self._executor.close()
