"""How projections are expressed: by how their weights are stored."""

from __future__ import annotations

from collections.abc import Mapping

from apar.export.decoder import Graph
from apar.export.weights_file import GroupedWeight

_ACCURACY_INT8 = 4
"""MatMulNBits computes with activations quantised to int8 per group: its fast kernels on CPUs."""


class StoredLinear:
    """Gemm for plain weights, com.microsoft's MatMulNBits for quantised ones; arithmetic in and out is float32."""

    opsets: Mapping[str, int] = {"com.microsoft": 1}

    def emit(self, graph: Graph, value: str, weight: str, bias: str | None, output: str) -> str:
        """Append value [T, in] @ weight [out, in]^T + bias -> [T, out]."""
        stored = graph.weights.get(weight)
        if not isinstance(stored, GroupedWeight):
            inputs = [value, graph.float32(weight), *([graph.plain(bias)] if bias else [])]
            return graph.node("Gemm", inputs, output, transB=1)
        inputs = [value, graph.initializer(stored.packed), graph.initializer(stored.scales)]
        if stored.zeros or bias:
            inputs.append(graph.initializer(stored.zeros) if stored.zeros else "")
        if bias:
            inputs += ["", graph.plain(bias)]
        out, columns = stored.shape
        return graph.node(
            "MatMulNBits",
            inputs,
            output,
            domain="com.microsoft",
            K=columns,
            N=out,
            bits=stored.bits,
            block_size=stored.group_size,
            accuracy_level=_ACCURACY_INT8,
        )
