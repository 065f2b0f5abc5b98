"""A double of TensorRT and of the CUDA driver, so that APAR's builder and executor run whole on a machine without.

What it does: it takes the ONNX graph, keeps the profiles, and executes steps of the engine with ONNX Runtime on memory
that the fake driver hands out. What it does not: compile anything, or run a plugin or a GPU kernel. It has no name that
the genuine bindings lack, and takes no arguments that they do not (test_tensorrt_api.py holds it to that), so code
that runs on it calls nothing that TensorRT has not.
"""

from __future__ import annotations

import ctypes
import enum
import io
import os
import pickle
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from cpu_graph import for_cpu

SOURCES = Path(__file__).parent / "plugins" / "tensorrt"


def build_fake_cuda(folder: Path) -> Path:
    """Compile the driver's double."""
    target = folder / "libfakecuda.so"
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    assert compiler, "a C++ compiler is needed, as for APAR's own library"
    source = SOURCES / "fake_cuda.cpp"
    subprocess.run([compiler, "-std=c++17", "-fPIC", "-shared", "-o", str(target), str(source)], check=True)
    return target


class Severity(enum.Enum):
    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2
    INFO = 3
    VERBOSE = 4


class ILogger:
    Severity = Severity

    def __init__(self) -> None:
        pass

    def log(self, severity: Severity, msg: str) -> None:
        raise NotImplementedError


class IProgressMonitor:
    def __init__(self) -> None:
        pass


class DataType(enum.Enum):
    FLOAT = 0
    HALF = 1
    BF16 = 7
    INT32 = 3
    INT64 = 8


class MemoryPoolType(enum.Enum):
    WORKSPACE = 0


class PreviewFeature(enum.Enum):
    ALIASED_PLUGIN_IO_10_03 = 1


class ProfilingVerbosity(enum.Enum):
    DETAILED = 2


class ExecutionContextAllocationStrategy(enum.Enum):
    USER_MANAGED = 2


class NetworkDefinitionCreationFlag(enum.IntEnum):
    STRONGLY_TYPED = 1


class Registry:
    """Knows the plugins, so that loading them succeeds."""

    def get_creator(self, type: str, version: str, plugin_namespace: str = "") -> object | None:
        return object() if (version, plugin_namespace) == ("1", "") else None


class Tensor:
    def __init__(self, name: str) -> None:
        self.name = name


class INetworkDefinition:
    def __init__(self, flags: int) -> None:
        self._flags = flags
        self._model: onnx.ModelProto | None = None

    @property
    def num_inputs(self) -> int:
        assert self._model is not None
        return len(self._model.graph.input)

    def get_input(self, index: int) -> Tensor:
        assert self._model is not None
        return Tensor(self._model.graph.input[index].name)


class ParserError:
    def __init__(self, text: str) -> None:
        self._text = text

    def desc(self) -> str:
        return self._text

    def node_name(self) -> str:
        return "node"

    def node_operator(self) -> str:
        return "Operator"


class OnnxParser:
    def __init__(self, network: INetworkDefinition, logger: ILogger) -> None:
        self._network = network
        self._errors: list[str] = []

    def parse_from_file(self, model: str) -> bool:
        if DOUBLE.parser_error:
            self._errors.append(DOUBLE.parser_error)
            return False
        self._network._model = onnx.load(model)
        return True

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    def get_error(self, index: int) -> ParserError:
        return ParserError(self._errors[index])


class IOptimizationProfile:
    def __init__(self) -> None:
        self._shapes: dict[str, tuple[tuple[int, ...], ...]] = {}

    def set_shape(self, input: str, min: tuple[int, ...], opt: tuple[int, ...], max: tuple[int, ...]) -> None:
        assert len(min) == len(opt) == len(max)
        assert all(1 <= a <= b <= c for a, b, c in zip(min, opt, max, strict=True)), (input, min, opt, max)
        self._shapes[input] = (min, opt, max)


class ITimingCache:
    def __init__(self, content: bytes) -> None:
        self._content = content

    def serialize(self) -> bytes:
        return self._content + b"measured"


class IBuilderConfig:
    def __init__(self) -> None:
        self.builder_optimization_level = 3
        self.profiling_verbosity: ProfilingVerbosity | None = None
        self.progress_monitor: Any = None
        self._profiles: list[IOptimizationProfile] = []
        self._features: dict[PreviewFeature, bool] = {}
        self._limits: dict[MemoryPoolType, int] = {}
        self._cache: ITimingCache | None = None

    def set_preview_feature(self, feature: PreviewFeature, enable: bool) -> None:
        self._features[feature] = enable

    def set_memory_pool_limit(self, pool: MemoryPoolType, pool_size: int) -> None:
        self._limits[pool] = pool_size

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        self._profiles.append(profile)
        return len(self._profiles) - 1

    def create_timing_cache(self, serialized_timing_cache: bytes) -> ITimingCache:
        return ITimingCache(serialized_timing_cache)

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
        if cache._content and DOUBLE.cache_refused:
            return False
        self._cache = cache
        return True


