"""How projections by packed matrices are expressed: as `apar::Linear` nodes, or in standard operators."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from onnx import TensorProto, defs

from apar.export.attention import DOMAIN
from apar.export.decoder import Graph
from apar.export.linear_packing import TILE
from apar.export.manifest import LINEAR_ABI_VERSION
from apar.export.weights_file import PackedWeight

OP = "Linear"
_ACCURACY_INT8 = 4
"""MatMulNBits computes with activations quantised to int8 per group: its fast kernels on CPUs."""
_MOST_CHANNELS = 256
"""The largest groups that MatMulNBits takes."""


class NativeLinear:
    """One node, with the norm or gate before it and the residual after it inside. Sums are float32."""

    opsets: Mapping[str, int] = {DOMAIN: 1}

    def __init__(self) -> None:
        register_schema()

    def emit(self, graph: Graph, value: str, weight: str, bias: str | None, output: str) -> str:
        """Append value [T, in] @ weight [out, in]^T + bias -> [T, out]."""
        return self.emit_fused(graph, value, weight, bias, output)

    def emit_fused(
        self,
        graph: Graph,
        value: str,
        weight: str,
        bias: str | None,
        output: str,
        *,
        norm: str | None = None,
        gated: bool = False,
        residual: str | None = None,
    ) -> str:
        """Append the projection of `value`, of its norm by the weight `norm`, or of its gate, plus `residual`."""
        stored = _packed(graph, weight)
        optional = [
            graph.initializer(stored.scales) if stored.scales else "",
            graph.initializer(stored.zeros) if stored.zeros else "",
            graph.plain(bias) if bias else "",
            graph.plain(norm) if norm else "",
            residual or "",
        ]
        while optional and not optional[-1]:
            optional.pop()
        out, columns = stored.shape
        return graph.node(
            OP,
            [value, graph.initializer(stored.packed), *optional],
            output,
            domain=DOMAIN,
            in_features=columns,
            out_features=out,
            bits=stored.bits,
            group_size=stored.group_size,
            gated=int(gated),
            norm_epsilon=graph.config.rms_norm_eps,
            abi_version=LINEAR_ABI_VERSION,
        )


class PortableLinear:
    """Gemm for floats, com.microsoft's MatMulNBits for integers, from the same packed tensors.

    What undoes the packing only moves bytes of constants: ONNX Runtime does it once, when it loads the graph.
    """

    opsets: Mapping[str, int] = {"com.microsoft": 1}

    def emit(self, graph: Graph, value: str, weight: str, bias: str | None, output: str) -> str:
        """Append value [T, in] @ weight [out, in]^T + bias -> [T, out]."""
        stored = _packed(graph, weight)
        if stored.bits:
            return self._integers(graph, value, stored, bias, output)
        name, packed = stored.packed.name, graph.initializer(stored.packed)
        out, columns = stored.shape
        if stored.packed.data_type != TensorProto.FLOAT:
            packed = _once(graph, "Cast", [packed], f"{name}.float32", to=TensorProto.FLOAT)
        # [tiles, K, 16] or [tiles, K / 2, 16, 2] -> [tiles, 16, K or K / 2, 1 or 2]
        order = (0, 2, 1, 3)[: len(stored.packed.dims)]
        moved = _once(graph, "Transpose", [packed], f"{name}.moved", perm=order)
        rows = _reshape(graph, moved, f"{name}.rows", (-1, _channels(stored.packed)))
        matrix = _slice(graph, rows, f"{name}.matrix", (out, columns))
        return graph.node("Gemm", [value, matrix, *([graph.plain(bias)] if bias else [])], output, transB=1)

    def _integers(self, graph: Graph, value: str, stored: PackedWeight, bias: str | None, output: str) -> str:
        assert stored.scales is not None
        name = stored.packed.name.removesuffix(".packed")
        out, columns = stored.shape
        width = _channels(stored.packed) * 8 // stored.bits
        size = stored.group_size or _largest_group(width)
        groups = width // size
        moved = _once(graph, "Transpose", [graph.initializer(stored.packed)], f"{name}.moved", perm=(0, 2, 1, 3))
        rows = _reshape(graph, moved, f"{name}.rows", (-1, groups, size * stored.bits // 8))
        scales = graph.initializer(stored.scales)
        if stored.scales.data_type != TensorProto.FLOAT:
            scales = _once(graph, "Cast", [scales], f"{name}.scales.float32", to=TensorProto.FLOAT)
        inputs = [value, _slice(graph, rows, f"{name}.matrix", (out,)), _groups(graph, scales, stored, groups)]
        if stored.zeros or bias:
            inputs.append(_zero_points(graph, stored, groups) if stored.zeros else "")
        if bias:
            inputs += ["", graph.plain(bias)]
        return graph.node(
            "MatMulNBits",
            inputs,
            output,
            domain="com.microsoft",
            K=columns,
            N=out,
            bits=stored.bits,
            block_size=size,
            accuracy_level=_ACCURACY_INT8,
        )


def _packed(graph: Graph, weight: str) -> PackedWeight:
    stored = graph.weights[weight]
    assert isinstance(stored, PackedWeight), weight
    return stored


def _channels(packed: TensorProto) -> int:
    """Elements of one output channel of a packed matrix."""
    return int(np.prod(packed.dims)) // (packed.dims[0] * TILE)


def _largest_group(width: int) -> int:
    """The largest size of groups that divides a row of `width` channels, a multiple of 32."""
    return min(width & -width, _MOST_CHANNELS)


def _groups(graph: Graph, values: str, stored: PackedWeight, groups: int) -> str:
    """[tiles, groups or 1, 16] -> [out, groups]."""
    moved = _once(graph, "Transpose", [values], f"{values}.moved", perm=(0, 2, 1))
    rows = _reshape(graph, moved, f"{values}.rows", (stored.packed.dims[0] * TILE, -1))
    matrix = _slice(graph, rows, f"{values}.matrix", (stored.shape[0],))
    if stored.group_size:
        return matrix
    shape = graph.constant(f"shape.{stored.shape[0]}.{groups}", np.array([stored.shape[0], groups], np.int64))
    return _once(graph, "Expand", [matrix, shape], f"{values}.expanded")


def _zero_points(graph: Graph, stored: PackedWeight, groups: int) -> str:
    """Zero points as MatMulNBits takes them: [out, groups] bytes, or at 4 bits two groups in a byte."""
    assert stored.zeros is not None
    zeros = _groups(graph, graph.initializer(stored.zeros), stored, groups)
    if stored.bits == 8:
        return zeros
    name = stored.zeros.name
    # Arithmetic on bytes is not among ONNX Runtime's operators for the CPU.
    wide = _once(graph, "Cast", [zeros], f"{name}.wide", to=TensorProto.INT32)
    if groups % 2:
        pad = graph.constant("pad.column", np.array([0, 0, 0, 1], np.int64))
        wide = _once(graph, "Pad", [wide, pad], f"{name}.even")
    pairs = _reshape(graph, wide, f"{name}.pairs", (stored.shape[0], -1, 2))
    factors = graph.constant("nibbles", np.array([[[1, 16]]], np.int32))
    axis = graph.constant("axes.pair", np.array([2], np.int64))
    scaled = _once(graph, "Mul", [pairs, factors], f"{name}.scaled")
    packed = _once(graph, "ReduceSum", [scaled, axis], f"{name}.packed", keepdims=0)
    return _once(graph, "Cast", [packed], f"{name}.bytes", to=TensorProto.UINT8)


def _once(graph: Graph, op: str, inputs: list[str], output: str, **attributes: Any) -> str:
    """A node on constants; a matrix that two projections use is unpacked once."""
    if not any(output in node.output for node in graph.nodes):
        graph.node(op, inputs, output, **attributes)
    return output


def _reshape(graph: Graph, value: str, output: str, shape: tuple[int, ...]) -> str:
    name = graph.constant("shape." + ".".join(map(str, shape)), np.array(shape, np.int64))
    return _once(graph, "Reshape", [value, name], output)


def _slice(graph: Graph, value: str, output: str, ends: tuple[int, ...]) -> str:
    """The first `ends` of the first axes."""
    text = ".".join(map(str, ends))
    inputs = [
        value,
        graph.constant(f"starts.{len(ends)}", np.zeros(len(ends), np.int64)),
        graph.constant(f"ends.{text}", np.array(ends, np.int64)),
    ]
    return _once(graph, "Slice", inputs, output)


def register_schema() -> None:
    """Make Linear known to the onnx package, so that its checker accepts graphs that hold it."""
    if defs.has(OP, 1, DOMAIN):
        return
    parameter, attribute = defs.OpSchema.FormalParameter, defs.OpSchema.Attribute
    optional = defs.OpSchema.FormalParameterOption.Optional
    kind = defs.OpSchema.AttrType
    integers = ("in_features", "out_features", "bits", "group_size", "gated", "abi_version")
    attributes = [attribute(name, kind.INT, "", required=True) for name in integers]
    attributes.append(attribute("norm_epsilon", kind.FLOAT, "", required=True))
    floats = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]
    defs.register_schema(
        defs.OpSchema(
            OP,
            DOMAIN,
            1,
            doc="A projection by a packed matrix, with RMSNorm or a gate before it and a residual after it.",
            inputs=[
                parameter("x", "T", "[T, in], or [T, 2 in] where gated"),
                parameter("weight", "W", "packed; its type and `bits` are its format"),
                parameter("scales", "S", "[tiles, groups, 16]", param_option=optional),
                parameter("zeros", "Z", "[tiles, groups, 16]", param_option=optional),
                parameter("bias", "T", "[out]", param_option=optional),
                parameter("norm", "T", "[in]", param_option=optional),
                parameter("residual", "T", "[T, out]", param_option=optional),
            ],
            outputs=[parameter("y", "T", "[T, out]")],
            type_constraints=[
                ("T", ["tensor(float)"], ""),
                ("W", [*floats, "tensor(uint8)"], ""),
                ("S", floats, ""),
                ("Z", ["tensor(uint8)"], ""),
            ],
            attributes=attributes,
        )
    )
