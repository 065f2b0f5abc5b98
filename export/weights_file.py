"""`model.onnx.data`: weights appended one after another, and the ONNX tensors that point at them."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import onnx

from apar.export.checkpoint import Checkpoint
from apar.export.errors import BuildError
from apar.export.linear_packing import (
    CHANNEL_MULTIPLE,
    TILE,
    pack_groups,
    pack_matrix,
    packed_shape,
    round_up,
    whole_tiles,
)
from apar.export.quantize import QuantizedRows, pack, quantize_rows
from apar.export.tensor_files import FLOAT_TYPES, StoredTensor, check_finite, to_float32
from apar.export.weight_plan import Weight

_ALIGNMENT, _PAGE, _LARGE = 64, 4096, 1 << 20
_CHUNK_ELEMENTS = 1 << 20
_THREADS = 2
_AHEAD = 4

_T = TypeVar("_T")
_U = TypeVar("_U")


@dataclass(frozen=True, slots=True)
class PlainWeight:
    """A weight stored as it is (float32, float16 or bfloat16)."""

    tensor: onnx.TensorProto


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A matrix [out, in] in the layout of linear_packing.py."""

    packed: onnx.TensorProto
    shape: tuple[int, int]
    bits: int = 0
    """Of integer codes; 0: floats."""
    group_size: int = 0
    """Input channels that share a scale; 0: all of an output channel, or floats."""
    scales: onnx.TensorProto | None = None
    """Float32 where they are an output channel's, bfloat16 where they are a group's."""
    zeros: onnx.TensorProto | None = None
    """Zero points; None where all groups are symmetric."""


_Chunk = tuple[StoredTensor, int, int]
"""A source tensor and the rows start:stop of it."""

StoredWeight = PlainWeight | PackedWeight


