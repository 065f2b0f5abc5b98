"""Which devices the kernels run on."""

from __future__ import annotations

import subprocess

import torch
from triton import TritonError

from apar.export.errors import ExecutorError
from apar.plugins.gpu.assembler import fit_driver
from apar.plugins.gpu.kernels.dot import INTERPRETED
from apar.runtime.executor.choice import OLDEST

DEVICE_ERRORS = (RuntimeError, TritonError, subprocess.CalledProcessError)
"""What PyTorch and Triton raise where a kernel cannot be compiled, loaded or run."""


def remedy(error: Exception) -> str:
    """What to do about one of DEVICE_ERRORS, as the end of a sentence; empty where nothing is known."""
    text = str(error)
    if isinstance(error, subprocess.CalledProcessError) or "C compiler" in text:
        return ". Triton builds its launcher with a C compiler and Python's headers: apt-get install gcc python3-dev"
    if "kernel image" in text:
        return ". The driver is too old for what Triton makes: update NVIDIA's driver, or install an older triton"
    return ""


def usable_device(name: str) -> torch.device:
    """The device, if the kernels run on it, and an assembler that suits its driver. Raises ExecutorError with what to
    do."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ExecutorError(f"there is no device {name!r}; write cpu, cuda or cuda:N") from error
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ExecutorError(
                "PyTorch finds no CUDA device; install a CUDA build of torch and check `nvidia-smi`, or run on the CPU"
            )
        count = torch.cuda.device_count()
        if ":" in name and device.index >= count:
            raise ExecutorError(f"there is no {device}: PyTorch sees {count} GPUs; CUDA_VISIBLE_DEVICES may hide some")
        if torch.cuda.get_device_capability(device) < OLDEST:
            raise ExecutorError(
                f"{torch.cuda.get_device_name(device)} is too old: the kernels need compute capability 8.0 or newer"
            )
        fit_driver()
        return device if ":" in name else torch.device("cuda", torch.cuda.current_device())
    if not INTERPRETED.value:
        raise ExecutorError(
            f"the GPU kernels run on CUDA devices, not on {name!r}; use the torch executor without device"
        )
    return device
