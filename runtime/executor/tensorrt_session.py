"""A compiled engine on the device, through TensorRT's Python API: its tensors, and contexts that execute it."""

from __future__ import annotations

import collections
import mmap
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from apar.export.errors import ExecutorError
from apar.export.tensorrt_api import element_types
from apar.plugins.cuda_driver import CudaDevice

_LOGGED = 3


class ErrorLog:
    """TensorRT's last errors. TensorRT wants one logger for all of a process's engines."""

    def __init__(self, trt: ModuleType) -> None:
        self._errors: collections.deque[str] = collections.deque(maxlen=_LOGGED)
        errors, severity_of = self._errors, trt.ILogger.Severity
        kept = (severity_of.ERROR, severity_of.INTERNAL_ERROR)

        class Logger(trt.ILogger):  # type: ignore[name-defined]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, msg: str) -> None:
                if severity in kept:
                    errors.append(msg.strip())

        self.logger = Logger()

    def __str__(self) -> str:
        """They in brackets, or nothing."""
        return f" ({'; '.join(self._errors)})" if self._errors else ""

    def clear(self) -> None:
        """Forget them."""
        self._errors.clear()


class TensorRtSession:
    """An engine file, deserialised. Its contexts share one piece of scratch memory: they must run one after another."""

    def __init__(self, trt: ModuleType, path: Path, device: CudaDevice, stream: int, log: ErrorLog) -> None:
        """Raises ExecutorError where TensorRT does not take the file."""
        self._trt, self._device, self._stream = trt, device, stream
        self.path, self.log = path, log
        self._runtime: Any = trt.Runtime(log.logger)
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            self._engine: Any = self._runtime.deserialize_cuda_engine(data)
        if self._engine is None:
            raise ExecutorError(f"TensorRT {trt.__version__} cannot load {path}{log}; build the engine again")
        self._scratch_bytes = int(self._engine.device_memory_size_v2)
        self._scratch = 0

    @property
    def tensors(self) -> dict[str, str]:
        """Inputs and outputs, and their element types in the manifest's words."""
        kinds, engine = element_types(self._trt), self._engine
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        return {name: kinds.get(engine.get_tensor_dtype(name), "another type") for name in names}

    @property
    def num_profiles(self) -> int:
        """Its optimisation profiles."""
        return int(self._engine.num_optimization_profiles)

    def largest(self, name: str, profile: int) -> tuple[int, ...]:
        """The largest shape that an input may have."""
        return tuple(self._engine.get_tensor_profile_shape(name, profile)[2])

    def context(self, profile: int) -> TensorRtContext:
        """A new execution context with this profile. Raises ExecutorError where there can be none."""
        if not self._scratch:
            self._scratch = self._device.allocate(self._scratch_bytes)
        made = self._engine.create_execution_context(self._trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if made is None:
            raise ExecutorError(f"TensorRT makes no execution context for {self.path}{self.log}")
        made.set_device_memory(self._scratch, self._scratch_bytes)
        if not made.set_optimization_profile_async(profile, self._stream):
            raise ExecutorError(f"{self.path} has no optimisation profile {profile}{self.log}; build the engine again")
        self._device.synchronize(self._stream)
        return TensorRtContext(made, self._stream, self.log)

    def close(self) -> None:
        """Free the engine; its contexts must have been dropped. Idempotent."""
        self._engine = self._runtime = None
        if self._scratch:
            self._device.free(self._scratch)
            self._scratch = 0


class TensorRtContext:
    """Executes an engine at the addresses and shapes that it was told last."""

    def __init__(self, context: Any, stream: int, log: ErrorLog) -> None:
        self._context, self._stream, self._log = context, stream, log

    def bind(self, addresses: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Say where tensors are, and the shapes of inputs. Raises ExecutorError for what TensorRT does not take."""
        for name, shape in shapes.items():
            if not self._context.set_input_shape(name, shape):
                raise ExecutorError(f"TensorRT does not take {name} of shape {shape}{self._log}")
        for name, address in addresses.items():
            if not self._context.set_tensor_address(name, address):
                raise ExecutorError(f"TensorRT does not take {name}{self._log}")

    def enqueue(self) -> None:
        """Put one execution on the stream. Raises ExecutorError where TensorRT does not."""
        if not self._context.execute_async_v3(self._stream):
            raise ExecutorError(f"the step failed in TensorRT{self._log}")
