"""What a number was measured on."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from apar.export.manifest import Manifest
    from apar.runtime.executor.base import Executor

PACKAGES = ("apar", "onnxruntime", "numpy", "onnx", "torch")


def describe_machine() -> dict[str, Any]:
    """Processor, cores, memory, kernels' instruction set, versions; without anything that names the machine."""
    from apar.runtime.executor.threads import default_threads

    return {
        "cpu": cpu_model(),
        "logical_cpus": os.cpu_count(),
        "usable_cores": default_threads(),
        "isa": kernel_isa()[0],
        "memory_bytes": _memory(),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
    }


def describe_engine(manifest: Manifest, executor: Executor) -> dict[str, Any]:
    """The engine that was measured, and what ran it."""
    return {
        "source": manifest.source,
        "dtype": manifest.dtype,
        "quantize": manifest.quantize,
        "group_size": manifest.group_size,
        "kv_dtype": manifest.kv_dtype,
        "block_size": manifest.block_size,
        "executor": executor.name,
        "detail": executor.detail,
    }


def cpu_model() -> str:
    """The processor's name as its maker writes it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def kernel_isa() -> tuple[str | None, str]:
    """Instruction set of the native library's kernels here, or None; and why."""
    from apar import plugins
    from apar.export.errors import PluginError

    try:
        path = plugins.library_path()
        plugins.check_versions(path)
        return plugins.cpu_isa(path), f"{path.name} is installed"
    except PluginError as error:
        return None, str(error)


def peak_memory() -> int | None:
    """Bytes this process has held at most, mapped files included; None where the system does not say."""
    try:
        import resource
    except ModuleNotFoundError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
