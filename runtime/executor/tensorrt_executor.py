"""Executor on a TensorRT engine, through TensorRT's Python API and the CUDA driver alone.

The pools are the executor's: each is bound as `past_kv_{i}` and as `present_kv_{i}` at one address, and a step at load
proves that TensorRT writes them in place. Two execution contexts, one a profile, share one piece of scratch memory.
Decoding steps are padded to buckets; a shape that comes again is captured as a CUDA graph and from then on replayed.
"""

from __future__ import annotations

import collections
import logging
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from apar.export.errors import ExecutorError, PluginError
from apar.export.manifest import Manifest
from apar.export.tensorrt_api import element_types, load_plugins, load_tensorrt
from apar.export.tensorrt_profiles import DECODE, MIXED, most_tokens
from apar.plugins.cuda_driver import CudaDevice
from apar.runtime.executor.base import Executor
from apar.runtime.executor.check import check_step
from apar.runtime.executor.pool import MAX_SLOTS
from apar.runtime.executor.tensorrt_self_test import PoolReader, check_pools
from apar.runtime.executor.tensorrt_step import Staging, StepShape, choose_shape, staging_bytes
from apar.runtime.step import Float32Array, StepInputs

logger = logging.getLogger(__name__)

KERNELS_NAME = "apar_gpu.table"
_MAX_GRAPHS = 64
_LOGGED = 3


