"""Which kernels are compiled ahead of time: one `Build` for each entry of the launch table (`launch_table.h`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import triton

from apar.export.errors import PluginError
from apar.plugins.gpu.kernels import attend, write
from apar.plugins.gpu.kernels import plan as device_plan
from apar.plugins.gpu.launch import ATTEND_STAGES, ATTEND_WARPS, DENSE_WARPS, PLAN_WARPS, PLAN_WIDTH
from apar.plugins.gpu.sizes import BLOCK_SIZES, HEAD_DIMS, HEADS_PER_PROGRAM, KEY_TILE, LARGE_TILE, SMALL_TILE

SMS = (80, 90, 100)
DTYPES = {"float16": "fp16", "bfloat16": "bf16"}
DTYPE_CODES = {None: 0, "float16": 1, "bfloat16": 2}
KINDS = {"copy_read": 1, "copy_write": 2, "rope_write": 3, "plan": 4, "attend": 5, "merge": 6}
CHECKED = 1

# Parameter -> (AparGpuArgument, type); "kv" stands for the build's 16-bit type.
ARGUMENTS = {
    "qkv": (1, "*kv"),
    "q": (2, "*kv"),
    "pool": (3, "*kv"),
    "plan": (4, "*i32"),
    "block_table": (5, "*i32"),
    "slot_mapping": (6, "*i32"),
    "tree_mask": (7, "*i32"),
    "out": (8, "*kv"),
    "part_out": (9, "*fp32"),
    "part_lse": (10, "*fp32"),
    "errors": (11, "*i32"),
    "position_ids": (12, "*i32"),
    "inv_freq": (13, "*fp32"),
    "slot_copies": (14, "*i32"),
    "copy_scratch": (15, "*kv"),
    "query_start": (16, "*i32"),
    "kv_len": (17, "*i32"),
    "prefix_rows": (18, "*i32"),
    "prefix_blocks": (19, "*i32"),
    "plan_scratch": (20, "*i32"),
    "num_blocks": (32, "i32"),
    "table_width": (33, "i32"),
    "mask_words": (34, "i32"),
    "num_heads": (35, "i32"),
    "num_kv_heads": (36, "i32"),
    "num_copies": (37, "i32"),
    "num_tokens": (38, "i32"),
    "num_rows": (39, "i32"),
    "num_groups": (40, "i32"),
    "items": (41, "i32"),
    "tiles": (42, "i32"),
    "budget": (43, "i32"),
    "tile_tokens": (44, "i32"),
    "heads_per_group": (45, "i32"),
    "masked": (46, "i32"),
    "splits": (47, "i32"),
    "scale": (64, "fp32"),
    "rope_scale": (65, "fp32"),
    "layer_stride": (96, "i64"),
}
NULL_ARGUMENT = 31


@dataclass(frozen=True, slots=True)
class Build:
    """One kernel with everything that is fixed at compile time. Fields that are None or 0 do not matter to it."""

    kind: str
    function: Any
    constants: dict[str, Any]
    num_warps: int
    num_stages: int = 1
    dtype: str | None = None
    head_dim: int = 0
    block_size: int = 0
    tile: int = 0
    checked: bool = False

    @property
    def name(self) -> str:
        """For people and reports."""
        fields = (
            self.kind,
            self.dtype,
            self.head_dim and f"d{self.head_dim}",
            self.block_size and f"b{self.block_size}",
        )
        return "_".join(str(f) for f in (*fields, self.tile and f"t{self.tile}", self.checked and "checked") if f)

    @property
    def parameters(self) -> tuple[str, ...]:
        """Arguments at launch, in order."""
        return tuple(name for name in self.function.arg_names if name not in self.constants)

    @property
    def signature(self) -> dict[str, str]:
        """Type of every parameter, as Triton spells them."""
        kind = DTYPES[self.dtype] if self.dtype else ""
        types = {name: ARGUMENTS[name][1].replace("kv", kind) for name in self.parameters}
        return {name: types.get(name, "constexpr") for name in self.function.arg_names}


@dataclass(frozen=True, slots=True)
class Choice:
    """What to build: every combination."""

    dtypes: Sequence[str] = tuple(DTYPES)
    head_dims: Sequence[int] = HEAD_DIMS
    block_sizes: Sequence[int] = (16, 32, 64)
    tiles: Sequence[int] = field(default=(SMALL_TILE, LARGE_TILE))
    checked: bool = False

    def __post_init__(self) -> None:
        for name, given, allowed in (
            ("dtype", self.dtypes, tuple(DTYPES)),
            ("head_dim", self.head_dims, HEAD_DIMS),
            ("block_size", self.block_sizes, BLOCK_SIZES),
        ):
            for value in given:
                if value not in allowed:
                    known = ", ".join(map(str, allowed))
                    raise PluginError(f"{name} {value} has no GPU kernels; there are: {known}")

    def builds(self) -> Iterator[Build]:
        """All builds, those of a kind together."""
        for block_size in self.block_sizes:
            constants: dict[str, Any] = {"BLOCK_SIZE": block_size, "WIDTH": PLAN_WIDTH}
            yield Build("plan", device_plan.make_plan, constants, PLAN_WARPS, block_size=block_size)
        for dtype in self.dtypes:
            for head_dim in self.head_dims:
                pads = {"HEAD_DIM": head_dim, "HEAD_PAD": triton.next_power_of_2(head_dim)}
                heads = {"HEADS": HEADS_PER_PROGRAM}
                yield Build("merge", attend.merge, pads | heads, DENSE_WARPS, dtype=dtype, head_dim=head_dim)
                for block_size in self.block_sizes:
                    yield from self._pool_builds(dtype, head_dim, block_size, pads, heads)

    def _pool_builds(
        self, dtype: str, head_dim: int, block_size: int, pads: dict[str, Any], heads: dict[str, Any]
    ) -> Iterator[Build]:
        """Kernels that know the pool's layout."""
        pool = {"BLOCK_SIZE": block_size, "CHECKED": self.checked}
        common: dict[str, Any] = {
            "dtype": dtype,
            "head_dim": head_dim,
            "block_size": block_size,
            "checked": self.checked,
        }
        for kind, scatter in (("copy_read", 0), ("copy_write", 1)):
            constants = {**pads, **heads, **pool, "SCATTER": scatter}
            yield Build(kind, write.copy_slots, constants, DENSE_WARPS, **common)
        half = {"HEAD_DIM": head_dim, "HALF_PAD": triton.next_power_of_2(head_dim // 2)}
        yield Build("rope_write", write.rope_write, {**half, **heads, **pool}, DENSE_WARPS, **common)
        for tile in self.tiles:
            constants = {**pads, **pool, "TILE": tile, "KEY_TILE": KEY_TILE}
            yield Build("attend", attend.attend, constants, ATTEND_WARPS[tile], ATTEND_STAGES, tile=tile, **common)
