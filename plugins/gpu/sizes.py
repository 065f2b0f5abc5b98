"""Sizes of a step's launches, from shapes alone: CUDA graphs and TensorRT know nothing else on the host.

`launch_table.h` states the same formulas for C++; a test compares the two.
"""

from __future__ import annotations

from dataclasses import dataclass

from apar.export.errors import ExecutorError

HEAD_DIMS = (64, 80, 96, 128)
BLOCK_SIZES = (8, 16, 32, 64, 128)
KEY_TILE = 64
"""Keys that one turn of the attention kernel's loop takes."""
SMALL_TILE = 16
LARGE_TILE = 64
"""Query rows (a row: one head of one token) of a tile: the least that tensor cores take, and for prefill."""
MIN_CHUNK = 128
"""Keys of the shortest part that a tile is split into."""
CHUNK_STEPS = 13
"""Chunks are MIN_CHUNK * 2**i keys for i below this, so that every context up to 524,288 can be one chunk."""
SPLIT_PROGRAMS = 512
"""Programs that splitting may add to a launch: about four for each multiprocessor of today's largest GPUs."""
MAX_SPLIT_TOKENS = 4096
"""Steps of more tokens than this fill any GPU: nothing is split and no prefix pass runs."""
HEADS_PER_PROGRAM = 8
"""Heads that a program of the RoPE, copy and merge kernels takes."""
PLAN_HEADER = 8
ITEM_FIELDS = 8
PART_FIELDS = 6


@dataclass(frozen=True, slots=True)
class StepSizes:
    """What buffers and grids of a step follow from: T tokens, R rows, G groups, and the model's heads.

    `tile` is the attention kernel's BLOCK_M; left at 0 it is chosen by `choose_tile`.
    """

    tokens: int
    rows: int
    groups: int
    num_heads: int
    num_kv_heads: int
    tile: int = 0

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ExecutorError(f"{self.num_heads} heads cannot be divided among {self.num_kv_heads} key/value heads")
        if self.heads_per_group > LARGE_TILE:
            raise ExecutorError(
                f"{self.heads_per_group} query heads share a key/value head; the GPU kernels take up to {LARGE_TILE}"
            )
        if self.tile == 0:
            object.__setattr__(self, "tile", choose_tile(self.tokens, self.rows, self.heads_per_group))

    @property
    def heads_per_group(self) -> int:
        """Query heads that share a key/value head."""
        return self.num_heads // self.num_kv_heads

    @property
    def tile_tokens(self) -> int:
        """Tokens of a tile."""
        return self.tile // self.heads_per_group

    @property
    def splits(self) -> bool:
        """Whether keys may be split at all (and prefixes read once)."""
        return self.tokens <= MAX_SPLIT_TOKENS

    @property
    def budget(self) -> int:
        """Items that splitting may add."""
        return -(-SPLIT_PROGRAMS // self.num_kv_heads) if self.splits else 0

    @property
    def own_tiles(self) -> int:
        """Most tiles that rows can have."""
        return self.rows + self.tokens // self.tile_tokens

    @property
    def prefix_tiles(self) -> int:
        """Most tiles that groups of at least two rows can have."""
        if self.groups == 0 or not self.splits:
            return 0
        return min(self.groups, self.rows // 2) + self.tokens // self.tile_tokens

    @property
    def tiles(self) -> int:
        return self.own_tiles + self.prefix_tiles

    @property
    def items(self) -> int:
        """First dimension of the attention kernel's grid; the second is `num_kv_heads`."""
        return self.tiles + self.budget

    @property
    def parts(self) -> int:
        """Partial outputs of a token (all heads of it) that a step can have; 0: the merge kernel is not needed."""
        return 2 * self.tokens + self.budget * self.tile_tokens if self.splits else 0

    @property
    def plan_size(self) -> int:
        """int32 elements of a plan: header, items, parts of each token."""
        return PLAN_HEADER + ITEM_FIELDS * self.items + PART_FIELDS * self.tokens

    @property
    def scratch_size(self) -> int:
        """int32 elements that the device's planner needs beside the plan."""
        return (self.tokens + 1) + (self.rows + 1) + 3 * (self.groups + 1) + 2 * (self.tiles + 1)


def choose_tile(tokens: int, rows: int, heads_per_group: int) -> int:
    """SMALL_TILE where rows have a token or two, as in decoding; LARGE_TILE for prefill and drafts."""
    small = heads_per_group <= SMALL_TILE and tokens * heads_per_group <= 2 * SMALL_TILE * rows
    return SMALL_TILE if small else LARGE_TILE
