"""Executor on a TensorRT engine, through TensorRT's Python API and the CUDA driver alone.

The pools are the executor's: each is bound as `past_kv_{i}` and as `present_kv_{i}` at one address, and a step at load
proves that TensorRT writes them in place. Two execution contexts, one a profile, share one piece of scratch memory.
Decoding steps are padded to buckets; a shape that comes again is captured as a CUDA graph and from then on replayed.
"""

from __future__ import annotations

import contextlib
import logging
import re
from pathlib import Path

import numpy as np
import numpy.typing as npt

from apar.export.errors import ExecutorError, PluginError
from apar.export.manifest import Manifest, TensorRtEngine
from apar.export.tensorrt_api import load_plugins, load_tensorrt, release
from apar.export.tensorrt_profiles import DECODE, DRAFT_TOKENS, MIXED, most_tokens
from apar.plugins.cuda_driver import CudaDevice
from apar.runtime.executor.base import NO_HEADS_REMEDY, Executor
from apar.runtime.executor.check import check_step
from apar.runtime.executor.pool import MAX_SLOTS
from apar.runtime.executor.tensorrt_graphs import StepGraphs
from apar.runtime.executor.tensorrt_heads import TensorRtHeads
from apar.runtime.executor.tensorrt_self_test import PoolReader, check_pools, check_tensors
from apar.runtime.executor.tensorrt_session import ErrorLog, TensorRtContext, TensorRtSession
from apar.runtime.executor.tensorrt_step import Staging, StepShape, choose_shape, staging_bytes
from apar.runtime.step import Float32Array, IntArray, StepInputs

logger = logging.getLogger(__name__)

KERNELS_NAME = "apar_gpu.table"
ENGINE_NAME, HEADS_NAME = "rank0.engine", "rank0_medusa.engine"


