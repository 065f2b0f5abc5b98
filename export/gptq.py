"""Codes that make up for each other's rounding errors: GPTQ (arXiv 2210.17323) in NumPy.

What counts is not how far a matrix's numbers move but how far its outputs do on real inputs: the mean of
|x W^T - x Q^T|^2 = trace((W - Q) H (W - Q)^T), H = mean of x x^T over calibration tokens. Input channels are rounded
one after another, those with the largest inputs first, and each one's error is spread over the channels that are
still free, by the inverse of H. Scales are chosen beforehand, for groups in their natural order, so that the result
has the same layout as plain rounding.
"""

from __future__ import annotations

import logging

import numpy as np

from apar.export.quantize import (
    Float32Array,
    QuantizedRows,
    UInt8Array,
    choose_scales,
    group_columns,
    inverse,
    quantize_rows,
    round_to_codes,
)

logger = logging.getLogger(__name__)

DAMPING = 0.01
"""Part of the mean squared input that is added to every channel's own, against directions that no token showed."""
_DAMPING_TRIES = 4
_BLOCK = 64
"""Channels whose errors are spread over the rest in one product."""
_SEARCH_ROWS = 1 << 20
"""Numbers that the search for scales handles at a time."""
SHRINKS = tuple(1 - 0.025 * i for i in range(13))
"""Factors on a group's range that are tried: a smaller step may be worth cutting the largest numbers off."""


def gptq_rows(
    rows: Float32Array, hessian: Float32Array, bits: int, group_size: int, zero_points: bool = False
) -> QuantizedRows:
    """Quantise float32 [N, K] for inputs whose mean outer product is `hessian` [K, K].

    Where the Hessian cannot be factored however strongly it is damped (inputs that overflow), rows are rounded to
    nearest, and a warning says so.
    """
    importance = np.diagonal(hessian)
    order = np.argsort(-importance, kind="stable")
    factor = _inverse_factor(hessian, order)
    if factor is None:
        logger.warning("calibration inputs of a matrix are degenerate; it is rounded to nearest")
        return quantize_rows(rows, bits, group_size, zero_points)
    importance = importance + np.float32(DAMPING) * importance.mean()
    scales, zeros = search_scales(group_columns(rows, group_size), bits, zero_points, importance)
    codes = _compensate(rows, order, factor, scales, zeros, bits, group_size)
    return QuantizedRows(codes, scales, zeros, bits, rows.shape[1])


def output_error(rows: Float32Array, quantized: Float32Array, hessian: Float32Array) -> float:
    """|x (W - Q)^T|^2 / |x W^T|^2 over inputs x with the mean outer product `hessian`."""
    change = rows - quantized
    moved = np.vdot(change @ hessian, change)
    return float(moved / max(float(np.vdot(rows @ hessian, rows)), 1e-30))


