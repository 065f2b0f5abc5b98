"""The interface of all executors: load an engine directory, execute steps, close."""

from __future__ import annotations

from abc import ABC, abstractmethod

from apar.export.manifest import Manifest
from apar.runtime.step import Float32Array, StepInputs


class Executor(ABC):
    """Runs steps of one engine. Not thread-safe: one loop drives it.

    Attributes:
        name: the backend's name, as `--executor` takes it.
        manifest: the engine's manifest.
        num_blocks: blocks in the KV pool; valid block ids are 0..num_blocks-1.
        detail: one line for people: graph, library, threads, pool size.
    """

    name: str
    manifest: Manifest
    num_blocks: int
    detail: str

    @abstractmethod
    def execute(self, inputs: StepInputs) -> Float32Array:
        """Run one step and return logits float32 [L, vocab].

        The array belongs to the executor and is valid (and may be written by the caller) until the
        next call. Raises ExecutorError if the step failed; KV contents of the rows in it are then
        undefined, other blocks are untouched.
        """

    @abstractmethod
    def close(self) -> None:
        """Free the model and the pools. Idempotent."""
