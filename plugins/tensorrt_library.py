"""The plugin library for TensorRT: where it is, whether it fits, and what it can be asked and told."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from ctypes import c_char_p, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any

from apar.export.errors import PluginError
from apar.export.manifest import ABI_VERSION

LIBRARY_VARIABLE = "APAR_TENSORRT_LIBRARY"
"""Environment variable that names the library's file and goes before every other place."""
_REMEDY = (
    "Build it with the headers of TensorRT: pip install . --config-settings=cmake.define.APAR_TENSORRT=ON "
    "--config-settings=cmake.define.TENSORRT_INCLUDE_DIR=FOLDER (docs/tensorrt.md says where they are), or set "
    f"{LIBRARY_VARIABLE} to a built one."
)


class TensorRtLibrary:
    """A loaded plugin library. Load TensorRT itself first."""

    def __init__(self, path: Path) -> None:
        """Load it into the process for good. Raises PluginError where that fails."""
        self.path = path
        try:
            self._library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
            for name, result, arguments in _FUNCTIONS:
                function = getattr(self._library, name)
                function.restype, function.argtypes = result, arguments
        except (OSError, AttributeError) as error:
            raise PluginError(f"{path} cannot be loaded as APAR's TensorRT plugins ({error}). {_REMEDY}") from error

    @property
    def major(self) -> int:
        """Major version of the TensorRT that it is for."""
        return int(self._library.apar_tensorrt_major())

    @property
    def status(self) -> str:
        """Whether its plugins are registered, or why not."""
        return str(self._library.apar_tensorrt_status().decode("utf-8", "replace"))

    def check(self, major: int) -> None:
        """Raise PluginError unless it is for this major version of TensorRT and this version of APAR."""
        if self.major != major:
            raise PluginError(f"{self.path} is for TensorRT {self.major}, but TensorRT {major} is running. {_REMEDY}")
        abi = int(self._library.apar_tensorrt_abi_version())
        if abi != ABI_VERSION:
            raise PluginError(f"{self.path} has ForkAttention ABI {abi}, this apar needs {ABI_VERSION}. {_REMEDY}")

    def add_kernels(self, table: Path) -> None:
        """Give it a table of GPU kernels (`apar.plugins.gpu.pack`). Raises PluginError for a file that is none."""
        problem = self._library.apar_tensorrt_add_kernels(str(table).encode())
        if problem:
            raise PluginError(problem.decode("utf-8", "replace"))

    def check_kernels(self, compute_capability: str) -> None:
        """Raise PluginError where it has no GPU kernels for such a GPU."""
        major, minor = compute_capability.split(".")
        problem = self._library.apar_tensorrt_kernels(10 * int(major) + int(minor))
        if problem:
            raise PluginError(f"{self.path}: {problem.decode('utf-8', 'replace')}")

    def bind_pools(self, engine_id: int, pools: Sequence[int], num_blocks: int) -> None:
        """Tell the plugins of the engine `engine_id` where each layer's pool is (engines with bound pools)."""
        addresses = (c_void_p * len(pools))(*pools)
        if self._library.apar_tensorrt_bind_pools(engine_id, len(pools), addresses, num_blocks):
            raise PluginError(
                f"this process has already loaded the engine {engine_id}, whose pools are bound; run a second copy of "
                "it in a process of its own"
            )

    def unbind_pools(self, engine_id: int) -> None:
        """Forget the pools of an engine."""
        self._library.apar_tensorrt_unbind_pools(engine_id)

    def counters(self) -> tuple[int, int]:
        """Layers run since the library was loaded, and those whose pool came at two addresses and was copied."""
        run, copied = c_int64(), c_int64()
        self._library.apar_tensorrt_counters(ctypes.byref(run), ctypes.byref(copied))
        return run.value, copied.value


_FUNCTIONS: tuple[tuple[str, Any, list[Any]], ...] = (
    ("apar_tensorrt_major", c_int32, []),
    ("apar_tensorrt_abi_version", c_int32, []),
    ("apar_tensorrt_status", c_char_p, []),
    ("apar_tensorrt_add_kernels", c_char_p, [c_char_p]),
    ("apar_tensorrt_kernels", c_char_p, [c_int32]),
    ("apar_tensorrt_bind_pools", c_int32, [c_int32, c_int32, ctypes.POINTER(c_void_p), c_int64]),
    ("apar_tensorrt_unbind_pools", None, [c_int32]),
    ("apar_tensorrt_counters", None, [ctypes.POINTER(c_int64), ctypes.POINTER(c_int64)]),
)


def library_path(major: int) -> Path:
    """The plugin library for a major version of TensorRT. Raises PluginError where there is none."""
    from apar.plugins import find_library

    given = os.environ.get(LIBRARY_VARIABLE)
    if given:
        path = Path(given)
        if not path.is_file():
            raise PluginError(f"{LIBRARY_VARIABLE} is {given!r}, which is no file; correct it or unset it")
        return path.resolve()
    name = f"libapar_tensorrt{major}.so"
    found = find_library(name)
    if found is None:
        raise PluginError(f"apar was installed without its plugins for TensorRT {major} ({name}). {_REMEDY}")
    return found