def search_scales(
    grouped: Float32Array, bits: int, zero_points: bool, importance: Float32Array
) -> tuple[Float32Array, UInt8Array | None]:
    """Scales and zero points of [N, groups, group_size] with the least squared error weighted by `importance` [K]."""
    count, groups, size = grouped.shape
    weight = np.zeros(groups * size, np.float32)
    weight[: importance.size] = importance
    weight = weight.reshape(groups, size)
    scales = np.empty((count, groups), np.float32)
    zeros = np.empty((count, groups), np.uint8) if zero_points else None
    chunk = max(1, _SEARCH_ROWS // (groups * size))
    for start in range(0, count, chunk):
        part = slice(start, start + chunk)
        best, zero = _search(grouped[part], bits, zero_points, weight)
        scales[part] = best
        if zeros is not None and zero is not None:
            zeros[part] = zero
    return scales, zeros


def _search(
    grouped: Float32Array, bits: int, zero_points: bool, weight: Float32Array
) -> tuple[Float32Array, UInt8Array | None]:
    best, best_zeros = choose_scales(grouped, bits, zero_points)
    least = _weighted_error(grouped, best, best_zeros, bits, weight)
    for shrink in SHRINKS:
        scales, zeros = choose_scales(grouped, bits, zero_points, shrink)
        signs = (1, -1) if bits == 4 and zeros is None else (1,)  # the end of the range that has 8 levels, not 7
        for sign in signs:
            tried = scales * np.float32(sign)
            error = _weighted_error(grouped, tried, zeros, bits, weight)
            better = error < least
            least[better], best[better] = error[better], tried[better]
            if best_zeros is not None and zeros is not None:
                best_zeros[better] = zeros[better]
    return best, best_zeros


def _weighted_error(
    grouped: Float32Array, scales: Float32Array, zeros: UInt8Array | None, bits: int, weight: Float32Array
) -> Float32Array:
    codes = round_to_codes(grouped, scales, zeros, bits)
    change = codes.astype(np.float32)
    change -= np.float32(1 << bits - 1) if zeros is None else zeros.astype(np.float32)[:, :, None]
    change *= scales[:, :, None]
    change -= grouped
    error: Float32Array = np.einsum("ngs,ngs,gs->ng", change, change, weight, optimize=False)
    return error


def _compensate(
    rows: Float32Array,
    order: np.ndarray,
    factor: Float32Array,
    scales: Float32Array,
    zeros: UInt8Array | None,
    bits: int,
    group_size: int,
) -> UInt8Array:
    """Codes [N, groups, group_size]; `factor` is the upper Cholesky factor of the inverse Hessian in `order`."""
    count, columns = rows.shape
    groups = scales.shape[1]
    free = np.ascontiguousarray(rows[:, order].T)  # [K, N]: a channel's numbers lie together
    step, one_by_step = np.ascontiguousarray(scales.T), np.ascontiguousarray(inverse(scales).T)
    zero = np.full((groups, 1), 1 << bits - 1, np.float32) if zeros is None else zeros.T.astype(np.float32)
    codes = np.empty((groups * group_size, count), np.uint8)
    codes[columns:] = zero.astype(np.uint8)[-1]
    highest = np.float32((1 << bits) - 1)
    for start in range(0, columns, _BLOCK):
        stop = min(start + _BLOCK, columns)
        block, errors = free[start:stop], np.empty((stop - start, count), np.float32)
        for j, channel in enumerate(order[start:stop]):
            group = channel // group_size
            code = block[j] * one_by_step[group]
            np.rint(code, out=code)
            code += zero[group]
            np.clip(code, 0, highest, out=code)
            codes[channel] = code
            code -= zero[group]
            code *= step[group]
            errors[j] = (block[j] - code) / factor[start + j, start + j]
            block[j + 1 :] -= factor[start + j, start + j + 1 : stop, None] * errors[j]
        if stop < columns:
            free[stop:] -= factor[start:stop, stop:].T @ errors
    return np.ascontiguousarray(codes.T).reshape(count, groups, group_size)


def _inverse_factor(hessian: Float32Array, order: np.ndarray) -> Float32Array | None:
    """Upper triangular U with U^T U = (hessian + damping)^-1 in `order`; None where there is none."""
    mean = float(np.diagonal(hessian).mean(dtype=np.float64))
    if not np.isfinite(mean) or mean <= 0:
        return None
    # H = V V^T with V upper triangular (Cholesky from the last channel backwards) gives U = V^-1.
    backwards = order[::-1]
    damping = DAMPING * mean
    for _ in range(_DAMPING_TRIES):
        turned = hessian[np.ix_(backwards, backwards)]
        turned[np.diag_indices_from(turned)] += np.float32(damping)
        try:
            lower = np.linalg.cholesky(turned)
        except np.linalg.LinAlgError:
            damping *= 10
            continue
        _invert_lower(lower)
        if np.isfinite(lower).all():
            return np.ascontiguousarray(lower[::-1, ::-1])
        damping *= 10
    return None


def _invert_lower(matrix: Float32Array) -> None:
    """Invert a lower triangular matrix in place."""
    size = len(matrix)
    if size <= _BLOCK:
        matrix[:] = np.tril(np.linalg.inv(matrix))
        return
    half = size // 2
    first, second, corner = matrix[:half, :half], matrix[half:, half:], matrix[half:, :half]
    _invert_lower(first)
    _invert_lower(second)
    corner[:] = -(second @ corner) @ first
