"""The torch executor on a CUDA device."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import triton

from apar.export.engine_weights import read_weights
from apar.export.errors import ExecutorError
from apar.export.manifest import Manifest
from apar.plugins.gpu.dense import WEIGHT_FORMATS
from apar.plugins.gpu.kernels.dot import INTERPRETED
from apar.plugins.gpu.sizes import LARGE_TILE, SMALL_TILE
from apar.runtime.executor.base import NO_HEADS_REMEDY, Executor
from apar.runtime.executor.check import check_step
from apar.runtime.executor.cuda.buckets import Bucket, Buckets
from apar.runtime.executor.cuda.decoder import CudaDecoder, Model
from apar.runtime.executor.cuda.sampling import TorchLogits
from apar.runtime.executor.cuda.step_buffers import Layout, StepBuffers
from apar.runtime.executor.pool import pool_blocks
from apar.runtime.step import Float32Array, IntArray, StepInputs

logger = logging.getLogger(__name__)

DTYPES = ("bfloat16", "float16", "float32")
POOL_SHARE = 0.92
"""Of the device memory that is free once weights, buffers and graphs are there; the rest is for the allocator."""

DRAFT_WORDS = 4
"""Words of the widest tree mask that there are buffers for from the start: 128 draft nodes a row."""

Progress = Callable[[int, int], None]
"""Is told how many of how many CUDA graphs have been captured."""


@dataclass(frozen=True, slots=True)
class _Room:
    """What the buffers hold."""

    size: int
    wanted: int
    tokens: int
    parts: int


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
        dtype: of arithmetic and KV pool; by default that of the engine's weights, bfloat16 where that is float32.
        weights: "16bit", or "int8" or "fp8" for 8-bit matrices with a scale for each output.
        graphs: capture CUDA graphs; without them every launch costs host time.
        max_rows, max_step_tokens: largest step that has a graph.
        checked: kernels that check every id (slower); errors are raised after the step.
        Raises EngineError for a damaged engine, ExecutorError for options that do not fit or too little memory.
        """
        model = engine if isinstance(engine, Model) else Model(Manifest.load(engine), read_weights(engine))
        self.manifest = manifest = model.manifest
        dtype = dtype or (manifest.dtype if manifest.dtype != "float32" else "bfloat16")
        if dtype not in DTYPES:
            raise ExecutorError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
        if weights not in WEIGHT_FORMATS:
            raise ExecutorError(f"weights must be one of {', '.join(WEIGHT_FORMATS)}, not {weights!r}")
        if max_rows < 1 or max_step_tokens < max_rows:
            raise ExecutorError("max_rows must be at least 1 and max_step_tokens at least max_rows")
        self._device = _usable(device)
        self._dtype: torch.dtype = getattr(torch, dtype)
        self._checked = checked
        self._graphs = graphs and self._device.type == "cuda"
        decoder = manifest.decoder
        try:
            with torch.inference_mode():
                self._decoder = CudaDecoder(
                    model,
                    device=self._device,
                    dtype=self._dtype,
                    form=weights,
                    checked=checked,
                )
                self._table_width = -(-decoder.max_context // manifest.block_size)
                self._buckets = Buckets(max_rows, max_step_tokens)
                self._layouts: dict[Bucket, Layout] = {}
                self._captured: dict[Bucket, torch.cuda.CUDAGraph] = {}
                self._room: _Room | None = None
                self._reserve(self._largest(max_rows, max_step_tokens))
                self.num_blocks = self._pool_size(num_blocks, kv_memory_bytes)
                shape = (
                    decoder.num_layers,
                    2,
                    self.num_blocks,
                    decoder.num_kv_heads,
                    manifest.block_size,
                    decoder.head_dim,
                )
                self._pools = torch.zeros(shape, dtype=self._dtype, device=self._device)
                if self._graphs:
                    self._capture_all(progress or _line)
        except torch.OutOfMemoryError as error:
            raise ExecutorError(f"the GPU's memory does not hold the model and its pool: {error}") from error
        self._closed = False
        self._wanted = self._hidden[:0]
        pool_bytes = self._pools.numel() * self._pools.element_size()
        where = torch.cuda.get_device_name(self._device) if self._device.type == "cuda" else "Triton's interpreter"
        self.detail = (
            f"PyTorch {torch.__version__}, Triton {triton.__version__} on {where}, {dtype}, {weights} weights "
            f"({self._decoder.matrix_bytes / 1e9:.2f} GB a step), {len(self._captured)} CUDA graphs, "
            f"{self.num_blocks} blocks of {manifest.block_size} ({pool_bytes / 1e9:.2f} GB)"
        )

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
        )
        wanted = inputs.logits_rows.size
        try:
            with torch.inference_mode():
                self._run(inputs)
                if self._checked:
                    self._decoder.attention.raise_errors()
        except RuntimeError as error:
            raise ExecutorError(f"the step failed on the GPU: {error}") from error
        self._wanted = self._hidden[:wanted]
        return TorchLogits(self._logits[:wanted])

    def load_draft_heads(self) -> None:
        """See Executor.load_draft_heads; the weights are here already."""
        if self.manifest.draft_heads is None:
            raise ExecutorError(f"the engine has no Medusa heads; {NO_HEADS_REMEDY}")

    def draft_logits(self, wanted: IntArray) -> Float32Array:
        """See Executor.draft_logits."""
        with torch.inference_mode():
            rows = torch.from_numpy(wanted).to(self._device)
            logits: Float32Array = self._decoder.draft_logits(self._wanted[rows]).cpu().numpy()
            return logits

    def close(self) -> None:
        """Free graphs, weights and pools. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._captured.clear()
        del self._decoder, self._pools, self._buffers, self._workspace, self._logits, self._hidden, self._wanted
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _run(self, inputs: StepInputs) -> None:
        tokens, rows, wanted = inputs.input_ids.size, inputs.kv_len.size, inputs.logits_rows.size
        if tokens == 0:
            return
        if inputs.slot_copies.shape[0]:
            copies = torch.from_numpy(inputs.slot_copies).to(self._device, non_blocking=True)
            self._decoder.attention.copy(self._pools, copies)
        words = inputs.tree_mask.shape[1]
        bucket = self._buckets.find(tokens, rows, wanted, words)
        if bucket is None:
            layout = self._layout(Bucket(tokens, rows, wanted, words, mixed=tokens > 2 * rows))
            self._reserve([layout])
        else:
            layout = self._known_layout(bucket)
        self._buffers.send(layout, inputs)
        graph = None if bucket is None else self._captured.get(bucket)
        if graph is None:
            self._forward(layout)
        else:
            graph.replay()

    def _forward(self, layout: Layout) -> None:
        wanted = layout.bucket.wanted
        self._decoder.forward(
            self._buffers.tensors(layout),
            self._pools,
            layout.sizes,
            self._workspace,
            self._hidden[:wanted],
            self._logits[:wanted],
        )

    def _layout(self, bucket: Bucket, tile: int = 0) -> Layout:
        attention = self._decoder.attention
        tile = LARGE_TILE if bucket.mixed else tile
        sizes = attention.sizes(bucket.tokens, bucket.rows, bucket.groups, tile)
        return Layout(bucket, sizes, self._table_width)

    def _known_layout(self, bucket: Bucket) -> Layout:
        if bucket not in self._layouts:
            self._layouts[bucket] = self._layout(bucket)
        return self._layouts[bucket]

    def _largest(self, max_rows: int, max_step_tokens: int) -> list[Layout]:
        """Layouts that together are at least as large as any step's, those with drafts included."""
        decoder = self.manifest.decoder
        full = Bucket(max_step_tokens, max_rows, max_step_tokens, DRAFT_WORDS)
        small = decoder.num_heads // decoder.num_kv_heads <= SMALL_TILE
        tiles = (SMALL_TILE, LARGE_TILE) if small else (LARGE_TILE,)
        return [*(self._layout(full, tile) for tile in tiles), *map(self._known_layout, self._buckets.all)]

    def _reserve(self, layouts: list[Layout]) -> None:
        """Buffers that hold each of `layouts`. Graphs know the old ones by their addresses and go with them."""
        decoder = self.manifest.decoder
        size = max(layout.size for layout in layouts)
        wanted = max(layout.bucket.wanted for layout in layouts)
        tokens = max(layout.bucket.tokens for layout in layouts)
        parts = max(layout.sizes.parts for layout in layouts)
        if self._room is not None:
            had = self._room
            size, wanted = max(size, had.size), max(wanted, had.wanted)
            tokens, parts = max(tokens, had.tokens), max(parts, had.parts)
            if had == _Room(size, wanted, tokens, parts):
                return
            logger.warning(
                "a step of %d tokens is larger than expected: CUDA graphs are dropped, load with a larger "
                "max_step_tokens and max_rows",
                layouts[0].bucket.tokens,
            )
        self._captured.clear()
        self._room = _Room(size, wanted, tokens, parts)
        self._buffers = StepBuffers(size, self.manifest.block_size, self._device)
        self._logits = torch.zeros((wanted, decoder.vocab_size), dtype=torch.float32, device=self._device)
        self._hidden = torch.zeros((wanted, decoder.hidden_size), dtype=self._dtype, device=self._device)
        self._workspace = self._decoder.attention.workspace(tokens, parts, self._dtype)

    def _pool_size(self, num_blocks: int | None, kv_memory_bytes: int | None) -> int:
        kind = "float32" if self._dtype == torch.float32 else "float16"
        if num_blocks is None and kv_memory_bytes is None and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.empty_cache()
            free, _ = torch.cuda.mem_get_info(self._device)
            kv_memory_bytes = int(POOL_SHARE * (free - self._step_bytes()))
            if kv_memory_bytes <= 0:
                raise ExecutorError("the model leaves no memory of the GPU for a KV pool; use weights='int8' or 'fp8'")
        return pool_blocks(self.manifest, kind, num_blocks, kv_memory_bytes)

    def _step_bytes(self) -> int:
        """Bytes that the largest step takes beside the buffers: activations, a few of each kind alive at once."""
        decoder = self.manifest.decoder
        width = 2 * decoder.hidden_size + decoder.qkv_size + 3 * decoder.intermediate_size
        return 8 * max(bucket.tokens for bucket in self._buckets.all) * (width + 2 * decoder.hidden_size)

    def _capture_all(self, progress: Progress) -> None:
        """Compile and capture every bucket, the largest first, in one memory pool."""
        buckets = self._buckets.all
        pool = torch.cuda.graph_pool_handle()
        started = time.perf_counter()
        for done, bucket in enumerate(buckets):
            progress(done, len(buckets))
            layout = self._known_layout(bucket)
            self._buffers.send(layout, idle_step(layout))
            self._forward(layout)
            torch.cuda.synchronize(self._device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                self._forward(layout)
            self._captured[bucket] = graph
        progress(len(buckets), len(buckets))
        logger.info("captured %d CUDA graphs in %.1f s", len(buckets), time.perf_counter() - started)


def _usable(name: str) -> torch.device:
    """The device, if the kernels run on it. Raises ExecutorError with what to do."""
    device = torch.device(name)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ExecutorError(
                "PyTorch finds no CUDA device; install a CUDA build of torch and check `nvidia-smi`, or run on the CPU"
            )
        if torch.cuda.get_device_capability(device) < (8, 0):
            raise ExecutorError(
                f"{torch.cuda.get_device_name(device)} is too old: the kernels need compute 8.0 or newer"
            )
        return device if ":" in name else torch.device("cuda", torch.cuda.current_device())
    if not INTERPRETED.value:
        raise ExecutorError(
            f"the GPU kernels run on CUDA devices, not on {name!r}; use the torch executor without device"
        )
    return device


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


def _line(done: int, total: int) -> None:
    """Progress as a line that overwrites itself, where someone looks."""
    if sys.stderr.isatty():
        print(
            f"\rcapturing CUDA graphs: {done} of {total}",
            end="\n" if done == total else "",
            file=sys.stderr,
            flush=True,
        )
