"""ForkAttention and Linear: the native kernels and where to find the built library."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from apar.export.errors import PluginError
from apar.export.manifest import ABI_VERSION, LINEAR_ABI_VERSION

LIBRARY_NAME = "apar_onnxruntime.dll" if sys.platform == "win32" else "libapar_onnxruntime.so"
LIBRARY_VARIABLE = "APAR_PLUGIN_LIBRARY"
"""Environment variable that names the library's file and goes before every other place."""

_REMEDY = (
    "Install apar again on a machine with a C++ compiler and the headers of ONNX Runtime "
    "(ONNXRUNTIME_INCLUDE_DIR=FOLDER tells where they are; with `--config-settings=cmake.define.APAR_NATIVE=REQUIRED` "
    f"pip says what is missing), or set {LIBRARY_VARIABLE} to a built library."
)


def library_path() -> Path:
    """Return the built custom-operator library for ONNX Runtime.

    Raises PluginError where there is none. Engines then still run their portable graph.
    """
    given = os.environ.get(LIBRARY_VARIABLE)
    if given:
        path = Path(given)
        if not path.is_file():
            raise PluginError(f"{LIBRARY_VARIABLE} is {given!r}, which is no file; correct it or unset it")
        return path.resolve()
    found = find_library(LIBRARY_NAME)
    if found is not None:
        return found
    raise PluginError(
        f"apar was installed without its native library ({LIBRARY_NAME}), so only the portable graph runs. {_REMEDY}"
    )


def check_versions(path: Path) -> None:
    """Raise PluginError if the library at `path` cannot be loaded or has nodes of other versions than this package."""
    for node, function, ours in (
        ("ForkAttention", "apar_abi_version", ABI_VERSION),
        ("Linear", "apar_linear_abi_version", LINEAR_ABI_VERSION),
    ):
        version = _call(path, function, ctypes.c_int)
        if version != ours:
            raise PluginError(f"{path} has {node} ABI {version}, this version of apar needs {ours}. {_REMEDY}")


def cpu_isa(path: Path) -> str:
    """Return the instruction set whose kernels the library at `path` runs on this processor, such as `avx512`.

    The environment variable APAR_CPU_ISA overrides the choice. Raises PluginError if it names none that this processor
    has, or the library cannot be loaded.
    """
    name = _call(path, "apar_cpu_isa", ctypes.c_char_p)
    if not isinstance(name, bytes):
        raise PluginError(
            f"APAR_CPU_ISA is {os.environ.get('APAR_CPU_ISA')!r}, for which there are no kernels on this processor; "
            "unset it to let the library choose"
        )
    return name.decode("ascii")


def find_library(name: str) -> Path | None:
    """The built library with this file name, or None."""
    return next((path.resolve() for path in _candidates(name) if path.is_file()), None)


def _candidates(name: str = LIBRARY_NAME) -> Iterator[Path]:
    """Places of a library: beside this package, then where the installer put it (an editable install
    leaves the sources in the checkout and the library among the installed files)."""
    for folder in __path__:
        yield Path(folder) / name
    try:
        files = metadata.files("apar") or []
    except metadata.PackageNotFoundError:
        return
    for file in files:
        if file.name == name:
            yield Path(str(file.locate()))


def _call(path: Path, function: str, result: type[ctypes.c_int] | type[ctypes.c_char_p]) -> object:
    try:
        symbol = getattr(ctypes.CDLL(str(path)), function)
    except OSError as error:
        raise PluginError(f"{path} cannot be loaded ({error}). {_REMEDY}") from error
    except AttributeError as error:
        raise PluginError(f"{path} is no library of apar: it lacks {function}. {_REMEDY}") from error
    symbol.argtypes = []
    symbol.restype = result
    return symbol()
