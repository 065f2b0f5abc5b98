"""Executor on ONNX Runtime's CPU provider.

Two graphs of one decoder: `model.onnx` with the ForkAttention and Linear operators of the native library, and
`model_portable.onnx` in standard operators for machines without that library (slower, float32 pools, and plain
matrices become float32). Either updates the KV pools in place: each pool is one piece of memory that is
bound as `past_kv_{i}` and as `present_kv_{i}` once and for all; a step binds only its own tensors.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime

from apar import plugins
from apar.export.errors import EngineError, ExecutorError, PluginError
from apar.export.manifest import (
    GRAPH_NAME,
    HEADS_GRAPH_NAME,
    MANIFEST_NAME,
    PORTABLE_GRAPH_NAME,
    PORTABLE_HEADS_GRAPH_NAME,
    Manifest,
)
from apar.runtime.executor.base import NO_HEADS_REMEDY, Executor
from apar.runtime.executor.check import check_step, check_swaps
from apar.runtime.executor.pool import pool_blocks
from apar.runtime.executor.portable import portable_inputs
from apar.runtime.executor.threads import MAX_THREADS, default_threads
from apar.runtime.step import INPUT_NAMES, Float32Array, IntArray, StepInputs

GRAPHS = ("auto", "native", "portable")
_INT32 = np.dtype(np.int32)
_ALIGNMENT = 64
_BINDABLE = {np.dtype(np.int32), np.dtype(np.int64), np.dtype(np.bool_)}
_BUFFER_ROWS = 64
"""Rows that an output's buffer begins with."""
_ONE_THREAD_BYTES = 16 << 20
"""Heads whose weights take less run on one thread: waking others takes longer than they would save."""


