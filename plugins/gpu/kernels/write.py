"""Kernels that write the pool: slot copies, and K and V of a step's tokens after RoPE."""

from __future__ import annotations

import triton
import triton.language as tl

BAD_SLOT = tl.constexpr(2)
BAD_COPY = tl.constexpr(4)


@triton.jit(do_not_specialize=["num_blocks", "num_heads", "num_kv_heads"])
def rope_write(
    qkv,  # [T, (H + 2 K) D] before RoPE
    q,  # [T, H, D]: rotated queries
    pool,  # [2, B, K, BS, D]
    position_ids,  # int32 [T]
    slot_mapping,  # int32 [T]
    inv_freq,  # float32 [D / 2]
    errors,
    num_blocks,
    num_heads,
    num_kv_heads,
    rope_scale,
    HEAD_DIM: tl.constexpr,
    HALF_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    CHECKED: tl.constexpr,
):
    """Grid (T, ceil((H + 2 K) / HEADS)). Element i is paired with i + D / 2; angles are float32."""
    token = tl.program_id(0)
    slot = tl.load(slot_mapping + token)
    if slot < 0:
        return
    if CHECKED:
        if slot >= num_blocks * BLOCK_SIZE:
            tl.atomic_or(errors, BAD_SLOT)
            return
    half = HEAD_DIM // 2
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    d = tl.arange(0, HALF_PAD)
    heads = num_heads + 2 * num_kv_heads
    inside = (head < heads)[:, None] & (d < half)[None, :]
    source = qkv + (token.to(tl.int64) * heads + head)[:, None] * HEAD_DIM + d[None, :]
    low = tl.load(source, mask=inside, other=0.0)
    high = tl.load(source + half, mask=inside, other=0.0)

    angle = tl.load(position_ids + token).to(tl.float32) * tl.load(inv_freq + d, mask=d < half, other=0.0)
    turned = (head < num_heads + num_kv_heads)[:, None]
    cos = tl.where(turned, (tl.cos(angle) * rope_scale)[None, :], 1.0)
    sin = tl.where(turned, (tl.sin(angle) * rope_scale)[None, :], 0.0)
    low32, high32 = low.to(tl.float32), high.to(tl.float32)
    # Values pass through unchanged, NaN and infinities of one half included.
    new_low = tl.where(turned, low32 * cos - high32 * sin, low32)
    new_high = tl.where(turned, high32 * cos + low32 * sin, high32)

    is_query = (head < num_heads)[:, None] & inside
    target = q + (token.to(tl.int64) * num_heads + head)[:, None] * HEAD_DIM + d[None, :]
    tl.store(target, new_low.to(q.dtype.element_ty), mask=is_query)
    tl.store(target + half, new_high.to(q.dtype.element_ty), mask=is_query)

    is_key = (head < num_heads + num_kv_heads) & (head >= num_heads)
    kv_head = tl.where(is_key, head - num_heads, head - num_heads - num_kv_heads)
    part = tl.where(is_key, 0, 1).to(tl.int64)
    panel = (part * num_blocks + slot // BLOCK_SIZE) * num_kv_heads + kv_head
    place = (panel * BLOCK_SIZE + slot % BLOCK_SIZE) * HEAD_DIM
    is_kv = (head >= num_heads)[:, None] & inside
    target = pool + place[:, None] + d[None, :]
    tl.store(target, new_low.to(pool.dtype.element_ty), mask=is_kv)
    tl.store(target + half, new_high.to(pool.dtype.element_ty), mask=is_kv)


@triton.jit(do_not_specialize=["layer_stride", "num_blocks", "num_kv_heads", "num_copies"])
def copy_slots(
    pool,  # [2, B, K, BS, D] of the first layer
    slot_copies,  # int32 [C, 2]
    copy_scratch,  # [layers, 2, C, K, D]
    errors,
    layer_stride,  # int64: elements between the pools of two layers
    num_blocks,
    num_kv_heads,
    num_copies,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    SCATTER: tl.constexpr,
    CHECKED: tl.constexpr,
):
    """Grid (C, 2 ceil(K / HEADS), layers). SCATTER 0: sources to scratch; then, in a second launch, SCATTER 1:
    scratch to targets. So every source is read before any target is written. A pair that holds -1 is skipped."""
    copy = tl.program_id(0)
    chunks = tl.cdiv(num_kv_heads, HEADS)
    part = tl.program_id(1) // chunks
    layer = tl.program_id(2)
    head = (tl.program_id(1) % chunks) * HEADS + tl.arange(0, HEADS)
    d = tl.arange(0, HEAD_PAD)
    inside = (head < num_kv_heads)[:, None] & (d < HEAD_DIM)[None, :]
    source = tl.load(slot_copies + 2 * copy)
    target = tl.load(slot_copies + 2 * copy + 1)
    if (source == -1) | (target == -1):
        return
    slot = target if SCATTER else source
    if CHECKED:
        if (slot < 0) | (slot >= num_blocks * BLOCK_SIZE):
            tl.atomic_or(errors, BAD_COPY)
            return
    panel = (part.to(tl.int64) * num_blocks + slot // BLOCK_SIZE) * num_kv_heads + head
    place = (panel * BLOCK_SIZE + slot % BLOCK_SIZE) * HEAD_DIM
    in_pool = pool + layer.to(tl.int64) * layer_stride + place[:, None] + d[None, :]
    kept = ((layer.to(tl.int64) * 2 + part) * num_copies + copy) * num_kv_heads + head
    in_scratch = copy_scratch + kept[:, None] * HEAD_DIM + d[None, :]
    if SCATTER:
        tl.store(in_pool, tl.load(in_scratch, mask=inside, other=0.0), mask=inside)
    else:
        tl.store(in_scratch, tl.load(in_pool, mask=inside, other=0.0), mask=inside)
