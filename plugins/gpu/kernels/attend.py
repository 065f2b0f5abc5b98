"""The attention kernel: one program reads one item's keys once for all query rows of its tile."""

from __future__ import annotations

import triton
import triton.language as tl

from apar.plugins.gpu.kernels.dot import dot

LOG2_E = tl.constexpr(1.4426950408889634)
BAD_BLOCK = tl.constexpr(1)


@triton.jit(do_not_specialize=["num_blocks", "table_width", "mask_words", "num_heads", "num_kv_heads"])
def attend(
    q,  # [T, H, D] after RoPE
    pool,  # [2, B, K, BS, D]
    plan,  # int32, see plan.py
    block_table,  # int32 [R, MB]
    slot_mapping,  # int32 [T]
    tree_mask,  # int32 [T, W]
    out,  # [T, H, D]
    part_out,  # float32 [parts, H, D]
    part_lse,  # float32 [parts, H], base 2
    errors,  # int32 [1]; written by checked builds only
    num_blocks,
    table_width,
    mask_words,
    num_heads,
    num_kv_heads,
    scale,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    KEY_TILE: tl.constexpr,
    CHECKED: tl.constexpr,
):
    """Grid (items, K). A tile's row m is head m % g of token m // g, with g heads to a key/value head."""
    item = tl.program_id(0)
    kv_head = tl.program_id(1)
    if item >= tl.load(plan):
        return
    fields = plan + 8 + item * 8
    token_begin = tl.load(fields)
    token_count = tl.load(fields + 1)
    row = tl.load(fields + 2)
    key_begin = tl.load(fields + 3)
    key_end = tl.load(fields + 4)
    context = tl.load(fields + 5)
    first = tl.load(fields + 6)
    part = tl.load(fields + 7)

    group = num_heads // num_kv_heads
    m = tl.arange(0, TILE)
    token = token_begin + m // group
    head = kv_head * group + m % group
    live = m // group < token_count
    # Padding tokens have no slot. Their q may hold anything.
    real = live & (tl.load(slot_mapping + token, mask=live, other=-1) >= 0)
    d = tl.arange(0, HEAD_PAD)
    in_head = d < HEAD_DIM
    q_row = (token.to(tl.int64) * num_heads + head) * HEAD_DIM
    queries = tl.load(q + q_row[:, None] + d[None, :], mask=real[:, None] & in_head[None, :], other=0.0)

    head_stride = BLOCK_SIZE * HEAD_DIM
    block_stride = num_kv_heads.to(tl.int64) * head_stride
    values_at = num_blocks.to(tl.int64) * block_stride
    panel = pool + kv_head.to(tl.int64) * head_stride
    table = block_table + row.to(tl.int64) * table_width
    index = token - first
    mask_row = tree_mask + token.to(tl.int64) * mask_words

    peak = tl.full([TILE], float("-inf"), tl.float32)
    total = tl.zeros([TILE], tl.float32)
    result = tl.zeros([TILE, HEAD_PAD], tl.float32)
    for start in range(key_begin, key_end, KEY_TILE):
        key = start + tl.arange(0, KEY_TILE)
        within = key < key_end
        block = tl.load(table + key // BLOCK_SIZE, mask=within, other=0)
        if CHECKED:
            bad = within & ((block < 0) | (block >= num_blocks))
            tl.atomic_or(errors, BAD_BLOCK, mask=tl.max(bad.to(tl.int32), 0) > 0)
            within = within & (bad == 0)
            block = tl.where(within, block, 0)
        # Keys of this step: those of padding tokens were never written and may be NaN.
        step_key = key - context
        written = within & (tl.load(slot_mapping + first + step_key, mask=within & (step_key >= 0), other=0) >= 0)
        at = block.to(tl.int64) * block_stride + (key % BLOCK_SIZE) * HEAD_DIM
        keys = tl.load(panel + at[None, :] + d[:, None], mask=written[None, :] & in_head[:, None], other=0.0)
        scores = dot(queries, keys, tl.zeros([TILE, KEY_TILE], tl.float32)) * (scale * LOG2_E)
        seen = written[None, :] & (step_key[None, :] <= index[:, None])
        if mask_words > 0:
            # The 64 keys' bits of a token lie in three words; all are below 0 where a key is older than the step.
            word = (start - context) // 32 - (start < context).to(tl.int32)
            place = step_key - word * 32
            bits = tl.zeros([TILE, KEY_TILE], tl.int32)
            for i in tl.static_range(KEY_TILE // 32 + 1):
                at_word = token * 0 + word + i
                held = real & (at_word >= 0) & (at_word < mask_words)
                part_bits = tl.load(mask_row + at_word, mask=held, other=0)
                bits = tl.where((place // 32 == i)[None, :], part_bits[:, None], bits)
            bit = (bits >> (place % 32)[None, :]) & 1
            seen = written[None, :] & ((step_key < 0)[None, :] | (bit != 0))
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, 1))
        # A row that has seen nothing yet has no peak to subtract.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(peak - base)
        total = total * shrink + tl.sum(weights, 1)
        values = tl.load(
            panel + values_at + at[:, None] + d[None, :], mask=written[:, None] & in_head[None, :], other=0.0
        )
        result = result * shrink[:, None]
        result = dot(weights.to(values.dtype), values, result)
        peak = higher

    result = result / tl.where(total > 0.0, total, 1.0)[:, None]
    result = tl.where(real[:, None], result, 0.0)
    stored = live[:, None] & in_head[None, :]
    if part < 0:
        tl.store(out + q_row[:, None] + d[None, :], result.to(out.dtype.element_ty), mask=stored)
    else:
        place = (part + m // group).to(tl.int64) * num_heads + head
        tl.store(part_out + (place * HEAD_DIM)[:, None] + d[None, :], result, mask=stored)
        weight = tl.where(total > 0.0, peak + tl.log2(tl.where(total > 0.0, total, 1.0)), float("-inf"))
        tl.store(part_lse + place, weight, mask=live)


@triton.jit(do_not_specialize=["items", "num_heads"])
def merge(
    plan,
    part_out,  # float32 [parts, H, D]
    part_lse,  # float32 [parts, H]
    out,  # [T, H, D]
    items,  # rows of the plan's item table
    num_heads,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Grid (T, ceil(H / HEADS)). Weighs a token's parts by their log-sum-exp; tokens without any get zeros."""
    token = tl.program_id(0)
    fields = plan + 8 + items * 8 + token * 6
    own_splits = tl.load(fields + 2)
    if own_splits < 0:
        return
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    d = tl.arange(0, HEAD_PAD)
    live = head < num_heads
    inside = live[:, None] & (d < HEAD_DIM)[None, :]
    peak = tl.full([HEADS], float("-inf"), tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    result = tl.zeros([HEADS, HEAD_PAD], tl.float32)
    # The prefix's parts first: sums go from the first key to the last.
    for kind in tl.static_range(1, -1, -1):
        base = tl.load(fields + 3 * kind)
        stride = tl.load(fields + 3 * kind + 1)
        splits = tl.load(fields + 3 * kind + 2)
        for split in range(splits):
            place = (base + split * stride).to(tl.int64) * num_heads + head
            lse = tl.load(part_lse + place, mask=live, other=float("-inf"))
            part = tl.load(part_out + (place * HEAD_DIM)[:, None] + d[None, :], mask=inside, other=0.0)
            higher = tl.maximum(peak, lse)
            zero = tl.where(higher == float("-inf"), 0.0, higher)
            weight = tl.exp2(lse - zero)
            shrink = tl.exp2(peak - zero)
            total = total * shrink + weight
            result = result * shrink[:, None] + part * weight[:, None]
            peak = higher
    result = result / tl.where(total > 0.0, total, 1.0)[:, None]
    at = ((token.to(tl.int64) * num_heads + head) * HEAD_DIM)[:, None] + d[None, :]
    tl.store(out + at, result.to(out.dtype.element_ty), mask=inside)
