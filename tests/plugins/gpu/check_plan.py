"""The plan: what it must cover, what it may cost, and the same from the device."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest
import torch

from apar.plugins.gpu.fork_attention import ForkAttention, StepTensors
from apar.plugins.gpu.plan import PREFIX_KEYS, make_plan
from apar.plugins.gpu.sizes import ITEM_FIELDS, PART_FIELDS, PLAN_HEADER, StepSizes

Arrays = dict[str, npt.NDArray[np.int32]]
BLOCK = 16


def random_step(random: np.random.Generator, rows: int, longest: int) -> Arrays:
    """Rows of random lengths in random groups, some of them padding, some empty."""
    counts = random.choice([0, 1, 1, 1, 2, 3, 40], rows)
    counts[0] = max(1, counts[0])
    context = random.integers(0, longest, rows)
    start = np.concatenate(([0], np.cumsum(counts)))
    slots = np.arange(start[-1])
    for row in range(rows):
        if random.random() < 0.15:
            slots[start[row] : start[row + 1]] = -1
        elif counts[row] > 1 and random.random() < 0.2:
            slots[start[row + 1] - 1] = -1
    bounds = [0]
    while bounds[-1] < rows:
        bounds.append(min(rows, bounds[-1] + int(random.choice([1, 1, 2, 5, 33]))))
    shared = []
    for first, end in pairwise(bounds):
        if random.random() < 0.7:
            context[first:end] = context[first] + random.integers(0, 40, end - first)
        shared.append(int((context[first:end].min() + 20) // BLOCK) if random.random() < 0.8 else 0)
    if random.random() < 0.1:
        bounds, shared = [0], []
    elif random.random() < 0.3:
        # Groups without rows, as callers with fixed shapes pad.
        bounds, shared = [*bounds, rows, rows], [*shared, 0, 0]
    step = {
        "query_start": start,
        "kv_len": context + counts,
        "slot_mapping": slots,
        "prefix_rows": np.array(bounds),
        "prefix_blocks": np.array(shared),
    }
    return {name: array.astype(np.int32) for name, array in step.items()}


def plan_of(step: Arrays, sizes: StepSizes, masked: bool) -> npt.NDArray[np.int32]:
    return make_plan(sizes, **step, block_size=BLOCK, masked=masked)


def sizes_of(step: Arrays, heads: int, kv_heads: int, tile: int = 0) -> StepSizes:
    groups = step["prefix_blocks"].size
    return StepSizes(step["slot_mapping"].size, step["kv_len"].size, groups, heads, kv_heads, tile)


def check_coverage(step: Arrays, sizes: StepSizes, plan: npt.NDArray[np.int32], masked: bool) -> None:
    """Every key of every token is in exactly one item, and the merge is told of all parts."""
    count, chunk, used, tiles = (int(value) for value in plan[:4])
    assert count <= sizes.items and tiles <= sizes.tiles and used <= sizes.parts and count - tiles <= sizes.budget
    items = plan[PLAN_HEADER:][: ITEM_FIELDS * sizes.items].reshape(-1, ITEM_FIELDS)
    parts = plan[-PART_FIELDS * sizes.tokens :].reshape(-1, PART_FIELDS)
    assert (items[count:] == 0).all()

    start, slots = step["query_start"], step["slot_mapping"]
    row_of = np.repeat(np.arange(step["kv_len"].size), np.diff(start))
    real = [bool((slots[start[r] : start[r + 1]] >= 0).any()) for r in range(step["kv_len"].size)]
    writers = np.zeros(max(1, used), int)
    read: dict[int, list[tuple[int, int]]] = {t: [] for t in range(sizes.tokens)}
    for begin, n, row, low, high, seen, first, part in items[:count].tolist():
        assert 0 < n <= sizes.tile_tokens and low < high <= low + chunk
        for token in range(begin, begin + n):
            owner = row_of[token]
            context = step["kv_len"][owner] - (start[owner + 1] - start[owner])
            if first == start[owner] and row == owner and seen == context:
                pass  # its own tile
            elif real[owner]:
                # A prefix tile: declared as shared by the row's group, and older than the step.
                group = int(np.searchsorted(step["prefix_rows"], owner, "right")) - 1
                assert high <= min(step["prefix_blocks"][group] * BLOCK, context) and seen >= high
                assert step["prefix_rows"][group] == row
            read[token].append((low, high))
            if part >= 0:
                writers[part + token - begin] += 1
    assert (writers[:used] == 1).all()
    for token, ranges in read.items():
        owner = row_of[token]
        if not real[owner]:
            assert parts[token, 2] >= 0
            continue
        n, i = start[owner + 1] - start[owner], token - start[owner]
        context = step["kv_len"][owner] - n
        ranges.sort()
        assert ranges[0][0] == 0 and all(a[1] == b[0] for a, b in pairwise(ranges))
        assert ranges[-1][1] == context + n if masked else context + i < ranges[-1][1] <= context + n
        own_base, own_stride, own_splits, base, stride, splits = parts[token].tolist()
        if len(ranges) == 1 and own_splits == -1:
            assert splits == 0
        else:
            assert own_splits + splits == len(ranges)
            listed = {own_base + i * own_stride for i in range(own_splits)} | {base + i * stride for i in range(splits)}
            assert len(listed) == len(ranges) and max(listed) < used


@pytest.mark.parametrize("seed", range(150))
def test_every_key_is_read_once(seed: int) -> None:
    random = np.random.default_rng(seed)
    step = random_step(random, int(random.integers(1, 60)), int(random.choice([50, 600, 5000])))
    heads, kv_heads = [(4, 4), (8, 2), (32, 32), (6, 1), (14, 2)][seed % 5]
    masked = bool(seed % 3 == 0)
    sizes = sizes_of(step, heads, kv_heads, tile=int(random.choice([0, 16, 64])))
    check_coverage(step, sizes, plan_of(step, sizes, masked), masked)


@pytest.mark.parametrize("seed", range(6))
def test_the_device_makes_the_same_plan(seed: int) -> None:
    random = np.random.default_rng(1000 + seed)
    rows = [1, 2, 9, 130, 33, 64][seed]
    step = random_step(random, rows, 900)
    operator = ForkAttention(
        num_heads=8, num_kv_heads=[8, 2, 1][seed % 3], head_dim=64, block_size=BLOCK, inv_freq=torch.zeros(32)
    )
    sizes = operator.sizes(step["slot_mapping"].size, rows, step["prefix_blocks"].size)
    masked = seed % 2 == 1
    tensors = {name: torch.from_numpy(array) for name, array in step.items()}
    blank = torch.zeros(1, dtype=torch.int32)
    mask = torch.zeros((sizes.tokens, int(masked)), dtype=torch.int32)
    device = operator.plan_on_device(
        sizes, StepTensors(position_ids=blank, block_table=blank[None], tree_mask=mask, **tensors)
    ).numpy()
    host = plan_of(step, sizes, masked)
    used = PLAN_HEADER + ITEM_FIELDS * int(host[0])
    np.testing.assert_array_equal(device[:4], host[:4])
    np.testing.assert_array_equal(device[PLAN_HEADER:used], host[PLAN_HEADER:used])
    np.testing.assert_array_equal(device[-PART_FIELDS * sizes.tokens :], host[-PART_FIELDS * sizes.tokens :])


@pytest.mark.parametrize("longest", [600_000, 2**24])
def test_contexts_beyond_the_longest_chunk(longest: int) -> None:
    """No key is lost or read twice, and the device plans as the host does."""
    step = group_step(3, 700, 31)
    step["kv_len"][:] = (longest, 5000, 700)
    sizes = sizes_of(step, 32, 32)
    host = plan_of(step, sizes, False)
    check_coverage(step, sizes, host, False)
    operator = ForkAttention(num_heads=32, num_kv_heads=32, head_dim=64, block_size=BLOCK, inv_freq=torch.zeros(32))
    tensors = {name: torch.from_numpy(array) for name, array in step.items()}
    blank, mask = torch.zeros(1, dtype=torch.int32), torch.zeros((3, 0), dtype=torch.int32)
    device = operator.plan_on_device(
        sizes, StepTensors(position_ids=blank, block_table=blank[None], tree_mask=mask, **tensors)
    )
    np.testing.assert_array_equal(device.numpy()[:4], host[:4])
    used = PLAN_HEADER + ITEM_FIELDS * int(host[0])
    np.testing.assert_array_equal(device.numpy()[PLAN_HEADER:used], host[PLAN_HEADER:used])


def group_step(rows: int, keys: int, blocks: int) -> Arrays:
    step = {
        "query_start": np.arange(rows + 1),
        "kv_len": np.full(rows, keys + 1),
        "slot_mapping": np.arange(rows),
        "prefix_rows": np.array([0, rows]),
        "prefix_blocks": np.array([blocks]),
    }
    return {name: array.astype(np.int32) for name, array in step.items()}


@pytest.mark.parametrize(
    ("rows", "blocks", "shared"),
    [(6, 31, True), (2, 8, True), (2, 7, False), (1, 31, False), (32, 8, True), (6, 0, False)],
)
def test_when_a_prefix_is_read_once(rows: int, blocks: int, shared: bool) -> None:
    """Two rows or more and 128 keys or more, in 16-token blocks."""
    step = group_step(rows, 500, blocks)
    plan = plan_of(step, sizes_of(step, 32, 32), False)
    parts = plan[-PART_FIELDS * rows :].reshape(-1, PART_FIELDS)
    assert ((parts[:, 5] > 0) == shared).all()
    assert blocks * BLOCK >= PREFIX_KEYS or not shared


def test_a_prefix_that_is_still_being_written_is_left_to_the_rows() -> None:
    """Blocks that a row of the group fills in this very step are no shared past."""
    step = group_step(8, 500, 31)
    step["query_start"] = np.array([0, *range(20, 28)], np.int32)
    step["kv_len"][0] = 220
    step["slot_mapping"] = np.arange(27, dtype=np.int32)
    plan = plan_of(step, sizes_of(step, 32, 32), False)
    parts = plan[-PART_FIELDS * 27 :].reshape(-1, PART_FIELDS)
    assert (parts[:, 5] > 0).all()
    assert plan[PLAN_HEADER + 5] == 192  # 200 keys precede the step: 12 blocks
