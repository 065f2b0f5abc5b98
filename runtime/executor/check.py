"""Checks of a step against the contract, for executors whose kernels do not check for themselves."""

from __future__ import annotations

import numpy as np

from apar.export.errors import ExecutorError
from apar.runtime.step import INPUT_NAMES, Int32Array, StepInputs

_RANKS = {"block_table": 2, "slot_copies": 2, "tree_mask": 2}


def check_step(inputs: StepInputs, *, num_blocks: int, block_size: int, vocab_size: int, host_blocks: int = 0) -> None:
    """Raise ExecutorError unless every index of `inputs` is in bounds and no slot has two writers."""
    for name in INPUT_NAMES:
        array = getattr(inputs, name)
        rank = _RANKS.get(name, 1)
        if array.dtype != np.int32 or array.ndim != rank:
            raise ExecutorError(f"{name} must be int32 of rank {rank}, not {array.dtype} of rank {array.ndim}")
    tokens, rows = inputs.input_ids.size, inputs.kv_len.size
    slots = num_blocks * block_size
    starts = inputs.query_start
    count = starts[1:] - starts[:-1]
    if starts.size != rows + 1 or starts[0] != 0 or starts[-1] != tokens or int(count.min(initial=0)) < 0:
        raise ExecutorError(f"query_start does not cut {tokens} tokens into {rows} rows")
    for name in ("position_ids", "slot_mapping"):
        if getattr(inputs, name).size != tokens:
            raise ExecutorError(f"{name} has {getattr(inputs, name).size} entries for {tokens} tokens")
    if inputs.block_table.shape[0] != rows or inputs.tree_mask.shape[0] != tokens:
        raise ExecutorError("block_table or tree_mask has another length than the step")
    if inputs.slot_copies.shape[1] != 2:
        raise ExecutorError("slot_copies must have two columns")
    _bounds("input_ids", inputs.input_ids, 0, vocab_size)
    _bounds("slot_mapping", inputs.slot_mapping, -1, slots)
    _bounds("slot_copies", inputs.slot_copies, 0, slots)
    _bounds("logits_rows", inputs.logits_rows, 0, tokens)
    _bounds("position_ids", inputs.position_ids, 0, 2**31)
    if inputs.tree_mask.shape[1] and int(count.max(initial=0)) > 32 * inputs.tree_mask.shape[1]:
        raise ExecutorError(f"a row has {count.max()} tokens, tree_mask has bits for {32 * inputs.tree_mask.shape[1]}")
    real = padding_free(inputs)
    if (inputs.kv_len[real] < count[real]).any():
        raise ExecutorError("kv_len of a row is smaller than its number of tokens")
    needed = -(-inputs.kv_len // block_size)
    if real.any() and int(needed[real].max()) > inputs.block_table.shape[1]:
        raise ExecutorError("block_table is narrower than the longest row")
    used = np.arange(inputs.block_table.shape[1]) < (needed * real)[:, None]
    if int(np.where(used, inputs.block_table, 0).view(np.uint32).max(initial=0)) >= num_blocks:
        _bounds("block_table", inputs.block_table[used], 0, num_blocks)
    for name, targets in (("slot_mapping", inputs.slot_mapping), ("slot_copies", inputs.slot_copies[:, 1])):
        if targets.size > 1:
            ordered = np.sort(targets)
            if ((ordered[1:] == ordered[:-1]) & (ordered[1:] >= 0)).any():
                raise ExecutorError(f"{name} writes a slot twice")
    check_swaps(inputs, num_blocks=num_blocks, host_blocks=host_blocks)


def check_swaps(inputs: StepInputs, *, num_blocks: int, host_blocks: int = 0) -> None:
    """Raise ExecutorError unless `swap_out` and `swap_in` name blocks that there are, and none as a target twice."""
    if not (inputs.swap_out.size or inputs.swap_in.size):
        return
    for name, pairs, source, target in (
        ("swap_out", inputs.swap_out, num_blocks, host_blocks),
        ("swap_in", inputs.swap_in, host_blocks, num_blocks),
    ):
        if not pairs.size:
            continue
        if not host_blocks:
            raise ExecutorError(f"the step has {name}, and the executor offers no host blocks")
        if pairs.dtype != np.int32 or pairs.ndim != 2 or pairs.shape[1] != 2:
            raise ExecutorError(f"{name} must be int32 with two columns, not {pairs.dtype} of shape {pairs.shape}")
        _bounds(f"{name} (from)", pairs[:, 0], 0, source)
        _bounds(f"{name} (to)", pairs[:, 1], 0, target)
        if np.unique(pairs[:, 1]).size != len(pairs):
            raise ExecutorError(f"{name} writes a block twice")


def padding_free(inputs: StepInputs) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
    """[R] whether a row has any token that is written: the others are padding, their tables are not read."""
    starts = inputs.query_start
    if int(inputs.slot_mapping.min(initial=0)) >= 0:
        every: np.ndarray[tuple[int, ...], np.dtype[np.bool_]] = starts[1:] > starts[:-1]
        return every
    written = np.concatenate(([0], np.cumsum(inputs.slot_mapping >= 0)))
    return np.diff(written[starts]) > 0


def _bounds(name: str, values: Int32Array, low: int, high: int) -> None:
    if not values.size:
        return
    # As unsigned numbers what lies below the lowest is above all others: one look instead of two.
    shifted = values if low == 0 else values - np.int32(low)
    if int(shifted.view(np.uint32).max()) >= high - low:
        raise ExecutorError(f"{name} holds {values.min()}..{values.max()}, allowed is {low}..{high - 1}")
