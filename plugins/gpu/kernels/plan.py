"""The plan of plan.py, made on the device: for callers whose host sees shapes only, such as TensorRT's enqueue."""

from __future__ import annotations

import triton
import triton.language as tl

from apar.plugins.gpu import plan as host
from apar.plugins.gpu import sizes

_MIN_CHUNK = tl.constexpr(sizes.MIN_CHUNK)
_CHUNK_STEPS = tl.constexpr(sizes.CHUNK_STEPS)
_NO_CHUNK = tl.constexpr(host.NO_CHUNK)
_PREFIX_KEYS = tl.constexpr(host.PREFIX_KEYS)
_PREFIX_GAIN = tl.constexpr(host.PREFIX_GAIN)


@triton.jit
def _find(bounds, count, values, steps):
    """The last i in 0..count-1 with bounds[i] <= value, for ascending bounds with bounds[0] <= value."""
    low = values * 0
    high = low + count
    for _ in range(steps):
        middle = (low + high) // 2
        below = (middle > low) & (tl.load(bounds + middle) <= values)
        low = tl.where(below, middle, low)
        high = tl.where(below, high, tl.maximum(middle, low + 1))
    return low


@triton.jit
def _steps(count):
    """Halvings until a range of `count` is one."""
    steps = 1
    left = count
    while left > 0:
        left = left // 2
        steps += 1
    return steps


