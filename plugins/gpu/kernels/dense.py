"""The rest of a decoder layer: embedding, residual and norm in one, the gated activation, 8-bit weights."""

from __future__ import annotations

import triton
import triton.language as tl

from apar.plugins.gpu.kernels.dot import dot


@triton.jit
def embed(ids, table, residual, HIDDEN: tl.constexpr, BLOCK: tl.constexpr):
    """Grid (T, ceil(HIDDEN / BLOCK)). residual float32 [T, HIDDEN] = table[ids]."""
    token = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < HIDDEN
    row = tl.load(ids + token).to(tl.int64)
    value = tl.load(table + row * HIDDEN + column, mask=inside, other=0.0)
    tl.store(residual + token.to(tl.int64) * HIDDEN + column, value.to(tl.float32), mask=inside)


@triton.jit
def add_norm(
    update,  # [T, HIDDEN]: what the last projection gave
    residual,  # float32 [T, HIDDEN]
    weight,  # [HIDDEN]
    out,  # [rows, HIDDEN]
    rows,  # int32: with SELECT the tokens that are wanted
    eps,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
    SELECT: tl.constexpr,
):
    """Grid (rows). residual += update; out = RMSNorm(residual) * weight. With SELECT the residual stays as it is."""
    row = tl.program_id(0)
    token = tl.load(rows + row) if SELECT else row
    column = tl.arange(0, BLOCK)
    inside = column < HIDDEN
    at = token.to(tl.int64) * HIDDEN + column
    value = tl.load(residual + at, mask=inside, other=0.0)
    if ADD:
        value += tl.load(update + at, mask=inside, other=0.0).to(tl.float32)
        if not SELECT:
            tl.store(residual + at, value, mask=inside)
    scale = 1.0 / tl.sqrt(tl.sum(value * value, 0) / HIDDEN + eps)
    result = value * scale * tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row.to(tl.int64) * HIDDEN + column, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def silu_mul(gate_up, out, FFN: tl.constexpr, BLOCK: tl.constexpr):
    """Grid (T, ceil(FFN / BLOCK)). out [T, FFN] = silu(gate) * up of gate_up [T, 2 FFN]."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < FFN
    gate = tl.load(gate_up + token * 2 * FFN + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + token * 2 * FFN + FFN + column, mask=inside, other=0.0).to(tl.float32)
    result = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + token * FFN + column, result.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def linear8(
    x,  # [M, K]
    weight,  # int8 [N, K], or uint8 bits of float8 e4m3
    scale,  # float32 [N]
    bias,  # [N]
    out,  # [M, N]
    rows,  # M
    N: tl.constexpr,
    K: tl.constexpr,
    FLOAT8: tl.constexpr,
    BIAS: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
):
    """Grid (ceil(N / TILE_N), ceil(M / TILE_M)). out = x @ weight^T * scale + bias: weights stay 8-bit until they
    are in registers, products are those of x's type."""
    n = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    m = tl.program_id(1) * TILE_M + tl.arange(0, TILE_M)
    k = tl.arange(0, TILE_K)
    n_inside, m_inside = n < N, m < rows
    x_at = x + m.to(tl.int64)[:, None] * K + k[None, :]
    weight_at = weight + n.to(tl.int64)[None, :] * K + k[:, None]
    total = tl.zeros([TILE_M, TILE_N], tl.float32)
    for start in range(0, K, TILE_K):
        k_inside = start + k < K
        left = tl.load(x_at + start, mask=m_inside[:, None] & k_inside[None, :], other=0.0)
        code = tl.load(weight_at + start, mask=n_inside[None, :] & k_inside[:, None], other=0)
        if FLOAT8:
            # Sign, exponent and mantissa moved to float16's places: the number times 2**-8, subnormals included.
            bits = code.to(tl.int16)
            half = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
            right = half.to(tl.float16, bitcast=True).to(left.dtype)
        else:
            right = code.to(tl.float32).to(left.dtype)
        total = dot(left, right, total)
    result = total * tl.load(scale + n, mask=n_inside, other=0.0)[None, :]
    if BIAS:
        result += tl.load(bias + n, mask=n_inside, other=0.0).to(tl.float32)[None, :]
    target = out + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(target, result.to(out.dtype.element_ty), mask=m_inside[:, None] & n_inside[None, :])
