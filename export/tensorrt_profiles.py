"""Sizes that a step of a TensorRT engine may have, by the symbols of the graph's dimensions.

Two optimisation profiles: `DECODE`, for steps of few tokens (decoding, forks, drafts), and `MIXED`, for prompts. Every
dimension is at least 1 (see typed_graph.TensorRtAttention). There is one row more than branches may be: a padding row,
which takes padding tokens where a step is padded to the shape of a captured CUDA graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from apar.export.manifest import TensorRtEngine

DECODE, MIXED = 0, 1
DRAFT_TOKENS = 160
"""What a decoding step may be filled up to with drafts: GPUs multiply so many rows in the time that reading the
weights takes (dense float16 rate over bandwidth, about 156 on an A100, more on an H100)."""
NO_COPIES = 2
"""Rows at the beginning of slot_copies that are no copies."""
_USUAL_BLOCKS = 64
"""The builder makes pools of this size where it times something; nothing depends on how many blocks there are."""
Range = tuple[int, int, int]
"""min, opt, max"""


def ranges(engine: TensorRtEngine, profile: int) -> dict[str, Range]:
    """Each symbolic dimension of the graph -> its range in `profile`."""
    rows = engine.max_rows + 1
    tokens = most_tokens(engine, profile)
    usual_rows = max(1, engine.max_rows // 2) if profile == DECODE else max(1, engine.max_rows // 4)
    usual_tokens = usual_rows if profile == DECODE else tokens
    return {
        "T": (1, usual_tokens, tokens),
        "R": (1, usual_rows, rows),
        "R_plus_1": (2, usual_rows + 1, rows + 1),
        "MB": (1, engine.table_width, engine.table_width),
        "C": (NO_COPIES, NO_COPIES, engine.max_copies + NO_COPIES),
        "G": (1, max(1, usual_rows // 4), rows),
        "G_plus_1": (2, max(1, usual_rows // 4) + 1, rows + 1),
        "M": (1, 1, tokens),
        "W": (1, 1, mask_words(engine)),
        "L": (1, usual_rows, tokens),
        "B": (1, min(_USUAL_BLOCKS, engine.max_blocks), engine.max_blocks),
    }


def most_tokens(engine: TensorRtEngine, profile: int) -> int:
    """Tokens that a step of `profile` may have: in decoding, a fork's two for every row, or drafts."""
    return min(engine.max_tokens, max(2 * engine.max_rows, DRAFT_TOKENS)) if profile == DECODE else engine.max_tokens


def head_ranges(engine: TensorRtEngine) -> dict[str, Range]:
    """The same for the graph of Medusa heads: wanted tokens of a step (L), and those that are continued from (N)."""
    return {
        "L": (1, max(1, engine.max_rows // 2), engine.max_tokens),
        "N": (1, max(1, engine.max_rows // 2), engine.max_rows),
    }


def mask_words(engine: TensorRtEngine) -> int:
    """Words of a tree mask: in a step with drafts, prompt chunks carry their causal triangle too."""
    return -(-engine.max_tokens // 32)


def shapes(dimensions: Sequence[int | str], symbols: Mapping[str, Range]) -> tuple[tuple[int, ...], ...]:
    """min, opt and max shape of a tensor whose dimensions are numbers or symbols."""
    return tuple(
        tuple(size if isinstance(size, int) else symbols[size][which] for size in dimensions) for which in range(3)
    )
