"""The CUDA driver by ctypes: what running a TensorRT engine needs of it, with no package but the driver itself.

Functions of the driver API are called by their versioned names, which have not changed since CUDA 11.4.
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import byref, c_char_p, c_int, c_size_t, c_uint, c_ulonglong, c_void_p
from typing import Any

import numpy as np
import numpy.typing as npt

from apar.export.errors import PluginError

logger = logging.getLogger(__name__)

LIBRARY_VARIABLE = "APAR_CUDA_DRIVER"
"""Environment variable that names the driver's library where it is not libcuda.so.1."""
_MAJOR, _MINOR = 75, 76
_CAPTURE_RELAXED = 2
_NON_BLOCKING = 1


class CudaDevice:
    """One GPU and its primary context. `close` releases it; memory must have been freed before.

    What gives something back never raises: after an illegal access a context refuses that too, and whoever tidies up
    then has told of a better error already.
    """

    def __init__(self, ordinal: int = 0) -> None:
        """Raises PluginError where there is no driver or no such GPU."""
        self._lib = load_driver()
        self._call("cuInit", c_uint(0))
        count = c_int()
        self._call("cuDeviceGetCount", byref(count))
        if not 0 <= ordinal < count.value:
            raise PluginError(f"there is no GPU {ordinal}: the CUDA driver sees {count.value}; check nvidia-smi")
        self.ordinal = ordinal
        self._device = c_int()
        self._call("cuDeviceGet", byref(self._device), c_int(ordinal))
        name = ctypes.create_string_buffer(128)
        self._call("cuDeviceGetName", name, c_int(128), self._device)
        self.name = name.value.decode("utf-8", "replace")
        self._context = c_void_p()

    @property
    def compute_capability(self) -> str:
        """Such as 9.0."""
        return f"{self._attribute(_MAJOR)}.{self._attribute(_MINOR)}"

    @property
    def total_memory(self) -> int:
        """Bytes."""
        total = c_size_t()
        self._call("cuDeviceTotalMem_v2", byref(total), self._device)
        return total.value

    @property
    def free_memory(self) -> int:
        """Bytes that can be allocated now; needs `activate`."""
        free, total = c_size_t(), c_size_t()
        self._call("cuMemGetInfo_v2", byref(free), byref(total))
        return free.value

    def activate(self) -> None:
        """Make the primary context, which TensorRT uses too, the calling thread's."""
        if self._context.value is None:
            self._call("cuDevicePrimaryCtxRetain", byref(self._context), self._device)
        self._call("cuCtxSetCurrent", self._context)

    def close(self) -> None:
        """Release the primary context. Idempotent."""
        if self._context.value is not None:
            self._context = c_void_p()
            self._give_back("cuCtxSetCurrent", c_void_p())  # the thread must not keep a context that may end now
            self._give_back("cuDevicePrimaryCtxRelease_v2", self._device)

    def allocate(self, size: int) -> int:
        """Address of `size` bytes of device memory."""
        address = c_ulonglong()
        self._call("cuMemAlloc_v2", byref(address), c_size_t(max(size, 1)))
        return address.value

    def free(self, address: int) -> None:
        """Give device memory back."""
        self._give_back("cuMemFree_v2", c_ulonglong(address))

    def allocate_host(self, size: int) -> npt.NDArray[np.uint8]:
        """`size` bytes of pinned host memory; give them back with `free_host`."""
        address = c_void_p()
        self._call("cuMemHostAlloc", byref(address), c_size_t(max(size, 1)), c_uint(0))
        assert address.value is not None
        return np.ctypeslib.as_array((ctypes.c_uint8 * max(size, 1)).from_address(address.value))

    def free_host(self, array: npt.NDArray[np.uint8]) -> None:
        """Give pinned memory back; `array` must not be used after this."""
        self._give_back("cuMemFreeHost", c_void_p(array.ctypes.data))

    def to_device(self, target: int, source: npt.NDArray[Any], stream: int) -> None:
        """Copy a contiguous array on the stream; it must stay until the stream has done so."""
        size = c_size_t(source.nbytes)
        self._call("cuMemcpyHtoDAsync_v2", c_ulonglong(target), c_void_p(source.ctypes.data), size, c_void_p(stream))

    def to_host(self, target: npt.NDArray[Any], source: int, stream: int) -> None:
        """Copy to a contiguous array on the stream."""
        size = c_size_t(target.nbytes)
        self._call("cuMemcpyDtoHAsync_v2", c_void_p(target.ctypes.data), c_ulonglong(source), size, c_void_p(stream))

    def zero(self, address: int, size: int, stream: int) -> None:
        """Fill device memory with zero bytes on the stream."""
        self._call("cuMemsetD8Async", c_ulonglong(address), ctypes.c_ubyte(0), c_size_t(size), c_void_p(stream))

    def make_stream(self) -> int:
        """A stream that does not wait for the default one."""
        stream = c_void_p()
        self._call("cuStreamCreate", byref(stream), c_uint(_NON_BLOCKING))
        return stream.value or 0

    def destroy_stream(self, stream: int) -> None:
        """Free a stream."""
        self._give_back("cuStreamDestroy_v2", c_void_p(stream))

    def synchronize(self, stream: int) -> None:
        """Wait until everything on the stream is done."""
        self._call("cuStreamSynchronize", c_void_p(stream))

    @contextmanager
    def capture(self, stream: int) -> Iterator[list[int]]:
        """Record what is put on the stream instead of running it; the list then holds the executable graph."""
        graph, executable = c_void_p(), c_void_p()
        made: list[int] = []
        self._call("cuStreamBeginCapture_v2", c_void_p(stream), c_uint(_CAPTURE_RELAXED))
        try:
            yield made
        except BaseException:
            # What was recorded is worth nothing, and the stream must not stay in this state.
            if self._lib.cuStreamEndCapture(c_void_p(stream), byref(graph)) == 0 and graph.value is not None:
                self._lib.cuGraphDestroy(graph)
            raise
        self._call("cuStreamEndCapture", c_void_p(stream), byref(graph))
        try:
            self._call("cuGraphInstantiateWithFlags", byref(executable), graph, c_ulonglong(0))
        finally:
            self._call("cuGraphDestroy", graph)
        made.append(executable.value or 0)

    def launch_graph(self, executable: int, stream: int) -> None:
        """Run a captured graph on the stream."""
        self._call("cuGraphLaunch", c_void_p(executable), c_void_p(stream))

    def destroy_graph(self, executable: int) -> None:
        """Free a captured graph."""
        self._give_back("cuGraphExecDestroy", c_void_p(executable))

    def _attribute(self, number: int) -> int:
        value = c_int()
        self._call("cuDeviceGetAttribute", byref(value), c_int(number), self._device)
        return value.value

    def _call(self, function: str, *arguments: Any) -> None:
        check(self._lib, function, getattr(self._lib, function)(*arguments))

    def _give_back(self, function: str, *arguments: Any) -> None:
        try:
            self._call(function, *arguments)
        except PluginError as error:
            logger.debug("%s", error)


def load_driver() -> ctypes.CDLL:
    """The driver's library. Raises PluginError where there is none."""
    name = os.environ.get(LIBRARY_VARIABLE) or "libcuda.so.1"
    try:
        return ctypes.CDLL(name)
    except OSError as error:
        raise PluginError(
            f"there is no CUDA driver here ({error}); install NVIDIA's driver, and start containers with --gpus all"
        ) from error


def driver_version() -> str:
    """The newest CUDA that the driver runs, such as 13.0. Raises PluginError where there is none."""
    library = load_driver()
    version = c_int()
    check(library, "cuDriverGetVersion", library.cuDriverGetVersion(byref(version)))
    return f"{version.value // 1000}.{version.value % 1000 // 10}"


def check(library: ctypes.CDLL, function: str, status: int) -> None:
    """Raise PluginError with the driver's own name and text for a status that is not success."""
    if status == 0:
        return
    name, text = c_char_p(), c_char_p()
    library.cuGetErrorName(c_int(status), byref(name))
    library.cuGetErrorString(c_int(status), byref(text))
    known = (name.value or b"unknown error").decode(), (text.value or b"").decode()
    raise PluginError(f"{function} failed: {known[0]} ({status}): {known[1]}")
