"""Tensors put together from parts of others: shards of one, or one of shards. Nothing is read until asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from apar.export.tensor_files import FLOAT_TYPES, StoredTensor


@dataclass(frozen=True, slots=True)
class Piece:
    """A rectangle of a matrix (or a range of a vector) and where it goes."""

    tensor: StoredTensor
    rows: range
    """Rows of `tensor`."""
    columns: range | None = None
    """Columns of `tensor`; None: all of them."""
    row: int = 0
    """Row of the whole that the first of `rows` becomes."""
    column: int = 0


@dataclass(frozen=True, slots=True)
class PiecedTensor(StoredTensor):
    """A tensor of pieces; elements that no piece covers are zero."""

    pieces: tuple[Piece, ...] = ()

    def read(self, start: int = 0, stop: int | None = None) -> npt.NDArray[Any]:
        """Rows `start:stop`. Raises CheckpointError if a file ends before them."""
        stop = self.shape[0] if stop is None else stop
        out = np.zeros((stop - start, *self.shape[1:]), FLOAT_TYPES[self.dtype])
        for piece in self.pieces:
            first, last = max(start, piece.row), min(stop, piece.row + len(piece.rows))
            if first >= last:
                continue
            offset = piece.rows.start - piece.row
            values = piece.tensor.read(first + offset, last + offset)
            if values.ndim == 1:
                out[first - start : last - start] = values
                continue
            columns = piece.columns or range(values.shape[1])
            out[first - start : last - start, piece.column : piece.column + len(columns)] = values[
                :, columns.start : columns.stop
            ]
        return out

    def map(self) -> npt.NDArray[Any]:
        """The whole tensor, in memory."""
        return self.read()


def pieced(name: str, shape: tuple[int, ...], *pieces: Piece) -> PiecedTensor:
    """The tensor `name` of `shape` made of `pieces`, which have one element type."""
    first = pieces[0].tensor
    return PiecedTensor(name, first.dtype, shape, first.path, 0, pieces)
