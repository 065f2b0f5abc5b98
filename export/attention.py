"""The two ways attention over the KV pools is expressed in the decoder graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, defs

from apar.export.decoder import Graph, pools, tensor
from apar.export.manifest import ABI_VERSION, DecoderConfig

DOMAIN = "apar"
OP = "ForkAttention"
ELEMENT_KINDS = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
}
"""Element types by the names that options and the manifest use."""
_INPUTS = (
    "position_ids",
    "query_start",
    "kv_len",
    "block_table",
    "slot_mapping",
    "slot_copies",
    "prefix_rows",
    "prefix_blocks",
    "tree_mask",
)


class ForkAttention:
    """The `apar::ForkAttention` node: RoPE, the K/V write and paged attention in one operator."""

    opsets: Mapping[str, int] = {DOMAIN: 1}
    mask_rows = "T"
    """Name of tree_mask's first dimension."""
    pools_in_graph = True
    """The graph takes and returns the pools; otherwise whoever runs the node knows them."""
    more_inputs: tuple[str, ...] = ()
    """Values that the node takes beside those of the contract."""

    def __init__(self, block_size: int, kv_dtype: str, value_dtype: str = "float32") -> None:
        """`kv_dtype` is the pools' element type, `value_dtype` that of qkv and of the result."""
        register_schema()
        self._block_size = block_size
        self._kind = ELEMENT_KINDS[kv_dtype]
        self._value_dtype = value_dtype

    def inputs(self, config: DecoderConfig) -> list[onnx.ValueInfoProto]:
        """The step contract (docs/step-contract.md)."""
        shapes: dict[str, tuple[int | str, ...]] = {
            "position_ids": ("T",),
            "query_start": ("R_plus_1",),
            "kv_len": ("R",),
            "block_table": ("R", "MB"),
            "slot_mapping": ("T",),
            "slot_copies": ("C", 2),
            "prefix_rows": ("G_plus_1",),
            "prefix_blocks": ("G",),
            "tree_mask": (self.mask_rows, "W"),
        }
        step = [tensor(name, TensorProto.INT32, *shapes[name]) for name in _INPUTS]
        return [*step, *self._pools("past_kv", config)]

    def outputs(self, config: DecoderConfig) -> list[onnx.ValueInfoProto]:
        """The pools again: bind each to its input's memory."""
        return self._pools("present_kv", config)

    def _pools(self, prefix: str, config: DecoderConfig) -> list[onnx.ValueInfoProto]:
        shape = (2, "B", config.num_kv_heads, self._block_size, config.head_dim)
        return list(pools(prefix, config, self._kind, *shape)) if self.pools_in_graph else []

    def prepare(self, graph: Graph) -> None:
        """Nothing: the host plans the step, the node reads the plan."""

    def emit(self, graph: Graph, layer: int, qkv: str) -> str:
        """One node."""
        config, output = graph.config, f"layers.{layer}.attention"
        kind = ELEMENT_KINDS[self._value_dtype]
        node = onnx.helper.make_node(
            OP,
            [
                graph.cast(qkv, kind, f"{qkv}.{self._value_dtype}"),
                *([f"past_kv_{layer}"] if self.pools_in_graph else []),
                *_INPUTS,
                *self.more_inputs,
            ],
            [output, *([f"present_kv_{layer}"] if self.pools_in_graph else [])],
            name=output,
            domain=DOMAIN,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            block_size=self._block_size,
            abi_version=ABI_VERSION,
            scale=config.head_dim**-0.5,
            rope_inv_freq=list(config.rope_inv_freq),
            rope_scale=config.rope_scale,
            plugin_version="1",
            plugin_namespace="",
            **self.more_attributes(layer),
        )
        graph.nodes.append(node)
        if kind != TensorProto.FLOAT:
            graph.kinds[output] = kind
        return output

    def more_attributes(self, layer: int) -> dict[str, Any]:
        """Attributes beside those of the contract."""
        return {}


