"""Executors run steps of an engine; one file a backend, one interface (`base`)."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from apar.export.errors import ExecutorError
from apar.export.manifest import Manifest
from apar.runtime.executor.base import Executor

__all__ = ["EXECUTORS", "Executor", "load_executor"]

EXECUTORS = {
    "onnx": ("apar.runtime.executor.onnx", "OnnxExecutor"),
    "torch": ("apar.runtime.executor.torch_device", "load_torch_executor"),
    "tensorrt": ("apar.runtime.executor.tensorrt_executor", "TensorRtExecutor"),
}


def load_executor(engine: Path, name: str = "auto", **options: Any) -> Executor:
    """Load an engine directory with the executor called `name`; "auto" is what the engine was built for.

    `package.module:Class` names an executor of one's own. Options are those of the executor's constructor, such as
    `num_blocks`.
    Raises ExecutorError for an unknown name or option, and what the constructor raises.
    """
    if name in ("auto", "onnx", "torch"):
        compiled = Manifest.load(Path(engine)).tensorrt is not None
        if compiled and name != "auto":
            raise ExecutorError(f"{engine} is a TensorRT engine, which the {name} executor cannot run; use tensorrt")
        name = ("tensorrt" if compiled else "onnx") if name == "auto" else name
    module, attribute = EXECUTORS.get(name) or name.partition(":")[::2]
    if not attribute:
        raise ExecutorError(
            f"there is no executor {name!r}; executors are: auto, {', '.join(EXECUTORS)}, and package.module:Class"
        )
    try:
        kind = getattr(import_module(module), attribute)
    except ModuleNotFoundError as error:
        raise ExecutorError(f"the {name} executor needs the package {error.name}, which is not installed") from error
    except AttributeError as error:
        raise ExecutorError(f"there is no executor {name!r}: {module} has no {attribute}") from error
    try:
        executor: Executor = kind(Path(engine), **options)
    except TypeError as error:
        if "keyword argument" not in str(error):
            raise
        raise ExecutorError(f"the {name} executor does not take these options: {error}") from error
    return executor
