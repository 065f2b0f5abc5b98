"""A step in the shape that a TensorRT engine takes it: nothing empty, and padded to few shapes where that pays.

Pure arithmetic on arrays. Decoding steps, with drafts or without, are padded to buckets, so that their CUDA graphs are
found again: padding tokens (slot -1) belong to one padding row, further padding rows and groups are empty, copies
repeat the last one, and block tables have the width of the longest path.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from apar.export.errors import ExecutorError
from apar.export.manifest import TensorRtEngine
from apar.export.tensorrt_profiles import DECODE, MIXED, NO_COPIES, mask_words, most_tokens
from apar.runtime.step import INPUT_NAMES, Int32Array, StepInputs

ALIGNMENT = 256
"""Bytes; each tensor begins at a multiple of it, as TensorRT and the kernels ask."""
_FINE, _COARSE = 8, 32


@dataclass(frozen=True, slots=True)
class StepShape:
    """Sizes of every dimension, by which a captured CUDA graph is found."""

    profile: int
    tokens: int
    rows: int
    width: int
    copies: int
    groups: int
    logits: int
    mask_rows: int = 1
    words: int = 1

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each input."""
        return {
            "input_ids": (self.tokens,),
            "position_ids": (self.tokens,),
            "query_start": (self.rows + 1,),
            "kv_len": (self.rows,),
            "block_table": (self.rows, self.width),
            "slot_mapping": (self.tokens,),
            "slot_copies": (NO_COPIES + self.copies, 2),
            "prefix_rows": (self.groups + 1,),
            "prefix_blocks": (self.groups,),
            "tree_mask": (self.mask_rows, self.words),
            "logits_rows": (self.logits,),
        }


def choose_shape(inputs: StepInputs, engine: TensorRtEngine, *, mixed: bool = False) -> StepShape:
    """The shape that `inputs` is padded to; `mixed` asks for the profile of prompts, however small the step.

    Raises ExecutorError where the engine was built for smaller steps.
    """
    tokens, rows = inputs.input_ids.size, inputs.kv_len.size
    copies, wanted = inputs.slot_copies.shape[0], inputs.logits_rows.size
    masked = inputs.tree_mask.shape[1] > 0 and tokens > 0
    for name, size, most in (
        ("rows", rows, engine.max_rows),
        ("tokens", tokens, engine.max_tokens),
        ("slot copies", copies, engine.max_copies),
        ("wanted logits", wanted, engine.max_tokens),
        ("mask words", inputs.tree_mask.shape[1], mask_words(engine)),
    ):
        if size > most:
            raise ExecutorError(f"the step has {size} {name}, the engine was built for {most}")
    if (inputs.block_table[:, engine.table_width :] >= 0).any():
        raise ExecutorError(f"a path has more than {engine.table_width} blocks, the most that the engine was built for")
    groups, words = inputs.prefix_blocks.size, inputs.tree_mask.shape[1] if masked else 1
    if mixed or tokens > most_tokens(engine, DECODE):
        return StepShape(
            profile=MIXED,
            tokens=tokens,
            rows=rows,
            width=max(1, min(inputs.block_table.shape[1], engine.table_width)),
            copies=copies,
            groups=max(groups, 1),
            logits=max(wanted, 1),
            mask_rows=tokens if masked else 1,
            words=words,
        )
    bucket = min(_bucket(tokens), most_tokens(engine, DECODE))
    padding_row = bucket > tokens
    padded_rows = min(_bucket(rows + padding_row), engine.max_rows + 1)
    return StepShape(
        profile=DECODE,
        tokens=bucket,
        rows=padded_rows,
        width=engine.table_width,
        copies=min(_power(copies), engine.max_copies) if copies else 0,
        groups=min(_bucket(max(groups, 1)), padded_rows),
        logits=max(wanted, min(_bucket(max(wanted, 1)), bucket)),
        mask_rows=bucket if masked else 1,
        words=min(_power(words), mask_words(engine)),
    )


