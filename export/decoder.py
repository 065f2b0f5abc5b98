"""The Llama decoder as an ONNX graph, written once.

Three things vary and are passed in: how attention is expressed (attention.py: the ForkAttention node, or
standard operators), how a projection is (linear.py: by how its weight is stored; typed_graph.py: in an element
type), and how the norm is (here: one operator or plain arithmetic, which older operator sets have). Everything
else, on packed tokens [T, hidden] without a batch dimension, is here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from apar.export.manifest import DecoderConfig
from apar.export.weights_file import PlainWeight, StoredWeight


@dataclass(slots=True)
class Graph:
    """Collects nodes and the initialisers that they use."""

    config: DecoderConfig
    weights: Mapping[str, StoredWeight]
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: dict[str, TensorProto] = field(default_factory=dict)
    kinds: dict[str, int] = field(default_factory=dict)
    """Element type of each value that is not float32."""

    def node(self, op: str, inputs: Sequence[str], output: str, *, domain: str = "", **attributes: Any) -> str:
        """Append a node with one output and return the output's name."""
        self.nodes.append(helper.make_node(op, inputs, [output], name=output, domain=domain, **attributes))
        return output

    def split(self, value: str, sizes: Sequence[int], outputs: Sequence[str], axis: int) -> list[str]:
        """Append a Split into parts of `sizes`."""
        name = self.constant("split." + ".".join(map(str, sizes)), np.array(sizes, np.int64))
        self.nodes.append(helper.make_node("Split", [value, name], outputs, name=f"{outputs[0]}.split", axis=axis))
        return list(outputs)

    def constant(self, name: str, value: npt.NDArray[Any]) -> str:
        """A small initialiser kept in the graph itself; the same name is made once."""
        if name not in self.initializers:
            self.initializers[name] = numpy_helper.from_array(value, name)
        return name

    def initializer(self, tensor: TensorProto) -> str:
        """An initialiser in the weights file."""
        self.initializers[tensor.name] = tensor
        return str(tensor.name)

    def plain(self, name: str) -> str:
        """A weight stored plainly, in its stored type."""
        weight = self.weights[name]
        assert isinstance(weight, PlainWeight), name
        return self.initializer(weight.tensor)

    def float32(self, name: str) -> str:
        """A weight stored plainly, as float32: a Cast (folded at load) where it is stored narrower."""
        stored = self.plain(name)
        if self.initializers[stored].data_type == TensorProto.FLOAT:
            return stored
        wide = f"{stored}.float32"
        if not any(node.name == wide for node in self.nodes):
            self.node("Cast", [stored], wide, to=TensorProto.FLOAT)
        return wide

    def cast(self, value: str, kind: int, output: str) -> str:
        """`value` in the element type `kind`: a Cast to `output`, or itself where it has that type."""
        if self.kinds.get(value, TensorProto.FLOAT) == kind:
            return value
        if output in self.kinds:
            return output
        self.node("Cast", [value], output, to=kind)
        if kind != TensorProto.FLOAT:
            self.kinds[output] = kind
        return output


class Attention(Protocol):
    """How attention over the KV pools is expressed."""

    opsets: Mapping[str, int]

    def inputs(self, config: DecoderConfig) -> list[onnx.ValueInfoProto]:
        """Graph inputs beside `input_ids` and `logits_rows`."""

    def outputs(self, config: DecoderConfig) -> list[onnx.ValueInfoProto]:
        """Graph outputs beside `logits`."""

    def prepare(self, graph: Graph) -> None:
        """Append what is computed once a step."""

    def emit(self, graph: Graph, layer: int, qkv: str) -> str:
        """Append one layer's attention: qkv [T, (H + 2K) * D] before RoPE -> [T, H * D].

        Where the result is not float32, `Graph.kinds` says so.
        """


class Linear(Protocol):
    """How a projection is expressed."""

    opsets: Mapping[str, int]

    def emit(self, graph: Graph, value: str, weight: str, bias: str | None, output: str) -> str:
        """Append value [T, in] @ weight [out, in]^T + bias -> [T, out].

        Where the result is not float32, `Graph.kinds` says so.
        """


class Norm(Protocol):
    """How RMSNorm is expressed."""

    opsets: Mapping[str, int]

    def emit(self, graph: Graph, value: str, scale: str, output: str) -> str:
        """Append value / sqrt(mean(value ** 2) + eps) * scale, in float32."""


