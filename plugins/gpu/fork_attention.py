"""ForkAttention on one device: buffers of a shape, the plan, and the launches of a layer, in the contract's order."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from apar.export.errors import ExecutorError
from apar.plugins.gpu.kernels import attend, write
from apar.plugins.gpu.kernels import plan as device_plan
from apar.plugins.gpu.launch import (
    ATTEND_STAGES,
    ATTEND_WARPS,
    DENSE_WARPS,
    PLAN_WARPS,
    PLAN_WIDTH,
    WIDE_ATTEND_STAGES,
)
from apar.plugins.gpu.sizes import BLOCK_SIZES, HEAD_DIMS, HEADS_PER_PROGRAM, KEY_TILE, StepSizes

ERRORS = {
    attend.BAD_BLOCK.value: "block_table names a block that is not in the pool",
    write.BAD_SLOT.value: "slot_mapping names a slot that is not in the pool",
    write.BAD_COPY.value: "slot_copies names a slot that is not in the pool",
}


@dataclass(frozen=True, slots=True)
class StepTensors:
    """A step's index tensors on the device, int32, shapes as in the step contract."""

    position_ids: Tensor
    query_start: Tensor
    kv_len: Tensor
    block_table: Tensor
    slot_mapping: Tensor
    prefix_rows: Tensor
    prefix_blocks: Tensor
    tree_mask: Tensor