class TreeMaskAttention:
    """Standard operators only: one linear buffer of slots, and a mask that says which token sees which slot.

    A pool is float32 [2, slots, K * D]. Copies and this step's keys and values go into it by one ScatterND
    (so that, bound in and out to the same memory, nothing else of it moves); then the rows of
    `context_slots` are gathered and attended to under `visible`. Targets and slots must be distinct.
    """

    opsets: Mapping[str, int] = {}

    def inputs(self, config: DecoderConfig) -> list[onnx.ValueInfoProto]:
        """Inputs that the executor makes of the step contract."""
        return [
            tensor("position_ids", TensorProto.INT32, "T"),
            tensor("slot_mapping", TensorProto.INT64, "T"),
            tensor("copy_source", TensorProto.INT64, "C"),
            tensor("copy_target", TensorProto.INT64, "C"),
            tensor("context_slots", TensorProto.INT64, "S"),
            tensor("visible", TensorProto.BOOL, "T", "S"),
            *pools("past_kv", config, TensorProto.FLOAT, *self._pool(config)),
        ]

    def outputs(self, config: DecoderConfig) -> list[onnx.ValueInfoProto]:
        """The pools again: bind each to its input's memory."""
        return list(pools("present_kv", config, TensorProto.FLOAT, *self._pool(config)))

    def _pool(self, config: DecoderConfig) -> tuple[int | str, ...]:
        return (2, "slots", config.num_kv_heads * config.head_dim)

    def prepare(self, graph: Graph) -> None:
        """cos and sin [1, T, D / 2]; where rows are written, as ScatterND indices [2, C + T, 2]."""
        config = graph.config
        inv_freq = graph.constant("rope.inv_freq", np.array(config.rope_inv_freq, np.float32)[None, None, :])
        batch = graph.constant("axes.batch", np.array([0], np.int64))
        position = graph.node("Cast", ["position_ids"], "rope.position", to=TensorProto.FLOAT)
        axes = graph.constant("axes.batch_last", np.array([0, 2], np.int64))
        angle = graph.node("Mul", [graph.node("Unsqueeze", [position, axes], "rope.column"), inv_freq], "rope.angle")
        scale = graph.constant("rope.scale", np.array(config.rope_scale, np.float32))
        for op, name in (("Cos", "rope.cos"), ("Sin", "rope.sin")):
            graph.node("Mul", [graph.node(op, [angle], f"{name}.unscaled"), scale], name)
        target = graph.node("Concat", ["copy_target", "slot_mapping"], "write.slots", axis=0)
        written = [graph.node("Unsqueeze", [part, batch], f"{part}.batch") for part in _pairs(graph, target, "write")]
        graph.node("Concat", written, "write.index", axis=0)
        _pairs(graph, "context_slots", "context")

    def emit(self, graph: Graph, layer: int, qkv: str) -> str:
        """RoPE, write, gather, Attention."""
        config, name = graph.config, f"layers.{layer}"
        heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
        batch = graph.constant("axes.batch", np.array([0], np.int64))
        packed = graph.node("Unsqueeze", [qkv, batch], f"{name}.qkv.batch")
        qk, value = graph.split(packed, ((heads + kv_heads) * dim, kv_heads * dim), (f"{name}.qk", f"{name}.v"), axis=2)
        turned = graph.node(
            "RotaryEmbedding", [qk, "rope.cos", "rope.sin"], f"{name}.qk.rope", num_heads=heads + kv_heads
        )
        query, key = graph.split(turned, (heads * dim, kv_heads * dim), (f"{name}.q.rope", f"{name}.k.rope"), axis=2)
        past, present = f"past_kv_{layer}", f"present_kv_{layer}"
        new = graph.node("Concat", [key, value], f"{name}.kv.new", axis=0)
        copied = graph.node("Gather", [past, "copy_source"], f"{name}.kv.copied", axis=1)
        rows = graph.node("Concat", [copied, new], f"{name}.kv.rows", axis=1)
        graph.node("ScatterND", [past, "write.index", rows], present)
        # Two gathers by (0 or 1, slot): one Gather and a Split would move everything twice.
        context = [
            graph.node("GatherND", [present, f"context.{part}"], f"{name}.{part}.context") for part in ("key", "value")
        ]
        keys, values = (graph.node("Unsqueeze", [part, batch], f"{part}.batch") for part in context)
        attended = graph.node(
            "Attention",
            [query, keys, values, "visible"],
            f"{name}.attention.batch",
            q_num_heads=heads,
            kv_num_heads=kv_heads,
            scale=dim**-0.5,
        )
        return graph.node("Squeeze", [attended, batch], f"{name}.attention")