class Builder:
    def __init__(self, logger: ILogger) -> None:
        self._logger = logger

    def create_network(self, flags: int = 0) -> INetworkDefinition:
        return INetworkDefinition(flags)

    def create_builder_config(self) -> IBuilderConfig:
        return IBuilderConfig()

    def create_optimization_profile(self) -> IOptimizationProfile:
        return IOptimizationProfile()

    def build_serialized_network(self, network: INetworkDefinition, config: IBuilderConfig) -> bytes | None:
        DOUBLE.configs.append(config)
        DOUBLE.networks.append(network)
        monitor = config.progress_monitor
        monitor.phase_start("Building", None, 2)
        for step in range(2):
            monitor.phase_start("Tactics", "Building", 4)
            for inner in range(4):
                if not monitor.step_complete("Tactics", inner):
                    return None
            monitor.phase_finish("Tactics")
            monitor.step_complete("Building", step)
        monitor.phase_finish("Building")
        self._logger.log(Severity.INFO, "built")
        if DOUBLE.build_error:
            self._logger.log(Severity.ERROR, DOUBLE.build_error)
            return None
        assert network._model is not None
        for value in network._model.graph.input:
            assert all(value.name in profile._shapes for profile in config._profiles), value.name
        return pickle.dumps((network._model.SerializeToString(), [profile._shapes for profile in config._profiles]))


class Runtime:
    def __init__(self, logger: ILogger) -> None:
        self._logger = logger

    def deserialize_cuda_engine(self, serialized_engine: Any) -> ICudaEngine | None:
        data = bytes(serialized_engine)
        if not data.startswith(b"\x80"):
            self._logger.log(Severity.ERROR, "magic number mismatch")
            return None
        model, profiles = pickle.load(io.BytesIO(data))
        return ICudaEngine(onnx.load_from_string(model), profiles)


class ICudaEngine:
    def __init__(self, model: onnx.ModelProto, profiles: list[dict[str, tuple[tuple[int, ...], ...]]]) -> None:
        self._model = model
        self._profiles = profiles
        self._tensors = {value.name: value for value in (*model.graph.input, *model.graph.output)}

    @property
    def num_io_tensors(self) -> int:
        return len(self._tensors)

    @property
    def num_optimization_profiles(self) -> int:
        return len(self._profiles)

    @property
    def device_memory_size_v2(self) -> int:
        return 4096

    def get_tensor_name(self, index: int) -> str:
        return list(self._tensors)[index]

    def get_tensor_dtype(self, name: str) -> DataType:
        kinds = {1: DataType.FLOAT, 10: DataType.HALF, 16: DataType.BF16, 6: DataType.INT32}
        return kinds[self._tensors[name].type.tensor_type.elem_type]

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
        return list(self._profiles[profile_index][name])

    def create_execution_context(self, strategy: ExecutionContextAllocationStrategy) -> IExecutionContext:
        return IExecutionContext(self)


