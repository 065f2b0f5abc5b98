"""Which keys are read by which program: worked out once a step, on the host.

A **tile** is a run of consecutive tokens whose keys are read together: a few tokens of one row (its *own* tile), or,
where rows of a group share a prefix, tokens of all the group's rows (a *prefix* tile: it reads the shared keys once).
A tile's keys are cut into chunks; a tile and a chunk make an **item**, the work of one program for each key/value
head. A token whose keys lie in more than one item gets a partial output and a log-sum-exp from each, which the merge
kernel weighs together. Everything is int32 in one buffer, of a size that follows from shapes (`StepSizes`):

    [0:8]                          header: items, keys of a chunk, partial outputs, tiles, 0...
    [8 : 8 + 8 items]              an item: first token, tokens, row whose table is read, first key, end of keys,
                                   keys that every token of the tile sees, first token of the row, first partial
                                   output or -1 where the item is all there is and writes the output itself
    [... + 6 T]                    of each token: first part, stride, count of its own tile's parts; the same of its
                                   prefix tile's. Count -1: the output is written already

The rules:

1. A row without a token that has a slot is padding: no tile. Other rows have ceil(tokens / tile_tokens) own tiles.
2. A group's shared keys: `prefix_blocks` whole blocks, but no more than lie before every row's tokens of this step.
3. The group reads them in a pass of its own where that pays: two rows or more, at least `2 * KEY_TILE` keys, and at
   least 16 key reads saved for every query row of the group. A key and its value are 4 D bytes (16-bit); the second
   partial output of a query row costs 16 D bytes (written and read, float32, twice), that is 4 key reads, so the pass
   has to save four times what it costs.
4. Chunks are the shortest of 128, 256, 512, ... keys that add no more than `budget` items to the tiles.
5. Items of prefix tiles come first: they are the longest.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from apar.plugins.gpu.sizes import CHUNK_STEPS, ITEM_FIELDS, KEY_TILE, MIN_CHUNK, PART_FIELDS, PLAN_HEADER, StepSizes

Int32Array = npt.NDArray[np.int32]
IntArray = npt.NDArray[np.int64]

PREFIX_KEYS = 2 * KEY_TILE
PREFIX_GAIN = 16
NO_CHUNK = 2**30


def make_plan(
    sizes: StepSizes,
    *,
    query_start: Int32Array,
    kv_len: Int32Array,
    slot_mapping: Int32Array,
    prefix_rows: Int32Array,
    prefix_blocks: Int32Array,
    block_size: int,
    masked: bool,
    share: bool = True,
    out: Int32Array | None = None,
) -> Int32Array:
    """Plan one step; arrays are those of the step contract. `masked`: the step has a tree mask.

    `share` False: no prefix passes. Returns int32 [sizes.plan_size], in `out` where it is given.
    """
    plan = np.empty(sizes.plan_size, np.int32) if out is None else out
    plan.fill(0)
    starts = query_start[:-1].astype(np.int64)
    counts = np.diff(query_start).astype(np.int64)
    context = kv_len - counts
    written = np.concatenate(([0], np.cumsum(slot_mapping >= 0)))
    real = written[query_start[1:]] > written[query_start[:-1]]
    own_tiles = np.where(real, -(-counts // sizes.tile_tokens), 0)
    own_begin = np.zeros(counts.size, np.int64)

    tokens = sizes.tokens
    parts = plan[PLAN_HEADER + ITEM_FIELDS * sizes.items :].reshape(tokens, PART_FIELDS)
    passes = _prefix_passes(sizes, starts, counts, context, real, own_tiles, prefix_rows, prefix_blocks, block_size)
    shared, first_row, end_row, keys = passes if share else tuple(a[:0] for a in passes)
    prefix_begin = starts[first_row] if shared.size else shared
    prefix_tokens = (starts + counts)[end_row - 1] - prefix_begin if shared.size else shared
    prefix_tiles = -(-prefix_tokens // sizes.tile_tokens)
    if shared.size:
        members = end_row - first_row
        row = np.arange(int(members.sum())) + np.repeat(first_row - (np.cumsum(members) - members), members)
        own_begin[row] = np.repeat(keys, members)

    # All tiles, prefix tiles first: the row or group each belongs to, and its place in it.
    tile_group = np.repeat(np.arange(shared.size), prefix_tiles)
    tile_row = np.repeat(np.arange(counts.size), own_tiles)
    group_at = np.cumsum(prefix_tiles) - prefix_tiles
    row_at = np.cumsum(own_tiles) - own_tiles
    in_group = (np.arange(tile_group.size) - group_at[tile_group]) * sizes.tile_tokens
    in_row = (np.arange(tile_row.size) - row_at[tile_row]) * sizes.tile_tokens
    row = np.concatenate((first_row[tile_group], tile_row))
    begin = np.concatenate((prefix_begin[tile_group] + in_group, starts[tile_row] + in_row))
    left = np.concatenate((prefix_tokens[tile_group] - in_group, counts[tile_row] - in_row))
    count = np.minimum(left, sizes.tile_tokens)
    key_begin = np.concatenate((np.zeros(tile_group.size, np.int64), own_begin[tile_row]))
    seen_by_all = np.concatenate((keys[tile_group], context[tile_row]))
    first = np.concatenate((prefix_begin[tile_group], starts[tile_row]))
    own_end = context[tile_row] + (counts[tile_row] if masked else in_row + count[tile_group.size :])
    key_end = np.concatenate((keys[tile_group], own_end))

    length = key_end - key_begin
    chunk = _chunk(length, sizes.budget)
    splits = np.maximum(1, -(-length // chunk))
    partial = (splits > 1) | (key_begin > 0)
    partial[: tile_group.size] = True
    used = np.where(partial, splits * count, 0)
    part = np.cumsum(used) - used

    item_tile = np.repeat(np.arange(row.size), splits)
    split = np.arange(item_tile.size) - np.repeat(np.cumsum(splits) - splits, splits)
    item_begin = key_begin[item_tile] + split * chunk
    items = plan[PLAN_HEADER : PLAN_HEADER + ITEM_FIELDS * item_tile.size].reshape(-1, ITEM_FIELDS)
    items[:, 0] = begin[item_tile]
    items[:, 1] = count[item_tile]
    items[:, 2] = row[item_tile]
    items[:, 3] = item_begin
    items[:, 4] = np.minimum(item_begin + chunk, key_end[item_tile])
    items[:, 5] = seen_by_all[item_tile]
    items[:, 6] = first[item_tile]
    items[:, 7] = np.where(partial[item_tile], part[item_tile] + split * count[item_tile], -1)

    # What each token's tile left for the merge. Tokens of a tile are consecutive.
    for tiles, column in ((slice(tile_group.size, None), 0), (slice(0, tile_group.size), 3)):
        n = count[tiles]
        within = np.arange(int(n.sum())) - np.repeat(np.cumsum(n) - n, n)
        token = np.repeat(begin[tiles], n) + within
        some = np.repeat(partial[tiles], n)
        parts[token, column] = np.where(some, np.repeat(part[tiles], n) + within, 0)
        parts[token, column + 1] = np.where(some, np.repeat(n, n), 0)
        parts[token, column + 2] = np.where(some, np.repeat(splits[tiles], n), -1)
    plan[:4] = (item_tile.size, chunk, int(used.sum()), row.size)
    return plan


def _prefix_passes(
    sizes: StepSizes,
    starts: IntArray,
    counts: IntArray,
    context: IntArray,
    real: npt.NDArray[np.bool_],
    own_tiles: IntArray,
    prefix_rows: Int32Array,
    prefix_blocks: Int32Array,
    block_size: int,
) -> tuple[IntArray, IntArray, IntArray, IntArray]:
    """Groups whose prefix is read once: their indices, first rows, end rows and shared keys."""
    none = np.zeros(0, np.int64)
    if not sizes.splits or prefix_blocks.size == 0:
        return none, none, none, none
    groups = np.flatnonzero((np.diff(prefix_rows) > 1) & (prefix_blocks * block_size >= PREFIX_KEYS))
    if groups.size == 0:
        return none, none, none, none
    first, end = prefix_rows[groups].astype(np.int64), prefix_rows[groups + 1].astype(np.int64)
    bounds = np.stack((first, end), axis=1).ravel()
    # The rows between two groups fall to the odd places; an end behind the last row has nothing to reduce.
    inside = bounds[:-1] if bounds[-1] == counts.size else bounds
    full = np.where(real, context // block_size, NO_CHUNK)
    blocks = np.minimum(prefix_blocks[groups], np.minimum.reduceat(full, inside)[::2])
    rows = np.add.reduceat(real.astype(np.int64), inside)[::2]
    tiles = np.add.reduceat(own_tiles, inside)[::2]
    tokens = starts[end - 1] + counts[end - 1] - starts[first]
    keys = blocks.astype(np.int64) * block_size
    saved = (tiles - -(-tokens // sizes.tile_tokens)) * keys
    pays = (rows > 1) & (keys >= PREFIX_KEYS) & (saved >= PREFIX_GAIN * tokens * sizes.heads_per_group)
    return groups[pays], first[pays], end[pays], keys[pays]


def _chunk(length: IntArray, budget: int) -> int:
    """The shortest chunk that adds at most `budget` items."""
    if budget:
        for step in range(CHUNK_STEPS):
            chunk = MIN_CHUNK << step
            if int((-(-length // chunk)).sum()) - length.size <= budget:
                return chunk
    return NO_CHUNK