class Staging:
    """Index tensors of a step side by side in one piece of host memory, to be copied to the device at once."""

    def __init__(self, memory: npt.NDArray[np.uint8]) -> None:
        self._memory = memory

    @staticmethod
    def offsets(shape: StepShape) -> tuple[dict[str, int], int]:
        """Where each tensor of a step of this shape begins, in bytes, and the bytes used in all."""
        offsets: dict[str, int] = {}
        end = 0
        for name, size in shape.shapes().items():
            offsets[name] = end
            end += -(-4 * math.prod(size) // ALIGNMENT) * ALIGNMENT
        return offsets, end

    def fill(self, inputs: StepInputs, shape: StepShape) -> tuple[dict[str, int], int]:
        """Write the padded step; returns `offsets(shape)`."""
        offsets, end = self.offsets(shape)
        views: dict[str, Int32Array] = {}
        for name, size in shape.shapes().items():
            begin = offsets[name]
            views[name] = self._memory[begin : begin + 4 * math.prod(size)].view(np.int32).reshape(size)
        _fill(views, inputs, shape)
        return offsets, end


def _fill(views: dict[str, Int32Array], inputs: StepInputs, shape: StepShape) -> None:
    tokens, rows, groups = inputs.input_ids.size, inputs.kv_len.size, inputs.prefix_blocks.size
    for name, padding in (("input_ids", 0), ("position_ids", 0), ("slot_mapping", -1)):
        views[name][:tokens] = getattr(inputs, name)
        views[name][tokens:] = padding
    views["query_start"][: rows + 1] = inputs.query_start
    views["query_start"][rows + 1 :] = shape.tokens  # all padding tokens are the first padding row's
    views["kv_len"][:rows] = inputs.kv_len
    views["kv_len"][rows:] = 0
    width = min(shape.width, inputs.block_table.shape[1])
    views["block_table"].fill(-1)
    views["block_table"][:rows, :width] = inputs.block_table[:, :width]
    copies = inputs.slot_copies.shape[0]
    views["slot_copies"][:NO_COPIES] = 0
    views["slot_copies"][NO_COPIES : NO_COPIES + copies] = inputs.slot_copies
    if copies:
        views["slot_copies"][NO_COPIES + copies :] = inputs.slot_copies[-1]
    views["prefix_rows"][0] = 0
    views["prefix_rows"][: inputs.prefix_rows.size] = inputs.prefix_rows
    views["prefix_rows"][groups + 1 :] = views["prefix_rows"][groups]
    views["prefix_blocks"][:groups] = inputs.prefix_blocks
    views["prefix_blocks"][groups:] = 0
    if inputs.tree_mask.shape[1] and tokens:
        views["tree_mask"].fill(0)
        views["tree_mask"][:tokens, : inputs.tree_mask.shape[1]] = inputs.tree_mask
    else:
        views["tree_mask"].fill(1)  # one token sees itself
    wanted = inputs.logits_rows.size
    views["logits_rows"][:wanted] = inputs.logits_rows
    views["logits_rows"][wanted:] = 0


def staging_bytes(engine: TensorRtEngine) -> int:
    """Memory that the largest step needs."""
    rows, tokens = engine.max_rows + 1, engine.max_tokens
    elements = 4 * tokens + rows * engine.table_width + 5 * (rows + 2) + tokens * mask_words(engine)
    elements += 2 * (engine.max_copies + NO_COPIES)
    return 4 * elements + ALIGNMENT * len(INPUT_NAMES)


def _bucket(count: int) -> int:
    """1, 2, 4, 8, then multiples of 8 up to 64, then of 32."""
    if count <= _FINE:
        return _power(count)
    step = _FINE if count <= 64 else _COARSE
    return -(-count // step) * step


def _power(count: int) -> int:
    """The next power of two."""
    return 1 << max(count - 1, 0).bit_length()