class TensorRtExecutor(Executor):
    """Runs an engine directory that was built with `--format tensorrt`."""

    name = "tensorrt"

    def __init__(
        self,
        engine: Path,
        *,
        num_blocks: int | None = None,
        kv_memory_bytes: int | None = None,
        kv_fraction: float | None = None,
        cuda_graphs: bool = True,
        device: int = 0,
    ) -> None:
        """Load an engine directory.

        num_blocks, kv_memory_bytes: size of the KV pools; by default `kv_fraction` of the memory that is free after
            the engine is loaded (by default what the engine was built for).
        cuda_graphs: replay decoding steps of a shape that came before as CUDA graphs.
        device: number of the GPU.
        Raises EngineError for a damaged engine, PluginError where TensorRT, its plugins or the driver are missing,
        ExecutorError for an engine of another TensorRT, GPU or kind, and where TensorRT does not write in place.
        """
        self._closed = True
        self.manifest = Manifest.load(engine)
        facts = self.manifest.tensorrt
        if facts is None:
            raise ExecutorError(
                f"{engine} is no TensorRT engine; build one with: apar build CHECKPOINT --format tensorrt"
            )
        if facts.tp_size != 1:
            raise ExecutorError(
                f"{engine} is cut over {facts.tp_size} GPUs, which this executor does not drive; build it for one"
            )
        self._facts = facts
        self._trt = trt = load_tensorrt()
        if str(trt.__version__) != facts.version:
            raise ExecutorError(
                f"{engine} was built with TensorRT {facts.version}, but {trt.__version__} is installed: "
                f"build the engine again here, or install tensorrt=={facts.version}"
            )
        self._device = CudaDevice(device)
        found = self._device.compute_capability
        if found != facts.compute_capability:
            raise ExecutorError(
                f"{engine} was built on {facts.device} (compute capability {facts.compute_capability}), but GPU "
                f"{device} is {self._device.name} ({found}): build the engine again on this GPU"
            )
        self._library = load_plugins(trt)
        if (engine / KERNELS_NAME).is_file():
            self._library.add_kernels(engine / KERNELS_NAME)
        self._library.check_kernels(found)
        self._memory: list[int] = []
        self._host: list[npt.NDArray[np.uint8]] = []
        self._graphs: collections.OrderedDict[StepShape, int] = collections.OrderedDict()
        self._seen: collections.OrderedDict[StepShape, int] = collections.OrderedDict()
        self._stream = 0
        self._bound_pools = False
        self._closed = False
        try:
            self._device.activate()
            self._load(engine / "rank0.engine")
            self._make_pools(num_blocks, kv_memory_bytes, facts.kv_fraction if kv_fraction is None else kv_fraction)
            self._use_graphs = cuda_graphs
            layer_bytes = self._block_bytes // self.manifest.decoder.num_layers
            pools = PoolReader(self._device, self._stream, self._pools, self.num_blocks, layer_bytes)
            check_pools(self.execute, self.manifest, self._library, pools)
        except PluginError as error:
            self.close()
            raise ExecutorError(f"{engine} cannot be loaded on {self._device.name}: {error}") from error
        except BaseException:
            self.close()
            raise
        pool_bytes = self.num_blocks * self._block_bytes
        self.detail = (
            f"TensorRT {trt.__version__} on {self._device.name}, {self.num_blocks} blocks of "
            f"{self.manifest.block_size} ({self.manifest.kv_dtype}, {pool_bytes / 2**20:.0f} MiB), up to "
            f"{facts.max_rows} rows and {facts.max_tokens} tokens a step{', CUDA graphs' if cuda_graphs else ''}"
        )

    @property
    def step_limits(self) -> tuple[int, int]:
        """Rows and tokens that the engine was built for."""
        return self._facts.max_rows, self._facts.max_tokens

    def execute(self, inputs: StepInputs) -> Float32Array:
        """See Executor.execute."""
        if self._closed:
            raise ExecutorError("the tensorrt executor is closed")
        check_step(
            inputs,
            num_blocks=self.num_blocks,
            block_size=self.manifest.block_size,
            vocab_size=self.manifest.decoder.vocab_size,
        )
        shape = choose_shape(inputs, self._facts)
        self._log.clear()
        try:
            self._device.activate()  # the caller's thread may be another than last time
            offsets, size = self._staging.fill(inputs, shape)
            self._device.to_device(self._indices, self._pinned[:size], self._stream)
            logits, address = self._logits(shape)
            self._run(shape, offsets, address)
            wanted = logits[: inputs.logits_rows.size]
            if wanted.size:
                self._device.to_host(wanted, address, self._stream)
            self._device.synchronize(self._stream)
        except PluginError as error:
            raise ExecutorError(f"the step failed on the GPU: {error}{self._said()}") from error
        return wanted

    def close(self) -> None:
        """Free the engine and the pools. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._device.activate()
        if self._stream:
            self._device.synchronize(self._stream)
        for graph in self._graphs.values():
            self._device.destroy_graph(graph)
        self._graphs.clear()
        self._contexts: list[Any] = []  # contexts first: they refer to the engine
        self._engine: Any = None
        self._runtime: Any = None
        if self._bound_pools:
            self._library.unbind_pools(self._facts.engine_id)
        for address in self._memory:
            self._device.free(address)
        self._memory.clear()
        for array in self._host:
            self._device.free_host(array)
        self._host.clear()
        if self._stream:
            self._device.destroy_stream(self._stream)
        self._device.close()

    # ------------------------------------------------------------------ loading

    def _load(self, path: Path) -> None:
        trt, facts = self._trt, self._facts
        self._log = _Log(trt)
        self._runtime = trt.Runtime(self._log.logger)
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            self._engine = self._runtime.deserialize_cuda_engine(data)
        if self._engine is None:
            raise ExecutorError(f"TensorRT {trt.__version__} cannot load {path}{self._said()}; build the engine again")
        self._check_tensors()
        self._stream = self._device.make_stream()
        strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        scratch_bytes = int(self._engine.device_memory_size_v2)
        scratch = self._allocate(scratch_bytes)
        self._contexts = []
        for profile in (DECODE, MIXED):
            context = self._engine.create_execution_context(strategy)
            if context is None:
                raise ExecutorError(f"TensorRT makes no execution context for {path}{self._said()}")
            context.set_device_memory(scratch, scratch_bytes)
            if not context.set_optimization_profile_async(profile, self._stream):
                raise ExecutorError(
                    f"{path} has no optimisation profile {profile}{self._said()}; build the engine again"
                )
            self._contexts.append(context)
        self._device.synchronize(self._stream)
        size = staging_bytes(facts)
        self._pinned = self._allocate_host(size)
        self._staging = Staging(self._pinned)
        self._indices = self._allocate(size)
        self._logits_memory: dict[int, tuple[Float32Array, int]] = {}

    def _check_tensors(self) -> None:
        """The engine's inputs and outputs are those that the manifest speaks of."""
        engine, trt = self._engine, self._trt
        kinds = element_types(trt)
        found = {}
        for i in range(engine.num_io_tensors):
            name = engine.get_tensor_name(i)
            found[name] = kinds.get(engine.get_tensor_dtype(name), "another type")
        expected = dict.fromkeys(StepShape(0, 1, 1, 1, 0, 1, 1).shapes(), "int32") | {"logits": "float32"}
        for layer in range(self.manifest.decoder.num_layers if self._facts.kv_binding != "bound" else 0):
            expected |= {f"past_kv_{layer}": self.manifest.kv_dtype, f"present_kv_{layer}": self.manifest.kv_dtype}
        if found != expected:
            wrong = sorted(set(found.items()) ^ set(expected.items()))
            raise ExecutorError(
                f"rank0.engine is not the engine that manifest.json describes ({wrong[0][0]} differs); build it again"
            )
        largest = tuple(engine.get_tensor_profile_shape("input_ids", MIXED)[2])
        if engine.num_optimization_profiles != 2 or largest != (self._facts.max_tokens,):
            raise ExecutorError("rank0.engine was built for other step sizes than manifest.json says; build it again")

    def _make_pools(self, num_blocks: int | None, memory: int | None, fraction: float) -> None:
        decoder, facts = self.manifest.decoder, self._facts
        self._block_bytes = decoder.kv_bytes_per_token(self.manifest.kv_dtype) * self.manifest.block_size
        if num_blocks is not None and memory is not None:
            raise ExecutorError("give num_blocks or kv_memory_bytes, not both")
        if not 0 < fraction <= 1:
            raise ExecutorError(f"kv_fraction {fraction} is not a part of the memory: give a number up to 1")
        if num_blocks is None:
            free = self._device.free_memory - self._logits_bytes(MIXED)
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
        shape = (2, num_blocks, decoder.num_kv_heads, self.manifest.block_size, decoder.head_dim)
        if facts.kv_binding == "bound":
            self._library.bind_pools(facts.engine_id, self._pools, num_blocks)
            self._bound_pools = True
            return
        for context in self._contexts:
            for layer, pool in enumerate(self._pools):
                self._must(context.set_input_shape(f"past_kv_{layer}", shape), f"past_kv_{layer} of shape {shape}")
                self._must(context.set_tensor_address(f"past_kv_{layer}", pool), f"past_kv_{layer}")
                self._must(context.set_tensor_address(f"present_kv_{layer}", pool), f"present_kv_{layer}")

    # ------------------------------------------------------------------ running

    def _run(self, shape: StepShape, offsets: Mapping[str, int], logits: int) -> None:
        graph = self._graphs.get(shape)
        if graph is not None:
            self._graphs.move_to_end(shape)
            self._device.launch_graph(graph, self._stream)
            return
        context = self._contexts[shape.profile]
        for name, size in shape.shapes().items():
            self._must(context.set_input_shape(name, size), f"{name} of shape {size}")
            self._must(context.set_tensor_address(name, self._indices + offsets[name]), name)
        self._must(context.set_tensor_address("logits", logits), "logits")
        self._enqueue(context)
        if not self._use_graphs or shape.profile != DECODE:
            return
        count = self._seen.pop(shape, 0)
        self._seen[shape] = count + 1
        if len(self._seen) > _MAX_GRAPHS:
            self._seen.popitem(last=False)
        if count == 1:
            # This run has told TensorRT the shapes; what is recorded now is only what runs.
            self._device.synchronize(self._stream)
            self._capture(shape, context)

    def _capture(self, shape: StepShape, context: Any) -> None:
        """Record the step that has just run. Where that is not possible, steps go on without graphs."""
        try:
            with self._device.capture(self._stream) as made:
                self._enqueue(context)
        except (ExecutorError, PluginError) as error:
            logger.warning("steps run without CUDA graphs from now on, since one could not be recorded: %s", error)
            self._use_graphs = False
            return
        self._graphs[shape] = made[0]
        if len(self._graphs) > _MAX_GRAPHS:
            self._device.destroy_graph(self._graphs.popitem(last=False)[1])

    def _enqueue(self, context: Any) -> None:
        if not context.execute_async_v3(self._stream):
            raise ExecutorError(f"the step failed in TensorRT{self._said()}")

    def _logits(self, shape: StepShape) -> tuple[Float32Array, int]:
        """Host and device memory for the logits of a profile; made when first needed, at one place for good."""
        if shape.profile not in self._logits_memory:
            size = self._logits_bytes(shape.profile)
            host = self._allocate_host(size).view(np.float32).reshape(-1, self.manifest.decoder.vocab_size)
            self._logits_memory[shape.profile] = host, self._allocate(size)
        return self._logits_memory[shape.profile]

    def _logits_bytes(self, profile: int) -> int:
        return 4 * most_tokens(self._facts, profile) * self.manifest.decoder.vocab_size

    def _allocate(self, size: int) -> int:
        address = self._device.allocate(size)
        self._memory.append(address)
        return address

    def _allocate_host(self, size: int) -> npt.NDArray[np.uint8]:
        array = self._device.allocate_host(size)
        self._host.append(array)
        return array

    def _must(self, accepted: bool, what: str) -> None:
        if not accepted:
            raise ExecutorError(f"TensorRT does not take {what}{self._said()}")

    def _said(self) -> str:
        return f" ({'; '.join(self._log.errors)})" if self._log.errors else ""


class _Log:
    """TensorRT's last errors."""

    def __init__(self, trt: Any) -> None:
        self.errors: collections.deque[str] = collections.deque(maxlen=_LOGGED)
        errors = self.errors

        class Logger(trt.ILogger):
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, msg: str) -> None:
                if str(severity).rpartition(".")[2] in ("ERROR", "INTERNAL_ERROR"):
                    errors.append(msg.strip())

        self.logger = Logger()

    def clear(self) -> None:
        """Forget them."""
        self.errors.clear()
