"""The torch executor on a CUDA device."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path

import numpy as np
import torch
import triton

from apar.export.errors import ExecutorError
from apar.plugins.gpu.sizes import LARGE_TILE, SMALL_TILE
from apar.runtime.executor.base import NO_HEADS_REMEDY, Executor
from apar.runtime.executor.check import check_step
from apar.runtime.executor.cuda.buckets import Bucket, Buckets
from apar.runtime.executor.cuda.decoder import CudaDecoder
from apar.runtime.executor.cuda.device import DEVICE_ERRORS, remedy, usable_device
from apar.runtime.executor.cuda.graphs import Graphs, Progress, Recorder, progress_line
from apar.runtime.executor.cuda.host_blocks import HostBlocks
from apar.runtime.executor.cuda.sampling import TorchLogits
from apar.runtime.executor.cuda.step_buffers import Layout, idle_step
from apar.runtime.executor.cuda.step_memory import StepMemory
from apar.runtime.executor.model import Model
from apar.runtime.executor.pool import host_pool_blocks, pool_blocks
from apar.runtime.step import Float32Array, IntArray, StepInputs

DTYPES = ("bfloat16", "float16", "float32")
WEIGHTS = {"16bit": (None, "16bit"), "bf16": ("bfloat16", "16bit"), "fp16": ("float16", "16bit")}
WEIGHTS |= {"int8": (None, "int8"), "fp8": (None, "fp8")}
"""What `weights` may be: the dtype that it asks for, and the format of matrices."""
POOL_SHARE = 0.92
"""Of the device memory that is free once weights and buffers are there; the rest is for the allocator."""
SAMPLING_BYTES = 64
"""Of each logit where rows draw from all of them: sorted values and ids, weights and their sums."""
GRAPH_BYTES = 16 << 20
"""What is left free for each CUDA graph: a few hundred launches and their arguments."""


class CudaExecutor(Executor):
    """Runs an engine's weights on a CUDA device with the kernels of `apar.plugins.gpu`.

    Where Triton interprets (TRITON_INTERPRET=1) everything but the graphs also runs on the CPU: so it is tested.
    """

    name = "torch"
    memory_bound_tokens = 160
    """Dense bfloat16 rate over bandwidth: about 156 on an A100, 184 on an H200, more on an H100."""

    def __init__(
        self,
        engine: Path | Model,
        *,
        num_blocks: int | None = None,
        kv_memory_bytes: int | None = None,
        host_blocks: int | None = None,
        kv_host_memory_bytes: int | None = None,
        device: str = "cuda",
        dtype: str | None = None,
        weights: str = "16bit",
        graphs: bool = True,
        max_rows: int = 256,
        max_step_tokens: int = 1024,
        checked: bool = False,
        progress: Progress | None = None,
    ) -> None:
        """Load an engine directory, or take a model that is in memory.

        num_blocks, kv_memory_bytes: size of the KV pool; by default 92 % of the memory that is free in the end.
        host_blocks, kv_host_memory_bytes: pinned host memory that keeps what is evicted from the pool; none by default.
        device: "cuda" (the current one) or "cuda:N".
        dtype: of arithmetic and KV pool; by default that of the engine's weights, bfloat16 where that is float32.
        weights: "16bit", "bf16" and "fp16" (which are also a `dtype`), or "int8" or "fp8" for 8-bit matrices with a
            scale for each output.
        graphs: capture CUDA graphs; without them every launch costs host time.
        max_rows, max_step_tokens: largest step that there is memory and a graph for; see `step_limits`.
        checked: kernels that check every id (slower); errors are raised after the step.
        Raises EngineError for a damaged engine, ExecutorError for options that do not fit or too little memory.
        """
        model = Model.of(engine)
        self.manifest = manifest = model.manifest
        if weights not in WEIGHTS:
            raise ExecutorError(f"weights must be one of {', '.join(WEIGHTS)}, not {weights!r}")
        meant, form = WEIGHTS[weights]
        if dtype is not None and meant not in (None, dtype):
            raise ExecutorError(f"weights {weights} are {meant}, which is not the dtype {dtype}; give one of the two")
        dtype = dtype or meant or (manifest.dtype if manifest.dtype != "float32" else "bfloat16")
        if dtype not in DTYPES:
            raise ExecutorError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
        if max_rows < 1 or max_step_tokens < max_rows:
            raise ExecutorError("max_rows must be at least 1 and max_step_tokens at least max_rows")
        self._device = usable_device(device)
        self._dtype: torch.dtype = getattr(torch, dtype)
        self._kv_kind = "float32" if dtype == "float32" else "float16"  # as long as bfloat16
        self._checked = checked
        self._progress = progress or progress_line
        decoder = manifest.decoder
        try:
            with self._on_device(), torch.inference_mode():
                self._decoder = CudaDecoder(
                    model,
                    device=self._device,
                    dtype=self._dtype,
                    form=form,
                    checked=checked,
                )
                self._table_width = -(-decoder.max_context // manifest.block_size)
                self._limits = (max_rows, max_step_tokens)
                self._buckets = Buckets(max_rows, max_step_tokens)
                self._layouts: dict[Bucket, Layout] = {}
                self._graphs = Graphs(self._recorder() if graphs else None)
                self._memory = self._make_memory(self._largest())
                self._spare: StepMemory | None = None
                self.host_blocks = host_pool_blocks(manifest, self._kv_kind, host_blocks, kv_host_memory_bytes)
                layers = (decoder.num_layers, 2)
                block = (decoder.num_kv_heads, manifest.block_size, decoder.head_dim)
                self._host: HostBlocks | None = None
                if self.host_blocks:
                    self._host = HostBlocks(self.host_blocks, (*layers, *block), self._dtype, self._device)
                self.num_blocks = self._pool_size(num_blocks, kv_memory_bytes)
                self._pools = torch.zeros((*layers, self.num_blocks, *block), dtype=self._dtype, device=self._device)
                # Compiles the copies, which no graph holds: a fork must not wait for that.
                self._decoder.attention.copy(
                    self._pools, torch.full((1, 2), -1, dtype=torch.int32, device=self._device)
                )
                self._graphs.capture(self._buckets.plain, self._idle, self._progress)
        except torch.OutOfMemoryError as error:
            raise ExecutorError(f"the GPU's memory does not hold the model and its pool: {error}") from error
        except DEVICE_ERRORS as error:
            raise ExecutorError(
                f"the model cannot be made ready on {self._device}: {error}{remedy(error)}; device='cpu' does without"
            ) from error
        self._closed = False
        self._wanted = self._memory.hidden[:0]
        pool_bytes = self._pools.numel() * self._pools.element_size()
        where = torch.cuda.get_device_name(self._device) if self._device.type == "cuda" else "Triton's interpreter"
        self.detail = (
            f"PyTorch {torch.__version__}, Triton {triton.__version__} on {where} ({self._device}), {dtype}, {form} "
            f"weights ({self._decoder.matrix_bytes / 1e9:.2f} GB a step), {len(self._graphs)} CUDA graphs, "
            f"{self.num_blocks} blocks of {manifest.block_size} ({pool_bytes / 1e9:.2f} GB)"
        )
        if self._host is not None:
            self.detail += f", {self.host_blocks} host blocks ({self._host.bytes / 1e9:.2f} GB)"

    @property
    def step_limits(self) -> tuple[int, int]:
        """Larger steps run too, in memory that is allocated then, and without a graph."""
        return self._limits

    @property
    def foreseen_plans(self) -> int:
        """Steps whose plan was made while the device was still at the step before."""
        return self._memory.buffers.foreseen_plans

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that every step reads."""
        return self._decoder.matrix_bytes

    def fill_pools(self) -> None:
        """Fill the pools with random numbers, for measurements of steps that no prefill came before."""
        with torch.inference_mode():
            self._pools.normal_()

    def execute(self, inputs: StepInputs) -> Float32Array:
        """See Executor.execute: logits are copied to the host."""
        return self.logits(inputs).host()

    def logits(self, inputs: StepInputs) -> TorchLogits:
        """See Executor.logits: they stay on the device, and nothing waits for it."""
        if self._closed:
            raise ExecutorError("the torch executor is closed")
        check_step(
            inputs,
            num_blocks=self.num_blocks,
            block_size=self.manifest.block_size,
            vocab_size=self.manifest.decoder.vocab_size,
            host_blocks=self.host_blocks,
        )
        wanted = inputs.logits_rows.size
        try:
            with self._on_device(), torch.inference_mode():
                memory = self._run(inputs)
                if self._checked:
                    self._decoder.attention.raise_errors()
        except torch.OutOfMemoryError as error:
            raise ExecutorError(
                f"the GPU's memory does not hold a step of {inputs.input_ids.size} tokens: {error}"
            ) from error
        except DEVICE_ERRORS as error:
            raise ExecutorError(f"the step failed on the GPU: {error}{remedy(error)}") from error
        self._wanted = memory.hidden[:wanted]
        self._foresee(inputs)
        return TorchLogits(memory.logits[:wanted])

    def expect_drafts(self, chains: bool) -> None:
        """See Executor.expect_drafts: captures the graphs of steps with drafts."""
        try:
            with self._on_device(), torch.inference_mode():
                self._graphs.capture(self._buckets.drafts(chains), self._idle, self._progress)
        except torch.OutOfMemoryError as error:
            raise ExecutorError(
                f"the GPU's memory does not hold the graphs of drafts: {error}; give a smaller KV pool"
            ) from error
        except DEVICE_ERRORS as error:
            raise ExecutorError(f"the graphs of drafts cannot be captured: {error}{remedy(error)}") from error

    def load_draft_heads(self) -> None:
        """See Executor.load_draft_heads; the weights are here already."""
        if self.manifest.draft_heads is None:
            raise ExecutorError(f"the engine has no Medusa heads; {NO_HEADS_REMEDY}")

    def draft_logits(self, wanted: IntArray) -> Float32Array:
        """See Executor.draft_logits."""
        with self._on_device(), torch.inference_mode():
            rows = torch.from_numpy(wanted).to(self._device)
            logits: Float32Array = self._decoder.draft_logits(self._wanted[rows]).cpu().numpy()
            return logits

    def close(self) -> None:
        """Free graphs, weights and pools. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._graphs.clear()
        self._spare = None
        if self._host is not None:
            self._host.close()
        del self._decoder, self._pools, self._memory, self._wanted
        if self._device.type == "cuda":
            with suppress(RuntimeError):  # after an illegal access the device refuses this too
                torch.cuda.empty_cache()

    def _on_device(self) -> AbstractContextManager[object]:
        """Makes the executor's GPU the calling thread's: Triton, streams, events and graphs go by that."""
        return torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext()

    def _recorder(self) -> Recorder | None:
        """What captures graphs, where there are any."""
        return Recorder() if self._device.type == "cuda" else None

    def _run(self, inputs: StepInputs) -> StepMemory:
        tokens, rows, wanted = inputs.input_ids.size, inputs.kv_len.size, inputs.logits_rows.size
        if tokens == 0:
            return self._memory
        words = inputs.tree_mask.shape[1]
        bucket = self._buckets.find(tokens, rows, wanted, words)
        layout = self._layout(bucket or Bucket.exactly(tokens, rows, wanted, words))
        memory = self._memory if bucket is not None else self._memory_for(layout)
        copies = memory.buffers.send(layout, inputs)
        if self._host is not None:
            self._host.swap_out(self._pools, inputs.swap_out)
        self._decoder.attention.copy(self._pools, copies)
        if self._host is not None:
            self._host.swap_in(self._pools, inputs.swap_in)
        replay = self._graphs.get(bucket)
        if replay is None:
            self._forward(layout, memory)
        else:
            replay()
        return memory

    def _forward(self, layout: Layout, memory: StepMemory) -> None:
        wanted = layout.bucket.wanted
        self._decoder.forward(
            memory.buffers.tensors(layout),
            self._pools,
            layout.sizes,
            memory.workspace,
            memory.hidden[:wanted],
            memory.logits[:wanted],
        )

    def _idle(self, bucket: Bucket) -> Callable[[], None]:
        """Launches of a bucket's padding alone: what a graph is captured from."""
        layout, memory = self._layout(bucket), self._memory
        memory.buffers.send(layout, idle_step(layout))
        return lambda: self._forward(layout, memory)

    def _foresee(self, inputs: StepInputs) -> None:
        """Plan the next step while the device is at this one: the commonest has the same rows, a token each."""
        rows = inputs.kv_len.size
        if rows == 0 or inputs.tree_mask.shape[1] or not np.array_equal(inputs.logits_rows, inputs.query_start[1:] - 1):
            return
        bucket = self._buckets.find(rows, rows, rows, 0)
        if bucket is not None:
            self._memory.buffers.foresee(self._layout(bucket), inputs)

    def _layout(self, bucket: Bucket, tile: int = 0) -> Layout:
        """Where a bucket's arrays lie; kept for those that come again. `tile` 0: what suits the bucket."""
        known = self._layouts.get(bucket)
        if known is not None and not tile:
            return known
        tile = LARGE_TILE if bucket.large_tile else tile
        sizes = self._decoder.attention.sizes(bucket.tokens, bucket.rows, bucket.groups, tile)
        layout = Layout(bucket, sizes, self._table_width)
        if self._buckets.find(bucket.tokens, bucket.rows, bucket.wanted, bucket.mask_words) == bucket:
            self._layouts[bucket] = layout
        return layout

    def _largest(self) -> list[Layout]:
        """Layouts that together are at least as large as any step's within the limits."""
        decoder = self.manifest.decoder
        rows, tokens = self._limits
        full = Bucket(tokens, rows, tokens, -(-tokens // 32))
        small = decoder.num_heads // decoder.num_kv_heads <= SMALL_TILE
        tiles = (SMALL_TILE, LARGE_TILE) if small else (LARGE_TILE,)
        buckets = (*self._buckets.plain, *self._buckets.drafts(chains=False))
        return [*(self._layout(full, tile) for tile in tiles), *map(self._layout, buckets)]

    def _memory_for(self, layout: Layout) -> StepMemory:
        """Memory for a step of any size. The usual one stays as it is: graphs know it by its addresses."""
        if self._memory.holds(layout):
            return self._memory
        if self._spare is None or not self._spare.holds(layout):
            self._spare = None
            self._spare = self._make_memory([layout])
        return self._spare

    def _make_memory(self, layouts: list[Layout]) -> StepMemory:
        decoder = self.manifest.decoder
        return StepMemory(
            layouts,
            self._decoder.attention,
            vocab_size=decoder.vocab_size,
            hidden_size=decoder.hidden_size,
            dtype=self._dtype,
            device=self._device,
        )

    def _pool_size(self, num_blocks: int | None, kv_memory_bytes: int | None) -> int:
        if num_blocks is None and kv_memory_bytes is None and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.empty_cache()
            free, _ = torch.cuda.mem_get_info(self._device)
            kv_memory_bytes = int(POOL_SHARE * (free - self._step_bytes() - self._other_bytes()))
            if kv_memory_bytes <= 0:
                raise ExecutorError("the model leaves no memory of the GPU for a KV pool; use weights='int8' or 'fp8'")
        return pool_blocks(self.manifest, self._kv_kind, num_blocks, kv_memory_bytes)

    def _step_bytes(self) -> int:
        """Bytes that the largest step takes beside the buffers: activations, a few of each kind alive at once."""
        decoder = self.manifest.decoder
        width = 2 * decoder.hidden_size + decoder.qkv_size + 3 * decoder.intermediate_size
        return 8 * self._limits[1] * (width + 2 * decoder.hidden_size)

    def _other_bytes(self) -> int:
        """Bytes of what comes after the pool: graphs, those of drafts included, and sampling."""
        graphs = len(self._buckets.plain) + len(self._buckets.drafts(chains=False))
        return GRAPH_BYTES * graphs + SAMPLING_BYTES * self._limits[0] * self.manifest.decoder.vocab_size