class TensorRtExecutor(Executor):
    """Runs an engine directory that was built with `--format tensorrt`."""

    name = "tensorrt"
    memory_bound_tokens = DRAFT_TOKENS

    def __init__(
        self,
        engine: Path,
        *,
        num_blocks: int | None = None,
        kv_memory_bytes: int | None = None,
        kv_fraction: float | None = None,
        cuda_graphs: bool = True,
        device: int | str = 0,
    ) -> None:
        """Load an engine directory.

        num_blocks, kv_memory_bytes: size of the KV pools; by default `kv_fraction` of the memory that is free after
            the engine is loaded (by default what the engine was built for), less what its Medusa heads will need.
        cuda_graphs: replay decoding steps of a shape that came before as CUDA graphs.
        device: number of the GPU, or "cuda" (the first) or "cuda:N".
        Raises EngineError for a damaged engine, PluginError where TensorRT, its plugins or the driver are missing,
        ExecutorError for an engine of another TensorRT, GPU or kind, and where TensorRT does not write in place.
        """
        self._closed = True
        self._engine = engine
        self.manifest = Manifest.load(engine)
        self._facts = facts = _facts(engine, self.manifest)
        self._trt = trt = load_tensorrt()
        if release(trt) != facts.version:
            raise ExecutorError(
                f"{engine} was built with TensorRT {facts.version}, but {release(trt)} is installed: "
                f"build the engine again here, or: pip install 'tensorrt=={facts.version}.*'"
            )
        self._device = CudaDevice(_ordinal(device))
        found = self._device.compute_capability
        if found != facts.compute_capability:
            raise ExecutorError(
                f"{engine} was built on {facts.device} (compute capability {facts.compute_capability}), but GPU "
                f"{self._device.ordinal} is {self._device.name} ({found}): build the engine again on this GPU"
            )
        if self._device.name != facts.device:
            logger.warning(
                "%s was built on %s and runs on %s: TensorRT's choices may be slow here; build it again on this GPU",
                engine, facts.device, self._device.name,
            )  # fmt: skip
        self._library = load_plugins(trt)
        if (engine / KERNELS_NAME).is_file():
            self._library.add_kernels(engine / KERNELS_NAME)
        self._library.check_kernels(found)
        self._memory: list[int] = []
        self._host: dict[int, npt.NDArray[np.uint8]] = {}
        self._stream = 0
        self._session: TensorRtSession | None = None
        self._contexts: list[TensorRtContext] = []
        self._graphs: StepGraphs | None = None
        self._heads: TensorRtHeads | None = None
        self._bound_pools = False
        self._closed = False
        self._log = ErrorLog(trt)
        try:
            self._device.activate()
            self._stream = self._device.make_stream()
            self._load(engine / ENGINE_NAME)
            self._make_pools(num_blocks, kv_memory_bytes, facts.kv_fraction if kv_fraction is None else kv_fraction)
            layer_bytes = self._block_bytes // self.manifest.decoder.num_layers
            pools = PoolReader(self._device, self._stream, self._pools, self.num_blocks, layer_bytes)
            check_pools(self._execute, self.manifest, self._library, pools)
            if cuda_graphs:
                self._graphs = StepGraphs(self._device, self._stream, self._own_context)
        except PluginError as error:
            self.close()
            raise ExecutorError(f"{engine} cannot be loaded on {self._device.name}: {error}") from error
        except BaseException:
            self.close()
            raise
        pool_bytes = self.num_blocks * self._block_bytes
        self.detail = (
            f"TensorRT {release(trt)} on {self._device.name}, {self.num_blocks} blocks of "
            f"{self.manifest.block_size} ({self.manifest.kv_dtype}, {pool_bytes / 2**20:.0f} MiB), up to "
            f"{facts.max_rows} rows and {facts.max_tokens} tokens a step{', CUDA graphs' if cuda_graphs else ''}"
        )

    @property
    def step_limits(self) -> tuple[int, int]:
        """Rows and tokens that the engine was built for."""
        return self._facts.max_rows, self._facts.max_tokens

    def execute(self, inputs: StepInputs) -> Float32Array:
        """See Executor.execute."""
        return self._execute(inputs)

    def _execute(self, inputs: StepInputs, *, mixed: bool = False) -> Float32Array:
        if self._closed:
            raise ExecutorError("the tensorrt executor is closed")
        check_step(
            inputs,
            num_blocks=self.num_blocks,
            block_size=self.manifest.block_size,
            vocab_size=self.manifest.decoder.vocab_size,
        )
        shape = choose_shape(inputs, self._facts, mixed=mixed)
        self._log.clear()
        try:
            self._device.activate()  # the caller's thread may be another than last time
            offsets, size = self._staging.fill(inputs, shape)
            self._device.to_device(self._indices, self._pinned[:size], self._stream)
            if shape.profile != DECODE or self._graphs is None or not self._graphs.run(shape):
                context = self._contexts[shape.profile]
                self._bind_step(context, shape, offsets)
                context.enqueue()
            host, address = self._logits(shape)
            wanted = host[: inputs.logits_rows.size]
            if wanted.size:
                self._device.to_host(wanted, address, self._stream)
            self._device.synchronize(self._stream)
        except PluginError as error:
            raise ExecutorError(f"the step failed on the GPU: {error}{self._log}") from error
        return wanted

    def load_draft_heads(self) -> None:
        """See Executor.load_draft_heads."""
        if self._closed:
            raise ExecutorError("the tensorrt executor is closed")
        if self.manifest.draft_heads is None:
            raise ExecutorError(f"{self._engine} has no Medusa heads; {NO_HEADS_REMEDY}")
        if self._heads is None:
            path = self._engine / HEADS_NAME
            self._device.activate()
            try:
                session = TensorRtSession(self._trt, path, self._device, self._stream, self._log)
                self._heads = TensorRtHeads(session, self._device, self._stream, self.manifest, self._hidden)
            except PluginError as error:
                raise ExecutorError(
                    f"{path} cannot be loaded: {error}; leave more memory free (kv_fraction)"
                ) from error

    def draft_logits(self, wanted: IntArray) -> Float32Array:
        """See Executor.draft_logits."""
        if self._heads is None or self._closed:
            return super().draft_logits(wanted)
        self._log.clear()
        try:
            self._device.activate()
            return self._heads.run(wanted)
        except PluginError as error:
            raise ExecutorError(f"the draft heads failed on the GPU: {error}{self._log}") from error

    def close(self) -> None:
        """Free the engine and the pools. Idempotent."""
        if self._closed:
            return
        self._closed = True
        with contextlib.suppress(PluginError):  # a GPU that failed is beyond waiting for
            self._device.activate()
            if self._stream:
                self._device.synchronize(self._stream)
        if self._graphs:
            self._graphs.close()
        self._graphs = None
        if self._heads:
            self._heads.close()
        self._contexts.clear()  # contexts first: they refer to the engine
        if self._session:
            self._session.close()
        if self._bound_pools:
            self._library.unbind_pools(self._facts.engine_id)
        for address in self._memory:
            self._device.free(address)
        self._memory.clear()
        for array in self._host.values():
            self._device.free_host(array)
        self._host.clear()
        if self._stream:
            self._device.destroy_stream(self._stream)
        self._device.close()

    # ------------------------------------------------------------------ loading

    def _load(self, path: Path) -> None:
        self._session = session = TensorRtSession(self._trt, path, self._device, self._stream, self._log)
        check_tensors(session, self.manifest)
        self._contexts = [session.context(profile) for profile in (DECODE, MIXED)]
        size = staging_bytes(self._facts)
        self._pinned = self._allocate_host(size)
        self._staging = Staging(self._pinned)
        self._indices = self._allocate(size)
        hidden_bytes = 4 * self._facts.max_tokens * self.manifest.decoder.hidden_size
        self._hidden = self._allocate(hidden_bytes) if self.manifest.draft_heads else 0
        self._logits_memory: dict[int, tuple[Float32Array, int]] = {}

    def _make_pools(self, num_blocks: int | None, memory: int | None, fraction: float) -> None:
        decoder, facts = self.manifest.decoder, self._facts
        self._block_bytes = decoder.kv_bytes_per_token(self.manifest.kv_dtype) * self.manifest.block_size
        if num_blocks is not None and memory is not None:
            raise ExecutorError("give num_blocks or kv_memory_bytes, not both")
        if not 0 < fraction <= 1:
            raise ExecutorError(f"kv_fraction {fraction} is not a part of the memory: give a number up to 1")
        if num_blocks is None:
            free = self._device.free_memory - self._later_bytes()
            num_blocks = (int(fraction * free) if memory is None else memory) // self._block_bytes
            num_blocks = min(num_blocks, facts.max_blocks)
        if not 1 <= num_blocks <= min(facts.max_blocks, MAX_SLOTS // self.manifest.block_size):
            raise ExecutorError(
                f"{num_blocks} blocks of {self._block_bytes} bytes are not between 1 and {facts.max_blocks}, the most "
                "that the engine was built for; give less with num_blocks, or free memory of the GPU"
            )
        self.num_blocks = num_blocks
        layer_bytes = num_blocks * self._block_bytes // decoder.num_layers
        self._pools = [self._allocate(layer_bytes) for _ in range(decoder.num_layers)]
        for pool in self._pools:
            self._device.zero(pool, layer_bytes, self._stream)
        if facts.kv_binding == "bound":
            self._library.bind_pools(facts.engine_id, self._pools, num_blocks)
            self._bound_pools = True
        for context in self._contexts:
            self._bind_pools(context)

    def _later_bytes(self) -> int:
        """Memory that is taken after the pools: logits, and Medusa heads if they are asked for."""
        needed = 2 * 4 * most_tokens(self._facts, DECODE) * self.manifest.decoder.vocab_size
        if self.manifest.draft_heads:
            needed += (self._engine / HEADS_NAME).stat().st_size + TensorRtHeads.bytes_needed(self.manifest)
        return needed

    # ------------------------------------------------------------------ running

    def _bind_pools(self, context: TensorRtContext) -> None:
        if self._bound_pools:
            return
        decoder = self.manifest.decoder
        shape = (2, self.num_blocks, decoder.num_kv_heads, self.manifest.block_size, decoder.head_dim)
        for layer, pool in enumerate(self._pools):
            past, present = f"past_kv_{layer}", f"present_kv_{layer}"
            context.bind({past: pool, present: pool}, {past: shape})

    def _bind_step(self, context: TensorRtContext, shape: StepShape, offsets: dict[str, int]) -> None:
        addresses = {name: self._indices + offset for name, offset in offsets.items()}
        addresses["logits"] = self._logits(shape)[1]
        if self._hidden:
            addresses["hidden"] = self._hidden
        context.bind(addresses, shape.shapes())

    def _own_context(self, shape: StepShape) -> TensorRtContext:
        """A context for steps of this shape alone."""
        assert self._session is not None
        context = self._session.context(shape.profile)
        self._bind_pools(context)
        self._bind_step(context, shape, self._staging.offsets(shape)[0])
        return context

    def _logits(self, shape: StepShape) -> tuple[Float32Array, int]:
        """Host and device memory for a step's logits: at one place for good where steps are captured, else grown."""
        vocab = self.manifest.decoder.vocab_size
        rows = most_tokens(self._facts, DECODE) if shape.profile == DECODE else shape.logits
        held = self._logits_memory.get(shape.profile)
        if held is None or rows > len(held[0]):
            if held is not None:
                rows = min(2 * rows, self._facts.max_tokens)
                del self._logits_memory[shape.profile]
                self._device.free_host(self._host.pop(held[0].ctypes.data))
                self._memory.remove(held[1])
                self._device.free(held[1])
            host = self._allocate_host(4 * rows * vocab).view(np.float32).reshape(-1, vocab)
            held = self._logits_memory[shape.profile] = host, self._allocate(4 * rows * vocab)
        return held

    def _allocate(self, size: int) -> int:
        address = self._device.allocate(size)
        self._memory.append(address)
        return address

    def _allocate_host(self, size: int) -> npt.NDArray[np.uint8]:
        array = self._device.allocate_host(size)
        self._host[array.ctypes.data] = array
        return array


def _ordinal(device: int | str) -> int:
    """A GPU's number. Raises ExecutorError for a device that is none."""
    if device in ("auto", "cuda"):
        return 0
    found = re.fullmatch(r"(?:cuda:)?(\d+)", str(device))
    if found is None:
        raise ExecutorError(f"a TensorRT engine runs on cuda or cuda:N, not on {device!r}")
    return int(found[1])


def _facts(engine: Path, manifest: Manifest) -> TensorRtEngine:
    """What the engine was compiled for. Raises ExecutorError where this executor does not run such engines."""
    facts = manifest.tensorrt
    if facts is None:
        raise ExecutorError(f"{engine} is no TensorRT engine; build one with: apar build CHECKPOINT --format tensorrt")
    if facts.tp_size != 1:
        raise ExecutorError(
            f"{engine} is cut over {facts.tp_size} GPUs, which this executor does not drive; build it for one"
        )
    return facts
