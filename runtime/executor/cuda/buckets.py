"""Padded shapes that steps are run in, so that a few captured CUDA graphs serve all of them."""

from __future__ import annotations

from dataclasses import dataclass

ROW_STEPS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)
FEW_ROWS = 32
"""Prefill with at most so many rows beside it has buckets of its own."""
SHORTEST_PREFILL = 64


@dataclass(frozen=True, slots=True, order=True)
class Bucket:
    """Shape of a padded step: T tokens, R rows, L wanted logits, W mask words."""

    tokens: int
    rows: int
    wanted: int
    mask_words: int = 0
    mixed: bool = False
    """Prefill beside decoding: attention takes its large tile."""

    @property
    def groups(self) -> int:
        """Most groups that can share a prefix."""
        return self.rows // 2


class Buckets:
    """The buckets of an executor: a step goes into the smallest that holds it.

    - decoding, at most two tokens a row on average: R of ROW_STEPS (then multiples of 64) up to `max_rows`, with R
      tokens and with 2 R, since a fork brings two;
    - mixed, more tokens than that: 64, 128, ... `max_step_tokens` tokens, with FEW_ROWS and with `max_rows` rows.

    Steps with drafts, and steps that fit nothing, run in their own shape, without a graph.
    """

    def __init__(self, max_rows: int, max_step_tokens: int) -> None:
        rows = [*(step for step in ROW_STEPS if step < max_rows), *range(320, max_rows, 64), max_rows]
        self.decoding = sorted({Bucket(min(times * r, max_step_tokens), r, r) for r in rows for times in (1, 2)})
        tokens = [max_step_tokens]
        while tokens[-1] // 2 >= SHORTEST_PREFILL:
            tokens.append(tokens[-1] // 2)
        beside = {min(FEW_ROWS, max_rows), max_rows}
        self.mixed = sorted(Bucket(t, r, r, mixed=True) for t in tokens for r in beside)

    @property
    def all(self) -> list[Bucket]:
        """Every bucket, the largest first: memory that later captures can use again."""
        return sorted([*self.decoding, *self.mixed], reverse=True)

    def find(self, tokens: int, rows: int, wanted: int, mask_words: int) -> Bucket | None:
        """The first bucket of its kind, by tokens and then rows, that holds such a step; None where there is none."""
        if mask_words:
            return None
        for bucket in self.decoding if tokens <= 2 * rows else self.mixed:
            if bucket.tokens >= tokens and bucket.rows >= rows and bucket.wanted >= wanted:
                return bucket
        return None