class OnnxExecutor(Executor):
    """Runs an engine directory with ONNX Runtime."""

    name = "onnx"
    mixes_drafts = True
    graph: str
    """"native" or "portable": what was loaded."""

    def __init__(
        self,
        engine: Path,
        *,
        graph: str = "auto",
        num_blocks: int | None = None,
        kv_memory_bytes: int | None = None,
        threads: int | None = None,
        spinning: bool | None = None,
        yields: bool = False,
    ) -> None:
        """Load an engine directory.

        graph: "native" needs the native library; "portable" does not; "auto" takes the portable graph, with a
            warning, where the library cannot be loaded.
        num_blocks, kv_memory_bytes: size of the KV pool; see `pool_blocks`.
        threads: threads of a step; default: physical cores that the process may use.
        spinning: idle threads of a step poll for work. Faster on a machine of one's own, much slower on a busy
            one. Default: yes, except where the environment variable CI is set.
        yields: they do not poll between two steps, so that others on these cores come to work then; waking them
            takes some 0.1 ms a step.
        Raises EngineError for a damaged engine, PluginError for graph="native" without the library,
        ExecutorError for everything else.
        """
        if graph not in GRAPHS:
            raise ExecutorError(f"graph must be one of {', '.join(GRAPHS)}, not {graph!r}")
        threads = default_threads() if threads is None else threads
        if not 1 <= threads <= MAX_THREADS:
            raise ExecutorError(f"threads must be between 1 and {MAX_THREADS}, not {threads}")
        spinning = not os.environ.get("CI") if spinning is None else spinning
        self._session: onnxruntime.InferenceSession | None = None
        self._heads: onnxruntime.InferenceSession | None = None
        self._engine, self._threads = engine, threads
        self.manifest = Manifest.load(engine)
        options = _session_options(threads, spinning, yields)
        library = "standard operators"
        self.graph = "portable"
        if graph != "portable":
            try:
                library = _register_library(options)
                self.graph = "native"
            except PluginError as error:
                if graph == "native":
                    raise
                warnings.warn(f"the portable graph is used, which is slower: {error}", RuntimeWarning, stacklevel=2)
                library = f"standard operators (no native library: {error})"
                options = _session_options(threads, spinning, yields)
        decoder, size = self.manifest.decoder, self.manifest.block_size
        kv_dtype = self.manifest.kv_dtype if self.graph == "native" else "float32"
        self.num_blocks = pool_blocks(self.manifest, kv_dtype, num_blocks, kv_memory_bytes)
        self._scratch = self.num_blocks * size
        session = _load(engine / (GRAPH_NAME if self.graph == "native" else PORTABLE_GRAPH_NAME), options)
        shape: tuple[int, ...] = (2, self.num_blocks, decoder.num_kv_heads, size, decoder.head_dim)
        if self.graph == "portable":
            shape = (2, self._scratch + 1, decoder.num_kv_heads * decoder.head_dim)
        _check_graph(session, engine, self.manifest, kv_dtype, shape)
        self._binding = session.io_binding()
        self._pools = []
        for layer in range(decoder.num_layers):
            pool = onnxruntime.OrtValue.ortvalue_from_numpy(_zeros(shape, np.dtype(kv_dtype)))
            self._binding.bind_ortvalue_input(f"past_kv_{layer}", pool)
            self._binding.bind_ortvalue_output(f"present_kv_{layer}", pool)
            self._pools.append(pool)
        self._logits = _OutputBuffer(decoder.vocab_size)
        self._hidden = _OutputBuffer(decoder.hidden_size)
        self._last_hidden = np.empty((0, decoder.hidden_size), np.float32)
        self._draft_logits = _OutputBuffer(0)
        self._session = session
        pool_bytes = self.num_blocks * size * decoder.kv_bytes_per_token(kv_dtype)
        self.detail = (
            f"ONNX Runtime {onnxruntime.__version__}, {self.graph} graph, {library}, {threads} threads"
            f"{', spinning' if spinning else ''}, {self.num_blocks} blocks of {size} "
            f"({kv_dtype}, up to {pool_bytes / 2**20:.0f} MiB)"
        )

    def execute(self, inputs: StepInputs) -> Float32Array:
        """See Executor.execute."""
        if self._session is None:
            raise ExecutorError("the onnx executor is closed")
        decoder = self.manifest.decoder
        if self.graph == "native":  # its kernels check the step themselves
            check_swaps(inputs, num_blocks=self.num_blocks)
            tensors: Mapping[str, npt.NDArray[np.generic]] = {name: getattr(inputs, name) for name in INPUT_NAMES}
        else:
            size = self.manifest.block_size
            check_step(inputs, num_blocks=self.num_blocks, block_size=size, vocab_size=decoder.vocab_size)
            tensors = portable_inputs(inputs, size, self._scratch)
        bind, native = self._binding.bind_cpu_input, self.graph == "native"
        for name, array in tensors.items():
            if array.dtype not in _BINDABLE or not array.flags.c_contiguous or (native and array.dtype != _INT32):
                raise ExecutorError(f"{name} must be a C-contiguous int32 array, not {array.dtype}")
            bind(name, array)
        wanted = inputs.logits_rows.size
        logits = self._logits.bind(self._binding, "logits", wanted)
        if self._heads is not None:
            self._last_hidden = self._hidden.bind(self._binding, "hidden", wanted)
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:  # ONNX Runtime's exceptions have no common base
            raise ExecutorError(f"the step failed in ONNX Runtime: {_useful(error)}") from error
        return logits

    def load_draft_heads(self) -> None:
        """See Executor.load_draft_heads."""
        heads = self.manifest.draft_heads
        if heads is None:
            raise ExecutorError(f"{self._engine} has no Medusa heads; {NO_HEADS_REMEDY}")
        if self._heads is None:
            decoder = self.manifest.decoder
            matrices = heads.count * heads.blocks * decoder.hidden_size + heads.count * decoder.vocab_size
            small = 2 * matrices * decoder.hidden_size < _ONE_THREAD_BYTES
            # Two sessions whose idle threads both poll would take the cores from each other.
            options = _session_options(1 if small else self._threads, spinning=False)
            if self.graph == "native":
                _register_library(options)
            name = HEADS_GRAPH_NAME if self.graph == "native" else PORTABLE_HEADS_GRAPH_NAME
            session = _load(self._engine / name, options)
            shape: list[int | None] = [None, heads.count, decoder.vocab_size]
            _compare(self._engine, {"draft_logits": ("tensor(float)", shape)}, session.get_outputs())
            self._heads = session
            self._heads_binding = self._heads.io_binding()
            self._draft_logits = _OutputBuffer(heads.count, decoder.vocab_size)

    def draft_logits(self, wanted: IntArray) -> Float32Array:
        """See Executor.draft_logits."""
        if self._heads is None:
            return super().draft_logits(wanted)
        self._heads_binding.bind_cpu_input("hidden", self._last_hidden[wanted])
        logits = self._draft_logits.bind(self._heads_binding, "draft_logits", wanted.size)
        try:
            self._heads.run_with_iobinding(self._heads_binding)
        except Exception as error:  # ONNX Runtime's exceptions have no common base
            raise ExecutorError(f"the draft heads failed in ONNX Runtime: {_useful(error)}") from error
        return logits

    def close(self) -> None:
        """Free the model and the pools. Idempotent."""
        if self._session is None:
            return
        self._binding.clear_binding_inputs()
        self._binding.clear_binding_outputs()
        del self._binding
        if self._heads is not None:
            self._heads_binding.clear_binding_inputs()
            self._heads_binding.clear_binding_outputs()
            del self._heads_binding
        self._pools.clear()
        self._session = self._heads = None
        self._logits = self._hidden = self._draft_logits = _OutputBuffer(0)
        self._last_hidden = np.empty((0, 0), np.float32)