def _pairs(graph: Graph, slots: str, name: str) -> tuple[str, str]:
    """Indices [n, 2] into a pool of the keys and of the values at `slots` [n]: (0, slot) and (1, slot)."""
    last = graph.constant("axes.last", np.array([1], np.int64))
    column = graph.node("Unsqueeze", [slots, last], f"{name}.column")
    zero = graph.node("Sub", [column, column], f"{name}.zero")
    one = graph.node("Add", [zero, graph.constant("one", np.array(1, np.int64))], f"{name}.one")
    return (
        graph.node("Concat", [zero, column], f"{name}.key", axis=1),
        graph.node("Concat", [one, column], f"{name}.value", axis=1),
    )


def register_schema() -> None:
    """Make ForkAttention known to the onnx package, so that its checker accepts graphs that hold it."""
    if defs.has(OP, 1, DOMAIN):
        return
    parameter, attribute = defs.OpSchema.FormalParameter, defs.OpSchema.Attribute
    # The last two inputs are TensorRT's alone. A node whose pools are bound elsewhere has one input and one output
    # less, which a schema can only say of the last ones.
    optional = defs.OpSchema.FormalParameterOption.Optional
    kind = defs.OpSchema.AttrType
    required = {"num_heads": kind.INT, "num_kv_heads": kind.INT, "head_dim": kind.INT, "block_size": kind.INT}
    required |= {"abi_version": kind.INT, "scale": kind.FLOAT, "rope_inv_freq": kind.FLOATS}
    attributes = [attribute(name, attr_type, "", required=True) for name, attr_type in required.items()]
    attributes.append(attribute("rope_scale", onnx.helper.make_attribute("rope_scale", 1.0), ""))
    plugin = ("kv_binding", "engine_id", "layer")  # of TensorRT's plugin alone (typed_graph.py)
    attributes += [attribute(name, onnx.helper.make_attribute(name, 0), "") for name in plugin]
    attributes.append(attribute("plugin_version", onnx.helper.make_attribute("plugin_version", "1"), ""))
    attributes.append(attribute("plugin_namespace", onnx.helper.make_attribute("plugin_namespace", ""), ""))
    defs.register_schema(
        defs.OpSchema(
            OP,
            DOMAIN,
            1,
            doc="Ragged paged attention over branches that share prefixes, with RoPE and the K/V write inside.",
            inputs=[
                parameter("qkv", "T", "[T, (H + 2K) * D], before RoPE"),
                parameter("past_kv", "P", "[2, B, K, block_size, D]"),
                *(parameter(name, "tensor(int32)", "step contract") for name in _INPUTS[:-1]),
                parameter(_INPUTS[-1], "tensor(int32)", "step contract", param_option=optional),
                parameter("plan", "tensor(int32)", "of the step, from ForkPlan", param_option=optional),
                parameter("inv_freq", "tensor(float)", "rope_inv_freq on the device", param_option=optional),
            ],
            outputs=[
                parameter("attention", "T", "[T, H * D]"),
                parameter("present_kv", "P", "past_kv, written in place", param_option=optional),
            ],
            type_constraints=[
                ("T", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"], ""),
                ("P", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"], ""),
            ],
            attributes=attributes,
        )
    )