class WeightsFile:
    """Writes weights in row chunks, so that memory stays bounded whatever a tensor's size."""

    def __init__(self, path: Path, progress: Callable[[int], None]) -> None:
        """`progress` is told the checkpoint bytes read after each chunk."""
        self._name = path.name
        self._file = path.open("wb")
        self._digest = hashlib.sha256()
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="apar-build")
        self._progress = progress
        self.weights: dict[str, StoredWeight] = {}

    @property
    def sha256(self) -> str:
        """SHA-256 of what was written, in hexadecimal: a file of many gigabytes need not be read again for it."""
        return self._digest.hexdigest()

    def __enter__(self) -> WeightsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)
        try:
            if error is None:
                self._file.flush()
                os.fsync(self._file.fileno())
        finally:
            self._file.close()

    def add_plain(self, weight: Weight, checkpoint: Checkpoint, dtype: str) -> None:
        """Append `weight` as it is, in the element type `dtype`.

        Raises BuildError if a number does not fit it, CheckpointError for one that is not finite.
        """
        tensor = self._append(weight.name, FLOAT_TYPES[dtype], weight.shape, self._floats(weight, checkpoint, dtype))
        self.weights[weight.name] = PlainWeight(tensor)

    def add_packed(self, weight: Weight, checkpoint: Checkpoint, dtype: str) -> None:
        """Append the matrix `weight` packed, in the element type `dtype`. Raises what `add_plain` does."""
        out, columns = weight.shape
        element = FLOAT_TYPES[dtype]
        tiles = whole_tiles(self._floats(weight, checkpoint, dtype))
        shape = packed_shape(out, columns, element)
        tensor = self._append(weight.name, element, shape, (pack_matrix(rows) for rows in tiles))
        self.weights[weight.name] = PackedWeight(tensor, (out, columns))

    def add_grouped(
        self, weight: Weight, checkpoint: Checkpoint, bits: int, group_size: int, zero_points: bool = False
    ) -> None:
        """Append the matrix `weight` rounded to nearest in `bits`, in groups of `group_size` input channels.

        group_size 0: one group, the whole row.
        """

        def quantize(chunk: _Chunk) -> tuple[QuantizedRows, int]:
            tensor, start, stop = chunk
            values = tensor.read(start, stop)
            rows = check_finite(to_float32(values), tensor)
            return quantize_rows(rows, bits, group_size or rows.shape[1], zero_points), values.nbytes

        def parts() -> Iterator[QuantizedRows]:
            for rows, read in self._in_order(quantize, _chunks(weight, checkpoint)):
                yield rows
                self._progress(read)

        self._add_parts(weight, parts(), bits, group_size)

    def add_quantized(self, weight: Weight, rows: QuantizedRows, group_size: int) -> None:
        """Append the matrix `weight` with codes that were chosen elsewhere; group_size as in `add_grouped`."""
        self._add_parts(weight, [rows], rows.bits, group_size)

    def _add_parts(self, weight: Weight, parts: Iterable[QuantizedRows], bits: int, group_size: int) -> None:
        scales: list[npt.NDArray[Any]] = []
        zeros: list[npt.NDArray[np.uint8]] = []
        out, columns = weight.shape
        groups = -(-columns // group_size) if group_size else 1
        width = groups * group_size if group_size else round_up(columns, CHANNEL_MULTIPLE)

        def codes() -> Iterator[npt.NDArray[np.uint8]]:
            for rows in parts:
                scales.append(rows.scales)
                if rows.zeros is not None:
                    zeros.append(rows.zeros)
                flat = rows.codes.reshape(len(rows.codes), -1)
                yield pack(np.pad(flat, ((0, 0), (0, width - flat.shape[1]))), bits)

        def groups_of(values: list[npt.NDArray[Any]], element: np.dtype[Any]) -> onnx.TensorProto:
            name = f"{weight.name}.{'zeros' if values is zeros else 'scales'}"
            packed = (pack_groups(rows.astype(element)) for rows in whole_tiles(values))
            return self._append(name, element, (-(-out // TILE), groups, TILE), packed)

        byte = np.dtype(np.uint8)
        matrix = self._append(
            f"{weight.name}.packed",
            byte,
            packed_shape(out, width, byte, bits),
            (pack_matrix(rows, bits) for rows in whole_tiles(codes())),
        )
        scale = groups_of(scales, FLOAT_TYPES["bfloat16" if group_size else "float32"])
        zero = groups_of(zeros, byte) if zeros else None
        self.weights[weight.name] = PackedWeight(matrix, (out, columns), bits, group_size, scale, zero)

    def _floats(self, weight: Weight, checkpoint: Checkpoint, dtype: str) -> Iterator[npt.NDArray[Any]]:
        """The rows of `weight` in the element type `dtype`, chunk by chunk."""
        element = FLOAT_TYPES[dtype]

        def convert(chunk: _Chunk) -> tuple[npt.NDArray[Any], int]:
            tensor, start, stop = chunk
            values = tensor.read(start, stop)
            read = values.nbytes
            if values.dtype == element:
                check_finite(to_float32(values), tensor)
                return values, read
            wide = check_finite(to_float32(values), tensor)
            if dtype == "float16" and wide.size and max(-wide.min(), wide.max()) > np.finfo(np.float16).max:
                raise BuildError(
                    f"{tensor.path}: tensor {tensor.name} has numbers beyond float16's range; build with dtype bfloat16"
                )
            return wide.astype(element), read

        for values, read in self._in_order(convert, _chunks(weight, checkpoint)):
            yield values
            self._progress(read)

    def _append(
        self, name: str, element: np.dtype[Any], shape: tuple[int, ...], arrays: Iterable[npt.NDArray[Any]]
    ) -> onnx.TensorProto:
        length = int(np.prod(shape, dtype=np.int64)) * element.itemsize
        alignment = _PAGE if length >= _LARGE else _ALIGNMENT
        offset = -(-self._file.tell() // alignment) * alignment
        self._write(b"\0" * (offset - self._file.tell()))
        for array in arrays:
            self._write(np.ascontiguousarray(array).view(np.uint8).data)
        kind = onnx.helper.np_dtype_to_tensor_dtype(element)
        tensor = onnx.TensorProto(name=name, data_type=kind, dims=shape, data_location=onnx.TensorProto.EXTERNAL)
        for key, value in (("location", self._name), ("offset", offset), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
        return tensor

    def _write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._digest.update(data)

    def _in_order(self, function: Callable[[_T], _U], items: Iterable[_T]) -> Iterator[_U]:
        """Map over a few threads, results in order, never more than a few items ahead."""
        waiting: deque[Future[_U]] = deque()
        try:
            for item in items:
                waiting.append(self._pool.submit(function, item))
                if len(waiting) > _AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _chunks(weight: Weight, checkpoint: Checkpoint) -> Iterator[_Chunk]:
    for source in weight.sources:
        tensor = checkpoint.tensors[source]
        rows = max(1, _CHUNK_ELEMENTS // max(tensor.row_size, 1))
        for start in range(0, tensor.shape[0], rows):
            yield tensor, start, min(start + rows, tensor.shape[0])
