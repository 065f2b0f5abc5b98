"""Reading `tree_mask`: which of a row's own step tokens each of them sees."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from apar.export.errors import ExecutorError
from apar.runtime.step import Int32Array

BoolArray = npt.NDArray[np.bool_]
IndexArray = npt.NDArray[np.int64]


def visible(mask: Int32Array, count: int) -> BoolArray:
    """bool [n, count] of words [n, W]: bit j of row i says that token i sees the row's j-th step token.

    W = 0 is the causal triangle (n = count then).
    """
    if mask.shape[1] == 0:
        return np.tri(count, dtype=bool)
    words = np.ascontiguousarray(mask, "<i4").view(np.uint8)
    return np.unpackbits(words, axis=1, bitorder="little", count=count).astype(bool)


def parents(
    mask: Int32Array, query_start: Int32Array, row: IndexArray, offset: IndexArray, real: IndexArray
) -> IndexArray:
    """[T] token that each token of a step directly follows; -1: the row's earlier path.

    `row` and `offset` [T] say where each token stands, `real` which tokens are no padding. W must not be 0.
    Raises ExecutorError where a real token's mask is not "my ancestors and I".
    """
    width = 32 * mask.shape[1]
    bits = visible(mask, width) & (np.arange(width) < np.diff(query_start)[row][:, None])
    tokens = np.arange(row.size)
    own = bits[tokens, offset]
    rest = bits.copy()
    rest[tokens, offset] = False
    last = np.where(rest.any(axis=1), width - 1 - rest[:, ::-1].argmax(axis=1), -1)
    parent = np.where(last >= 0, query_start[:-1][row] + last, -1)
    inherited = bits[np.maximum(parent, 0)] & (last >= 0)[:, None]
    wrong = ~own | (last >= offset) | (rest != inherited).any(axis=1)
    if wrong[real].any():
        at = int(real[wrong[real].argmax()])
        raise ExecutorError(f"row {row[at]}: tree_mask of its token {offset[at]} is not its ancestors and itself")
    return parent
