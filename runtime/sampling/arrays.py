"""Array types of sampling, and the size of the pieces that it works in."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

BoolArray = npt.NDArray[np.bool_]
Float64Array = npt.NDArray[np.float64]
UInt64Array = npt.NDArray[np.uint64]

CHUNK_ELEMENTS = 1 << 18
"""Logits that are worked on at a time: a megabyte of them."""


def chunk_rows(vocab: int) -> int:
    """Rows of so many logits that are worked on at a time; no result depends on it."""
    return max(1, CHUNK_ELEMENTS // vocab)
