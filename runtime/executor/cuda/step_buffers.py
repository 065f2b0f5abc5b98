"""A step's index arrays, padded to a bucket, in one piece of memory that goes to the device in one copy."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from apar.plugins.gpu.fork_attention import StepTensors
from apar.plugins.gpu.plan import make_plan
from apar.plugins.gpu.sizes import StepSizes
from apar.runtime.executor.cuda.buckets import Bucket
from apar.runtime.step import Int32Array, StepInputs

_ALIGN = 4
"""Arrays begin at multiples of 16 bytes, as the kernels' loads want."""
_STAGES = 2
"""Host copies of the memory: one may still be on its way while the next is filled."""


class Layout:
    """Where each array of a bucket lies in the int32 memory."""

    def __init__(self, bucket: Bucket, sizes: StepSizes, table_width: int) -> None:
        self.bucket = bucket
        self.sizes = sizes
        self.shapes: dict[str, tuple[int, ...]] = {
            "input_ids": (bucket.tokens,),
            "position_ids": (bucket.tokens,),
            "slot_mapping": (bucket.tokens,),
            "query_start": (bucket.rows + 1,),
            "kv_len": (bucket.rows,),
            "logits_rows": (bucket.wanted,),
            "plan": (sizes.plan_size,),
            "tree_mask": (bucket.tokens, bucket.mask_words),
            "block_table": (bucket.rows, table_width),
        }
        self.offsets: dict[str, int] = {}
        at = 0
        for name, shape in self.shapes.items():
            self.offsets[name] = at
            at += -(-int(np.prod(shape)) // _ALIGN) * _ALIGN
        self.size = at

    def arrays(self, memory: Int32Array) -> dict[str, Int32Array]:
        """Views of host memory."""
        return {
            name: memory[self.offsets[name] : self.offsets[name] + int(np.prod(shape))].reshape(shape)
            for name, shape in self.shapes.items()
        }

    def tensors(self, memory: Tensor) -> dict[str, Tensor]:
        """Views of device memory."""
        return {
            name: memory[self.offsets[name] : self.offsets[name] + int(np.prod(shape))].view(shape)
            for name, shape in self.shapes.items()
        }


class StepBuffers:
    """Memory for the largest layout, on the host (twice) and on the device."""

    def __init__(self, size: int, block_size: int, device: torch.device) -> None:
        pinned = device.type == "cuda"
        self.size = size
        self._block_size = block_size
        self._device = torch.zeros(size, dtype=torch.int32, device=device)
        self._host = [torch.zeros(size, dtype=torch.int32, pin_memory=pinned) for _ in range(_STAGES)]
        self._sent = [torch.cuda.Event() if pinned else None for _ in range(_STAGES)]
        self._turn = 0

    def tensors(self, layout: Layout) -> dict[str, Tensor]:
        """The device's arrays of a layout: always at the same addresses."""
        return layout.tensors(self._device)

    def send(self, layout: Layout, inputs: StepInputs) -> None:
        """Pad a step to `layout`, plan it and start the copy to the device.

        Padding tokens write nothing, padding rows are never read, padding logits are those of token 0.
        """
        self._turn = (self._turn + 1) % _STAGES
        host, sent = self._host[self._turn], self._sent[self._turn]
        if sent is not None:
            sent.synchronize()
        self._fill(layout, layout.arrays(host.numpy()), inputs)
        self._device[: layout.size].copy_(host[: layout.size], non_blocking=True)
        if sent is not None:
            sent.record()

    def _fill(self, layout: Layout, arrays: dict[str, Int32Array], inputs: StepInputs) -> None:
        tokens, rows, wanted = inputs.input_ids.size, inputs.kv_len.size, inputs.logits_rows.size
        for name, used, fill in (
            ("input_ids", tokens, 0),
            ("position_ids", tokens, 0),
            ("slot_mapping", tokens, -1),
            ("query_start", rows + 1, tokens),
            ("kv_len", rows, 0),
            ("logits_rows", wanted, 0),
        ):
            arrays[name][:used] = getattr(inputs, name)
            arrays[name][used:] = fill
        width = min(inputs.block_table.shape[1], arrays["block_table"].shape[1])
        arrays["block_table"][:rows, :width] = inputs.block_table[:, :width]
        if layout.bucket.mask_words:
            arrays["tree_mask"][:tokens] = inputs.tree_mask
        make_plan(
            layout.sizes,
            query_start=arrays["query_start"],
            kv_len=arrays["kv_len"],
            slot_mapping=arrays["slot_mapping"],
            prefix_rows=inputs.prefix_rows,
            prefix_blocks=inputs.prefix_blocks,
            block_size=self._block_size,
            masked=layout.bucket.mask_words > 0,
            out=arrays["plan"],
        )


def attention_tensors(tensors: dict[str, Tensor]) -> StepTensors:
    """What the attention kernels take of a layout's arrays; the plan stands for the prefixes."""
    nothing = tensors["plan"][:1]
    return StepTensors(
        position_ids=tensors["position_ids"],
        query_start=tensors["query_start"],
        kv_len=tensors["kv_len"],
        block_table=tensors["block_table"],
        slot_mapping=tensors["slot_mapping"],
        prefix_rows=nothing,
        prefix_blocks=nothing[:0],
        tree_mask=tensors["tree_mask"],
    )