@triton.jit(
    do_not_specialize=[
        "num_tokens",
        "num_rows",
        "num_groups",
        "items",
        "tiles",
        "budget",
        "tile_tokens",
        "heads_per_group",
        "masked",
        "splits",
    ]
)
def make_plan(
    query_start,  # int32 [R + 1]
    kv_len,  # int32 [R]
    slot_mapping,  # int32 [T]
    prefix_rows,  # int32 [G + 1]
    prefix_blocks,  # int32 [G]
    plan,  # int32 [plan_size]
    plan_scratch,  # int32 [scratch_size]
    num_tokens,
    num_rows,
    num_groups,
    items,  # items, tiles, budget and tile_tokens of StepSizes
    tiles,
    budget,
    tile_tokens,
    heads_per_group,
    masked,
    splits,
    BLOCK_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Grid (1). `masked` and `splits` are 0 or 1."""
    lane = tl.arange(0, WIDTH)
    written = plan_scratch
    row_tile = written + num_tokens + 1
    group_tile = row_tile + num_rows + 1
    group_keys = group_tile + num_groups + 1
    group_rows = group_keys + num_groups + 1
    tile_item = group_rows + num_groups + 1
    tile_part = tile_item + tiles + 1

    # Tokens with a slot before each token, so that a row's are a difference.
    before = 0
    for start in range(0, num_tokens, WIDTH):
        t = start + lane
        flag = (tl.load(slot_mapping + t, mask=t < num_tokens, other=-1) >= 0).to(tl.int32)
        tl.store(written + t, before + tl.cumsum(flag, 0) - flag, mask=t < num_tokens)
        before += tl.sum(flag, 0)
    tl.store(written + num_tokens, before)
    for start in range(0, num_groups, WIDTH):
        g = start + lane
        tl.store(group_keys + g, tl.zeros([WIDTH], tl.int32) + _NO_CHUNK, mask=g < num_groups)
        tl.store(group_rows + g, tl.zeros([WIDTH], tl.int32), mask=g < num_groups)
    tl.debug_barrier()

    # Rows: own tiles; the least context and the real rows of each group.
    group_steps = _steps(num_groups)
    at = 0
    for start in range(0, num_rows, WIDTH):
        r = start + lane
        inside = r < num_rows
        begin = tl.load(query_start + r, mask=inside, other=0)
        end = tl.load(query_start + r + 1, mask=inside, other=0)
        real = inside & (tl.load(written + end, mask=inside, other=0) > tl.load(written + begin, mask=inside, other=0))
        own = tl.where(real, (end - begin + tile_tokens - 1) // tile_tokens, 0)
        tl.store(row_tile + r, at + tl.cumsum(own, 0) - own, mask=inside)
        at += tl.sum(own, 0)
        if num_groups > 0:
            g = _find(prefix_rows, num_groups, tl.where(inside, r, 0), group_steps)
            grouped = real & (r < tl.load(prefix_rows + num_groups))
            full = (tl.load(kv_len + r, mask=real, other=0) - (end - begin)) // BLOCK_SIZE
            tl.atomic_min(group_keys + g, full, mask=grouped)
            tl.atomic_add(group_rows + g, own * 0 + 1, mask=grouped)
    tl.store(row_tile + num_rows, at)
    own_tiles = at
    tl.debug_barrier()

    # Groups: the shared keys where the pass pays, else 0, and the prefix tiles.
    at = 0
    for start in range(0, num_groups, WIDTH):
        g = start + lane
        inside = g < num_groups
        first = tl.load(prefix_rows + g, mask=inside, other=0)
        end = tl.load(prefix_rows + g + 1, mask=inside, other=0)
        rows = tl.load(group_rows + g, mask=inside, other=0)
        declared = tl.load(prefix_blocks + g, mask=inside, other=0)
        keys = tl.minimum(declared, tl.load(group_keys + g, mask=inside, other=0)) * BLOCK_SIZE
        tokens = tl.load(query_start + end, mask=inside, other=0) - tl.load(query_start + first, mask=inside, other=0)
        prefix = (tokens + tile_tokens - 1) // tile_tokens
        separate = tl.load(row_tile + end, mask=inside, other=0) - tl.load(row_tile + first, mask=inside, other=0)
        saved = (separate - prefix).to(tl.int64) * keys
        pays = (splits != 0) & inside & (rows > 1) & (keys >= _PREFIX_KEYS)
        pays = pays & (saved >= _PREFIX_GAIN * tokens.to(tl.int64) * heads_per_group)
        prefix = tl.where(pays, prefix, 0)
        tl.debug_barrier()
        tl.store(group_keys + g, tl.where(pays, keys, 0), mask=inside)
        tl.store(group_tile + g, at + tl.cumsum(prefix, 0) - prefix, mask=inside)
        at += tl.sum(prefix, 0)
    tl.store(group_tile + num_groups, at)
    prefix_tiles = at
    used_tiles = prefix_tiles + own_tiles
    tl.debug_barrier()

    # The chunk: the shortest that keeps within the budget.
    chunk = _NO_CHUNK
    if budget > 0:
        step = _CHUNK_STEPS - 1
        while step >= 0:
            tried = _MIN_CHUNK << step
            added = 0
            for start in range(0, used_tiles, WIDTH):
                tile = start + lane
                inside = tile < used_tiles
                row, group, begin, count, key_begin, key_end, context, first = _tile(
                    tile, inside, prefix_tiles, query_start, kv_len, prefix_rows, row_tile, group_tile, group_keys,
                    num_rows, num_groups, tile_tokens, masked,
                )  # fmt: skip
                added += tl.sum(tl.where(inside, (key_end - key_begin + tried - 1) // tried - 1, 0), 0)
            if added <= budget:
                chunk = tried
                step -= 1
            else:
                step = -1

    # Tiles: items and partial outputs before each.
    item_at = 0
    part_at = 0
    for start in range(0, used_tiles, WIDTH):
        tile = start + lane
        inside = tile < used_tiles
        row, group, begin, count, key_begin, key_end, context, first = _tile(
            tile, inside, prefix_tiles, query_start, kv_len, prefix_rows, row_tile, group_tile, group_keys,
            num_rows, num_groups, tile_tokens, masked,
        )  # fmt: skip
        parts = tl.where(inside, tl.maximum((key_end - key_begin + chunk - 1) // chunk, 1), 0)
        partial = (tile < prefix_tiles) | (key_begin > 0) | (parts > 1)
        used = tl.where(partial, parts * count, 0)
        tl.store(tile_item + tile, item_at + tl.cumsum(parts, 0) - parts, mask=inside)
        tl.store(tile_part + tile, part_at + tl.cumsum(used, 0) - used, mask=inside)
        item_at += tl.sum(parts, 0)
        part_at += tl.sum(used, 0)
    tl.store(tile_item + used_tiles, item_at)
    tl.debug_barrier()

    # Items.
    tile_steps = _steps(used_tiles)
    for start in range(0, item_at, WIDTH):
        item = start + lane
        inside = item < item_at
        tile = _find(tile_item, used_tiles, tl.where(inside, item, 0), tile_steps)
        row, group, begin, count, key_begin, key_end, context, first = _tile(
            tile, inside, prefix_tiles, query_start, kv_len, prefix_rows, row_tile, group_tile, group_keys,
            num_rows, num_groups, tile_tokens, masked,
        )  # fmt: skip
        split = item - tl.load(tile_item + tile, mask=inside, other=0)
        partial = (tile < prefix_tiles) | (key_begin > 0) | (key_end - key_begin > chunk)
        part = tl.load(tile_part + tile, mask=inside, other=0) + split * count
        low = key_begin + split * chunk
        fields = plan + 8 + item * 8
        tl.store(fields, begin, mask=inside)
        tl.store(fields + 1, count, mask=inside)
        tl.store(fields + 2, row, mask=inside)
        tl.store(fields + 3, low, mask=inside)
        tl.store(fields + 4, tl.minimum(low + tl.minimum(chunk, key_end - low), key_end), mask=inside)
        tl.store(fields + 5, context, mask=inside)
        tl.store(fields + 6, first, mask=inside)
        tl.store(fields + 7, tl.where(partial, part, -1), mask=inside)

    # Parts of each token.
    row_steps = _steps(num_rows)
    for start in range(0, num_tokens, WIDTH):
        t = start + lane
        inside = t < num_tokens
        row = _find(query_start, num_rows, tl.where(inside, t, 0), row_steps)
        row_begin = tl.load(query_start + row)
        row_end = tl.load(query_start + row + 1)
        own = prefix_tiles + tl.load(row_tile + row) + (t - row_begin) // tile_tokens
        planned = inside & (t < row_end) & (tl.load(row_tile + row + 1) > tl.load(row_tile + row))
        count = tl.minimum(row_end - row_begin - (t - row_begin) // tile_tokens * tile_tokens, tile_tokens)
        parts = tl.load(tile_item + own + 1, mask=planned, other=0) - tl.load(tile_item + own, mask=planned, other=0)
        fields = plan + 8 + items * 8 + t * 6
        group = row * 0
        shared = planned & (t < 0)
        if num_groups > 0:
            group = _find(prefix_rows, num_groups, row, group_steps)
            shared = inside & (t < row_end) & (row < tl.load(prefix_rows + num_groups))
            shared = shared & (tl.load(group_keys + group) > 0)
        some = planned & (shared | (parts > 1))
        base = tl.load(tile_part + own, mask=some, other=0) + (t - row_begin) % tile_tokens
        tl.store(fields, tl.where(some, base, 0), mask=inside)
        tl.store(fields + 1, tl.where(some, count, 0), mask=inside)
        tl.store(fields + 2, tl.where(planned, tl.where(some, parts, -1), 0), mask=inside)
        group_begin = tl.load(query_start + tl.load(prefix_rows + group, mask=shared, other=0), mask=shared, other=0)
        group_end = tl.load(query_start + tl.load(prefix_rows + group + 1, mask=shared, other=0), mask=shared, other=0)
        place = t - group_begin
        tile = tl.load(group_tile + group, mask=shared, other=0) + place // tile_tokens
        count = tl.minimum(group_end - group_begin - place // tile_tokens * tile_tokens, tile_tokens)
        parts = tl.load(tile_item + tile + 1, mask=shared, other=0) - tl.load(tile_item + tile, mask=shared, other=0)
        base = tl.load(tile_part + tile, mask=shared, other=0) + place % tile_tokens
        tl.store(fields + 3, tl.where(shared, base, 0), mask=inside)
        tl.store(fields + 4, tl.where(shared, count, 0), mask=inside)
        tl.store(fields + 5, tl.where(shared, parts, 0), mask=inside)
    tl.store(plan, item_at)
    tl.store(plan + 1, chunk)
    tl.store(plan + 2, part_at)
    tl.store(plan + 3, used_tiles)


@triton.jit
def _tile(
    tile,
    inside,
    prefix_tiles,
    query_start,
    kv_len,
    prefix_rows,
    row_tile,
    group_tile,
    group_keys,
    num_rows,
    num_groups,
    tile_tokens,
    masked,
):
    """Everything about tiles, as make_plan of plan.py states it: row, group, first token, tokens, first key, end of
    keys, keys that all its tokens see, first token of its row."""
    is_prefix = inside & (tile < prefix_tiles)
    is_own = inside & (tile >= prefix_tiles)
    # Rows without tiles share their bound with the next row: the last one at or below is the owner.
    row = _find(row_tile, num_rows, tl.where(is_own, tile - prefix_tiles, 0), _steps(num_rows))
    group = row * 0
    shared_keys = row * 0
    if num_groups > 0:
        group = _find(group_tile, num_groups, tl.where(is_prefix, tile, 0), _steps(num_groups))
        first_row = tl.load(prefix_rows + group, mask=is_prefix, other=0)
        end_row = tl.load(prefix_rows + group + 1, mask=is_prefix, other=0)
        # The row's own group, for where its own keys begin.
        of_row = _find(prefix_rows, num_groups, row, _steps(num_groups))
        grouped = is_own & (row < tl.load(prefix_rows + num_groups))
        shared_keys = tl.load(group_keys + tl.where(is_prefix, group, of_row), mask=is_prefix | grouped, other=0)
        end_row = tl.where(is_prefix, end_row, row + 1)
        row = tl.where(is_prefix, first_row, row)
    else:
        end_row = row + 1
    first = tl.load(query_start + row, mask=inside, other=0)
    end = tl.load(query_start + end_row, mask=inside, other=0)
    base = tl.where(is_prefix, tl.load(group_tile + group, mask=is_prefix, other=0), 0)
    base = tl.where(is_own, prefix_tiles + tl.load(row_tile + row, mask=is_own, other=0), base)
    offset = (tile - base) * tile_tokens
    count = tl.minimum(end - first - offset, tile_tokens)
    context = tl.load(kv_len + row, mask=is_own, other=0) - (end - first)
    context = tl.where(is_prefix, shared_keys, context)
    last = tl.where(masked != 0, end - first, offset + count)
    key_end = tl.where(is_prefix, shared_keys, context + last)
    key_begin = tl.where(is_prefix, 0, shared_keys)
    return row, group, first + offset, count, key_begin, key_end, context, first
