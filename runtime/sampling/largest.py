"""The largest logits of rows, in order, without sorting the vocabulary."""

from __future__ import annotations

import numpy as np

from apar.runtime.sampling.arrays import UInt64Array
from apar.runtime.step import Float32Array, IntArray

_ID_BITS = np.uint64(32)
_ID_MASK = np.uint64(0xFFFFFFFF)
_LEAST_SPREAD = 4
"""Logits in a group from which on looking for a bound is faster than partitioning all of them."""


def largest(logits: Float32Array, count: int) -> IntArray:
    """Ids [n, count] of each row's `count` largest logits [n, V], largest first, ties by id. Without NaN."""
    rows, vocab = logits.shape
    found = _survivors(logits, count)
    if found is None:
        keys = _sort_keys(logits, np.arange(vocab, dtype=np.uint64))
        if count < vocab:
            keys = np.partition(keys, count - 1, axis=1)[:, :count]
    else:
        row, ids, column = found
        keys = np.full((rows, int(column.max()) + 1), np.iinfo(np.uint64).max, dtype=np.uint64)
        keys[row, column] = _sort_keys(logits[row, ids], ids.astype(np.uint64))
    keys.sort(axis=1)
    return (keys[:, :count] & _ID_MASK).astype(np.int64)


def largest_values(logits: Float32Array, count: int) -> Float32Array:
    """[n, count] each row's `count` largest logits [n, V], largest first. Without NaN."""
    rows, vocab = logits.shape
    if count == vocab:
        return np.sort(logits, axis=1)[:, ::-1]
    found = _survivors(logits, count)
    if found is None:
        values = np.partition(logits, vocab - count, axis=1)[:, vocab - count :]
    else:
        row, ids, column = found
        values = np.full((rows, int(column.max()) + 1), -np.inf, dtype=np.float32)
        values[row, column] = logits[row, ids]
    values.sort(axis=1)
    return values[:, : -count - 1 : -1]


def _survivors(logits: Float32Array, count: int) -> tuple[IntArray, IntArray, IntArray] | None:
    """A few logits of each row, `count` at least, that hold its `count` largest: rows, ids, and places [m] among those
    of the same row, in order of (row, id); None where looking for them does not pay.

    The count-th largest of the maxima of disjoint groups is no larger than the count-th largest logit, and close to
    it: a cheap bound that leaves little to sort.
    """
    rows, vocab = logits.shape
    spread = vocab // (4 * count)
    if spread < _LEAST_SPREAD:
        return None
    groups = vocab // spread
    maxima = logits[:, : groups * spread].reshape(rows, spread, groups).max(axis=1)
    bound = np.partition(maxima, groups - count, axis=1)[:, groups - count]
    row, ids = np.divmod(np.flatnonzero(logits >= bound[:, None]), vocab)
    counts = np.bincount(row, minlength=rows)
    column = np.arange(row.size) - np.repeat(np.cumsum(counts) - counts, counts)
    return row, ids, column


def _sort_keys(logits: Float32Array, ids: UInt64Array) -> UInt64Array:
    """Integers that sort as (logit descending, id ascending): the float's bits, mapped so that larger floats give
    smaller integers, above the id. Adding zero turns -0.0 into 0.0, with which it must tie."""
    encoded = (logits + np.float32(0)).view(np.int32)
    descending = np.where(encoded < 0, encoded, ~(encoded | np.int32(-(2**31)))).view(np.uint32)
    return (descending.astype(np.uint64) << _ID_BITS) | ids
