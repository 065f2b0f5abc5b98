"""ForkAttention on the CPU against the NumPy reference: trees, layouts, types, masks, copies, padding."""

from __future__ import annotations

import numpy as np
import pytest
from fork_steps import Row, Tree, available_isas, compare, run_in_place, session
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from reference import Attributes, fork_attention

SMALL = Attributes(num_heads=4, num_kv_heads=2, head_dim=16, block_size=8)


@pytest.fixture(params=available_isas())
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every instruction set that this machine has, one test each."""
    monkeypatch.setenv("APAR_CPU_ISA", request.param)
    return str(request.param)


def grow_tree(tree: Tree, run: object) -> None:
    """Prefill, fork twice, decode raggedly, with two requests in the batch."""
    first, second = tree.root(), tree.root()
    tree.step(run, [Row(first, 37), Row(second, 5)])
    children = [tree.fork(first), tree.fork(first)]
    tree.step(run, [Row(first), *(Row(child, 2) for child in children), Row(second, 3)])
    children.append(tree.fork(children[0]))
    for _ in range(2):
        tree.step(run, [Row(first), *(Row(child) for child in children), Row(second)])


@pytest.mark.parametrize("kv_dtype", ["float32", "float16"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "block_size"),
    [(4, 4, 64, 16), (6, 2, 128, 32), (3, 1, 80, 16), (2, 2, 96, 8), (24, 1, 6, 12), (2, 1, 36, 1), (2, 2, 8, 2)],
)
def test_trees_match_the_reference(
    isa: str, kv_dtype: str, heads: int, kv_heads: int, head_dim: int, block_size: int
) -> None:
    attributes = Attributes(heads, kv_heads, head_dim, block_size, kv_dtype)
    grow_tree(Tree(attributes, blocks=24 + 160 // block_size, seed=0), session(attributes))


@pytest.mark.parametrize("kv_dtype", ["float32", "float16"])
def test_long_contexts_span_chunks(isa: str, kv_dtype: str) -> None:
    """Siblings that share several chunks of keys, and one that has less than a chunk."""
    attributes = Attributes(4, 2, 16, 16, kv_dtype)
    tree = Tree(attributes, blocks=90, seed=1)
    for threads in (1, 2):
        run = session(attributes, threads)
        parent, other = tree.root(), tree.root()
        tree.step(run, [Row(parent, 531), Row(other, 3)])
        children = [tree.fork(parent) for _ in range(3)]
        for count in (2, 1):
            tree.step(run, [Row(parent), *(Row(child, count) for child in children), Row(other)])


@pytest.mark.parametrize("block_size", [96, 256, 300, 512])
def test_blocks_that_do_not_divide_a_chunk(isa: str, block_size: int) -> None:
    attributes = Attributes(2, 1, 8, block_size)
    tree = Tree(attributes, blocks=-(-700 // block_size) + 2, seed=2)
    run = session(attributes)
    root = tree.root()
    tree.step(run, [Row(root, 600)])
    child = tree.fork(root)
    tree.step(run, [Row(root, 3), Row(child, 2)])


def test_rope_far_out_and_scaled() -> None:
    """Positions beyond the cached table; YaRN's factor on cos and sin."""
    attributes = Attributes(2, 1, 16, 8, rope_scale=1.25)
    tree = Tree(attributes, blocks=4, seed=3)
    run = session(attributes)
    inputs = tree.inputs([Row(tree.root(), 9)])
    inputs["position_ids"] = inputs["position_ids"] + np.int32(65532)
    tree.run(run, inputs)


def test_error_is_small_relative_to_the_values() -> None:
    """float32: 1e-5 of the exact result, with scores spread over tens."""
    attributes = Attributes(4, 2, 64, 16)
    tree = Tree(attributes, blocks=12, seed=4)
    inputs = tree.inputs([Row(tree.root(), 150)])
    inputs["qkv"] *= 4
    expected = fork_attention(inputs, tree.expected_pool, attributes)
    attn = run_in_place(session(attributes), inputs, tree.pool)
    assert np.abs(attn - expected).max() <= 1e-5 * np.abs(expected).max()


