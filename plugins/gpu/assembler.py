"""Which assembler makes the GPU's machine code: none that is newer than the driver, which would refuse what it makes.

Triton brings two. From 3.9 on, code for compute capability 9.0 and later comes from the newer one, of CUDA 13, and has
a format that drivers of CUDA 12 (before 580) cannot read. The older one, of CUDA 12, knows those GPUs too.
"""

from __future__ import annotations

import contextlib
import logging
import os

from triton import knobs
from triton.backends.nvidia.compiler import get_ptxas

from apar.export.errors import PluginError
from apar.plugins import cuda_driver

logger = logging.getLogger(__name__)

VARIABLE = "TRITON_PTXAS_BLACKWELL_PATH"
"""Triton's own variable for the newer assembler; its name is older than its use for other GPUs."""


def fit_driver() -> None:
    """Have Triton take the older assembler for everything where the driver is too old for the newer one.

    To be called before anything is compiled. Does nothing where there is no driver, or where the user named an
    assembler.
    """
    newer, older = knobs.nvidia.ptxas_blackwell, knobs.nvidia.ptxas
    with contextlib.suppress(PluginError):
        driver = cuda_driver.driver_version()
        if os.environ.get(VARIABLE) or not _reads(driver, older.version) or _reads(driver, newer.version):
            return
        os.environ[VARIABLE] = older.path
        logger.info("the driver is of CUDA %s: kernels are assembled by ptxas %s", driver, older.version)


def obstacle(sm: int) -> str | None:
    """Why this machine's driver cannot load what Triton makes for compute capability `sm` (90 is 9.0); None where it
    can, or where there is no driver."""
    try:
        driver = cuda_driver.driver_version()
    except PluginError:
        return None
    tool = get_ptxas(sm)
    if _reads(driver, tool.version):
        return None
    return (
        f"Triton's assembler is of CUDA {tool.version}, whose code a driver of CUDA {driver} does not load; "
        "update NVIDIA's driver"
    )


def _reads(driver: str, assembler: str) -> bool:
    """Drivers load the code of every assembler of their CUDA's major version, and of those before."""
    return int(assembler.partition(".")[0]) <= int(driver.partition(".")[0])
