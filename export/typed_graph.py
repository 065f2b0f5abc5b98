"""The decoder for a strongly typed runtime (TensorRT): every value's element type is final in the graph.

Matrices and the attention node are in the engine's dtype, with explicit casts around them; the residual stream, the
norms, the gate and the logits are float32, so that only matrix products round. Operators are those of opset 19, which
every TensorRT 10 parses. With a Shard of several ranks, the graph is one rank's and holds the collectives.

TensorRT may sum float16 products in float16. Casts of both operands to float32 and of the product back ask for float32
sums: TensorRT knows the pattern and makes one float16 kernel of it (its guide, "Control of Computational Precision";
TensorRT-LLM's `matmul(use_fp32_acc=True)` is the same). bfloat16 products are summed in float32 anyway.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

from apar.export.attention import DOMAIN, ELEMENT_KINDS, ForkAttention
from apar.export.decoder import Graph
from apar.export.errors import BuildError
from apar.export.manifest import ABI_VERSION
from apar.export.sharding import ROW_PARALLEL, Shard

OPSET = 19
KV_BINDINGS = ("in-place", "aliased", "bound")
"""How the plugin gets at the pools: as a network input and output of one address whose alias is not declared to
TensorRT (in-place) or is (aliased), or by addresses that the executor gives the plugin's library (bound), for a
TensorRT that copies pools."""
PLUGIN_VERSION = "1"
PLUGIN_NAMESPACE = ""
_PLAN_INPUTS = ("query_start", "kv_len", "slot_mapping", "prefix_rows", "prefix_blocks", "tree_mask")


class PlainNorm:
    """RMSNorm in plain arithmetic; RMSNormalization is opset 23's."""

    opsets: Mapping[str, int] = {"": OPSET}

    def emit(self, graph: Graph, value: str, scale: str, output: str) -> str:
        """value / sqrt(mean(value ** 2) + eps) * scale, in float32."""
        axes = graph.constant("axes.last", np.array([-1], np.int64))
        epsilon = graph.constant("norm.epsilon", np.array([graph.config.rms_norm_eps], np.float32))
        square = graph.node("Mul", [value, value], f"{output}.square")
        mean = graph.node("ReduceMean", [square, axes], f"{output}.mean", keepdims=1)
        shifted = graph.node("Add", [mean, epsilon], f"{output}.shifted")
        root = graph.node("Sqrt", [shifted], f"{output}.root")
        return graph.node("Mul", [graph.node("Div", [value, root], f"{output}.unscaled"), scale], output)


class TypedLinear:
    """Gemm on operands of one element type, and what a rank needs of the others around it."""

    opsets: Mapping[str, int] = {"": OPSET, DOMAIN: 1}

    def __init__(self, dtype: str, shard: Shard = Shard()) -> None:  # noqa: B008 - immutable
        self._dtype = dtype
        self._shard = shard

    def emit(self, graph: Graph, value: str, weight: str, bias: str | None, output: str) -> str:
        """Append value [T, in] @ weight [out, in]^T + bias -> [T, out], in the engine's dtype."""
        kind = ELEMENT_KINDS[self._dtype]
        narrow = graph.cast(value, kind, f"{value}.{self._dtype}")
        name = output if kind == TensorProto.FLOAT else f"{output}.{self._dtype}"
        part = weight.removesuffix(".weight").rpartition(".")[2]
        if self._shard.size > 1 and part in ROW_PARALLEL:
            # The bias is added once, after the sum.
            partial = self._product(graph, narrow, weight, f"{name}.partial")
            result = self._collective(graph, "AllReduce", partial, f"{name}.sum" if bias else name)
        elif self._shard.size > 1 and part == "lm_head":
            result = self._gather_vocabulary(graph, self._product(graph, narrow, weight, f"{name}.partial"), name)
        else:
            result = self._product(graph, narrow, weight, f"{name}.product" if bias else name)
        if bias:
            result = graph.node("Add", [result, graph.plain(bias)], name)
        if kind != TensorProto.FLOAT:
            graph.kinds[result] = kind
        return result

    def _product(self, graph: Graph, narrow: str, weight: str, name: str) -> str:
        """narrow @ weight^T, of their element type."""
        if self._dtype != "float16":
            return graph.node("Gemm", [narrow, graph.plain(weight)], name, transB=1)
        wide = f"{narrow}.wide"
        if not any(node.name == wide for node in graph.nodes):
            graph.node("Cast", [narrow], wide, to=TensorProto.FLOAT)
        summed = graph.node("Gemm", [wide, graph.float32(weight)], f"{name}.sums", transB=1)
        return graph.node("Cast", [summed], name, to=ELEMENT_KINDS[self._dtype])

    def _gather_vocabulary(self, graph: Graph, partial: str, name: str) -> str:
        """[L, rows] of each rank -> [ranks, L, rows] -> [L, ranks * rows] -> [L, vocab]."""
        ranks = self._collective(graph, "AllGather", partial, f"{name}.ranks")
        swapped = graph.node("Transpose", [ranks], f"{name}.swapped", perm=[1, 0, 2])
        vocab = graph.config.vocab_size
        padded = self._shard.size * self._shard.vocab_rows(vocab)
        shape = graph.constant("vocab.shape", np.array([-1, padded], np.int64))
        if padded == vocab:
            return graph.node("Reshape", [swapped, shape], name)
        joined = graph.node("Reshape", [swapped, shape], f"{name}.padded")
        bounds = [
            graph.constant(f"vocab.{key}", np.array([number], np.int64))
            for key, number in (("begin", 0), ("end", vocab), ("axis", 1))
        ]
        return graph.node("Slice", [joined, *bounds], name)

    def _collective(self, graph: Graph, op: str, value: str, output: str) -> str:
        register_schemas()
        return graph.node(
            op,
            [value],
            output,
            domain=DOMAIN,
            ranks=self._shard.size,
            plugin_version=PLUGIN_VERSION,
            plugin_namespace=PLUGIN_NAMESPACE,
        )


