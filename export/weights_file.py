"""`model.onnx.data`: weights appended one after another, and the ONNX tensors that point at them."""

from __future__ import annotations

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
class GroupedWeight:
    """A quantised matrix [out, in] in the layout of MatMulNBits."""

    packed: onnx.TensorProto
    scales: onnx.TensorProto
    zeros: onnx.TensorProto | None
    """Zero points; None where all groups are symmetric."""
    bits: int
    group_size: int
    shape: tuple[int, int]


_Chunk = tuple[StoredTensor, int, int]
"""A source tensor and the rows start:stop of it."""

StoredWeight = PlainWeight | GroupedWeight


class WeightsFile:
    """Writes weights in row chunks, so that memory stays bounded whatever a tensor's size."""

    def __init__(self, path: Path, progress: Callable[[int], None]) -> None:
        """`progress` is told the checkpoint bytes read after each chunk."""
        self._name = path.name
        self._file = path.open("wb")
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="apar-build")
        self._progress = progress
        self.weights: dict[str, StoredWeight] = {}

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
        """Append `weight` in the element type `dtype`.

        Raises BuildError if a number does not fit it, CheckpointError for one that is not finite.
        """
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

        def arrays() -> Iterator[npt.NDArray[Any]]:
            for values, read in self._in_order(convert, _chunks(weight, checkpoint)):
                yield values
                self._progress(read)

        kind = onnx.helper.np_dtype_to_tensor_dtype(element)
        self.weights[weight.name] = PlainWeight(
            self._append(weight.name, kind, weight.shape, element.itemsize, arrays())
        )

    def add_grouped(
        self, weight: Weight, checkpoint: Checkpoint, bits: int, group_size: int, zero_points: bool = False
    ) -> None:
        """Append the matrix `weight` rounded to nearest in `bits`, in groups of `group_size` input channels."""

        def quantize(chunk: _Chunk) -> tuple[QuantizedRows, int]:
            tensor, start, stop = chunk
            values = tensor.read(start, stop)
            rows = check_finite(to_float32(values), tensor)
            return quantize_rows(rows, bits, group_size, zero_points), values.nbytes

        def parts() -> Iterator[QuantizedRows]:
            for rows, read in self._in_order(quantize, _chunks(weight, checkpoint)):
                yield rows
                self._progress(read)

        self._add_parts(weight, parts(), bits, group_size, zero_points)

    def add_quantized(self, weight: Weight, rows: QuantizedRows) -> None:
        """Append the matrix `weight` with codes that were chosen elsewhere."""
        self._add_parts(weight, [rows], rows.bits, rows.codes.shape[2], rows.zeros is not None)

    def _add_parts(
        self, weight: Weight, parts: Iterable[QuantizedRows], bits: int, group_size: int, zero_points: bool
    ) -> None:
        scales: list[npt.NDArray[np.float32]] = []
        zeros: list[npt.NDArray[np.uint8]] = []
        out, columns = weight.shape
        groups = -(-columns // group_size)

        def codes() -> Iterator[npt.NDArray[Any]]:
            for rows in parts:
                scales.append(rows.scales)
                if rows.zeros is not None:
                    zeros.append(pack(rows.zeros, bits))
                yield pack(rows.codes, bits)

        byte, name = onnx.TensorProto.UINT8, weight.name
        packed = self._append(f"{name}.packed", byte, (out, groups, group_size * bits // 8), 1, codes())
        scale = self._append(f"{name}.scales", onnx.TensorProto.FLOAT, (out, groups), 4, scales)
        zero = self._append(f"{name}.zeros", byte, (out, -(-groups * bits // 8)), 1, zeros) if zero_points else None
        self.weights[name] = GroupedWeight(packed, scale, zero, bits, group_size, (out, columns))

    def _append(
        self, name: str, kind: int, shape: tuple[int, ...], width: int, arrays: Iterable[npt.NDArray[Any]]
    ) -> onnx.TensorProto:
        length = int(np.prod(shape, dtype=np.int64)) * width
        alignment = _PAGE if length >= _LARGE else _ALIGNMENT
        offset = -(-self._file.tell() // alignment) * alignment
        self._file.write(b"\0" * (offset - self._file.tell()))
        for array in arrays:
            self._file.write(np.ascontiguousarray(array).view(np.uint8).data)
        tensor = onnx.TensorProto(name=name, data_type=kind, dims=shape, data_location=onnx.TensorProto.EXTERNAL)
        for key, value in (("location", self._name), ("offset", offset), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
        return tensor

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
