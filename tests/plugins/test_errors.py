"""Bad input never reaches a kernel: a sentence that names it comes out, the pool is untouched, the session lives on."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import onnxruntime as ort
import pytest
from fork_steps import Row, Tree, available_isas, entry_points, run_in_place, session
from reference import Array, Attributes

from apar.export.manifest import ABI_VERSION

ATTRIBUTES = Attributes(num_heads=4, num_kv_heads=2, head_dim=16, block_size=8)
BLOCKS = 12
Inputs = dict[str, Array]


def setter(name: str, index: tuple[int, ...] | int, value: int) -> Callable[[Inputs], None]:
    def change(inputs: Inputs) -> None:
        inputs[name][index] = value

    return change


def grow(name: str, shape: tuple[int, ...]) -> Callable[[Inputs], None]:
    def change(inputs: Inputs) -> None:
        inputs[name] = np.zeros(shape, inputs[name].dtype)

    return change


QKV_SHAPE = "qkv has shape [4, 100], it must be [T, (num_heads + 2 num_kv_heads) head_dim] = [4, 128]"

# The step below has rows of 3 and 1 tokens with 15 and 13 keys: blocks 0 shared, then one each.
BAD_INPUT = {
    "first row": (setter("query_start", 0, 1), "query_start[0] = 1, but the first row starts at token 0"),
    "decreasing": (setter("query_start", 1, 5), "query_start[2] = 4, but the entry before it is 5"),
    "negative start": (setter("query_start", 1, -1), "query_start[1] = -1, but the entry before it is 0"),
    "too few tokens": (setter("query_start", 2, 3), "query_start[2] = 3, but qkv has 4 tokens"),
    "short kv_len": (setter("kv_len", 0, 2), "kv_len[0] = 2, but the row has 3 tokens in this step"),
    "negative kv_len": (setter("kv_len", 1, -4), "kv_len[1] = -4, but the row has 1 tokens"),
    "long kv_len": (setter("kv_len", 0, 17), "kv_len[0] = 17, but a row of block_table holds 16 slots"),
    "block -1": (setter("block_table", (1, 1), -1), "block_table[1, 1] = -1, but kv_len[1] = 13 needs it to be one of"),
    "block 12": (setter("block_table", (0, 0), 12), "block_table[0, 0] = 12, but kv_len[0] = 15 needs"),
    "slot -2": (setter("slot_mapping", 2, -2), "slot_mapping[2] = -2, but it must be -1 or a slot of the pool"),
    "slot 96": (
        setter("slot_mapping", 0, 96),
        "slot_mapping[0] = 96, but it must be -1 or a slot of the pool, which has 96",
    ),
    "position": (setter("position_ids", 1, -5), "position_ids[1] = -5, but a position must not be negative"),
    "copy source": (setter("slot_copies", (1, 0), -1), "slot_copies[1, 0] = -1, but it must be a slot of the pool"),
    "copy target": (setter("slot_copies", (0, 1), 96), "slot_copies[0, 1] = 96, but it must be a slot of the pool"),
    "first group": (setter("prefix_rows", 0, 1), "prefix_rows[0] = 1, but the first group starts at row 0"),
    "last group": (setter("prefix_rows", 1, 1), "prefix_rows[1] = 1, but there are 2 rows"),
    "negative group": (setter("prefix_rows", 1, -3), "prefix_rows[1] = -3, but the entry before it is 0"),
    "negative prefix": (setter("prefix_blocks", 0, -1), "prefix_blocks[0] = -1, but a row of block_table has 2"),
    "wide prefix": (setter("prefix_blocks", 0, 3), "prefix_blocks[0] = 3, but a row of block_table has 2 entries"),
    "false prefix": (setter("prefix_blocks", 0, 2), "prefix_blocks[0] = 2, but rows 0 and 1 of that group differ at"),
    "qkv shape": (grow("qkv", (4, 100)), QKV_SHAPE),
    "positions shape": (grow("position_ids", (3,)), "position_ids has shape [3], it must be [T] = [4]"),
    "start shape": (grow("query_start", (2,)), "query_start has shape [2], it must be [R + 1] = [3]"),
    "table shape": (grow("block_table", (3, 2)), "block_table has shape [3, 2], it must be [R, MB] = [2, 2]"),
    "slots shape": (grow("slot_mapping", (5,)), "slot_mapping has shape [5], it must be [T] = [4]"),
    "groups shape": (grow("prefix_rows", (3,)), "prefix_rows has shape [3], it must be [G + 1] = [2]"),
    "mask shape": (grow("tree_mask", (3, 1)), "tree_mask has shape [3, 1], it must be [T, W] = [4, 1]"),
}


@pytest.fixture(scope="module")
def run() -> ort.InferenceSession:
    return session(ATTRIBUTES)


@pytest.fixture
def tree(run: ort.InferenceSession) -> Tree:
    tree = Tree(ATTRIBUTES, BLOCKS, seed=30)
    tree.pool[:] = 0.5
    return tree


def good_step(tree: Tree, run: ort.InferenceSession) -> Inputs:
    root = tree.root()
    run_in_place(run, tree.inputs([Row(root, 12)]), tree.pool)
    child = tree.fork(root)
    inputs = tree.inputs([Row(root, 3), Row(child, 1)])
    assert inputs["kv_len"].tolist() == [15, 13]
    assert inputs["prefix_blocks"].tolist() == [1]
    return inputs


def refuse(run: ort.InferenceSession, inputs: Inputs, pool: Array, sentence: str) -> None:
    before = pool.copy()
    with pytest.raises(Exception, match=re.escape("ForkAttention: " + sentence)):
        run_in_place(run, inputs, pool)
    np.testing.assert_array_equal(pool, before)


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input(case: str, tree: Tree, run: ort.InferenceSession) -> None:
    inputs = good_step(tree, run)
    expected = run_in_place(run, inputs, tree.pool.copy())
    change, sentence = BAD_INPUT[case]
    bad = {name: array.copy() for name, array in inputs.items()}
    change(bad)
    refuse(run, bad, tree.pool, sentence)
    np.testing.assert_array_equal(run_in_place(run, inputs, tree.pool), expected)


def test_two_writers_of_a_slot(tree: Tree, run: ort.InferenceSession) -> None:
    inputs = good_step(tree, run)
    inputs["slot_mapping"][3] = slot = inputs["slot_mapping"][1]
    refuse(run, inputs, tree.pool, f"slot_mapping writes slot {slot} twice, at index 1 and at index 3")
    # The set of seen slots is clean again.
    inputs["slot_mapping"][3] = -1
    run_in_place(run, inputs, tree.pool)


def test_two_copies_to_a_slot(tree: Tree, run: ort.InferenceSession) -> None:
    inputs = good_step(tree, run)
    inputs["slot_copies"][2, 1] = slot = inputs["slot_copies"][0, 1]
    refuse(run, inputs, tree.pool, f"slot_copies writes slot {slot} twice, at index 0 and at index 2")


def test_wrong_pool_shape(tree: Tree, run: ort.InferenceSession) -> None:
    inputs = good_step(tree, run)
    pool = np.zeros((3, BLOCKS, 2, 8, 16), np.float32)
    formula = "[2, B, num_kv_heads, block_size, head_dim] = [2, 12, 2, 8, 16]"
    refuse(run, inputs, pool, f"past_kv has shape [3, 12, 2, 8, 16], it must be {formula}")


def test_random_indices_never_crash(run: ort.InferenceSession, tree: Tree) -> None:
    """Each index tensor filled with noise: an error or a result, and an untouched pool where it is an error."""
    inputs = good_step(tree, run)
    random = np.random.default_rng(0)
    for _ in range(200):
        bad = {name: array.copy() for name, array in inputs.items()}
        name = str(random.choice([n for n in bad if n != "qkv"]))
        if bad[name].size == 0:
            continue
        at = tuple(random.integers(0, n) for n in bad[name].shape)
        bad[name][at] = random.choice([-(2**31), -1, 0, 1, 2, 7, 11, 95, 96, 2**31 - 1])
        before = tree.pool.copy()
        try:
            run_in_place(run, bad, tree.pool)
        except Exception as error:
            assert "ForkAttention: " in str(error)
            np.testing.assert_array_equal(tree.pool, before)
        tree.pool[:] = before


# ---------------------------------------------------------------- when a session is created


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"abi_version": ABI_VERSION + 1},
            f"the engine has ABI version {ABI_VERSION + 1}, this library has {ABI_VERSION}; "
            "rebuild the engine with `apar build` or reinstall apar",
        ),
        ({"num_heads": 3}, "num_heads = 3 must be a positive multiple of num_kv_heads = 2"),
        ({"num_kv_heads": 0}, "num_heads = 4 must be a positive multiple of num_kv_heads = 0"),
        ({"head_dim": 15}, "head_dim = 15 must be even and positive"),
        ({"block_size": 0}, "block_size = 0 must be positive"),
        ({"rope_inv_freq": [1.0] * 5}, "rope_inv_freq has 5 entries, head_dim = 16 needs 8 of them"),
    ],
)
def test_bad_attributes(changes: dict[str, object], sentence: str) -> None:
    with pytest.raises(Exception, match=re.escape(sentence)):
        session(ATTRIBUTES, **changes)


@pytest.mark.parametrize("wish", ["sse9", "AVX2", "avx512"])
def test_unavailable_instruction_set(wish: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if wish in available_isas():
        pytest.skip(f"this machine has {wish}")
    monkeypatch.setenv("APAR_CPU_ISA", wish)
    sentence = f"APAR_CPU_ISA is '{wish}', which this machine does not offer; it has .*generic"
    with pytest.raises(Exception, match=sentence):
        session(ATTRIBUTES)


def test_queries_without_a_session(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("APAR_CPU_ISA", raising=False)
    assert entry_points().apar_abi_version() == ABI_VERSION
    assert entry_points().apar_cpu_isa().decode() == available_isas()[0]
    monkeypatch.setenv("APAR_CPU_ISA", "nothing")
    assert entry_points().apar_cpu_isa() is None
