"""Drawing tokens: top-k, top-p and min-p without sorting the vocabulary.

A draw goes down the row's logits in order, largest first and ties by id, until the weights that it passed exceed the
row's random number. Cumulative sums of a front part do not depend on what follows it, so it is tried on the largest
few, and only rows whose draw cannot be settled among them are done again with more. How many are tried, and how many
rows at a time, therefore changes no result. Only values are sorted: the token is found again by its value, and among
equal values by its place.
"""

from __future__ import annotations

import numpy as np

from apar.runtime.sampling.arrays import BoolArray, Float64Array, chunk_rows
from apar.runtime.sampling.largest import largest_values
from apar.runtime.sampling.prepared_params import INVERSE_TEMPERATURE, MIN_P, TOP_K, TOP_P
from apar.runtime.step import Float32Array, Int32Array, IntArray

CANDIDATES = (64, 1024, 8192)
"""How many of the largest logits a draw is tried with, one after the other, before all are sorted."""


def draw(logits: Float32Array, peaks: Float32Array, numbers: Float64Array, uniforms: Float64Array) -> Int32Array:
    """A token [n] for each row of logits [n, V].

    peaks: [n] the rows' largest logits, all finite. numbers: [n, 4] inverse temperature, top-k (0: off), top-p, min-p.
    uniforms: [n] the rows' random numbers.
    """
    tokens = np.empty(len(logits), dtype=np.int32)
    # Only without top-k and min-p does the share of a token depend on all others.
    whole = (numbers[:, TOP_K] == 0) & (numbers[:, MIN_P] == 0)
    size = chunk_rows(logits.shape[1])
    for needs_total in (False, True):
        members = np.flatnonzero(whole == needs_total)
        for start in range(0, len(members), size):
            rows = members[start : start + size]
            part = logits if len(rows) == len(logits) else logits[rows]
            inverse = numbers[rows, INVERSE_TEMPERATURE]
            mass = totals(part, peaks[rows], inverse) if needs_total else None
            tokens[rows] = _draw_chunk(part, numbers[rows], uniforms[rows], mass)
    return tokens


def totals(logits: Float32Array, peaks: Float32Array, inverse: Float64Array) -> Float64Array:
    """Sum over each row of exp((logit - peak) * inverse): [n]."""
    with np.errstate(over="ignore"):
        shifted = logits - peaks[:, None]
        shifted *= inverse.astype(np.float32)[:, None]
    return np.exp(shifted, out=shifted).sum(axis=1).astype(np.float64)


def _draw_chunk(
    logits: Float32Array, numbers: Float64Array, uniforms: Float64Array, mass: Float64Array | None
) -> Int32Array:
    """Tokens [n] of rows [n, V]; `mass` [n] is the weight of all their tokens, where it is wanted."""
    vocab = logits.shape[1]
    tokens = np.empty(len(logits), dtype=np.int32)
    left = np.arange(len(logits))
    for count in (*(c for c in CANDIDATES if c < vocab), vocab):
        part = logits if len(left) == len(logits) else logits[left]
        values = largest_values(part, count)
        whole = None if mass is None else mass[left]
        chosen, settled = _pick(values, numbers[left], uniforms[left], whole, vocab)
        if settled.all():
            tokens[left] = _tokens_at(part, values, chosen)
            break
        if settled.any():
            tokens[left[settled]] = _tokens_at(part[settled], values[settled], chosen[settled])
            left = left[~settled]
    return tokens


def _tokens_at(logits: Float32Array, values: Float32Array, chosen: IntArray) -> IntArray:
    """[n] ids of what stands at place `chosen` [n] among a row's `values` [n, C], its largest ones."""
    vocab = logits.shape[1]
    rows = np.arange(len(values))
    value = values[rows, chosen][:, None]
    row, ids = np.divmod(np.flatnonzero(logits == value), vocab)
    if row.size == rows.size:
        return ids
    # Of equal logits the one whose place it is.
    place = chosen - np.count_nonzero(values > value, axis=1)
    found: IntArray = ids[np.searchsorted(row, rows) + place]
    return found


def _pick(
    values: Float32Array, numbers: Float64Array, uniforms: Float64Array, mass: Float64Array | None, vocab: int
) -> tuple[IntArray, BoolArray]:
    """Place [n] of each row's draw among its `values` [n, C], the C largest logits in descending order, and
    whether C was enough to tell."""
    count = values.shape[1]
    exact = values.astype(np.float64)
    weights = exact - exact[:, :1]
    weights *= numbers[:, INVERSE_TEMPERATURE, None]
    np.exp(weights, out=weights)
    sums = np.cumsum(weights, axis=1)
    # Weights descend, so tokens of weight 0 (banned, or far below) come last and all conditions keep a front part.
    positive = np.count_nonzero(weights, axis=1)
    complete = (positive < count) | (count == vocab)
    top_p = numbers[:, TOP_P]
    if mass is not None and (top_p >= 1.0).all():
        chosen = np.count_nonzero(sums <= (uniforms * mass)[:, None], axis=1)
        return np.minimum(chosen, np.minimum(positive, count) - 1), (chosen < count) | complete
    if mass is None:
        likely = np.count_nonzero(weights >= numbers[:, MIN_P, None], axis=1)
        width = np.where(complete, np.minimum(likely, positive), np.where(likely < count, likely, vocab))
        top_k = numbers[:, TOP_K].astype(np.int64)
        width = np.where(top_k > 0, np.minimum(width, top_k), width)
        settled = width <= count
        width = np.minimum(width, count)
        mass = np.take_along_axis(sums, width[:, None] - 1, axis=1)[:, 0]
    else:
        settled = np.ones(len(values), dtype=np.bool_)
        width = np.where(complete, positive, vocab)
    nucleus = np.where(top_p < 1.0, 1 + np.count_nonzero(sums < (top_p * mass)[:, None], axis=1), width)
    narrowed = nucleus < width
    # A nucleus that ends behind the candidates has no known mass.
    settled &= ~narrowed | (nucleus <= count)
    nucleus = np.minimum(np.minimum(nucleus, width), count)
    mass = np.where(narrowed, np.take_along_axis(sums, nucleus[:, None] - 1, axis=1)[:, 0], mass)
    chosen = np.count_nonzero(sums <= (uniforms * mass)[:, None], axis=1)
    settled &= (chosen < count) | complete | (width <= count)
    return np.minimum(chosen, nucleus - 1), settled
