"""What `auto` means: the executor that suits an engine, the options given, and this machine."""

from __future__ import annotations

import importlib.util
import logging
import re
from collections.abc import Mapping
from importlib import metadata
from math import prod
from typing import Any

from apar.export.errors import PluginError
from apar.export.manifest import Manifest
from apar.export.weight_plan import weight_plan
from apar.plugins.cuda_driver import CudaDevice
from apar.plugins.gpu.sizes import BLOCK_SIZES, HEAD_DIMS, LARGE_TILE

logger = logging.getLogger(__name__)

ONNX_OPTIONS = ("graph", "threads", "spinning", "yields")
GPU_OPTIONS = ("weights", "dtype")
OLDEST = (8, 0)
"""Compute capability that the GPU kernels need."""
OLDEST_PACKAGES = {"torch": (2, 8), "triton": (3, 6)}
"""What the GPU kernels and their executor call is not in older ones."""
ROOM = 0.9
"""Share of the GPU's free memory that weights may take, so that a KV pool worth the name is left."""


def choose(manifest: Manifest, options: Mapping[str, Any]) -> str:
    """The executor's name: `tensorrt` for its engines; `torch` where a GPU was asked for, or is there and can run the
    model; `onnx` otherwise. Says why in the log."""
    if manifest.tensorrt is not None:
        return "tensorrt"
    device = options.get("device", "auto")
    if device not in ("auto", "cpu") or any(options.get(name) is not None for name in GPU_OPTIONS):
        return "torch"
    if device == "cpu" or any(name in options for name in ONNX_OPTIONS):
        return "onnx"
    obstacle = gpu_obstacle(manifest)
    if obstacle is None:
        return "torch"
    logger.info("the onnx executor runs the engine, on the CPU: %s", obstacle)
    return "onnx"


def gpu_obstacle(manifest: Manifest) -> str | None:
    """Why no GPU of this machine can run the engine with the torch executor; None where one can."""
    try:
        # The driver first: it answers at once, while importing PyTorch takes seconds.
        device = CudaDevice()
        capability = device.compute_capability
    except PluginError as error:
        return str(error)
    if tuple(map(int, capability.split("."))) < OLDEST:
        return f"{device.name} has compute capability {capability}, the kernels need {OLDEST[0]}.{OLDEST[1]}"
    decoder = manifest.decoder
    if decoder.head_dim not in HEAD_DIMS or manifest.block_size not in BLOCK_SIZES:
        return f"there are no GPU kernels for head_dim {decoder.head_dim} with blocks of {manifest.block_size}"
    if decoder.num_heads // decoder.num_kv_heads > LARGE_TILE:
        return f"more than {LARGE_TILE} query heads share a key/value head"
    problem = package_obstacle()
    if problem is not None:
        return f"{device.name} is not used, since {problem}"
    import torch

    if not torch.cuda.is_available():
        return f"{device.name} is not used: this build of PyTorch ({torch.__version__}) finds no CUDA device"
    needed = 2 * sum(prod(weight.shape) for weight in weight_plan(decoder, packed=False, heads=manifest.draft_heads))
    try:
        free, _ = torch.cuda.mem_get_info()
    except RuntimeError as error:  # such as a GPU that is another process's alone, or without memory for a context
        return f"{device.name} is not used, since it cannot be: {error}"
    if needed > ROOM * free:
        return f"{device.name} has {free / 1e9:.1f} GB free, the weights take {needed / 1e9:.1f} GB; try weights int8"
    return None


def package_obstacle() -> str | None:
    """The package that the torch executor lacks on a GPU, or that is too old; None where all are there."""
    for name, oldest in OLDEST_PACKAGES.items():
        if importlib.util.find_spec(name) is None:
            return f"{name} is not installed; pip install 'apar[gpu]'"
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue  # such as a build of one's own: it is what it is
        found = re.match(r"(\d+)\.(\d+)", version)
        if found is not None and (int(found[1]), int(found[2])) < oldest:
            return f"{name} {version} is older than {oldest[0]}.{oldest[1]}; pip install -U 'apar[gpu]'"
    return None
