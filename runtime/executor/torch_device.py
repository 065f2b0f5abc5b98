"""The torch executor by device: the GPU kernels where there is a CUDA device, the plain reference elsewhere."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from apar.export.errors import ExecutorError
from apar.runtime.executor.base import Executor
from apar.runtime.executor.choice import GPU_OPTIONS, package_obstacle

try:
    import torch
except ModuleNotFoundError as error:
    raise ExecutorError("the torch executor needs PyTorch; install it with: pip install 'apar[torch]'") from error


def load_torch_executor(engine: Path, *, device: str = "auto", **options: Any) -> Executor:
    """Load an engine with PyTorch. device: "auto", "cpu" (the reference), "cuda" or "cuda:N".

    Options are those of TorchExecutor or CudaExecutor. Raises ExecutorError where packages for the GPU are missing.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if re.fullmatch(r"cpu|cuda(:\d+)?", device) is None:
        raise ExecutorError(f"there is no device {device!r}; the torch executor runs on cpu, cuda or cuda:N")
    if device == "cpu":
        from apar.runtime.executor.torch_executor import TorchExecutor

        for name in GPU_OPTIONS:
            if options.pop(name, None) is not None:
                raise ExecutorError(
                    f"{name} is an option for GPUs; on the CPU the torch executor computes in float32. "
                    "Engines with small weights are built with: apar build --quantize"
                )
        # Steps of any size run there.
        options.pop("max_rows", None)
        options.pop("max_step_tokens", None)
        return TorchExecutor(engine, **options)
    problem = package_obstacle()
    if problem is not None:
        raise ExecutorError(f"the torch executor cannot run on a GPU: {problem}, or give device='cpu'")
    from apar.runtime.executor.cuda.executor import CudaExecutor

    return CudaExecutor(engine, device=device, **options)
