"""How kernels are launched: warps of a program and stages of its software pipeline."""

from __future__ import annotations

from apar.plugins.gpu.sizes import LARGE_TILE, SMALL_TILE

PLAN_WIDTH = 256
PLAN_WARPS = PLAN_WIDTH // 32
DENSE_WARPS = 4
ATTEND_WARPS = {SMALL_TILE: 4, LARGE_TILE: 8}
ATTEND_STAGES = 3
"""Block ids are loaded a stage ahead of keys and values, these a stage ahead of the tensor cores."""
WIDE_ATTEND_STAGES = 1
WIDE_LINEAR_STAGES = 2
"""In float32: more would take more shared memory than the 99 KiB of compute capability 8.6, 8.9 and 12."""
