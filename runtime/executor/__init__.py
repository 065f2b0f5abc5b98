"""Executors run steps of an engine; one file a backend, one interface (`base`)."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from apar.export.errors import ExecutorError
from apar.export.manifest import Manifest
from apar.runtime.executor.base import Executor
from apar.runtime.executor.choice import choose

__all__ = ["EXECUTORS", "Executor", "load_executor"]

EXECUTORS = {
    "onnx": ("apar.runtime.executor.onnx", "OnnxExecutor"),
    "torch": ("apar.runtime.executor.torch_device", "load_torch_executor"),
    "tensorrt": ("apar.runtime.executor.tensorrt_executor", "TensorRtExecutor"),
}


HOST_OPTIONS = ("host_blocks", "kv_host_memory_bytes")
_NO_HOST_BLOCKS = {
    "onnx": "its KV pool is in host memory already; give that more with num_blocks or kv_memory_bytes",
    "tensorrt": "what is evicted is computed again; the torch executor offers them",
}


def load_executor(
    engine: Path, name: str = "auto", *, room: tuple[int, int] | None = None, served: bool = False, **options: Any
) -> Executor:
    """Load an engine directory with the executor called `name`; "auto" is what suits the engine and this machine
    (`choice`).

    `package.module:Class` names an executor of one's own. Options are those of the executor's constructor, such as
    `num_blocks`; onnx also takes `device="cpu"`. room: (rows, tokens) of the largest steps that will come, for
    executors that allocate by it. served: a server and its gateway work on this machine's cores, too.
    Raises ExecutorError for an unknown name or option, and what the constructor raises.
    """
    if name in ("auto", "onnx", "torch"):
        manifest = Manifest.load(Path(engine))
        if manifest.tensorrt is not None and name != "auto":
            raise ExecutorError(f"{engine} is a TensorRT engine, which the {name} executor cannot run; use tensorrt")
        if name == "auto":
            name = choose(manifest, options)
    if name == "onnx":
        device = options.pop("device", "auto")
        if device not in ("auto", "cpu"):
            raise ExecutorError(f"the onnx executor runs on the CPU, not on {device!r}; use the torch executor")
        if served:
            options = {"yields": True} | options
    if name in _NO_HOST_BLOCKS:
        given = [option for option in HOST_OPTIONS if options.pop(option, None)]
        if given:
            raise ExecutorError(f"{given[0]}: the {name} executor offers no host blocks, {_NO_HOST_BLOCKS[name]}")
    if name == "torch" and room is not None:
        options = {"max_rows": room[0], "max_step_tokens": room[1]} | options
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
    if not callable(kind):
        raise ExecutorError(f"{name} is no executor but a {type(kind).__name__}; name a class derived from Executor")
    try:
        executor = kind(Path(engine), **options)
    except TypeError as error:
        if "keyword argument" not in str(error):
            raise
        raise ExecutorError(f"the {name} executor does not take these options: {error}") from error
    if not isinstance(executor, Executor):
        raise ExecutorError(f"{name} made no executor but a {type(executor).__name__}; derive the class from Executor")
    return executor