# ---------------------------------------------------------------- masks, padding, copies


def test_tree_mask(isa: str) -> None:
    """A draft tree beside causal rows: each node sees its ancestors only, over more than one mask word."""
    tree = Tree(SMALL, blocks=40, seed=5)
    run = session(SMALL)
    drafted, causal = tree.root(), tree.root()
    tree.step(run, [Row(drafted, 13), Row(causal, 6)])
    nodes = 40
    mask = np.zeros((nodes, 2), np.uint32)
    for node in range(nodes):
        ancestor = node
        while True:
            mask[node, ancestor // 32] |= np.uint32(1 << (ancestor % 32))
            if ancestor == 0:
                break
            ancestor = (ancestor - 1) // 2
    tree.step(run, [Row(drafted, nodes, mask), Row(causal, 4)])


def test_mask_may_show_later_tokens_and_nothing_at_all() -> None:
    tree = Tree(SMALL, blocks=8, seed=6)
    mask = np.array([[0b110], [0b100], [0]], np.uint32)
    attn = tree.step(session(SMALL), [Row(tree.root(), 3, mask)])
    assert not attn[2].any()


def test_invisible_values_do_not_leak() -> None:
    """NaN in one draft node's values stays with the tokens that see it."""
    tree = Tree(SMALL, blocks=8, seed=7)
    run = session(SMALL)
    root = tree.root()
    tree.step(run, [Row(root, 5)])
    inputs = tree.inputs([Row(root, 3, np.array([[1], [3], [5]], np.uint32))])
    clean = run_in_place(run, inputs, tree.pool.copy())
    inputs["qkv"][1] = np.nan
    attn = run_in_place(run, inputs, tree.pool.copy())
    assert np.isnan(attn[1]).all()
    np.testing.assert_array_equal(attn[[0, 2]], clean[[0, 2]])


def test_nan_goes_no_further_than_its_row() -> None:
    """One request's NaN reaches its own later tokens, and nobody else's."""
    tree = Tree(SMALL, blocks=8, seed=8)
    inputs = tree.inputs([Row(tree.root(), 6), Row(tree.root(), 4)])
    clean = run_in_place(session(SMALL), inputs, tree.pool.copy())
    inputs["qkv"][2] = np.nan
    attn = run_in_place(session(SMALL), inputs, tree.pool.copy())
    np.testing.assert_array_equal(attn[[0, 1, 6, 7, 8, 9]], clean[[0, 1, 6, 7, 8, 9]])
    assert np.isnan(attn[2:6]).all()


def test_padding(isa: str) -> None:
    """Padding tokens inside rows and rows of padding only: zeros out, nothing written, NaN stays out."""
    tree = Tree(SMALL, blocks=30, seed=9)
    run = session(SMALL)
    root = tree.root()
    tree.step(run, [Row(root, 11)])
    child = tree.fork(root)
    inputs = tree.inputs([Row(root, 1, padding=3), Row(child, 2, padding=1)])
    pad = 5
    tokens = len(inputs["slot_mapping"])
    inputs["qkv"] = np.concatenate([inputs["qkv"], np.full((pad, SMALL.qkv_size), np.nan, np.float32)])
    inputs["position_ids"] = np.concatenate([inputs["position_ids"], np.full(pad, -7, np.int32)])
    inputs["slot_mapping"] = np.concatenate([inputs["slot_mapping"], np.full(pad, -1, np.int32)])
    inputs["tree_mask"] = np.zeros((tokens + pad, 0), np.int32)
    # Two rows whose lengths and tables must not be looked at.
    inputs["query_start"] = np.append(inputs["query_start"], np.int32([tokens + 2, tokens + pad]))
    inputs["kv_len"] = np.append(inputs["kv_len"], np.int32([0, 10**9]))
    width = inputs["block_table"].shape[1]
    inputs["block_table"] = np.concatenate([inputs["block_table"], np.full((2, width), -1, np.int32)])
    inputs["prefix_rows"] = np.int32([0, 2, 4])
    inputs["prefix_blocks"] = np.int32([1, width])
    attn = tree.run(run, inputs)
    assert not attn[inputs["slot_mapping"] < 0].any()


def test_slot_copies_read_all_sources_first(isa: str) -> None:
    """A rotation, a chain and a target in another block, of slots that the same step then reads."""
    tree = Tree(SMALL, blocks=6, seed=10)
    run = session(SMALL)
    root = tree.root()
    tree.step(run, [Row(root, 20)])
    slot = [tree.slot(root, key) for key in range(20)]
    tree.copies = [(slot[0], slot[1]), (slot[1], slot[2]), (slot[2], slot[0]), (slot[4], slot[5]), (slot[5], slot[17])]
    tree.copies.append((slot[9], slot[9]))
    tree.step(run, [Row(root, 2)])


def test_draft_compaction() -> None:
    """Accepted slots move to the front; the next step overwrites the rest."""
    tree = Tree(SMALL, blocks=8, seed=11)
    run = session(SMALL)
    root = tree.root()
    tree.step(run, [Row(root, 6)])
    tree.step(run, [Row(root, 5, np.array([[1], [3], [5], [11], [21]], np.uint32))])
    kept = [0, 2, 4]
    tree.copies = [(tree.slot(root, 6 + old), tree.slot(root, 6 + new)) for new, old in enumerate(kept)]
    root.length = 6 + len(kept)
    tree.step(run, [Row(root, 2)])


def test_steps_without_tokens_still_copy() -> None:
    tree = Tree(SMALL, blocks=6, seed=12)
    run = session(SMALL)
    root = tree.root()
    tree.step(run, [Row(root, 7)])
    child = tree.fork(root)
    inputs = tree.inputs([Row(root, 0)])
    assert inputs["qkv"].shape[0] == 0
    assert tree.run(run, inputs).shape == (0, SMALL.num_heads * SMALL.head_dim)
    tree.step(run, [Row(child)])


# ---------------------------------------------------------------- memory


def test_separate_output_leaves_the_input_pool_alone() -> None:
    tree = Tree(SMALL, blocks=8, seed=13)
    run = session(SMALL)
    inputs = tree.inputs([Row(tree.root(), 9)])
    before = tree.pool.copy()
    attn, present = run.run(["attn", "present_kv"], {**inputs, "past_kv": tree.pool})
    np.testing.assert_array_equal(tree.pool, before)
    in_place = run_in_place(run, inputs, tree.pool)
    np.testing.assert_array_equal(attn, in_place)
    np.testing.assert_array_equal(present, tree.pool)


def test_only_mapped_slots_change() -> None:
    """Panels of blocks that no slot names stay as they are."""
    tree = Tree(SMALL, blocks=10, seed=14)
    tree.pool[:] = 7
    inputs = tree.inputs([Row(tree.root(), 3), Row(tree.root(), 1)])
    run_in_place(session(SMALL), inputs, tree.pool)
    written = set(inputs["slot_mapping"] // SMALL.block_size)
    for block in range(10):
        changed = int((tree.pool[:, block] != 7).sum())
        tokens = int((inputs["slot_mapping"] // SMALL.block_size == block).sum())
        assert changed == tokens * 2 * SMALL.num_kv_heads * SMALL.head_dim
        assert (changed > 0) == (block in written)


@pytest.mark.parametrize("isa_name", available_isas())
def test_half_conversion(isa_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values reach a float16 pool rounded to nearest even: subnormals, overflow, ties, signed zeros."""
    monkeypatch.setenv("APAR_CPU_ISA", isa_name)
    attributes = Attributes(1, 1, 64, 1, "float16")
    special = [0.0, -0.0, 6e-8, 3e-8, 2.98e-8, 5.9604645e-8, 6.1e-5, 6.097e-5, 65504, 65519, 65520, -1e6, 1.00048828125]
    special += [1.0004883, 1.00146484375, -2049, 2051, 1e-9, np.inf, -np.inf]
    values = np.random.default_rng(0).standard_normal(64).astype(np.float32)
    values[: len(special)] = special
    tree = Tree(attributes, blocks=1, seed=15)
    inputs = tree.inputs([Row(tree.root(), 1)])
    inputs["qkv"][0, 128:] = values
    attn = run_in_place(session(attributes), inputs, tree.pool)
    with np.errstate(over="ignore"):
        rounded = values.astype(np.float16)
    # One key, so attention returns its value; the value panel of one slot has one possible layout.
    np.testing.assert_array_equal(tree.pool[1, 0, 0, 0].view(np.uint16), rounded.view(np.uint16))
    np.testing.assert_array_equal(attn[0], rounded.astype(np.float32))


# ---------------------------------------------------------------- random cases


@settings(max_examples=25, deadline=None, derandomize=True, phases=(Phase.explicit, Phase.generate))
@given(data=st.data())
def test_random_trees(data: st.DataObject) -> None:
    """Any tree of branches, any raggedness, any sharing of the batch."""
    kv_heads = data.draw(st.integers(1, 3), label="kv_heads")
    attributes = Attributes(
        num_heads=kv_heads * data.draw(st.integers(1, 5), label="group"),
        num_kv_heads=kv_heads,
        head_dim=2 * data.draw(st.integers(1, 20), label="half_dim"),
        block_size=data.draw(st.sampled_from([1, 2, 3, 8, 16, 32]), label="block_size"),
        kv_dtype=data.draw(st.sampled_from(["float32", "float16"]), label="kv_dtype"),
    )
    seed = data.draw(st.integers(0, 999), label="seed")
    tree = Tree(attributes, blocks=1500 // attributes.block_size + 60, seed=seed)
    run = session(attributes, threads=data.draw(st.integers(1, 2), label="threads"))
    branches = [tree.root()]
    tree.step(run, [Row(branches[0], data.draw(st.sampled_from([1, 20, 290]), label="prompt"))])
    for _ in range(3):
        for _ in range(data.draw(st.integers(0, 2), label="forks")):
            branches.append(tree.fork(data.draw(st.sampled_from(branches))))
        if data.draw(st.booleans(), label="request"):
            branches.append(tree.root())
        branches.sort(key=lambda branch: branch.family)
        rows = [
            Row(branch, data.draw(st.sampled_from([1, 1, 1, 2, 7])), padding=data.draw(st.sampled_from([0, 0, 2])))
            for branch in branches
        ]
        tree.step(run, rows, share=data.draw(st.booleans(), label="share"))


def test_reference_against_plain_softmax() -> None:
    """The reference itself, on the smallest case that can be written out by hand."""
    attributes = Attributes(1, 1, 2, 4)
    pool = np.zeros((2, 1, 1, 4, 2))
    inputs = {
        "qkv": np.float32([[1, 0, 1, 0, 1, 2], [0, 1, 0, 1, 3, 4]]),
        "position_ids": np.int32([0, 0]),
        "query_start": np.int32([0, 2]),
        "kv_len": np.int32([2]),
        "block_table": np.int32([[0]]),
        "slot_mapping": np.int32([0, 1]),
        "slot_copies": np.zeros((0, 2), np.int32),
        "tree_mask": np.zeros((2, 0), np.int32),
    }
    attn = fork_attention(inputs, pool, attributes)
    late = np.exp(2**-0.5) / (1 + np.exp(2**-0.5))
    compare(np.float32(attn), np.array([[1, 2], [1 + 2 * late, 2 + 2 * late]]), attributes)