class ForkAttention:
    """The operator for one model: shapes, RoPE and the launches. Knows no step.

    num_heads, num_kv_heads, head_dim, block_size: of the model and its pools, `[2, B, K, block_size, head_dim]`.
    inv_freq: float32 [head_dim / 2] on the device.
    checked: kernels that check every id, skip what is out of bounds and say so in `raise_errors`.
    """

    def __init__(
        self,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        block_size: int,
        inv_freq: Tensor,
        scale: float | None = None,
        rope_scale: float = 1.0,
        checked: bool = False,
    ) -> None:
        if head_dim not in HEAD_DIMS or block_size not in BLOCK_SIZES:
            raise ExecutorError(
                f"the GPU kernels take head_dim {', '.join(map(str, HEAD_DIMS))} and block_size "
                f"{', '.join(map(str, BLOCK_SIZES))}, not {head_dim} and {block_size}; device='cpu' runs any model"
            )
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.block_size = block_size
        self.checked = checked
        self._scale = head_dim**-0.5 if scale is None else scale
        self._rope_scale = rope_scale
        self._inv_freq = inv_freq
        self._pad = triton.next_power_of_2(head_dim)
        self._errors = torch.zeros(1, dtype=torch.int32, device=inv_freq.device)

    def sizes(self, tokens: int, rows: int, groups: int, tile: int = 0) -> StepSizes:
        """Sizes of a step of this model."""
        return StepSizes(tokens, rows, groups, self.num_heads, self.num_kv_heads, tile)

    def workspace(self, tokens: int, parts: int, dtype: torch.dtype) -> Workspace:
        """Buffers for steps of at most so many tokens and partial outputs."""
        device = self._inv_freq.device
        heads, dim = self.num_heads, self.head_dim
        return Workspace(
            q=torch.empty((tokens, heads, dim), dtype=dtype, device=device),
            part_out=torch.empty((max(1, parts), heads, dim), dtype=torch.float32, device=device),
            part_lse=torch.empty((max(1, parts), heads), dtype=torch.float32, device=device),
        )

    def copy(self, pools: Tensor, slot_copies: Tensor) -> None:
        """Slot copies [C, 2] in all layers of `pools` [layers, 2, B, K, block_size, head_dim]."""
        layers, _, blocks, kv_heads, _, dim = pools.shape
        count = slot_copies.shape[0]
        if count == 0:
            return
        scratch = torch.empty((layers, 2, count, kv_heads, dim), dtype=pools.dtype, device=pools.device)
        grid = (count, 2 * triton.cdiv(kv_heads, HEADS_PER_PROGRAM), layers)
        for scatter in (0, 1):
            write.copy_slots[grid](
                pools,
                slot_copies,
                scratch,
                self._errors,
                pools.stride(0),
                blocks,
                kv_heads,
                count,
                HEAD_DIM=dim,
                HEAD_PAD=self._pad,
                BLOCK_SIZE=self.block_size,
                HEADS=HEADS_PER_PROGRAM,
                SCATTER=scatter,
                CHECKED=self.checked,
                num_warps=DENSE_WARPS,
            )

    def plan_on_device(self, sizes: StepSizes, step: StepTensors) -> Tensor:
        """`plan.make_plan` on the device: int32 [sizes.plan_size]."""
        device = step.kv_len.device
        plan = torch.empty(sizes.plan_size, dtype=torch.int32, device=device)
        scratch = torch.empty(sizes.scratch_size, dtype=torch.int32, device=device)
        device_plan.make_plan[(1,)](
            step.query_start,
            step.kv_len,
            step.slot_mapping,
            step.prefix_rows,
            step.prefix_blocks,
            plan,
            scratch,
            sizes.tokens,
            sizes.rows,
            sizes.groups,
            sizes.items,
            sizes.tiles,
            sizes.budget,
            sizes.tile_tokens,
            sizes.heads_per_group,
            int(step.tree_mask.shape[1] > 0),
            int(sizes.splits),
            BLOCK_SIZE=self.block_size,
            WIDTH=PLAN_WIDTH,
            num_warps=PLAN_WARPS,
        )
        return plan

    def layer(
        self,
        qkv: Tensor,
        pool: Tensor,
        step: StepTensors,
        plan: Tensor,
        sizes: StepSizes,
        workspace: Workspace,
        out: Tensor,
    ) -> Tensor:
        """Write K and V of qkv [T, (H + 2 K) D] to `pool`, attend, and return `out` [T, H D]."""
        blocks = pool.shape[1]
        heads, kv_heads, dim = self.num_heads, self.num_kv_heads, self.head_dim
        write.rope_write[(sizes.tokens, triton.cdiv(heads + 2 * kv_heads, HEADS_PER_PROGRAM))](
            qkv,
            workspace.q,
            pool,
            step.position_ids,
            step.slot_mapping,
            self._inv_freq,
            self._errors,
            blocks,
            heads,
            kv_heads,
            self._rope_scale,
            HEAD_DIM=dim,
            HALF_PAD=triton.next_power_of_2(dim // 2),
            BLOCK_SIZE=self.block_size,
            HEADS=HEADS_PER_PROGRAM,
            CHECKED=self.checked,
            num_warps=DENSE_WARPS,
        )
        attend.attend[(sizes.items, kv_heads)](
            workspace.q,
            pool,
            plan,
            step.block_table,
            step.slot_mapping,
            step.tree_mask,
            out,
            workspace.part_out,
            workspace.part_lse,
            self._errors,
            blocks,
            step.block_table.shape[1],
            step.tree_mask.shape[1],
            heads,
            kv_heads,
            self._scale,
            HEAD_DIM=dim,
            HEAD_PAD=self._pad,
            BLOCK_SIZE=self.block_size,
            TILE=sizes.tile,
            KEY_TILE=KEY_TILE,
            CHECKED=self.checked,
            num_warps=ATTEND_WARPS[sizes.tile],
            num_stages=WIDE_ATTEND_STAGES if qkv.dtype == torch.float32 else ATTEND_STAGES,
        )
        # Also where nothing can be split: padding tokens get their zeros here.
        attend.merge[(sizes.tokens, triton.cdiv(heads, HEADS_PER_PROGRAM))](
            plan,
            workspace.part_out,
            workspace.part_lse,
            out,
            sizes.items,
            heads,
            HEAD_DIM=dim,
            HEAD_PAD=self._pad,
            HEADS=HEADS_PER_PROGRAM,
            num_warps=DENSE_WARPS,
        )
        return out

    def raise_errors(self) -> None:
        """Raise ExecutorError for what checked kernels found since the last call. Waits for the device."""
        found = int(self._errors.item())
        if found:
            self._errors.zero_()
            raise ExecutorError("; ".join(text for bit, text in ERRORS.items() if found & bit))


@dataclass(frozen=True, slots=True)
class Workspace:
    """Buffers that every layer of a step uses anew."""

    q: Tensor
    """[T, H, D]"""
    part_out: Tensor
    """float32 [parts, H, D]"""
    part_lse: Tensor
    """float32 [parts, H]"""
