"""Bit-for-bit equality: whatever the batch, the cut of prefill, the threads, or what is declared as shared."""

from __future__ import annotations

import numpy as np
import pytest
from fork_steps import Row, Tree, available_isas, run_in_place, session
from reference import Array, Attributes

CASES = [Attributes(4, 2, 64, 16), Attributes(3, 3, 20, 8, "float16"), Attributes(8, 1, 36, 12)]


@pytest.fixture(params=available_isas(), autouse=True)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APAR_CPU_ISA", request.param)


def forked_step(attributes: Attributes) -> tuple[Tree, dict[str, Array]]:
    """A step of nine ragged rows, seven of them siblings with about 600 keys, ready to run."""
    tree = Tree(attributes, blocks=2400 // attributes.block_size, seed=21)
    run = session(attributes)
    root, other, fresh = tree.root(), tree.root(), tree.root()
    inputs = tree.inputs([Row(root, 590), Row(other, 30)])
    run_in_place(run, inputs, tree.pool)
    children = [tree.fork(root) for _ in range(6)]
    rows = [Row(root), *(Row(child, 1 + i % 3) for i, child in enumerate(children)), Row(other, 2), Row(fresh, 41)]
    return tree, tree.inputs(rows)


def take_rows(inputs: dict[str, Array], rows: list[int]) -> tuple[dict[str, Array], Array]:
    """The same step with these rows only, and the tokens they have."""
    start = inputs["query_start"]
    tokens = np.concatenate([np.arange(start[r], start[r + 1]) for r in rows])
    counts = [start[r + 1] - start[r] for r in rows]
    picked = {name: inputs[name][tokens] for name in ("qkv", "position_ids", "slot_mapping", "tree_mask")}
    picked |= {name: inputs[name][rows] for name in ("kv_len", "block_table")}
    picked["query_start"] = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    picked["slot_copies"] = inputs["slot_copies"]
    picked["prefix_rows"] = np.int32([0])
    picked["prefix_blocks"] = np.int32([])
    return {name: picked[name] for name in inputs}, tokens


@pytest.mark.parametrize("attributes", CASES)
def test_threads_rows_and_sharing(attributes: Attributes) -> None:
    tree, inputs = forked_step(attributes)
    one, two = session(attributes, 1), session(attributes, 2)
    pool = tree.pool.copy()
    expected = run_in_place(one, inputs, pool)

    other_pool = tree.pool.copy()
    np.testing.assert_array_equal(run_in_place(two, inputs, other_pool), expected)
    np.testing.assert_array_equal(other_pool, pool)

    unshared = {**inputs, "prefix_rows": np.int32([0]), "prefix_blocks": np.int32([])}
    np.testing.assert_array_equal(run_in_place(one, unshared, tree.pool.copy()), expected)

    count = len(inputs["kv_len"])
    for run in (one, two):
        for row in range(count):
            alone, tokens = take_rows(inputs, [row])
            np.testing.assert_array_equal(run_in_place(run, alone, tree.pool.copy()), expected[tokens])

    order = [int(row) for row in np.random.default_rng(0).permutation(count)]
    permuted, tokens = take_rows(inputs, order)
    np.testing.assert_array_equal(run_in_place(two, permuted, tree.pool.copy()), expected[tokens])


@pytest.mark.parametrize("attributes", CASES)
@pytest.mark.parametrize("cut", [1, 17, 256])
def test_prefill_in_chunks_equals_prefill_at_once(attributes: Attributes, cut: int) -> None:
    total = 300 if cut > 1 else 40
    tree = Tree(attributes, blocks=400 // attributes.block_size, seed=22)
    inputs = tree.inputs([Row(tree.root(), total)])
    run = session(attributes)
    whole_pool = tree.pool.copy()
    whole = run_in_place(run, inputs, whole_pool)
    parts = []
    for first in range(0, total, cut):
        last = min(total, first + cut)
        part = {
            **inputs,
            **{n: inputs[n][first:last] for n in ("qkv", "position_ids", "slot_mapping", "tree_mask")},
            "query_start": np.int32([0, last - first]),
            "kv_len": np.int32([last]),
        }
        parts.append(run_in_place(run, part, tree.pool))
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    np.testing.assert_array_equal(tree.pool, whole_pool)


@pytest.mark.parametrize("attributes", CASES)
def test_causal_mask_bits_equal_no_mask(attributes: Attributes) -> None:
    """Verifying a chain of drafts gives the bits that plain decoding would have given."""
    tree = Tree(attributes, blocks=600 // attributes.block_size, seed=23)
    run = session(attributes)
    root = tree.root()
    run_in_place(run, tree.inputs([Row(root, 250)]), tree.pool)
    inputs = tree.inputs([Row(root, 11)])
    expected = run_in_place(run, inputs, tree.pool.copy())
    bits = np.array([[(2 << i) - 1] for i in range(11)], np.int32)
    np.testing.assert_array_equal(run_in_place(run, {**inputs, "tree_mask": bits}, tree.pool.copy()), expected)
