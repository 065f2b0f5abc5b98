"""Random matrices in the formats of `apar::Linear`, packed as plugins/linear.h says, and sessions of one such node."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
from fork_steps import library
from onnx import TensorProto, helper

from apar.export.linear_packing import CHANNEL_MULTIPLE, pack_groups, pack_matrix, round_up, whole_tiles

Array = npt.NDArray[Any]
Float64 = npt.NDArray[np.float64]

FLOATS = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
TENSOR_TYPES = {
    np.dtype(np.float32): TensorProto.FLOAT,
    np.dtype(np.float16): TensorProto.FLOAT16,
    np.dtype(ml_dtypes.bfloat16): TensorProto.BFLOAT16,
    np.dtype(np.uint8): TensorProto.UINT8,
}
EPSILON = 1e-5


@dataclass(frozen=True)
class Format:
    """How a matrix is stored."""

    name: str
    group_size: int = 0
    zeros: bool = False

    @property
    def bits(self) -> int:
        return {"int8": 8, "int4": 4}.get(self.name, 0)

    @property
    def unit(self) -> int:
        """Input channels that share a scale when they become integers."""
        return 0 if not self.bits else min(self.group_size or 256, 256 if self.bits == 8 else 32)

    def __str__(self) -> str:
        return self.name + (f"/{self.group_size}" if self.group_size else "") + ("z" if self.zeros else "")


FORMATS = [
    *(Format(name) for name in FLOATS),
    *(Format("int8", size, zeros) for size in (0, 16, 64, 256) for zeros in (False, True)),
    *(Format("int4", size, zeros) for size in (16, 32, 64, 128, 256) for zeros in (False, True)),
]


@dataclass(frozen=True)
class Matrix:
    """A matrix [N, K] and its packed tensors."""

    format: Format
    values: Float64
    weight: Array
    scales: Array | None = None
    zeros: Array | None = None


def random_matrix(form: Format, out: int, columns: int, seed: int = 0) -> Matrix:
    """Codes of the whole range, the extremes at the start of each row."""
    random = np.random.default_rng(seed)

    def tiles(rows: Array) -> Array:
        return np.concatenate(list(whole_tiles([rows])))

    if not form.bits:
        rows = random.standard_normal((out, columns)).astype(FLOATS[form.name])
        return Matrix(form, rows.astype(np.float64), pack_matrix(tiles(rows)))
    size = form.group_size or round_up(columns, CHANNEL_MULTIPLE)
    groups = -(-columns // size)
    codes = random.integers(0, 2**form.bits, (out, groups * size)).astype(np.uint8)
    codes[:, : size // 2] = 2**form.bits - 1
    codes[: out // 2, : size // 2] = 0
    scales = random.uniform(-0.02, 0.02, (out, groups)).astype(ml_dtypes.bfloat16 if form.group_size else np.float32)
    zeros = random.integers(0, 2**form.bits, (out, groups)).astype(np.uint8) if form.zeros else None
    centred = codes.reshape(out, groups, size) - (2.0 ** (form.bits - 1) if zeros is None else zeros[:, :, None] * 1.0)
    values = (centred * scales.astype(np.float64)[:, :, None]).reshape(out, -1)[:, :columns]
    packed = codes if form.bits == 8 else codes[:, 0::2] | (codes[:, 1::2] << 4)
    return Matrix(
        form,
        values,
        pack_matrix(tiles(packed), form.bits),
        pack_groups(tiles(scales)),
        None if zeros is None else pack_groups(tiles(zeros)),
    )


def as_integers(inputs: npt.NDArray[np.float32], form: Format) -> Float64:
    """Inputs [T, K] as the operator rounds them: to 16 bits for int8, to 8 bits for int4, a scale for each unit."""
    if not form.bits:
        return inputs.astype(np.float64)
    levels = np.float32(32767 if form.bits == 8 else 127)
    columns = inputs.shape[1]
    padded = np.pad(inputs, ((0, 0), (0, -columns % form.unit))).reshape(len(inputs), -1, form.unit)
    peak = np.abs(padded).max(axis=2, keepdims=True)
    some = peak > 1e-30
    factor = np.divide(levels, peak, out=np.zeros_like(peak), where=some)
    scale = np.where(some, peak / levels, np.float32(0))
    rounded = np.rint(padded * factor).astype(np.float64) * scale
    return rounded.reshape(len(inputs), -1)[:, :columns]


def normed(inputs: Array, norm: Array) -> Float64:
    """RMSNorm."""
    x = inputs.astype(np.float64)
    return x / np.sqrt((x**2).mean(axis=1, keepdims=True) + EPSILON) * norm


def gated(inputs: Array) -> Float64:
    """silu of the first half times the second."""
    gate, up = np.split(inputs.astype(np.float64), 2, axis=1)
    return gate / (1 + np.exp(-gate)) * up


def model(matrix: Matrix, optional: dict[str, Array], **changes: Any) -> bytes:
    """A graph of one node; `optional` tensors are initialisers, but `residual` is an input."""
    form, (out, columns) = matrix.format, matrix.values.shape
    tensors: dict[str, Array | None] = {"weight": matrix.weight, "scales": matrix.scales, "zeros": matrix.zeros}
    tensors |= {name: optional.get(name) for name in ("bias", "norm")}
    initializers = [
        helper.make_tensor(name, TENSOR_TYPES[array.dtype], array.shape, array.tobytes(), raw=True)
        for name, array in tensors.items()
        if array is not None
    ]
    names = ["x", *(name if array is not None else "" for name, array in tensors.items())]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["T", "X"])]
    if "residual" in optional:
        names.append("residual")
        inputs.append(helper.make_tensor_value_info("residual", TensorProto.FLOAT, ["T2", "R"]))
    attributes: dict[str, Any] = {
        "in_features": columns,
        "out_features": out,
        "bits": form.bits,
        "group_size": form.group_size,
        "gated": 0,
        "norm_epsilon": EPSILON,
        "abi_version": 1,
    }
    node = helper.make_node("Linear", names, ["y"], domain="apar", **(attributes | changes))
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["T", "N"])
    graph = helper.make_graph([node], "one_node", inputs, [output], initializers)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("apar", 1)]
    return onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


def session(
    matrix: Matrix, optional: dict[str, Array] | None = None, threads: int = 1, **changes: Any
) -> ort.InferenceSession:
    """A session of that graph."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.register_custom_ops_library(library())
    graph = model(matrix, optional or {}, **changes)
    return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def run(node: ort.InferenceSession, inputs: Array, residual: Array | None = None) -> npt.NDArray[np.float32]:
    """Its output."""
    feeds = {"x": inputs} if residual is None else {"x": inputs, "residual": residual}
    (y,) = node.run(None, feeds)
    return y


def random_inputs(tokens: int, columns: int, seed: int = 1) -> npt.NDArray[np.float32]:
    """Inputs with outliers, channels of very different size, and a stretch of zeros."""
    random = np.random.default_rng(seed)
    x = random.standard_normal((tokens, columns)).astype(np.float32)
    x *= np.exp(random.standard_normal(columns)).astype(np.float32)
    x[:, random.integers(0, columns)] *= 50
    x[:, columns // 2 : columns // 2 + 40] = 0
    return x
