"""A step's index arrays, padded to a bucket, in one piece of memory that goes to the device in one copy."""

from __future__ import annotations

import math
from dataclasses import dataclass
from weakref import WeakKeyDictionary

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
COPIES_PER_ROW = 16
"""Slot copies that there is room for, on average: a fork brings up to block_size - 1, an accepted draft its depth."""


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
            # The last one: what a step does not use of it need not be sent.
            "slot_copies": (COPIES_PER_ROW * bucket.rows, 2),
        }
        self.offsets: dict[str, int] = {}
        self._ends: dict[str, int] = {}
        at = 0
        for name, shape in self.shapes.items():
            self.offsets[name] = at
            self._ends[name] = at + math.prod(shape)
            at = -(-self._ends[name] // _ALIGN) * _ALIGN
        self.size = at

    def arrays(self, memory: Int32Array) -> dict[str, Int32Array]:
        """Views of host memory."""
        return {
            name: memory[self.offsets[name] : self._ends[name]].reshape(shape) for name, shape in self.shapes.items()
        }

    def tensors(self, memory: Tensor) -> dict[str, Tensor]:
        """Views of device memory."""
        return {name: memory[self.offsets[name] : self._ends[name]].view(shape) for name, shape in self.shapes.items()}


class StepBuffers:
    """Memory for the largest layout, on the host (twice) and on the device.

    Attributes:
        size: int32 elements.
        foreseen_plans: plans that were ready before their step was known (`foresee`).
    """

    def __init__(self, size: int, block_size: int, device: torch.device) -> None:
        pinned = device.type == "cuda"
        self.size = size
        self.foreseen_plans = 0
        self._block_size = block_size
        self._device = torch.zeros(size, dtype=torch.int32, device=device)
        self._host = [torch.zeros(size, dtype=torch.int32, pin_memory=pinned) for _ in range(_STAGES)]
        self._sent = [torch.cuda.Event() if pinned else None for _ in range(_STAGES)]
        self._turn = 0
        # Views of the host's memory and of the device's slot copies, by layout: making them anew costs more than
        # filling them. A layout that is forgotten takes its own along.
        self._views: WeakKeyDictionary[Layout, _Views] = WeakKeyDictionary()
        self._foreseen: _Foreseen | None = None

    def tensors(self, layout: Layout) -> dict[str, Tensor]:
        """The device's arrays of a layout: always at the same addresses."""
        return layout.tensors(self._device)

    def send(self, layout: Layout, inputs: StepInputs) -> Tensor:
        """Pad a step to `layout`, plan it and start the copy to the device, on the current stream.

        Padding tokens write nothing, padding rows are never read, padding logits are those of token 0.
        Returns the step's slot copies [C, 2] on the device; they are no part of what graphs hold.
        """
        self._turn = (self._turn + 1) % _STAGES
        host, sent = self._host[self._turn], self._sent[self._turn]
        views = self._views.get(layout)
        if views is None:
            views = _Views([layout.arrays(each.numpy()) for each in self._host], self.tensors(layout)["slot_copies"])
            self._views[layout] = views
        if sent is not None:
            sent.synchronize()
        self._fill(layout, views.host[self._turn], inputs)
        copies = inputs.slot_copies.shape[0]
        fits = copies <= layout.shapes["slot_copies"][0]
        used = layout.offsets["slot_copies"] + (2 * copies if fits else 0)
        self._device[:used].copy_(host[:used], non_blocking=True)
        if sent is not None:
            sent.record()
        if not fits:
            return torch.from_numpy(inputs.slot_copies).to(self._device.device)
        return views.copies[:copies]

    def foresee(self, layout: Layout, inputs: StepInputs) -> None:
        """Plan the step that follows `inputs` if every row goes on with one token: `layout` is that step's.

        To be called while the device works. Where the step turns out to be another, the plan is made then.
        """
        rows = inputs.kv_len.size
        foreseen = _Foreseen(
            layout, inputs.kv_len + 1, inputs.prefix_rows.copy(), inputs.prefix_blocks.copy(), np.empty(0, np.int32)
        )
        starts = np.minimum(np.arange(layout.bucket.rows + 1, dtype=np.int32), rows)
        slots = np.full(layout.bucket.tokens, -1, np.int32)
        slots[:rows] = 0
        lengths = np.zeros(layout.bucket.rows, np.int32)
        lengths[:rows] = foreseen.kv_len
        foreseen.plan = make_plan(
            layout.sizes,
            query_start=starts,
            kv_len=lengths,
            slot_mapping=slots,
            prefix_rows=foreseen.prefix_rows,
            prefix_blocks=foreseen.prefix_blocks,
            block_size=self._block_size,
            masked=False,
        )
        self._foreseen = foreseen

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
            words = inputs.tree_mask.shape[1]
            arrays["tree_mask"][:tokens, :words] = inputs.tree_mask
            arrays["tree_mask"][:tokens, words:] = 0
        copies = inputs.slot_copies.shape[0]
        if copies <= arrays["slot_copies"].shape[0]:
            arrays["slot_copies"][:copies] = inputs.slot_copies
        foreseen, self._foreseen = self._foreseen, None
        if foreseen is not None and foreseen.layout is layout and foreseen.is_of(inputs):
            arrays["plan"][:] = foreseen.plan
            self.foreseen_plans += 1
            return
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


@dataclass(frozen=True, slots=True)
class _Views:
    host: list[dict[str, Int32Array]]
    copies: Tensor


@dataclass(slots=True)
class _Foreseen:
    """A step of one token a row that may come, and its plan: all that a plan depends on."""

    layout: Layout
    kv_len: Int32Array
    prefix_rows: Int32Array
    prefix_blocks: Int32Array
    plan: Int32Array

    def is_of(self, inputs: StepInputs) -> bool:
        """Whether `inputs` is that step."""
        rows = self.kv_len.size
        return (
            inputs.input_ids.size == rows == inputs.kv_len.size
            and np.array_equal(inputs.kv_len, self.kv_len)
            and np.array_equal(inputs.prefix_rows, self.prefix_rows)
            and np.array_equal(inputs.prefix_blocks, self.prefix_blocks)
            and int(inputs.query_start[-1]) == rows
            and int(np.diff(inputs.query_start).min()) == 1
            and int(inputs.slot_mapping.min()) >= 0
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


def idle_step(layout: Layout) -> StepInputs:
    """A step of a bucket's padding alone."""

    def zeros(*shape: int) -> np.ndarray[tuple[int, ...], np.dtype[np.int32]]:
        return np.zeros(shape, np.int32)

    return StepInputs(
        input_ids=zeros(0),
        position_ids=zeros(0),
        query_start=zeros(1),
        kv_len=zeros(0),
        block_table=zeros(0, 1),
        slot_mapping=zeros(0),
        slot_copies=zeros(0, 2),
        prefix_rows=zeros(1),
        prefix_blocks=zeros(0),
        tree_mask=zeros(0, layout.bucket.mask_words),
        logits_rows=zeros(0),
    )
