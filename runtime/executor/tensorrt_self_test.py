"""A TensorRT engine's first look and steps: is it the manifest's, do keys and values land in the pools, uncopied?

TensorRT may put copies around a plugin, and is not told that a pool is written in place. So it is tried at load.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from apar.export.errors import ExecutorError
from apar.export.manifest import Manifest
from apar.export.tensorrt_profiles import MIXED
from apar.plugins.cuda_driver import CudaDevice
from apar.plugins.tensorrt_library import TensorRtLibrary
from apar.runtime.executor.tensorrt_session import TensorRtSession
from apar.runtime.step import INPUT_NAMES, Float32Array, StepInputs

_ADVICE = "build the engine again with --kv-binding bound"


@dataclass(frozen=True, slots=True)
class PoolReader:
    """Looks into the pools on the device."""

    device: CudaDevice
    stream: int
    pools: Sequence[int]
    """Address of each layer's."""
    num_blocks: int
    layer_block_bytes: int
    """Bytes of one block in one layer, keys and values."""

    def first_blocks(self, layer: int, part: int) -> npt.NDArray[np.uint8]:
        """The first one or two blocks of a layer's keys (part 0) or values (1), each as a row of bytes."""
        size = self.layer_block_bytes // 2
        found = np.empty((min(2, self.num_blocks), size), np.uint8)
        self.device.to_host(found, self.pools[layer] + part * self.num_blocks * size, self.stream)
        self.device.synchronize(self.stream)
        return found

    def clear(self) -> None:
        """Make the pools zero bytes again."""
        for pool in self.pools:
            self.device.zero(pool, self.num_blocks * self.layer_block_bytes, self.stream)
        self.device.synchronize(self.stream)


class Execute(Protocol):
    """Runs a step."""

    def __call__(self, inputs: StepInputs, *, mixed: bool) -> Float32Array: ...


def check_tensors(session: TensorRtSession, manifest: Manifest) -> None:
    """Raise ExecutorError unless the engine's inputs and outputs are those that the manifest speaks of."""
    facts, name = manifest.tensorrt, session.path.name
    assert facts is not None
    expected = dict.fromkeys(INPUT_NAMES, "int32") | {"logits": "float32"}
    if manifest.draft_heads:
        expected["hidden"] = "float32"
    for layer in range(manifest.decoder.num_layers if facts.kv_binding != "bound" else 0):
        expected |= {f"past_kv_{layer}": manifest.kv_dtype, f"present_kv_{layer}": manifest.kv_dtype}
    wrong = sorted({tensor for tensor, _ in session.tensors.items() ^ expected.items()})
    if wrong:
        raise ExecutorError(
            f"{name} is not the engine that manifest.json describes ({wrong[0]} differs); build it again"
        )
    if session.num_profiles != 2 or session.largest("input_ids", MIXED) != (facts.max_tokens,):
        raise ExecutorError(f"{name} was built for other step sizes than manifest.json says; build it again")


def check_pools(execute: Execute, manifest: Manifest, library: TensorRtLibrary, pools: PoolReader) -> None:
    """Run one step of each profile in the first block, and look. Raises ExecutorError with what to do.

    execute: as Executor.execute; `mixed` asks for the profile of prompts.
    """
    run, copied = library.counters()
    tokens = _tokens(manifest)
    # A prompt of all but the last, then the last alone.
    for first, last in ((0, len(tokens) - 1), (len(tokens) - 1, len(tokens))):
        if not np.isfinite(execute(_step(tokens[first:last], first), mixed=first == 0)).all():
            raise ExecutorError(
                "the engine's first step gives numbers that are not finite; build it with dtype bfloat16"
            )
    run_after, copied_after = library.counters()
    if run_after == run:
        raise ExecutorError("TensorRT did not run the ForkAttention plugin in the engine's first step; build it again")
    if copied_after != copied:
        raise ExecutorError(f"this TensorRT copies the KV pools in every step; {_ADVICE}")
    # What a block looks like inside is the kernels' own business.
    for layer in range(len(pools.pools)):
        for part, name in enumerate(("keys", "values")):
            blocks = pools.first_blocks(layer, part)
            if not blocks[0].any():
                raise ExecutorError(f"the {name} of layer {layer} do not land in the KV pool; {_ADVICE}")
            if blocks[1:].any():
                raise ExecutorError(f"the {name} of layer {layer} land in another block; build the engine again")
    pools.clear()


def _tokens(manifest: Manifest) -> list[int]:
    """A few tokens of which not all have an empty embedding."""
    tokens = manifest.tokens
    return [tokens.eos[0], tokens.fork, tokens.child, manifest.decoder.vocab_size // 2]


def _step(tokens: list[int], first: int) -> StepInputs:
    """One row of these tokens, in the slots of the pool from `first` on; those before it hold its path."""
    count = len(tokens)
    places = np.arange(first, first + count, dtype=np.int32)
    return StepInputs(
        input_ids=np.array(tokens, np.int32),
        position_ids=places,
        query_start=np.array([0, count], np.int32),
        kv_len=np.array([first + count], np.int32),
        block_table=np.zeros((1, 1), np.int32),
        slot_mapping=places,
        slot_copies=np.zeros((0, 2), np.int32),
        prefix_rows=np.zeros(1, np.int32),
        prefix_blocks=np.zeros(0, np.int32),
        tree_mask=np.zeros((count, 0), np.int32),
        logits_rows=np.array([count - 1], np.int32),
    )
