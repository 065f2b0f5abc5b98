"""How long a step would take on a device that is not here: a roofline over bytes and operations.

    seconds = max(bytes moved / memory bandwidth, operations / compute rate, bytes swapped out / host bandwidth)
            + bytes swapped in / host bandwidth + overhead

This is a model, not a measurement: kernels never overlap that perfectly, and small ones never reach either roof.
It is good for comparing schedules, which move the same bytes in different steps.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from apar.export.errors import RequestError
from apar.runtime.step import StepInputs
from apar.runtime.step_cost import Float64Array, StepCost


@dataclass(frozen=True, slots=True)
class StepWork:
    """What one step asks of the device."""

    rows: int
    tokens: int
    """Tokens computed."""
    kv_read: int
    """Tokens whose K/V the rows read, each row its whole path."""
    kv_shared: int
    """Of `kv_read`, what a group of siblings need not read again: its shared blocks count once."""
    copied: int
    """Slots copied: tails of parents' blocks."""
    pairs: int
    """(token, visible token) pairs of attention: the tokens attended."""
    swapped_out: int = 0
    """Tokens whose K/V is copied to host memory."""
    swapped_in: int = 0
    """Tokens whose K/V is copied back."""

    @classmethod
    def of(cls, inputs: StepInputs, block_size: int) -> StepWork:
        """The work of a step without drafts."""
        rows, tokens = inputs.kv_len.size, inputs.input_ids.size
        kv_read = pairs = int(inputs.kv_len.sum(dtype=np.int64))
        if tokens != rows:
            begin, end = inputs.query_start[:-1].astype(np.int64), inputs.query_start[1:]
            count = end - begin
            pairs = int((count * inputs.kv_len - count * (count - 1) // 2).sum())
        shared = inputs.prefix_blocks.nonzero()[0]
        again = inputs.prefix_rows[shared + 1] - inputs.prefix_rows[shared] - 1
        kv_shared = block_size * int(inputs.prefix_blocks[shared] @ again)
        swapped = block_size * len(inputs.swap_out), block_size * len(inputs.swap_in)
        return cls(rows, tokens, kv_read, kv_shared, len(inputs.slot_copies), pairs, *swapped)

    @classmethod
    def one_row(cls, tokens: int, kv_len: int) -> StepWork:
        """A step of one row that computes the last `tokens` of a path of `kv_len`."""
        return cls(1, tokens, kv_len, 0, 0, tokens * kv_len - tokens * (tokens - 1) // 2)


@dataclass(frozen=True, slots=True)
class CostModel:
    """A model on a device, by what a step moves and computes. Defaults: Llama 7B in bfloat16 on one NVIDIA H200."""

    name: str = "7b-h200"
    weight_bytes: float = 13.2e9
    """Bytes of weights that every step reads."""
    kv_bytes_per_token: float = 524288.0
    """Bytes of K and V of one token over all layers: 2 * 32 layers * 4096 * 2 bytes."""
    memory_bytes_per_second: float = 4.3e12
    """What a copy reaches of the 4.8 TB/s on paper."""
    flops_per_token: float = 14e9
    """Operations of the weight matrices for one token: two a weight."""
    flops_per_pair: float = 524288.0
    """Operations of attention for one (token, visible token) pair: 4 * 4096 * 32 layers."""
    flops_per_second: float = 790e12
    """Dense bfloat16, about 80 % of what is on paper."""
    host_bytes_per_second: float = 50e9
    """Between the device and pinned host memory: what copies reach of the 64 GB/s of PCIe 5 with 16 lanes. Blocks go
    out while the step computes; it begins when those that come in are there."""
    overhead_seconds: float = 0.0003
    """Added to every step: host work and launches that nothing hides."""
    kv_pool_tokens: int = 215_000
    """Tokens whose K/V fit beside the weights: the default size of the KV pool."""
    shared_prefix_reads: bool = True
    """Attention reads blocks that a request's branches share once for all of them; false: once for each."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name in MAY_BE_ZERO else 1
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            wanted, fits = {
                "str": ("a string", isinstance(value, str)),
                "bool": ("true or false", isinstance(value, bool)),
                "int": (f"a whole number of at least {least}", number and isinstance(value, int) and value >= least),
                "float": (f"a number of at least {least}", number and value >= least),
            }[str(field.type)]
            if not fits:
                raise RequestError(f"cost model: {field.name} is {value!r}, it must be {wanted}")
        if not any(getattr(self, name) for name in MAY_BE_ZERO):
            raise RequestError(f"cost model: steps take no time; one of {', '.join(MAY_BE_ZERO)} must be above 0")

    def moved_bytes(self, work: StepWork) -> float:
        """Bytes through the memory: weights, K/V read and written, slots copied (read and written)."""
        read = work.kv_read - (work.kv_shared if self.shared_prefix_reads else 0)
        return self.weight_bytes + self.kv_bytes_per_token * (read + work.tokens + 2 * work.copied)

    def operations(self, work: StepWork) -> float:
        """Floating-point operations of a step."""
        return self.flops_per_token * work.tokens + self.flops_per_pair * work.pairs

    def seconds(self, work: StepWork) -> float:
        """Duration of a step."""
        moving = self.moved_bytes(work) / self.memory_bytes_per_second
        out, back = (
            self.kv_bytes_per_token * n / self.host_bytes_per_second for n in (work.swapped_out, work.swapped_in)
        )
        return max(moving, self.operations(work) / self.flops_per_second, out) + back + self.overhead_seconds

    def predict(self, tokens: npt.ArrayLike, kv: npt.ArrayLike) -> Float64Array:
        """Duration of steps that compute `tokens` tokens, one a row, and read the K/V of `kv` tokens, elementwise."""
        tokens, kv = np.asarray(tokens, float), np.asarray(kv, float)
        moving = (self.weight_bytes + self.kv_bytes_per_token * (kv + tokens)) / self.memory_bytes_per_second
        computing = (self.flops_per_token * tokens + self.flops_per_pair * kv) / self.flops_per_second
        seconds: Float64Array = np.maximum(moving, computing) + self.overhead_seconds
        return seconds

    def unloaded_seconds(self, prompt: int, answer: int, max_step_tokens: int) -> float:
        """Latency of a request that is alone and does not fork: prompt in chunks, then a token a step.

        `answer` counts text tokens; the end-of-sequence token comes on top.
        """
        total = 0.0
        for end in (*range(max_step_tokens, prompt, max_step_tokens), prompt):
            total += self.seconds(StepWork.one_row((end - 1) % max_step_tokens + 1, end))
        return total + sum(self.seconds(StepWork.one_row(1, prompt + i)) for i in range(1, answer + 1))


class ModelStepCost(StepCost):
    """Predictions of a cost model, for decisions that are to be the same on every machine."""

    def __init__(self, model: CostModel) -> None:
        self.model = model

    def seconds(self, tokens: npt.ArrayLike, kv: npt.ArrayLike) -> Float64Array:
        """See StepCost.seconds."""
        return self.model.predict(tokens, kv)


MAY_BE_ZERO = ("overhead_seconds", "flops_per_pair", "kv_bytes_per_token", "weight_bytes", "flops_per_token")

COST_MODELS = {model.name: model for model in (CostModel(),)}
"""The models that go by a name."""


def load_cost_model(source: str) -> CostModel:
    """A named model, or one from a JSON file: an object with any fields of `CostModel`; those left out are 7b-h200's.

    Raises RequestError if there is no such model or the file is not of that form.
    """
    if source in COST_MODELS:
        return COST_MODELS[source]
    path = Path(source)
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        known = ", ".join(COST_MODELS)
        raise RequestError(f"there is no cost model {source!r}: give one of {known}, or a JSON file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise RequestError(f"the cost model cannot be read from {source}: {error}") from error
    fields = [field.name for field in dataclasses.fields(CostModel)]
    if not isinstance(content, dict):
        raise RequestError(f"{source}: a cost model is a JSON object with some of {', '.join(fields)}")
    unknown = [key for key in content if key not in fields]
    if unknown:
        raise RequestError(f"{source}: a cost model has no {', '.join(unknown)}; its fields are {', '.join(fields)}")
    try:
        return CostModel(**{"name": path.stem, **content})
    except RequestError as error:
        raise RequestError(f"{source}: {error}") from error
