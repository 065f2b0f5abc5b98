"""Matrices as `apar::Linear` reads them: tiles of 16 output channels, input channel after input channel.

    float32, float16   [tiles, K, 16]
    bfloat16           [tiles, K' / 2, 16, 2]
    8-bit codes        uint8 [tiles, K' / 4, 16, 4]
    4-bit codes        uint8 [tiles, K' / 8, 16, 4], the even channel of a byte in its low half
    scales, zeros      [tiles, groups, 16]

K' is K rounded up: to whole groups where there are any, for 8-bit codes without groups to a multiple of 32. The last
tile is filled up with zeros. A step then reads one unbroken stream, and a vector of the processor holds neighbouring
output channels of one input. The layout only moves bytes, so that standard operators can undo it (linear.py).
plugins/linear.h is the contract.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

TILE = 16
"""Output channels of a tile."""
CHANNEL_MULTIPLE = 32
"""To which input channels of 8-bit codes without groups are rounded up."""
_WORD_BYTES = 4
"""What lies together of one output channel, except for float16 and float32: four bytes."""

Array = npt.NDArray[Any]


def round_up(value: int, multiple: int) -> int:
    """The next multiple from `value` on."""
    return -(-value // multiple) * multiple


def together(element: np.dtype[Any], bits: int = 0) -> int:
    """Input channels of one output channel that lie together; `bits` of codes, 0 for floats."""
    if bits:
        return _WORD_BYTES * 8 // bits
    return 2 if element.name == "bfloat16" else 1


def packed_shape(out: int, columns: int, element: np.dtype[Any], bits: int = 0) -> tuple[int, ...]:
    """Shape of a packed matrix [out, columns]; codes have `columns` padded to whole groups already."""
    count = together(element, bits)
    tiles, steps = -(-out // TILE), -(-columns // count)
    if bits:
        return (tiles, steps, TILE, _WORD_BYTES)
    return (tiles, steps, TILE) if count == 1 else (tiles, steps, TILE, count)


def whole_tiles(parts: Iterable[Array]) -> Iterator[Array]:
    """The same rows in arrays of a multiple of 16, the last one filled up with zeros."""
    rest: Array | None = None
    for part in parts:
        rows = part if rest is None else np.concatenate((rest, part))
        whole = len(rows) // TILE * TILE
        if whole:
            yield rows[:whole]
        rest = rows[whole:]
    if rest is not None and len(rest):
        yield np.concatenate((rest, np.zeros((TILE - len(rest), *rest.shape[1:]), rest.dtype)))


def pack_matrix(rows: Array, bits: int = 0) -> Array:
    """Whole tiles of rows [16 n, K] of floats, or [16 n, K' * bits / 8] of bytes with the codes."""
    element = rows.dtype
    count = _WORD_BYTES if bits else together(element)
    columns = rows.shape[1]
    if columns % count:
        rows = np.pad(rows, ((0, 0), (0, count - columns % count)))
    rows = np.ascontiguousarray(rows)
    # What lies together is moved as one number.
    words = rows.view(f"u{element.itemsize * count}").reshape(len(rows) // TILE, TILE, -1)
    packed: Array = np.ascontiguousarray(words.transpose(0, 2, 1)).view(element)
    return packed.reshape(packed_shape(len(rows), rows.shape[1] * (8 // bits if bits else 1), element, bits))


def unpack_matrix(packed: Array, out: int, columns: int, bits: int = 0) -> Array:
    """Rows [out, columns] of floats, or of bytes [out, K' * bits / 8], of what `pack_matrix` made."""
    element = packed.dtype
    count = _WORD_BYTES if bits else together(element)
    tiles, steps = packed.shape[:2]
    words = np.ascontiguousarray(packed).view(f"u{element.itemsize * count}").reshape(tiles, steps, TILE)
    rows: Array = np.ascontiguousarray(words.transpose(0, 2, 1)).view(element).reshape(tiles * TILE, steps * count)
    return rows[:out] if bits else np.ascontiguousarray(rows[:out, :columns])


def pack_groups(values: Array) -> Array:
    """Whole tiles of scales or zero points [16 n, groups] as [n, groups, 16]."""
    packed: Array = np.ascontiguousarray(values.reshape(-1, TILE, values.shape[1]).transpose(0, 2, 1))
    return packed


def unpack_groups(packed: Array, out: int) -> Array:
    """Scales or zero points [out, groups] of what `pack_groups` made."""
    rows: Array = np.ascontiguousarray(packed.transpose(0, 2, 1)).reshape(-1, packed.shape[1])
    return rows[:out]
