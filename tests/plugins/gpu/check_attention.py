"""Attention, K/V write, RoPE, copies and merges in Triton's interpreter, against the NumPy reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fork_steps import Row
from gpu_steps import GpuTree, agree, random_rows, tree_mask
from reference import Attributes, fork_attention

from apar.plugins.gpu import sizes

SHAPES = [
    Attributes(2, 2, 64, 16),
    Attributes(3, 1, 80, 8),
    Attributes(4, 1, 96, 32, rope_scale=1.3, rope_theta=500000.0),
    Attributes(4, 2, 128, 16),
]


@pytest.mark.parametrize("seed", range(4))
def test_random_trees(seed: int) -> None:
    """Forks with copied blocks, chunks, drafts and padding, on every shape; some with a prefix pass."""
    tree = GpuTree(SHAPES[seed], 96, seed)
    families = [[tree.grown(int(tree.random.integers(130, 260)))], [tree.grown(int(tree.random.integers(1, 60)))]]
    for step in range(2):
        for family in families:
            # New branches stand beside their siblings: a group is a run of rows.
            family.append(tree.fork(family[int(tree.random.integers(len(family)))]))
        rows = random_rows(tree, [branch for family in families for branch in family], masked=step == 1)
        tree.checked_step(rows)
        for row in rows:
            # Padding and draft nodes were keys of one step.
            if row.mask is not None:
                row.branch.length -= row.count - 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype: torch.dtype) -> None:
    tree = GpuTree(SHAPES[3], 64, 1, dtype)
    parent = tree.grown(190)
    children = [tree.fork(parent) for _ in range(2)]
    result = tree.checked_step([Row(parent, 1), Row(children[0], 2), Row(children[1], 2)])
    assert result.prefix_tokens == 5
    tree.checked_step([Row(parent, 5, tree_mask([-1, 0, 0, 1, -1])), Row(children[1], 1)])


@pytest.mark.parametrize("tile", [16, 64])
def test_prefill_in_chunks(tile: int) -> None:
    """The same prompt in one step and in two chunks, on both tiles."""
    whole, parts = (GpuTree(SHAPES[0], 16, 3) for _ in range(2))
    at_once = whole.checked_step([Row(whole.root(), 70)], tile=tile)
    branch = parts.root()
    inputs = parts.inputs([Row(branch, 30)])
    inputs["qkv"] = whole_qkv = GpuTree(SHAPES[0], 16, 3).inputs([Row(whole.root(), 70)])["qkv"][:30]
    fork_attention(inputs, parts.expected_pool, parts.attributes)
    first = parts.launch(inputs, tile=tile)
    np.testing.assert_allclose(first.out, at_once.out[: len(whole_qkv)], atol=2e-6)


def test_prefix_pass_gives_the_same() -> None:
    """Shared and unshared reading of the same keys; the shared one does run."""
    tree = GpuTree(SHAPES[1], 64, 5)
    parent = tree.grown(270)
    rows = [Row(parent, 1), *(Row(tree.fork(parent), 2) for _ in range(4))]
    inputs = tree.inputs(rows)
    expected = fork_attention(inputs, tree.expected_pool, tree.attributes)
    shared = tree.launch(inputs)
    assert shared.prefix_tokens == 9
    inputs["slot_copies"] = inputs["slot_copies"][:0]
    alone = tree.launch(inputs, share=False)
    assert alone.prefix_tokens == 0
    agree(shared.out, expected, tree.dtype)
    agree(alone.out, expected, tree.dtype)


def test_rows_of_one_prefix_tile_may_be_many() -> None:
    """More query rows than a tile holds: several tiles read the prefix."""
    tree = GpuTree(Attributes(4, 1, 64, 16), 64, 6)
    parent = tree.grown(160)
    result = tree.checked_step([Row(parent, 1), *(Row(tree.fork(parent), 1) for _ in range(6))])
    assert result.prefix_tokens == 7
    assert result.sizes.tile_tokens == 4


def test_split_keys_merge(monkeypatch: pytest.MonkeyPatch) -> None:
    """A long context alone in a step is split over many programs; the result is that of one program."""
    tree = GpuTree(SHAPES[0], 128, 7)
    branch = tree.grown(1300)
    inputs = tree.inputs([Row(branch, 1)])
    expected = fork_attention(inputs, tree.expected_pool, tree.attributes)
    split = tree.launch(inputs)
    assert split.plan[0] > 8
    monkeypatch.setattr(sizes, "SPLIT_PROGRAMS", 0)
    whole = tree.launch(inputs)
    assert whole.plan[0] == 1
    agree(split.out, expected, tree.dtype)
    agree(whole.out, expected, tree.dtype)


def test_permuted_rows_permute_outputs() -> None:
    """Bit for bit: no row depends on where it stands or on what stands beside it."""
    tree = GpuTree(SHAPES[3], 96, 8)
    branches = [tree.grown(length) for length in (5, 200, 64, 131)]
    inputs = tree.inputs([Row(branch, count) for branch, count in zip(branches, (2, 1, 3, 1), strict=True)])
    straight = tree.launch(inputs)
    order = np.array([2, 0, 3, 1])
    starts = inputs["query_start"]
    tokens = np.concatenate([np.arange(starts[row], starts[row + 1]) for row in order])
    permuted = {**inputs}
    for name in ("qkv", "position_ids", "slot_mapping", "tree_mask"):
        permuted[name] = np.ascontiguousarray(inputs[name][tokens])
    for name in ("kv_len", "block_table"):
        permuted[name] = np.ascontiguousarray(inputs[name][order])
    permuted["query_start"] = np.concatenate(([0], np.cumsum(np.diff(starts)[order]))).astype(np.int32)
    permuted["prefix_blocks"] = inputs["prefix_blocks"][order]
    again = tree.launch(permuted)
    np.testing.assert_array_equal(again.out, straight.out[tokens])


def test_padding_rows_are_not_read() -> None:
    """Rows of a captured graph that the step does not fill: lengths and tables hold anything, outputs are zeros."""
    tree = GpuTree(SHAPES[0], 32, 9, checked=True)
    inputs = tree.inputs([Row(tree.grown(40), 1), Row(tree.grown(7), 2)])
    expected = fork_attention(inputs, tree.expected_pool, tree.attributes)
    before = tree.device_pool.clone()
    padded = {**inputs}
    padded["qkv"] = np.concatenate((inputs["qkv"], np.full((5, inputs["qkv"].shape[1]), np.nan, np.float32)))
    padded["position_ids"] = np.concatenate((inputs["position_ids"], np.full(5, -(2**31), np.int32)))
    padded["slot_mapping"] = np.concatenate((inputs["slot_mapping"], np.full(5, -1, np.int32)))
    padded["tree_mask"] = np.zeros((8, 0), np.int32)
    padded["query_start"] = np.concatenate((inputs["query_start"], [8, 8])).astype(np.int32)
    padded["kv_len"] = np.concatenate((inputs["kv_len"], [2**31 - 1, -5])).astype(np.int32)
    table = np.full((4, inputs["block_table"].shape[1]), 2**31 - 1, np.int32)
    table[:2] = inputs["block_table"]
    padded["block_table"] = table
    result = tree.launch(padded)
    agree(result.out[:3], expected, tree.dtype)
    assert (result.out[3:] == 0).all()
    changed = (tree.device_pool.view(torch.int32) != before.view(torch.int32)).flatten(2).any(-1)
    written = inputs["slot_mapping"] // 16
    assert set(torch.nonzero(changed)[:, 1].tolist()) == set(written.tolist())


def test_tokens_without_keys_get_zeros() -> None:
    """A mask without any bit, on an empty context."""
    tree = GpuTree(SHAPES[0], 8, 10)
    rows = [Row(tree.root(), 2, np.array([[1], [0]], np.uint32))]
    result = tree.checked_step(rows)
    assert (result.out[1] == 0).all() and (result.out[0] != 0).any()


def test_copies_read_before_they_write() -> None:
    """Chains and exchanges of slots, over two layers at once; pairs with -1 are padding."""
    tree = GpuTree(Attributes(2, 2, 80, 8), 8, 11)
    pools = torch.randn(2, 2, 8, 2, 8, 80)
    expected = pools.clone()
    copies = np.array([[3, 40], [40, 3], [5, 6], [6, 7], [7, 63], [-1, 9], [10, -1]], np.int32)
    source, target = (torch.from_numpy(column.astype(np.int64)) for column in copies[:5].T)
    expected[:, :, target // 8, :, target % 8] = pools[:, :, source // 8, :, source % 8].clone()
    tree.operator.copy(pools, torch.from_numpy(copies))
    assert torch.equal(pools, expected)
