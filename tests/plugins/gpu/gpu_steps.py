"""Steps of random trees through the GPU kernels and through the reference of tests/plugins/reference.py."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from fork_steps import Branch, Row, Tree
from reference import Array, Attributes, fork_attention

from apar.plugins.gpu.fork_attention import ForkAttention, StepTensors
from apar.plugins.gpu.plan import make_plan
from apar.plugins.gpu.sizes import PART_FIELDS, StepSizes

PLANNED = ("query_start", "kv_len", "slot_mapping", "prefix_rows", "prefix_blocks")
TOLERANCE = {torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Of the outputs' size. 16 bits: q, k, v and the weights are rounded to 11 or 8 bits."""


@dataclass
class Result:
    out: npt.NDArray[np.float32]
    plan: npt.NDArray[np.int32]
    sizes: StepSizes

    @property
    def prefix_tokens(self) -> int:
        """Tokens that a prefix pass has read keys for."""
        parts = self.plan[-PART_FIELDS * self.sizes.tokens :].reshape(-1, PART_FIELDS)
        return int((parts[:, 5] > 0).sum())


class GpuTree(Tree):
    """A `Tree` whose steps run on the GPU kernels."""

    def __init__(
        self, attributes: Attributes, blocks: int, seed: int, dtype: torch.dtype = torch.float32, checked: bool = False
    ) -> None:
        super().__init__(attributes, blocks, seed)
        self.dtype = dtype
        self.device_pool = torch.full(self.pool.shape, float("nan"), dtype=dtype)
        self.operator = ForkAttention(
            num_heads=attributes.num_heads,
            num_kv_heads=attributes.num_kv_heads,
            head_dim=attributes.head_dim,
            block_size=attributes.block_size,
            inv_freq=torch.from_numpy(attributes.rope_inv_freq),
            rope_scale=attributes.rope_scale,
            checked=checked,
        )

    def grown(self, length: int) -> Branch:
        """A root branch whose keys and values are there already: the interpreter is too slow for long prefills."""
        branch = self.root()
        self.extend(branch, length)
        slots = np.array([self.slot(branch, key) for key in range(length)])
        size = self.attributes.block_size
        shape = (2, length, self.attributes.num_kv_heads, self.attributes.head_dim)
        values = torch.from_numpy(self.random.standard_normal(shape, dtype=np.float32)).to(self.dtype)
        self.device_pool[:, slots // size, :, slots % size] = values.transpose(0, 1)
        self.expected_pool[:, slots // size, :, slots % size] = values.float().numpy().transpose(1, 0, 2, 3)
        return branch

    def tensors(self, inputs: dict[str, Array]) -> StepTensors:
        names = StepTensors.__slots__
        return StepTensors(*(torch.from_numpy(np.ascontiguousarray(inputs[name])) for name in names))

    def planned(self, inputs: dict[str, Array], sizes: StepSizes, share: bool = True) -> npt.NDArray[np.int32]:
        return make_plan(
            sizes,
            **{name: inputs[name] for name in PLANNED},
            block_size=self.attributes.block_size,
            masked=inputs["tree_mask"].shape[1] > 0,
            share=share,
        )

    def launch(self, inputs: dict[str, Array], share: bool = True, tile: int = 0) -> Result:
        """One step on the kernels, with the outputs poisoned before it."""
        tokens, rows = len(inputs["position_ids"]), len(inputs["kv_len"])
        sizes = self.operator.sizes(tokens, rows, len(inputs["prefix_blocks"]), tile)
        plan = self.planned(inputs, sizes, share)
        workspace = self.operator.workspace(sizes.tokens, sizes.parts, self.dtype)
        for buffer in (workspace.q, workspace.part_out, workspace.part_lse):
            buffer.fill_(float("nan"))
        out = torch.full((tokens, self.attributes.num_heads * self.attributes.head_dim), float("nan"), dtype=self.dtype)
        self.operator.copy(self.device_pool[None], torch.from_numpy(inputs["slot_copies"]))
        qkv = torch.from_numpy(inputs["qkv"]).to(self.dtype)
        device_plan = torch.from_numpy(plan)
        self.operator.layer(qkv, self.device_pool, self.tensors(inputs), device_plan, sizes, workspace, out)
        self.operator.raise_errors()
        return Result(out.float().numpy(), plan, sizes)

    def checked_step(self, rows: list[Row], share: bool = True, tile: int = 0) -> Result:
        """A step on the kernels and on the reference; they must agree."""
        inputs = self.inputs(rows, share)
        if self.dtype != torch.float32:
            real = inputs["slot_mapping"] >= 0
            inputs["qkv"][real] = torch.from_numpy(inputs["qkv"][real]).to(self.dtype).float().numpy()
        expected = fork_attention(inputs, self.expected_pool, self.attributes)
        result = self.launch(inputs, share, tile)
        agree(result.out, expected, self.dtype)
        return result


def agree(out: Array, expected: Array, dtype: torch.dtype) -> None:
    assert np.isfinite(out).all()
    limit = TOLERANCE[dtype] * np.abs(expected).max(initial=1.0)
    np.testing.assert_allclose(out, expected, rtol=0, atol=limit)


def tree_mask(parents: list[int]) -> npt.NDArray[np.uint32]:
    """Mask words [n, W] of draft nodes with these parents (-1: the path)."""
    words = np.zeros((len(parents), -(-len(parents) // 32)), np.uint32)
    for node, parent in enumerate(parents):
        if parent >= 0:
            words[node] = words[parent]
        words[node, node // 32] |= np.uint32(1 << (node % 32))
    return words


def random_rows(tree: GpuTree, branches: list[Branch], masked: bool) -> list[Row]:
    """Something for every branch to do: a token, a chunk, draft nodes; padding behind some."""
    rows = []
    for branch in branches:
        count = int(tree.random.choice([1, 1, 2, 5]))
        mask = None
        if masked and tree.random.random() < 0.6:
            count = int(tree.random.choice([2, 5, 34]))
            mask = tree_mask([int(tree.random.integers(-1, node)) if node else -1 for node in range(count)])
        rows.append(Row(branch, count, mask, padding=int(tree.random.choice([0, 0, 0, 2]))))
    return rows
