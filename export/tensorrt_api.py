"""TensorRT's Python package as building and running need it: found, of a known version, with the plugin loaded.

Only names that exist in TensorRT 10.10 to 11.x are used anywhere in APAR; what one of them lacks is asked for first.
"""

from __future__ import annotations

import importlib
import re
from types import ModuleType
from typing import Any

from apar.export.errors import PluginError
from apar.plugins.tensorrt_library import TensorRtLibrary, library_path

MAJORS = (10, 11)
CREATORS = ("ForkAttention", "ForkPlan", "AllReduce", "AllGather")
_INSTALL = (
    "install it with: pip install 'tensorrt==10.14.1.48.*' (what the Triton containers 26.04 to 26.07 carry; 10.10 to "
    "11.x will do), or run inside such a container"
)


def load_tensorrt() -> ModuleType:
    """Import TensorRT. Raises PluginError where it is missing, broken, or of a major version without a plugin."""
    try:
        trt = importlib.import_module("tensorrt")
        version = major(trt)
    except (ImportError, OSError, AttributeError, ValueError) as error:
        raise PluginError(f"TensorRT's Python package cannot be used here ({error}); {_INSTALL}") from error
    if version not in MAJORS:
        raise PluginError(f"TensorRT {trt.__version__} is installed; APAR works with 10.10 to 11.x; {_INSTALL}")
    return trt


def major(trt: Any) -> int:
    """Its major version."""
    return int(str(trt.__version__).split(".")[0])


def release(trt: Any) -> str:
    """Its version in four numbers: what engines are bound to, without a wheel's own suffix (10.14.1.48.post1)."""
    found = re.match(r"\d+(\.\d+){0,3}", str(trt.__version__))
    return found[0] if found else str(trt.__version__)


def load_plugins(trt: Any) -> TensorRtLibrary:
    """Load the plugin library for this TensorRT into the process. Idempotent.

    Raises PluginError where there is none, or where it does not register its plugins with this TensorRT.
    """
    library = TensorRtLibrary(library_path(major(trt)))
    library.check(major(trt))
    registry = trt.get_plugin_registry()
    missing = [name for name in CREATORS if registry.get_creator(name, "1", "") is None]
    if missing:
        raise PluginError(
            f"{library.path} was loaded, but TensorRT {trt.__version__} does not know its plugins {', '.join(missing)} "
            f"({library.status}); build the library again with the headers of this TensorRT"
        )
    return library


def element_types(trt: Any) -> dict[Any, str]:
    """TensorRT's data types by the names that the manifest uses."""
    kinds = trt.DataType
    return {kinds.FLOAT: "float32", kinds.HALF: "float16", kinds.BF16: "bfloat16", kinds.INT32: "int32"}
