"""Padded shapes that steps are run in, so that a few captured CUDA graphs serve all of them."""

from __future__ import annotations

from dataclasses import dataclass

ROW_STEPS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)
FEW_ROWS = 32
"""Prefill with at most so many rows beside it has buckets of its own."""
SHORTEST_PREFILL = 64
DRAFT_STEPS = (8, 16, 32, 48, 64, 96, 128, 160, 192, 256)
"""Tokens of steps with drafts: as many as keep a step bound by memory, and some."""
DRAFT_WORDS = DRAFT_STEPS[-1] // 32
"""Mask words of their buckets: a row may hold all tokens of the step. Drafts that are chains have no mask."""
LONG_DRAFTS = 8
"""Draft steps of more tokens a row than this, on average, take the large tile: it reads their keys fewer times."""


@dataclass(frozen=True, slots=True, order=True)
class Bucket:
    """Shape of a padded step: T tokens, R rows, L wanted logits, W mask words."""

    tokens: int
    rows: int
    wanted: int
    mask_words: int = 0
    large_tile: bool = False
    """Many tokens a row: attention takes its large tile."""

    @property
    def groups(self) -> int:
        """Most groups that can share a prefix."""
        return self.rows // 2

    @classmethod
    def exactly(cls, tokens: int, rows: int, wanted: int, mask_words: int) -> Bucket:
        """The shape of a step that has no bucket."""
        return cls(tokens, rows, wanted, mask_words, _large_tile(tokens, rows, wanted, mask_words))


class Buckets:
    """The buckets of an executor: a step goes into the smallest that holds it.

    - decoding, at most two tokens a row on average: R of ROW_STEPS (then multiples of 64) up to `max_rows`, with R
      tokens and with 2 R, since a fork brings two;
    - mixed, more tokens than that: 64, 128, ... `max_step_tokens` tokens, with FEW_ROWS and with `max_rows` rows;
    - drafts, steps with a tree mask or with more logits than rows: T of DRAFT_STEPS, with a row for every token, and
      with a row for every LONG_DRAFTS tokens; logits of all tokens. Trees and chains have buckets of their own.

    Steps that fit nothing run in their own shape, without a graph.
    """

    def __init__(self, max_rows: int, max_step_tokens: int) -> None:
        rows = [*(step for step in ROW_STEPS if step < max_rows), *range(320, max_rows, 64), max_rows]
        self.decoding = sorted({Bucket(min(times * r, max_step_tokens), r, r) for r in rows for times in (1, 2)})
        tokens = [max_step_tokens]
        while tokens[-1] // 2 >= SHORTEST_PREFILL:
            tokens.append(tokens[-1] // 2)
        beside = {min(FEW_ROWS, max_rows), max_rows}
        self.mixed = sorted(Bucket(t, r, r, large_tile=True) for t in tokens for r in beside)
        drafted = sorted({min(step, max_step_tokens) for step in DRAFT_STEPS})
        self._drafts = {
            (words > 0, large): [
                Bucket(t, min(max(1, t // LONG_DRAFTS) if large else t, max_rows), t, words, large) for t in drafted
            ]
            for words in (0, DRAFT_WORDS)
            for large in (False, True)
        }

    @property
    def plain(self) -> list[Bucket]:
        """Every bucket of steps without drafts, the largest first: memory that later captures can use again."""
        return sorted([*self.decoding, *self.mixed], reverse=True)

    def drafts(self, chains: bool) -> list[Bucket]:
        """Every bucket of steps with drafts, the largest first. chains: of chains alone; drafts from a tree may be
        chains too."""
        kinds = [kind for kind in self._drafts if not (chains and kind[0])]
        return sorted({bucket for kind in kinds for bucket in self._drafts[kind]}, reverse=True)

    def find(self, tokens: int, rows: int, wanted: int, mask_words: int) -> Bucket | None:
        """The first bucket of its kind, by tokens and then rows, that holds such a step; None where there is none."""
        for bucket in self._kind(tokens, rows, wanted, mask_words):
            if (
                bucket.tokens >= tokens
                and bucket.rows >= rows
                and bucket.wanted >= wanted
                and bucket.mask_words >= mask_words
            ):
                return bucket
        return None

    def _kind(self, tokens: int, rows: int, wanted: int, mask_words: int) -> list[Bucket]:
        large = _large_tile(tokens, rows, wanted, mask_words)
        if mask_words or wanted > rows:
            return self._drafts[mask_words > 0, large]
        return self.mixed if large else self.decoding


def _large_tile(tokens: int, rows: int, wanted: int, mask_words: int) -> bool:
    drafts = mask_words > 0 or wanted > rows
    return tokens > (LONG_DRAFTS if drafts else 2) * rows
