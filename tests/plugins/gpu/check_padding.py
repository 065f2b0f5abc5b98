"""Steps as TensorRT engines get them (runtime/executor/tensorrt_step.py), planned on the device and run by the kernels.

The padding conventions of the executor meet the kernels here: padding tokens of one padding row, rows and groups
without anything, copies that are repeated, a wider table.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fork_steps import Row
from gpu_steps import GpuTree, agree, tree_mask
from reference import Attributes, fork_attention

from apar.export.manifest import TensorRtEngine
from apar.export.tensorrt_profiles import NO_COPIES
from apar.plugins.gpu.fork_attention import StepTensors
from apar.runtime.executor.tensorrt_step import Staging, choose_shape, staging_bytes
from apar.runtime.step import StepInputs

FACTS = TensorRtEngine("", "", "", 16, 96, 64, 20, 16 * 16 + 96, 0.9)


@pytest.mark.parametrize("case", ["forks", "drafts"])
def test_padded_steps_give_the_same(case: str) -> None:
    tree = GpuTree(Attributes(4, 2, 64, 16), 64, 9, checked=True)
    parent, other = tree.grown(150), tree.grown(21)
    if case == "forks":
        rows = [Row(parent, 1), *(Row(tree.fork(parent), 2) for _ in range(2)), Row(other, 1)]
    else:
        rows = [Row(parent, 3, tree_mask([-1, 0, 0])), Row(tree.root(), 9)]
    inputs = tree.inputs(rows)
    tokens = len(inputs["position_ids"])
    step = StepInputs(
        input_ids=np.zeros(tokens, np.int32),
        logits_rows=np.arange(min(tokens, 3), dtype=np.int32),
        **{name: array for name, array in inputs.items() if name != "qkv"},  # type: ignore[arg-type]
    )
    shape = choose_shape(step, FACTS)
    memory = np.zeros(staging_bytes(FACTS), np.uint8)
    offsets, _ = Staging(memory).fill(step, shape)
    padded = {
        name: memory[offsets[name] :][: 4 * int(np.prod(size))].view(np.int32).reshape(size).copy()
        for name, size in shape.shapes().items()
    }
    assert shape.tokens > tokens
    if padded["tree_mask"].shape[0] != shape.tokens:  # what the plugin makes of it
        padded["tree_mask"] = np.zeros((shape.tokens, 0), np.int32)
    assert padded["tree_mask"].shape[1] == (case == "drafts")
    expected = fork_attention(inputs, tree.expected_pool, tree.attributes)

    operator = tree.operator
    qkv = np.full((shape.tokens, tree.attributes.qkv_size), np.nan, np.float32)
    qkv[:tokens] = inputs["qkv"]
    tensors = StepTensors(*(torch.from_numpy(padded[name]) for name in StepTensors.__slots__))
    sizes = operator.sizes(shape.tokens, shape.rows, shape.groups)
    operator.copy(tree.device_pool[None], torch.from_numpy(padded["slot_copies"][NO_COPIES:].copy()))
    workspace = operator.workspace(sizes.tokens, sizes.parts, tree.dtype)
    out = torch.full((shape.tokens, expected.shape[1]), float("nan"))
    plan = operator.plan_on_device(sizes, tensors)
    result = operator.layer(torch.from_numpy(qkv), tree.device_pool, tensors, plan, sizes, workspace, out).numpy()
    operator.raise_errors()
    agree(result[:tokens], expected, tree.dtype)
    assert (result[tokens:] == 0).all()