class TensorRtAttention(ForkAttention):
    """The node as TensorRT's plugin takes it: everything in the engine's dtype.

    TensorRT has no comfortable empty tensors, so a dimension is never 0: the first two rows of slot_copies are no
    copies (two, which keeps the others aligned), groups may have no rows, and a tree_mask with fewer rows than the
    step has tokens says that there is no mask (W = 0). Which program reads which keys is worked out once a step, by a
    ForkPlan node that all layers read.
    """

    mask_rows = "M"
    more_inputs = ("plan", "rope.inv_freq")

    def __init__(self, block_size: int, dtype: str, kv_binding: str, engine_id: int = 0) -> None:
        if kv_binding not in KV_BINDINGS:
            raise BuildError(f"kv_binding {kv_binding!r} is not one of {', '.join(KV_BINDINGS)}")
        super().__init__(block_size, dtype, dtype)
        self.pools_in_graph = kv_binding != "bound"
        self._binding = KV_BINDINGS.index(kv_binding)
        self._engine_id = engine_id

    def prepare(self, graph: Graph) -> None:
        """The plan of the step, and RoPE's frequencies where kernels can read them."""
        register_schemas()
        config = graph.config
        graph.constant("rope.inv_freq", np.array(config.rope_inv_freq, np.float32))
        graph.node(
            "ForkPlan",
            _PLAN_INPUTS,
            "plan",
            domain=DOMAIN,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            block_size=self._block_size,
            abi_version=ABI_VERSION,
            plugin_version=PLUGIN_VERSION,
            plugin_namespace=PLUGIN_NAMESPACE,
        )
        graph.kinds["plan"] = TensorProto.INT32

    def more_attributes(self, layer: int) -> dict[str, Any]:
        """`kv_binding` (index of KV_BINDINGS), and what finds the pool where it is bound."""
        return {"kv_binding": self._binding, "engine_id": self._engine_id, "layer": layer}


def register_schemas() -> None:
    """Make the plugins' further operators known to the onnx package, so that its checker accepts graphs with them."""
    if onnx.defs.has("ForkPlan", 1, DOMAIN):
        return
    schema = onnx.defs.OpSchema
    integer = schema.AttrType.INT

    def register(
        op: str, doc: str, inputs: tuple[str, ...], output: str, types: list[str], attributes: tuple[str, ...]
    ) -> None:
        text = {"plugin_version": PLUGIN_VERSION, "plugin_namespace": PLUGIN_NAMESPACE}
        optional = [schema.Attribute(key, onnx.helper.make_attribute(key, value), "") for key, value in text.items()]
        onnx.defs.register_schema(
            schema(
                op,
                DOMAIN,
                1,
                doc=doc,
                inputs=[schema.FormalParameter(name, "T", "") for name in inputs],
                outputs=[schema.FormalParameter(output, "T", "")],
                type_constraints=[("T", types, "")],
                attributes=[*(schema.Attribute(name, integer, "", required=True) for name in attributes), *optional],
            )
        )

    floats = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]
    register("AllReduce", "The sum of x over all ranks.", ("x",), "y", floats, ("ranks",))
    register("AllGather", "Every rank's x: [ranks, *x].", ("x",), "y", floats, ("ranks",))
    register(
        "ForkPlan",
        "Which program of the attention kernel reads which keys in this step (plugins/gpu/plan.py).",
        _PLAN_INPUTS,
        "plan",
        ["tensor(int32)"],
        ("num_heads", "num_kv_heads", "head_dim", "block_size", "abi_version"),
    )
