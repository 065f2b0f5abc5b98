"""Tensors where they lie in a checkpoint's files: found by header, read by rows, never all at once."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from apar.export.errors import CheckpointError

FLOAT_TYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
"""Element types that weights may have, by name."""

_SAFETENSORS_TYPES = {
    "F32": ("float32", 4), "F16": ("float16", 2), "BF16": ("bfloat16", 2), "F64": ("float64", 8),
    "I64": ("int64", 8), "I32": ("int32", 4), "I16": ("int16", 2), "I8": ("int8", 1), "U8": ("uint8", 1),
    "U16": ("uint16", 2), "U32": ("uint32", 4), "U64": ("uint64", 8), "BOOL": ("bool", 1),
    "F8_E4M3": ("float8_e4m3", 1), "F8_E5M2": ("float8_e5m2", 1),
}  # fmt: skip
_MAX_HEADER = 100_000_000


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a checkpoint: C-contiguous little-endian elements at a file's offset."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int

    @property
    def row_size(self) -> int:
        """Elements of one index of the first dimension."""
        return math.prod(self.shape[1:])

    def read(self, start: int = 0, stop: int | None = None) -> npt.NDArray[Any]:
        """Rows `start:stop` in the stored type. Raises CheckpointError if the file ends before them."""
        element = FLOAT_TYPES[self.dtype]
        stop = self.shape[0] if stop is None else stop
        count = (stop - start) * self.row_size
        offset = self.offset + start * self.row_size * element.itemsize
        rows = np.fromfile(self.path, dtype=element, count=count, offset=offset)
        if rows.size != count:
            raise CheckpointError(f"{self.path} ends inside tensor {self.name}; copy the checkpoint again")
        return rows.reshape(stop - start, *self.shape[1:])

    def map(self) -> npt.NDArray[Any]:
        """The whole tensor, memory-mapped."""
        return np.memmap(self.path, FLOAT_TYPES[self.dtype], mode="r", offset=self.offset, shape=self.shape)


def to_float32(values: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """The same numbers as float32 (exact for every type of FLOAT_TYPES)."""
    if values.dtype == FLOAT_TYPES["bfloat16"]:
        return (values.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)
    return values.astype(np.float32, copy=False)


def check_finite(values: npt.NDArray[np.float32], tensor: StoredTensor) -> npt.NDArray[np.float32]:
    """`values`, which were read from `tensor`. Raises CheckpointError for NaN and infinity."""
    if values.size and not (np.isfinite(values.min()) and np.isfinite(values.max())):
        raise CheckpointError(f"{tensor.path}: tensor {tensor.name} holds NaN or infinity; the checkpoint is damaged")
    return values


def read_safetensors(path: Path) -> dict[str, StoredTensor]:
    """Tensors of one safetensors file, by its header alone.

    Raises CheckpointError where the header is no safetensors header or the file is shorter than it says.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER):
                raise CheckpointError(
                    f"{path} is truncated or no safetensors file (header of {length} bytes in a file of {size}); "
                    "copy it again (a file of a few hundred bytes is often an unfetched Git LFS pointer)"
                )
            raw = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    try:
        header = json.loads(raw.decode("utf-8"))
        if not isinstance(header, dict):
            raise ValueError("it holds no object")
        entries = {name: _entry(entry) for name, entry in header.items() if name != "__metadata__"}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} has a damaged safetensors header ({error}); copy the file again") from error
    tensors = {}
    for name, (dtype, width, shape, begin, end) in entries.items():
        if begin < 0 or end - begin != math.prod(shape) * width:
            raise CheckpointError(
                f"{path}: tensor {name} of shape {list(shape)} lies at {begin}..{end}; copy the file again"
            )
        if 8 + length + end > size:
            raise CheckpointError(
                f"{path} is truncated: tensor {name} ends at byte {8 + length + end} of {size}; copy the file again"
            )
        tensors[name] = StoredTensor(name, dtype, shape, path, 8 + length + begin)
    return tensors


def _entry(entry: dict[str, Any]) -> tuple[str, int, tuple[int, ...], int, int]:
    dtype, width = _SAFETENSORS_TYPES.get(entry["dtype"], (str(entry["dtype"]), 0))
    if not width:
        raise ValueError(f"unknown element type {dtype!r}")
    begin, end = entry["data_offsets"]
    numbers = (*entry["shape"], begin, end)
    if any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in numbers):
        raise ValueError("shapes and offsets must be natural numbers")
    return dtype, width, tuple(entry["shape"]), begin, end
