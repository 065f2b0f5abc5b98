"""The Medusa heads as a graph of their own: hidden states in, `draft_logits` out.

A step verifies a whole tree of draft nodes but continues from one node of each row only, and which one is known after
sampling. So the decoder gives the hidden states of the wanted tokens, and the heads are run for the few that are
continued from: computed inside the decoder's graph they would cost heads x vocabulary numbers for every node.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
from onnx import TensorProto, helper

from apar.export.decoder import Graph, Linear, RmsNormalization, tensor
from apar.export.manifest import DecoderConfig, DraftHeads
from apar.export.weights_file import StoredWeight


def build_heads(
    config: DecoderConfig,
    heads: DraftHeads,
    weights: Mapping[str, StoredWeight],
    linear: Linear,
    *,
    gathered: bool = False,
) -> onnx.ModelProto:
    """hidden float32 [N, hidden] after the last norm -> draft_logits float32 [N, heads, vocab].

    `gathered`: `hidden` is all of a step's [L, hidden], as it lies on a device, and `wanted` int32 [N] says which rows.
    """
    graph = Graph(config, weights)
    inputs = [tensor("hidden", TensorProto.FLOAT, "L" if gathered else "N", config.hidden_size)]
    start = "hidden"
    if gathered:
        inputs.append(tensor("wanted", TensorProto.INT32, "N"))
        start = graph.node("Gather", ["hidden", "wanted"], "wanted.hidden")
    axis = graph.constant("axes.head", np.array([1], np.int64))
    shared = "lm_head.weight" if "lm_head.weight" in weights else "embed.weight"
    parts = []
    for head in range(heads.count):
        state = start
        for block in range(heads.blocks):
            name = f"heads.{head}.blocks.{block}"
            value = linear.emit(graph, state, f"{name}.weight", f"{name}.bias", f"{name}.linear")
            value = graph.cast(value, TensorProto.FLOAT, f"{name}.linear.float32")
            sigmoid = graph.node("Sigmoid", [value], f"{name}.sigmoid")
            swish = graph.node("Mul", [value, sigmoid], f"{name}.swish")
            state = graph.node("Add", [state, swish], name)
        own = f"heads.{head}.lm_head.weight"
        logits = linear.emit(graph, state, shared if heads.tied_lm_head else own, None, f"heads.{head}.logits")
        logits = graph.cast(logits, TensorProto.FLOAT, f"heads.{head}.logits.float32")
        parts.append(graph.node("Unsqueeze", [logits, axis], f"heads.{head}.row"))
    graph.node("Concat", parts, "draft_logits", axis=1)
    onnx_graph = helper.make_graph(
        graph.nodes,
        "draft_heads",
        inputs,
        [tensor("draft_logits", TensorProto.FLOAT, "N", heads.count, config.vocab_size)],
        list(graph.initializers.values()),
    )
    opsets = {**RmsNormalization.opsets, **linear.opsets}
    return helper.make_model(
        onnx_graph,
        opset_imports=[helper.make_opsetid(domain, version) for domain, version in opsets.items()],
        ir_version=helper.find_min_ir_version_for([helper.make_opsetid("", opsets[""])]),
        producer_name="apar",
    )