class RmsNormalization:
    """One operator of opset 23."""

    opsets: Mapping[str, int] = {"": 23}

    def emit(self, graph: Graph, value: str, scale: str, output: str) -> str:
        """One node."""
        return graph.node("RMSNormalization", [value, scale], output, axis=-1, epsilon=graph.config.rms_norm_eps)


def build_decoder(
    config: DecoderConfig,
    weights: Mapping[str, StoredWeight],
    attention: Attention,
    linear: Linear,
    norm: Norm | None = None,
    *,
    hidden_output: bool = False,
) -> onnx.ModelProto:
    """The whole step: input_ids [T] -> logits float32 [L, vocab] of the tokens `logits_rows`.

    `hidden_output`: also give `hidden` float32 [L, hidden], what the last matrix multiplies: draft heads read it.
    """
    norm = norm or RmsNormalization()
    graph = Graph(config, weights)
    embedded = graph.node("Gather", [graph.plain("embed.weight"), "input_ids"], "embed.rows")
    hidden = graph.node("Cast", [embedded], "embed.hidden", to=TensorProto.FLOAT)
    attention.prepare(graph)
    for layer in range(config.num_layers):
        hidden = _layer(graph, layer, hidden, attention, linear, norm)
    wanted = graph.node("Gather", [hidden, "logits_rows"], "wanted.hidden")
    normed = norm.emit(graph, wanted, graph.plain("norm.weight"), "hidden" if hidden_output else "norm")
    head = "lm_head.weight" if "lm_head.weight" in weights else "embed.weight"
    graph.cast(linear.emit(graph, normed, head, None, "logits"), TensorProto.FLOAT, "logits")
    inputs = [tensor("input_ids", TensorProto.INT32, "T"), *attention.inputs(config)]
    inputs.append(tensor("logits_rows", TensorProto.INT32, "L"))
    outputs = [tensor("logits", TensorProto.FLOAT, "L", config.vocab_size), *attention.outputs(config)]
    if hidden_output:
        outputs.append(tensor("hidden", TensorProto.FLOAT, "L", config.hidden_size))
    onnx_graph = helper.make_graph(graph.nodes, "decoder", inputs, outputs, list(graph.initializers.values()))
    opsets = {**norm.opsets, **attention.opsets, **linear.opsets}
    return helper.make_model(
        onnx_graph,
        opset_imports=[helper.make_opsetid(domain, version) for domain, version in opsets.items()],
        ir_version=helper.find_min_ir_version_for([helper.make_opsetid("", opsets[""])]),
        producer_name="apar",
    )


def _layer(graph: Graph, layer: int, hidden: str, attention: Attention, linear: Linear, norm: Norm) -> str:
    config, name = graph.config, f"layers.{layer}"

    def project(part: str, value: str, bias: bool) -> str:
        return linear.emit(
            graph, value, f"{name}.{part}.weight", f"{name}.{part}.bias" if bias else None, f"{name}.{part}"
        )

    def wide(value: str) -> str:
        return graph.cast(value, TensorProto.FLOAT, f"{value}.float32")

    def normed(value: str, part: str) -> str:
        return norm.emit(graph, value, graph.plain(f"{name}.{part}.weight"), f"{name}.{part}")

    qkv = project("qkv", normed(hidden, "input_norm"), config.attention_bias)
    attended = wide(project("o", attention.emit(graph, layer, qkv), config.attention_bias))
    hidden = graph.node("Add", [hidden, attended], f"{name}.attended")
    gate_up = wide(project("gate_up", normed(hidden, "post_norm"), config.mlp_bias))
    ffn = config.intermediate_size
    gate, up = graph.split(gate_up, (ffn, ffn), (f"{name}.gate", f"{name}.up"), axis=1)
    sigmoid = graph.node("Sigmoid", [gate], f"{name}.sigmoid")
    swish = graph.node("Mul", [gate, sigmoid], f"{name}.swish")
    down = wide(project("down", graph.node("Mul", [swish, up], f"{name}.gated"), config.mlp_bias))
    return graph.node("Add", [hidden, down], f"{name}.hidden")


def tensor(name: str, kind: int, *shape: int | str) -> onnx.ValueInfoProto:
    """Type and shape of a graph input or output."""
    return helper.make_tensor_value_info(name, kind, list(shape))


def pools(prefix: str, config: DecoderConfig, kind: int, *shape: int | str) -> Iterator[onnx.ValueInfoProto]:
    """The KV pool of each layer, as input (`past_kv`) or output (`present_kv`)."""
    for layer in range(config.num_layers):
        yield tensor(f"{prefix}_{layer}", kind, *shape)
