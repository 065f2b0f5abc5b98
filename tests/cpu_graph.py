"""Running the graph that TensorRT gets with ONNX Runtime's CPU provider.

The graph is executed as it is, except where that provider has no kernels: casts go around the attention node (whose
CPU kernels take float32 and float16 pools), and around bfloat16 operators, which then compute in float32 on bfloat16
operands and round their result to bfloat16: what a GPU does. bfloat16 pools are kept in float32: one rounding less.
The ForkPlan node, which only tells GPU programs their share of the work, is left out.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper

from apar.runtime.step import INPUT_NAMES, StepInputs

_ROUNDED = ("Gemm", "Add", "Transpose", "Reshape", "Slice", "Gather")


def for_cpu(source: Path | onnx.ModelProto) -> onnx.ModelProto:
    """The model at a path, or with its weights inside, made runnable by the CPU provider."""
    model = onnx.load(source) if isinstance(source, Path) else source
    graph = model.graph
    kinds = {tensor.name: tensor.data_type for tensor in graph.initializer}
    kinds |= {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)}
    nodes: list[onnx.NodeProto] = []

    def cast(value: str, kind: int, output: str) -> str:
        nodes.append(helper.make_node("Cast", [value], [output], to=kind))
        return output

    for node in graph.node:
        if node.op_type == "ForkPlan":
            continue
        if node.op_type == "ForkAttention":
            assert list(node.input[-2:]) == ["plan", "rope.inv_freq"]
            del node.input[-2:]
        kind = next((a.i for a in node.attribute if a.name == "to"), kinds.get(node.input[0], TensorProto.FLOAT))
        kinds.update(dict.fromkeys(node.output[:1], kind))
        inner = node.op_type == "ForkAttention" and kind != TensorProto.FLOAT
        if inner or (kind == TensorProto.BFLOAT16 and node.op_type in _ROUNDED):
            wide = 1 if inner else len(node.input)
            for i, value in enumerate(node.input[:wide]):
                if kinds.get(value) == kind:
                    node.input[i] = cast(value, TensorProto.FLOAT, f"{node.name}.wide.{i}")
            result = node.output[0]
            node.output[0] = f"{node.name}.unrounded"
            nodes.append(node)
            cast(node.output[0], kind, result)
        else:
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type == TensorProto.BFLOAT16:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    return model


def merged(paths: Sequence[Path]) -> onnx.ModelProto:
    """All ranks' graphs in one, with their collectives as what they mean: AllReduce a Sum, AllGather a stack.

    Logits are rank 0's; the other ranks' are `logits.rank{r}`.
    """
    models = [for_cpu(path) for path in paths]
    for rank, model in enumerate(models):
        _rename(model, rank)
    whole = onnx.ModelProto()
    whole.CopyFrom(models[0])
    graph = whole.graph
    for field in (graph.node, graph.input, graph.output, graph.initializer):
        del field[:]
    queues = [list(model.graph.node) for model in models]
    while any(queues):
        meeting = []
        for queue in queues:
            while queue:
                node = queue.pop(0)
                if node.op_type in ("AllReduce", "AllGather"):
                    meeting.append(node)
                    break
                graph.node.append(node)
        if meeting:
            assert len({node.op_type for node in meeting}) == 1
            assert len(meeting) == len(paths)
            graph.node.extend(_collective(meeting))
    for model in models:
        known = {value.name for value in graph.input}
        graph.input.extend(value for value in model.graph.input if value.name not in known)
        graph.output.extend(model.graph.output)
        graph.initializer.extend(model.graph.initializer)
    return whole


def _collective(nodes: Sequence[onnx.NodeProto]) -> list[onnx.NodeProto]:
    parts = [node.input[0] for node in nodes]
    made = [helper.make_node("Cast", [part], [f"{part}.c"], to=TensorProto.FLOAT) for part in parts]
    wide = [f"{part}.c" for part in parts]
    total = f"{nodes[0].name}.all"
    if nodes[0].op_type == "AllReduce":
        made.append(helper.make_node("Sum", wide, [total]))
    else:
        axes = f"{nodes[0].name}.axes"
        made.append(helper.make_node("Constant", [], [axes], value_ints=[0]))
        made += [helper.make_node("Unsqueeze", [part, axes], [f"{part}.row"]) for part in wide]
        made.append(helper.make_node("Concat", [f"{part}.row" for part in wide], [total], axis=0))
    return [*made, *(helper.make_node("CastLike", [total, node.input[0]], [node.output[0]]) for node in nodes)]


def _rename(model: onnx.ModelProto, rank: int) -> None:
    """Give every value but the step's inputs and rank 0's logits a name of its own."""

    def name(value: str) -> str:
        return value if not value or value in INPUT_NAMES else f"{value}.rank{rank}"

    for node in model.graph.node:
        node.name = name(node.name)
        node.input[:] = [name(value) for value in node.input]
        node.output[:] = [name(value) for value in node.output]
    for value in (*model.graph.input, *model.graph.output, *model.graph.initializer):
        value.name = name(value.name)


class CpuGraph:
    """A session whose pools are bound in place, one float16 or float32 array a layer."""

    def __init__(self, path: Path | Sequence[Path], num_blocks: int) -> None:
        """`path` is a graph, or the graphs of all ranks."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 4
        options.register_custom_ops_library(os.environ.get("APAR_PLUGIN_LIBRARY") or _library())
        model = for_cpu(path) if isinstance(path, Path) else merged(path)
        self.session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        self.binding = self.session.io_binding()
        self.pools = []
        for value in model.graph.input:
            if value.name.startswith("past_kv_"):
                kind = np.float16 if value.type.tensor_type.elem_type == TensorProto.FLOAT16 else np.float32
                shape = [d.dim_value or num_blocks for d in value.type.tensor_type.shape.dim]
                pool = onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(shape, kind))
                self.binding.bind_ortvalue_input(value.name, pool)
                self.binding.bind_ortvalue_output(value.name.replace("past", "present"), pool)
                self.pools.append(pool)

        self._logits = [value.name for value in model.graph.output if value.name.startswith("logits")]
        self._hidden = any(value.name == "hidden" for value in model.graph.output)
        self.hidden = np.zeros((0, 0), np.float32)
        """What Medusa heads read of the last step, float32 [L, hidden], where the graph gives it."""

    def execute(self, inputs: StepInputs) -> np.ndarray:
        """Logits float32 [L, vocab]; [ranks, L, vocab] of several ranks."""
        for name in INPUT_NAMES:
            self.binding.bind_cpu_input(name, getattr(inputs, name))
        for name in self._logits:
            self.binding.bind_output(name)
        if self._hidden:
            self.binding.bind_output("hidden")
        self.session.run_with_iobinding(self.binding)
        found = [value.numpy() for value in self.binding.get_outputs()[len(self.pools) :]]
        if self._hidden:
            self.hidden = found.pop()
        logits = np.array(found)
        return logits[0] if len(logits) == 1 else logits


def _library() -> str:
    from apar.plugins import library_path

    return str(library_path())
