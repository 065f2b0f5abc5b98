"""Bad ids in checked builds, and pools of more elements than 31 bits count."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fork_steps import Row
from gpu_steps import GpuTree, agree
from reference import Attributes, fork_attention

from apar.export.errors import ExecutorError

SHAPE = Attributes(2, 2, 64, 16)


def changed(tree: GpuTree, before: torch.Tensor) -> bool:
    return not torch.equal(tree.device_pool.view(torch.int32), before.view(torch.int32))


@pytest.mark.parametrize(
    ("name", "place", "value", "message"),
    [
        ("block_table", (0, 1), 8, "block_table"),
        ("block_table", (0, 1), -1, "block_table"),
        ("slot_mapping", 0, 8 * 16, "slot_mapping"),
    ],
)
def test_bad_ids_are_reported(name: str, place: object, value: int, message: str) -> None:
    tree = GpuTree(SHAPE, 8, 0, checked=True)
    inputs = tree.inputs([Row(tree.grown(30), 1)])
    good = {key: array.copy() for key, array in inputs.items()}
    inputs[name][place] = value
    before = tree.device_pool.clone()
    with pytest.raises(ExecutorError, match=message):
        tree.launch(inputs)
    if name == "slot_mapping":
        assert not changed(tree, before)
    # The report is gone with the error: the next step works.
    agree(tree.launch(good).out, fork_attention(good, tree.expected_pool, SHAPE), tree.dtype)


@pytest.mark.parametrize("copies", [[[0, 128]], [[-2, 3]]])
def test_bad_copies_are_reported(copies: list[list[int]]) -> None:
    tree = GpuTree(SHAPE, 8, 1, checked=True)
    tree.grown(8 * 16)
    before = tree.device_pool.clone()
    tree.operator.copy(tree.device_pool[None], torch.tensor(copies, dtype=torch.int32))
    with pytest.raises(ExecutorError, match="slot_copies"):
        tree.operator.raise_errors()
    if copies[0][1] == 128:
        assert not changed(tree, before)


def test_pools_beyond_31_bits() -> None:
    """The last blocks of a pool of 2**31 elements and more; the memory between is never touched, so it costs none."""
    attributes = Attributes(1, 1, 128, 128)
    blocks = 2**31 // (128 * 128) + 4
    tree = GpuTree(attributes, 4, 2, torch.float16)
    branch = tree.grown(200)
    inputs = tree.inputs([Row(branch, 2)])
    expected = fork_attention(inputs, tree.expected_pool, attributes)
    large = torch.empty((2, blocks, 1, 128, 128), dtype=torch.float16)
    far = blocks - 4
    large[:, far:] = tree.device_pool
    tree.device_pool = large
    inputs["block_table"] = np.where(inputs["block_table"] >= 0, inputs["block_table"] + far, -1).astype(np.int32)
    inputs["slot_mapping"] = inputs["slot_mapping"] + np.int32(far * 128)
    agree(tree.launch(inputs).out, expected, tree.dtype)
