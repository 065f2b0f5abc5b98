"""The Llama decoder as an ONNX graph, written once.

Three things vary and are passed in: how attention is expressed (attention.py: the ForkAttention node, or
standard operators), how a projection is (linear.py: by how its weight is stored; typed_graph.py: in an element
type), and how the norm is (here: one operator or plain arithmetic, which older operator sets have). Everything
else, on packed tokens [T, hidden] without a batch dimension, is here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

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


@runtime_checkable
class FusedLinear(Linear, Protocol):
    """A projection that can take what stands around it into its own node."""

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
        """Append the projection of `value`, of its RMSNorm by the weight `norm`, or of its gate, plus `residual`.

        Gated, value is [T, 2 * in], and the projection is that of silu(its first half) * its second half.
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
    block = _Projections(graph, linear, norm)
    for layer in range(config.num_layers):
        hidden = _layer(block, layer, hidden, attention)
    wanted = graph.node("Gather", [hidden, "logits_rows"], "wanted.hidden")
    head = "lm_head" if "lm_head.weight" in weights else "embed"
    if hidden_output:
        normed = norm.emit(graph, wanted, graph.plain("norm.weight"), "hidden")
        block.project(head, normed, "logits")
    else:
        block.project(head, wanted, "logits", norm="norm")
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


def _layer(block: _Projections, layer: int, hidden: str, attention: Attention) -> str:
    config, name = block.graph.config, f"layers.{layer}"
    biased, mlp_biased = config.attention_bias, config.mlp_bias
    qkv = block.project(f"{name}.qkv", hidden, bias=biased, norm=f"{name}.input_norm", narrow=True)
    attended = attention.emit(block.graph, layer, qkv)
    hidden = block.project(f"{name}.o", attended, f"{name}.attended", bias=biased, residual=hidden)
    gate_up = block.project(f"{name}.gate_up", hidden, bias=mlp_biased, norm=f"{name}.post_norm")
    return block.project(f"{name}.down", gate_up, f"{name}.hidden", bias=mlp_biased, gate=name, residual=hidden)


@dataclass(frozen=True, slots=True)
class _Projections:
    """Projections with what stands around them: in their own nodes where the emitter can, else in nodes before and
    after."""

    graph: Graph
    linear: Linear
    norm: Norm

    def project(
        self,
        name: str,
        value: str,
        output: str | None = None,
        *,
        bias: bool = False,
        norm: str | None = None,
        gate: str | None = None,
        residual: str | None = None,
        narrow: bool = False,
    ) -> str:
        """Append the projection `name` of `value` to `output`, float32 unless `narrow`.

        `norm`: of value's norm, by the weight of that name. `gate`: of its gate; the name of the layer.
        """
        graph, output = self.graph, output or name
        weight, biases = f"{name}.weight", f"{name}.bias" if bias else None
        if isinstance(self.linear, FusedLinear):
            scale = f"{norm}.weight" if norm else None
            return self.linear.emit_fused(
                graph, value, weight, biases, output, norm=scale, gated=gate is not None, residual=residual
            )
        if norm:
            value = self.norm.emit(graph, value, graph.plain(f"{norm}.weight"), norm)
        if gate:
            value = self._gate(value, gate)
        result = self.linear.emit(graph, value, weight, biases, name if residual else output)
        if narrow:
            return result
        wide = graph.cast(result, TensorProto.FLOAT, output if output == "logits" else f"{result}.float32")
        return graph.node("Add", [residual, wide], output) if residual else wide

    def _gate(self, gate_up: str, layer: str) -> str:
        graph, ffn = self.graph, self.graph.config.intermediate_size
        gate, up = graph.split(gate_up, (ffn, ffn), (f"{layer}.gate", f"{layer}.up"), axis=1)
        sigmoid = graph.node("Sigmoid", [gate], f"{layer}.sigmoid")
        swish = graph.node("Mul", [gate, sigmoid], f"{layer}.swish")
        return graph.node("Mul", [swish, up], f"{layer}.gated")


def tensor(name: str, kind: int, *shape: int | str) -> onnx.ValueInfoProto:
    """Type and shape of a graph input or output."""
    return helper.make_tensor_value_info(name, kind, list(shape))


def pools(prefix: str, config: DecoderConfig, kind: int, *shape: int | str) -> Iterator[onnx.ValueInfoProto]:
    """The KV pool of each layer, as input (`past_kv`) or output (`present_kv`)."""
    for layer in range(config.num_layers):
        yield tensor(f"{prefix}_{layer}", kind, *shape)