class _OutputBuffer:
    """Memory for an output of [N, ...] float32, kept from step to step, as ONNX Runtime's value for each N in use."""

    def __init__(self, *shape: int) -> None:
        self._memory: Float32Array = np.empty((_BUFFER_ROWS, *shape), np.float32)
        self._values: dict[int, tuple[Float32Array, onnxruntime.OrtValue]] = {}

    def bind(self, binding: onnxruntime.IOBinding, name: str, rows: int) -> Float32Array:
        """Let an output have `rows` rows of the memory; returns them."""
        found = self._values.get(rows)
        if found is None:
            if rows > self._memory.shape[0]:
                self._memory = np.empty((max(rows, 2 * self._memory.shape[0]), *self._memory.shape[1:]), np.float32)
                self._values.clear()
            part = self._memory[:rows]
            found = self._values[rows] = part, onnxruntime.OrtValue.ortvalue_from_numpy(part)
        binding.bind_ortvalue_output(name, found[1])
        return found[0]


def _session_options(threads: int, spinning: bool, yields: bool = False) -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # errors come as exceptions; do not print them as well
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spinning else "0")
    options.add_session_config_entry("session.force_spinning_stop", "1" if yields else "0")
    return options


def _register_library(options: onnxruntime.SessionOptions) -> str:
    """Give `options` the native library; return its description. Raises PluginError where there is none."""
    path = plugins.library_path()
    plugins.check_versions(path)
    try:
        options.register_custom_ops_library(str(path))
    except Exception as error:  # ONNX Runtime's exceptions have no common base
        raise PluginError(f"ONNX Runtime cannot load {path}: {_useful(error)}") from error
    return f"native library for {plugins.cpu_isa(path)}"


def _load(path: Path, options: onnxruntime.SessionOptions) -> onnxruntime.InferenceSession:
    if not path.is_file():
        raise ExecutorError(f"{path} is missing; build the engine again")
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions have no common base
        raise ExecutorError(
            f"ONNX Runtime {onnxruntime.__version__} cannot load {path}: {_useful(error)}; build the engine again"
        ) from error


_Tensor = tuple[str, list[int | None]]
"""Element type and sizes; None for a size that varies."""


def _check_graph(
    session: onnxruntime.InferenceSession, engine: Path, manifest: Manifest, kv_dtype: str, pool: tuple[int, ...]
) -> None:
    """Raise EngineError where the manifest's sizes are not those of the graph that was loaded."""
    decoder = manifest.decoder
    element = "tensor(float)" if kv_dtype == "float32" else f"tensor({kv_dtype})"
    wanted: dict[str, _Tensor] = {
        f"past_kv_{i}": (element, [*pool[:1], None, *pool[2:]]) for i in range(decoder.num_layers)
    }
    wanted["logits"] = ("tensor(float)", [None, decoder.vocab_size])
    if manifest.draft_heads is not None:
        wanted["hidden"] = ("tensor(float)", [None, decoder.hidden_size])
    tensors = [value for value in session.get_inputs() if value.name.startswith("past_kv_")]
    _compare(engine, wanted, [*tensors, *session.get_outputs()])


def _compare(engine: Path, wanted: Mapping[str, _Tensor], tensors: Sequence[onnxruntime.NodeArg]) -> None:
    found = {
        value.name: (value.type, [size if isinstance(size, int) else None for size in value.shape])
        for value in tensors
        if not value.name.startswith("present_kv_")
    }
    for name in sorted({*wanted, *found}):
        if wanted.get(name) != found.get(name):
            raise EngineError(
                f"{engine / MANIFEST_NAME} does not describe this engine's graph: {name} is {_shown(wanted.get(name))} "
                f"by the manifest, {_shown(found.get(name))} in the graph; copy the engine again or build it again"
            )


def _shown(tensor: _Tensor | None) -> str:
    return "not there" if tensor is None else f"{tensor[0]} {tensor[1]}".replace("None", "any")


def _zeros(shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> npt.NDArray[np.generic]:
    """Aligned zeros that take memory only where they are written."""
    count = int(np.prod(shape)) * dtype.itemsize
    try:
        raw = np.zeros(count + _ALIGNMENT, np.uint8)
    except MemoryError:
        raise ExecutorError(
            f"the KV pool does not fit into memory: one layer of it takes {count / 1e9:.1f} GB; "
            "give fewer blocks (num_blocks or kv_memory_bytes)"
        ) from None
    skip = -raw.ctypes.data % _ALIGNMENT
    return raw[skip : skip + count].view(dtype).reshape(shape)


def _useful(error: Exception) -> str:
    """What an ONNX Runtime exception says, without its status codes and source lines."""
    text = str(error).strip()
    for mark in ("Status Message: ", "[ONNXRuntimeError] : "):
        if mark in text:
            text = text.split(mark, 1)[1]
            break
    with contextlib.suppress(ValueError):
        head, _, rest = text.split(" : ", 2)
        if head.isdigit():
            text = rest
    return " ".join(text.split())
