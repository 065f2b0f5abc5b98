"""The step contract: what the host hands an executor for one step (docs/step-contract.md).

T tokens, R rows, L wanted logits, G groups of siblings, MB width of the block table, C slot copies,
O blocks swapped out, I blocks swapped in, W mask words. Every array is int32 and C-contiguous.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

BoolArray = npt.NDArray[np.bool_]
Int32Array = npt.NDArray[np.int32]
IntArray = npt.NDArray[np.int64]
"""Indices on the host: NumPy takes them without conversion."""
Float32Array = npt.NDArray[np.float32]

INPUT_NAMES = (
    "input_ids",
    "position_ids",
    "query_start",
    "kv_len",
    "block_table",
    "slot_mapping",
    "slot_copies",
    "prefix_rows",
    "prefix_blocks",
    "tree_mask",
    "logits_rows",
)
"""What every executor takes, and the engine's graph: all arrays but `swap_out` and `swap_in`."""

NO_SWAPS: Int32Array = np.zeros((0, 2), dtype=np.int32)


@dataclass(slots=True)
class StepInputs:
    """Arrays of one step. Row r owns tokens `query_start[r]:query_start[r + 1]`.

    Keys of a row are ordered by index k in `0..kv_len[r]-1`, found in the pool at slot
    `block_table[r, k // block_size] * block_size + k % block_size`. A row's i-th step token has index
    `kv_len[r] - count + i`; it sees every index below `kv_len[r] - count` and, of the row's own step
    tokens, those up to itself (W = 0) or those whose bit is set in `tree_mask`.
    """

    input_ids: Int32Array
    """[T] pending tokens of all rows, packed without padding."""
    position_ids: Int32Array
    """[T] path position of each token (the angle of RoPE)."""
    query_start: Int32Array
    """[R + 1] cumulative token counts."""
    kv_len: Int32Array
    """[R] path length of the row including this step's tokens."""
    block_table: Int32Array
    """[R, MB] physical blocks of the row's path; -1 past the end."""
    slot_mapping: Int32Array
    """[T] slot that each token's K/V is written to; -1: padding, nothing is written, output unspecified."""
    slot_copies: Int32Array
    """[C, 2] (source slot, target slot), done in every layer before any token is written, as if all sources
    were read before any target is written."""
    prefix_rows: Int32Array
    """[G + 1] group g of siblings = rows `prefix_rows[g]:prefix_rows[g + 1]`."""
    prefix_blocks: Int32Array
    """[G] leading blocks that all rows of the group share."""
    tree_mask: Int32Array
    """[T, W] bit j % 32 of word j // 32: the row's j-th step token is visible to this one. W = 0: causal."""
    logits_rows: Int32Array
    """[L] indices into T of the tokens whose logits are wanted."""
    swap_out: Int32Array = field(default_factory=lambda: NO_SWAPS)
    """[O, 2] (block, host block), copied before everything else. Only for executors that offer host blocks."""
    swap_in: Int32Array = field(default_factory=lambda: NO_SWAPS)
    """[I, 2] (host block, block), copied after `swap_out` and `slot_copies`, before any token is written."""