class IExecutionContext:
    """Runs the graph on the CPU, at the addresses and shapes that it was told."""

    def __init__(self, engine: ICudaEngine) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 4
        options.register_custom_ops_library(os.environ.get("APAR_PLUGIN_LIBRARY") or _native_library())
        model = onnx.ModelProto()
        model.CopyFrom(engine._model)
        self._session = onnxruntime.InferenceSession(
            for_cpu(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        self._engine = engine
        self._profile = -1
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._calls: list[Any] = []
        self._flushed: dict[str, tuple[int, ...]] = {}

    def set_device_memory(self, memory: int, size: int) -> None:
        assert memory
        assert size >= self._engine.device_memory_size_v2

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        self._profile = profile_index
        return 0 <= profile_index < len(self._engine._profiles)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert not self._calls, "a captured context must not be told other shapes"
        low, _, high = self._engine._profiles[self._profile][name]
        self._shapes[name] = tuple(shape)
        return len(shape) == len(low) and all(a <= s <= b for a, s, b in zip(low, shape, high, strict=True))

    def set_tensor_address(self, name: str, memory: int) -> bool:
        assert memory % 256 == 0
        assert not self._calls, "a captured context must not be told other addresses"
        self._addresses[name] = memory
        return name in self._engine._tensors

    def execute_async_v3(self, stream_handle: int) -> bool:
        assert stream_handle
        DOUBLE.executions += 1
        if DOUBLE.execution_error or (DOUBLE.capture_error and DOUBLE.cuda.fake_cuda_capturing()):
            return False
        shapes, addresses = dict(self._shapes), dict(self._addresses)
        if DOUBLE.cuda.fake_cuda_capturing():
            assert shapes == self._flushed, "TensorRT has not taken in the shapes before the capture"
            call = CALL(lambda _: self._execute(shapes, addresses))
            self._calls.append(call)
            DOUBLE.cuda.fake_cuda_capture(call, None)
        else:
            self._execute(shapes, addresses)
            self._flushed = shapes
        return True

    def _execute(self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> None:
        binding = self._session.io_binding()
        inputs = {value.name: value for value in self._engine._model.graph.input}
        arrays = {
            name: _array(addresses[name], shape, _NUMPY[inputs[name].type.tensor_type.elem_type])
            for name, shape in shapes.items()
            if not name.startswith("past_kv")
        }
        kept = self._contract(arrays) if "slot_copies" in arrays else arrays
        for name, array in kept.items():
            binding.bind_cpu_input(name, array)
        sizes = {"L": arrays["logits_rows"].size} if "logits_rows" in arrays else {"N": arrays["wanted"].size}
        for value in self._engine._model.graph.output:
            past = value.name.replace("present", "past")
            dims = [sizes.get(dim.dim_param, dim.dim_value) for dim in value.type.tensor_type.shape.dim]
            kind: type = np.float32
            if past != value.name:
                DOUBLE.layers_run += 1
                assert addresses[past] == addresses[value.name]
                dims, kind = list(shapes[past]), np.float16
                binding.bind_input(past, "cpu", 0, kind, dims, addresses[past])
            binding.bind_output(value.name, "cpu", 0, kind, dims, addresses[value.name])
        self._session.run_with_iobinding(binding)

    @staticmethod
    def _contract(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The step contract's own form of what the plugin gets: see typed_graph.TensorRtAttention."""
        tokens = arrays["input_ids"].size
        kept = dict(arrays)
        kept["slot_copies"] = np.unique(arrays["slot_copies"][2:], axis=0)
        if arrays["tree_mask"].shape[0] != tokens:
            kept["tree_mask"] = np.zeros((tokens, 0), np.int32)
        # Groups are advice; the CPU's kernels want them to cover the padding rows too.
        kept["prefix_rows"], kept["prefix_blocks"] = np.zeros(1, np.int32), np.zeros(0, np.int32)
        return kept


CALL = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_NUMPY = {onnx.TensorProto.INT32: np.int32, onnx.TensorProto.FLOAT: np.float32}


def _array(address: int, shape: tuple[int, ...], kind: type) -> np.ndarray:
    count = int(np.prod(shape)) * np.dtype(kind).itemsize
    return np.frombuffer((ctypes.c_uint8 * count).from_address(address), kind).reshape(shape)


def _native_library() -> str:
    from apar.plugins import library_path

    return str(library_path())


class Library:
    """In the place of plugins.tensorrt_library.TensorRtLibrary."""

    def add_kernels(self, table: Path) -> None:
        pass

    def check_kernels(self, compute_capability: str) -> None:
        pass

    def counters(self) -> tuple[int, int]:
        return DOUBLE.layers_run, DOUBLE.layers_copied


class Double:
    """What tests ask of the double, and tell it."""

    def __init__(self) -> None:
        self.cuda: Any = None
        self.reset()

    def reset(self) -> None:
        """Forget everything but the driver."""
        self.parser_error = self.build_error = ""
        self.execution_error = self.capture_error = False
        self.configs: list[IBuilderConfig] = []
        self.networks: list[INetworkDefinition] = []
        self.executions = self.layers_run = self.layers_copied = 0
        self.cache_refused = False


DOUBLE = Double()
__version__ = "10.14.1.48"
CLASSES = (
    Builder, IBuilderConfig, INetworkDefinition, IOptimizationProfile, ITimingCache, OnnxParser, ParserError, Runtime,
    ICudaEngine, IExecutionContext, ILogger, IProgressMonitor,
)  # fmt: skip
ENUMS = (
    DataType, MemoryPoolType, PreviewFeature, ProfilingVerbosity, ExecutionContextAllocationStrategy,
    NetworkDefinitionCreationFlag,
)  # fmt: skip


def get_plugin_registry() -> Registry:
    return Registry()


def installed(cuda: Path, monkeypatch: Any, version: str = __version__) -> Iterator[Double]:
    """Put the double in TensorRT's place for a test."""
    import sys

    from apar.export import tensorrt_engine
    from apar.runtime.executor import tensorrt_executor

    module = sys.modules[__name__]
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    monkeypatch.setattr(module, "__version__", version)
    monkeypatch.setenv("APAR_CUDA_DRIVER", str(cuda))
    for user in (tensorrt_engine, tensorrt_executor):
        monkeypatch.setattr(user, "load_plugins", lambda trt: Library())
    monkeypatch.setattr(tensorrt_engine, "_pack_kernels", lambda manifest, facts, path: path.write_bytes(b"kernels"))
    DOUBLE.reset()
    DOUBLE.cuda = ctypes.CDLL(str(cuda))
    DOUBLE.cuda.fake_cuda_capture.argtypes = [CALL, ctypes.c_void_p]
    yield DOUBLE
