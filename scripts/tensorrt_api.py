#!/usr/bin/env python3
"""Write down what TensorRT's Python bindings offer, as tests compare APAR's calls with it.

    python scripts/tensorrt_api.py BINDINGS_DIR ...  > tests/data/tensorrt_api.json

BINDINGS_DIR holds the package `tensorrt_bindings` of one version (pip install --no-deps --target DIR
tensorrt-cu13-bindings==VERSION). The libraries that it loads are NVIDIA's, or stubs of them in LD_LIBRARY_PATH
(tests/plugins/tensorrt/stub_nvinfer.c): nothing is run, only names and signatures are read.
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from typing import Any

CLASSES = (
    "Builder", "IBuilderConfig", "INetworkDefinition", "ITensor", "IOptimizationProfile", "IHostMemory", "ITimingCache",
    "OnnxParser", "ParserError", "Runtime", "ICudaEngine", "IExecutionContext", "ILogger", "IProgressMonitor",
    "IPluginRegistry", "IPluginCreatorV3One", "PluginField", "PluginFieldCollection", "IPluginV3Layer",
)  # fmt: skip
ENUMS = (
    "DataType", "ExecutionContextAllocationStrategy", "MemoryPoolType", "NetworkDefinitionCreationFlag",
    "PluginFieldType", "PreviewFeature", "ProfilingVerbosity", "TensorIOMode", "TensorRTPhase",
)  # fmt: skip
FUNCTIONS = ("get_plugin_registry", "init_libnvinfer_plugins")
_MODULE = re.compile(r"(tensorrt_bindings\.)?(tensorrt_bindings|nvinfer1|tensorrt)(\.|::)(tensorrt\.)?")


def introspect(folder: str) -> dict[str, Any]:
    """Classes with the signatures of their members, enumerations with their members, functions."""
    sys.path.insert(0, folder)
    trt = importlib.import_module("tensorrt_bindings")
    return {
        "version": trt.__version__,
        "classes": {
            name: {member: signatures(getattr(trt, name), member) for member in members(getattr(trt, name))}
            for name in CLASSES
            if hasattr(trt, name)
        },
        "enums": {name: sorted(getattr(trt, name).__members__) for name in ENUMS if hasattr(trt, name)},
        "functions": [name for name in FUNCTIONS if hasattr(trt, name)],
    }


def members(kind: type) -> list[str]:
    """Public names, and the constructor."""
    return [name for name in sorted(dir(kind)) if not name.startswith("_") or name == "__init__"]


def signatures(kind: type, member: str) -> list[str]:
    """Parameter lists as pybind11 states them; ["property"] for a property."""
    value = getattr(kind, member)
    if isinstance(value, property):
        return ["property"]
    found = re.findall(rf"^(?:\d+\. )?{re.escape(member)}\((.*)\)(?: -> .*)?$", value.__doc__ or "", re.MULTILINE)
    return [_MODULE.sub("", text) for text in found if text != "*args, **kwargs"]


def main() -> int:
    """One process a version, since only one can be imported."""
    if len(sys.argv) > 2 and sys.argv[1] == "--one":
        print(json.dumps(introspect(sys.argv[2])))
        return 0
    found = []
    for folder in sys.argv[1:]:
        done = subprocess.run([sys.executable, __file__, "--one", folder], check=True, capture_output=True, text=True)
        found.append(json.loads(done.stdout))
    print(json.dumps({entry.pop("version"): entry for entry in found}, indent=1, sort_keys=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
