"""The interface of all executors: load an engine directory, execute steps, close."""

from __future__ import annotations

from abc import ABC, abstractmethod

from apar.export.errors import ExecutorError
from apar.export.manifest import Manifest
from apar.runtime.device_logits import DeviceLogits
from apar.runtime.step import Float32Array, IntArray, StepInputs

NO_HEADS_REMEDY = (
    "build it from a checkpoint with a `medusa` folder, give `apar build --draft-heads DIR`, or draft with `ngram`"
)


class Executor(ABC):
    """Runs steps of one engine. Not thread-safe: one loop drives it.

    Attributes:
        name: the backend's name, as `--executor` takes it.
        manifest: the engine's manifest.
        num_blocks: blocks in the KV pool; valid block ids are 0..num_blocks-1.
        host_blocks: blocks in host memory that `swap_out` and `swap_in` may name, 0..host_blocks-1; 0: none.
        detail: one line for people: graph, library, threads, pool size.

    Engines with Medusa heads (`manifest.draft_heads`) can also give draft logits: `load_draft_heads` once, then
    `draft_logits` after a step.
    """

    name: str
    manifest: Manifest
    num_blocks: int
    host_blocks: int = 0
    detail: str
    memory_bound_tokens: int = 16
    """Tokens that a step may have before it costs noticeably more than one: what drafts may fill up. About the
    machine's arithmetic over its memory bandwidth; this is a common CPU's in float32."""
    mixes_drafts: bool = False
    """Whether steps whose drafts are all chains may do without `tree_mask` though those of other steps are trees."""

    @property
    def step_limits(self) -> tuple[int, int] | None:
        """Rows and tokens that a step may have, where the engine was compiled for so many."""
        return None

    @abstractmethod
    def execute(self, inputs: StepInputs) -> Float32Array:
        """Run one step and return logits float32 [L, vocab].

        The array belongs to the executor and is valid (and may be written by the caller) until the
        next call. Raises ExecutorError if the step failed; KV contents of the rows in it are then
        undefined, other blocks are untouched.
        """

    def logits(self, inputs: StepInputs) -> Float32Array | DeviceLogits:
        """As `execute`, for callers that sample: logits may stay where they were computed."""
        return self.execute(inputs)

    def expect_drafts(self, chains: bool) -> None:  # noqa: B027 - most executors have nothing to do
        """Get ready for steps with drafts: chains alone, which need no tree mask, or trees too. Idempotent."""

    def load_draft_heads(self) -> None:
        """Get the heads ready; without this call they cost nothing. Idempotent.

        Raises ExecutorError where the engine has none, or the executor cannot run them.
        """
        raise ExecutorError(f"the {self.name} executor cannot run Medusa heads; use draft method `ngram` or `none`")

    def draft_logits(self, wanted: IntArray) -> Float32Array:
        """Draft logits float32 [N, heads, vocab] of N tokens of the last step; `wanted` [N] are places in its
        `logits_rows`. The array belongs to the executor and is valid (and may be written by the caller) until the next
        call."""
        raise ExecutorError(f"the heads of the {self.name} executor are not loaded")

    @abstractmethod
    def close(self) -> None:
        """Free the model and the pools. Idempotent."""
