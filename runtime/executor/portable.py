"""Inputs of the portable graph, worked out from the step contract.

The portable graph knows no blocks: it sees one long buffer of slots, gathers those that anybody in the step
reads (`context_slots`), and attends to them under a mask (`visible`).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from apar.runtime.executor.check import padding_free
from apar.runtime.executor.tree_mask import BoolArray, visible
from apar.runtime.step import StepInputs

Int64Array = npt.NDArray[np.int64]


def portable_inputs(inputs: StepInputs, block_size: int, scratch: int) -> dict[str, npt.NDArray[np.generic]]:
    """The portable graph's step tensors, by name. `inputs` must have passed `check_step`.

    scratch: a slot outside all blocks, where padding tokens are written.
    """
    slots = inputs.slot_mapping.astype(np.int64)
    slots[slots < 0] = scratch
    copies = inputs.slot_copies.astype(np.int64)
    if copies.size:
        # The graph writes copies and tokens at once, in no order: a token's own write comes last, so it wins.
        copies = copies[~np.isin(copies[:, 1], slots)]
    context, sees = _context(inputs, block_size, scratch)
    return {
        "input_ids": inputs.input_ids,
        "position_ids": inputs.position_ids,
        "slot_mapping": slots,
        "copy_source": np.ascontiguousarray(copies[:, 0]),
        "copy_target": np.ascontiguousarray(copies[:, 1]),
        "context_slots": context,
        "visible": sees,
        "logits_rows": inputs.logits_rows,
    }


def _context(inputs: StepInputs, size: int, scratch: int) -> tuple[Int64Array, BoolArray]:
    """Slots that any row reads, int64 [S], and which token sees which of them, bool [T, S]."""
    count = np.diff(inputs.query_start)
    live = padding_free(inputs)
    kv_len = np.where(live, inputs.kv_len, 0)
    before = np.where(live, inputs.kv_len - count, 0)
    first = np.arange(inputs.block_table.shape[1]) * size  # path index at which each column's block begins
    row, column = np.nonzero(first < kv_len[:, None])
    if not row.size:
        return np.array([scratch], np.int64), np.ones((inputs.input_ids.size, 1), bool)
    blocks, place = np.unique(inputs.block_table[row, column], return_inverse=True)
    offset = np.arange(size)
    by_row = np.zeros((kv_len.size, blocks.size, size), bool)
    by_row[row, place] = offset < (before[row] - first[column])[:, None]
    sees = by_row.reshape(kv_len.size, -1)
    if inputs.input_ids.size != kv_len.size:
        sees = np.repeat(sees, count, axis=0)
    # Where each block of a row begins among the context's slots.
    begin = np.zeros(inputs.block_table.shape, np.int64)
    begin[row, column] = place * size
    own_row = np.repeat(np.arange(kv_len.size), count)
    own = np.flatnonzero(live[own_row])
    own_row = own_row[own]
    index = before[own_row] + own - inputs.query_start[own_row]
    where = np.zeros(inputs.input_ids.size, np.int64)
    where[own] = begin[own_row, index // size] + index % size
    if inputs.tree_mask.shape[1] == 0:
        sees[own, where[own]] = True
    for item in np.flatnonzero(live & ((count > 1) | (inputs.tree_mask.shape[1] > 0))):
        tokens = slice(inputs.query_start[item], inputs.query_start[item + 1])
        sees[tokens, where[tokens]] = visible(inputs.tree_mask[tokens], int(count[item]))
    used = np.zeros(blocks.size, np.int64)
    np.maximum.at(used, place, kv_len[row] - first[column])
    keep = (offset < used[:, None]).reshape(-1)
    context = (blocks[:, None].astype(np.int64) * size + offset).reshape(-1)
    if not keep.all():
        context, sees = context[keep], sees[:, keep]
    sees[inputs.slot_mapping < 0, 0] = True  # padding sees something, so that its softmax is defined
    return np.ascontiguousarray(context), np.ascontiguousarray(sees)
