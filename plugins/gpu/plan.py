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
IntArray = npt.NDArray[np.integer]

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
    starts, ends = query_start[:-1], query_start[1:]
    counts = ends - starts
    context = kv_len - counts
    # Many small arrays: what counts here is how many calls are made, so the commonest steps leave some out.
    if slot_mapping.size == 0 or int(slot_mapping.min()) >= 0:
        real = counts > 0
    else:
        written = np.zeros(slot_mapping.size + 1, np.int64)
        np.cumsum(slot_mapping >= 0, out=written[1:])
        real = written[ends] > written[starts]
    # Own tiles: row, first token, tokens, first token of the row.
    in_row: IntArray | int = 0
    if int(counts.max(initial=0)) <= sizes.tile_tokens:
        own_tiles: IntArray | npt.NDArray[np.bool_] = real
        tile_row: IntArray = real.nonzero()[0]
        everyone = tile_row.size == counts.size
        begin = first = starts if everyone else starts[tile_row]
        number = count = counts if everyone else counts[tile_row]
        seen = context if everyone else context[tile_row]
    else:
        several: IntArray = np.where(real, -(-counts // sizes.tile_tokens), 0)
        own_tiles = several
        tile_row, place = _runs(several)
        in_row = place * sizes.tile_tokens
        first, number, seen = starts[tile_row], counts[tile_row], context[tile_row]
        begin = first + in_row
        count = np.minimum(number - in_row, sizes.tile_tokens)

    passes = None
    if share and sizes.splits:
        all_real = tile_row.size == counts.size and own_tiles is real
        passes = _prefix_passes(
            sizes, query_start, context, None if all_real else (real, own_tiles), prefix_rows, prefix_blocks, block_size
        )
    prefixes = 0
    if passes is not None:
        first_row, end_row, keys = passes
        prefix_begin = prefix_first = starts[first_row]
        prefix_count = query_start[end_row] - prefix_begin
        prefix_row, prefix_keys = first_row, keys
        if int(prefix_count.max()) > sizes.tile_tokens:
            tiles = -(-prefix_count // sizes.tile_tokens)
            group, place = _runs(tiles)
            offset = place * sizes.tile_tokens
            prefix_first = prefix_begin[group]
            prefix_begin = prefix_first + offset
            prefix_count = np.minimum(prefix_count[group] - offset, sizes.tile_tokens)
            prefix_row, prefix_keys = first_row[group], keys[group]
        prefixes = prefix_row.size
    # A tile is an item until its keys are cut.
    table = plan[PLAN_HEADER : PLAN_HEADER + ITEM_FIELDS * (prefixes + tile_row.size)].reshape(-1, ITEM_FIELDS)
    own = table[prefixes:]
    own[:, 0], own[:, 1], own[:, 2] = begin, count, tile_row
    own[:, 4], own[:, 5], own[:, 6] = seen + (number if masked else in_row + count), seen, first
    if passes is not None:
        shared = np.zeros(counts.size + 1, np.int64)
        # Groups do not overlap: each adds its keys where it begins and takes them back where it ends.
        shared[first_row] = keys
        shared[end_row] -= keys
        own[:, 3] = np.add.accumulate(shared)[tile_row]
        front = table[:prefixes]
        front[:, 0], front[:, 1], front[:, 2] = prefix_begin, prefix_count, prefix_row
        front[:, 4], front[:, 5], front[:, 6] = prefix_keys, prefix_keys, prefix_first
    _cut(plan, sizes, table, prefixes)
    return plan


def _cut(plan: Int32Array, sizes: StepSizes, tiles: Int32Array, prefixes: int) -> None:
    """Cut the keys of `tiles`, the front of the item table, into items; the first `prefixes` are prefix passes."""
    begin, count, key_begin = tiles[:, 0], tiles[:, 1], tiles[:, 3]
    chunk, splits, total = _chunk(tiles[:, 4] - key_begin, sizes.budget)
    partial = key_begin > 0
    if total > splits.size:
        partial |= splits > 1
    partial[:prefixes] = True
    left = count * partial
    used = splits * left
    part_end = np.add.accumulate(used, dtype=np.int32)
    part = part_end - used
    part *= partial
    tiles[:, 7] = part - ~partial
    some = part, left, splits * partial - ~partial

    # What each token's tile left for the merge. Tokens of a tile are consecutive.
    parts = plan[PLAN_HEADER + ITEM_FIELDS * sizes.items :].reshape(sizes.tokens, PART_FIELDS)
    for start, end, at in ((prefixes, splits.size, 0), (0, prefixes, 3)):
        if start == end:
            continue
        n, token = count[start:end], begin[start:end]
        if int(n.max()) == 1:
            # Without a gap between the tokens, as in most steps, a slice of them will do.
            first, last = int(token[0]), int(token[-1])
            here: slice | IntArray = slice(first, last + 1) if last - first + 1 == n.size else token
            for i in range(3):
                parts[here, at + i] = some[i][start:end]
            continue
        tile, within = _runs(n)
        here = token[tile] + within
        tile += start
        for i in range(3):
            parts[here, at + i] = some[i][tile]
        parts[here, at] += within * partial[tile]

    plan[:4] = total, chunk, part_end[-1] if part_end.size else 0, splits.size
    if total > splits.size:
        tile, split = _runs(splits)
        items = tiles[tile]
        items[:, 3] += split * np.int32(chunk)
        items[:, 4] = np.minimum(items[:, 3] + np.int32(chunk), items[:, 4])
        items[:, 7] += np.where(partial[tile], split * items[:, 1], 0)
        plan[PLAN_HEADER : PLAN_HEADER + items.size] = items.ravel()


def _prefix_passes(
    sizes: StepSizes,
    query_start: Int32Array,
    context: Int32Array,
    padded: tuple[npt.NDArray[np.bool_], IntArray | npt.NDArray[np.bool_]] | None,
    prefix_rows: Int32Array,
    prefix_blocks: Int32Array,
    block_size: int,
) -> tuple[IntArray, IntArray, IntArray] | None:
    """First rows, end rows and shared keys of the groups whose prefix is read once; None where there is none.

    `padded`: which rows are real, and how many tiles each has; None: all are, and have one.
    """
    several = prefix_rows[1:] - prefix_rows[:-1] > 1
    groups = (several & (prefix_blocks >= -(-PREFIX_KEYS // block_size))).nonzero()[0]
    if groups.size == 0:
        return None
    first, end = prefix_rows[groups], prefix_rows[groups + 1]
    bounds = np.empty(2 * groups.size, np.int64)
    bounds[::2], bounds[1::2] = first, end
    # The rows between two groups fall to the odd places; an end behind the last row has nothing to reduce.
    inside = bounds[:-1] if bounds[-1] == context.size else bounds
    if padded is None:
        least, rows = context, end - first
        tiles = rows
    else:
        least = np.where(padded[0], context, NO_CHUNK)
        rows, tiles = (np.add.reduceat(each, inside, dtype=np.int64)[::2] for each in padded)
    blocks = np.minimum.reduceat(least, inside)[::2] // block_size
    tokens = query_start[end] - query_start[first]
    keys = np.minimum(prefix_blocks[groups], blocks).astype(np.int64) * block_size
    saved = (tiles - -(-tokens // sizes.tile_tokens)) * keys
    pays = (rows > 1) & (keys >= PREFIX_KEYS) & (saved >= (PREFIX_GAIN * sizes.heads_per_group) * tokens)
    number = np.count_nonzero(pays)
    if number == pays.size:
        return first, end, keys
    return (first[pays], end[pays], keys[pays]) if number else None


def _chunk(length: Int32Array, budget: int) -> tuple[int, Int32Array, int]:
    """The shortest chunk that adds at most `budget` items; the chunks of each tile, and of all."""
    if budget:
        splits = (length + (MIN_CHUNK - 1)) // MIN_CHUNK
        for step in range(CHUNK_STEPS):
            total = int(splits.sum())
            if total - length.size <= budget:
                return MIN_CHUNK << step, splits, total
            # Chunks twice as long: half as many, rounded up.
            splits = (splits + 1) >> 1
    splits = -(-length // NO_CHUNK)
    return NO_CHUNK, splits, int(splits.sum())


def _runs(counts: IntArray) -> tuple[IntArray, Int32Array]:
    """For each of `counts` [n] things in a row: whose it is, and its place among those."""
    owner = np.repeat(np.arange(counts.size), counts)
    place = np.arange(owner.size) - (np.add.accumulate(counts) - counts)[owner]
    return owner, place.astype(np.int32)
