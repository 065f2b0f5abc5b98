"""The graph that TensorRT gets: executed against Hugging Face's Llama, and looked at for what TensorRT asks of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from checkpoints import VARIANTS, make_checkpoint, make_heads
from cpu_graph import CpuGraph, for_cpu
from medusa_reference import expect, one_row
from onnx import TensorProto
from portable_graph import random_tokens
from step_builder import random_steps

from apar.export.attention import ELEMENT_KINDS
from apar.export.checkpoint import Checkpoint
from apar.export.errors import BuildError
from apar.export.sharding import Shard, shard_checkpoint
from apar.export.tensorrt_graph import heads_name, write_graph
from apar.export.typed_graph import KV_BINDINGS
from apar.runtime.step import INPUT_NAMES

BLOCKS, SIZE, WORDS = 80, 8, 260
BOUNDS = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 0.15}
"""Largest deviation of a logit, of logits of about 4, from float32 (seen: below 1e-4, 2.6e-3, 0.047)."""


def graph(folder: Path, variant: str, dtype: str, **options: object) -> tuple[Path, torch.nn.Module]:
    stored = torch.float32 if dtype == "float32" else getattr(torch, dtype)
    reference = make_checkpoint(folder / "checkpoint", variant, dtype=stored)
    (folder / "graph").mkdir()
    settings = {"dtype": dtype, "block_size": SIZE, "kv_binding": "in-place", **options}
    return write_graph(Checkpoint.open(folder / "checkpoint"), folder / "graph", **settings), reference  # type: ignore[arg-type]


def expected(reference: torch.nn.Module, paths: list[list[int]]) -> np.ndarray:
    with torch.inference_mode():
        return np.array([reference(torch.tensor([path])).logits[0, -1].numpy() for path in paths])


def worst(session: CpuGraph, reference: torch.nn.Module, seed: int) -> float:
    deviation = 0.0
    for step in random_steps(seed, vocab_size=WORDS, num_blocks=BLOCKS, block_size=SIZE, steps=8):
        logits = session.execute(step.inputs)
        deviation = max(deviation, float(np.abs(logits - expected(reference, step.paths)).max(initial=0.0)))
    return deviation


@pytest.mark.parametrize("variant", VARIANTS)
def test_float32_is_the_reference(variant: str, tmp_path: Path) -> None:
    path, reference = graph(tmp_path, variant, "float32")
    assert worst(CpuGraph(path, BLOCKS), reference, 1) < BOUNDS["float32"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("variant", ["mha", "gqa", "attention_bias", "tied"])
def test_narrow_types_stay_close(variant: str, dtype: str, tmp_path: Path) -> None:
    path, reference = graph(tmp_path, variant, dtype)
    deviation = worst(CpuGraph(path, BLOCKS), reference, 2)
    assert 0 < deviation < BOUNDS[dtype]


@pytest.mark.parametrize(
    ("variant", "size", "dtype"),
    [("mha", 2, "float32"), ("gqa", 4, "float32"), ("attention_bias", 2, "float32"), ("mlp_bias", 4, "float32"),
     ("tied", 2, "float16"), ("head_dim", 2, "bfloat16")],
)  # fmt: skip
def test_the_ranks_together_are_the_whole(variant: str, size: int, dtype: str, tmp_path: Path) -> None:
    # 263 rows of vocabulary are no multiple of the ranks; 2 key/value heads are fewer than 4 ranks.
    stored = getattr(torch, dtype)
    reference = make_checkpoint(tmp_path / "checkpoint", variant, dtype=stored, vocab_size=263)
    (tmp_path / "graphs").mkdir()
    checkpoint = Checkpoint.open(tmp_path / "checkpoint")
    ranks = [
        write_graph(
            checkpoint,
            tmp_path / "graphs",
            dtype=dtype,
            block_size=SIZE,
            kv_binding="in-place",
            shard=Shard(rank, size),
        )
        for rank in range(size)
    ]
    session = CpuGraph(ranks, BLOCKS)
    for step in random_steps(3, vocab_size=WORDS, num_blocks=BLOCKS, block_size=SIZE, steps=6):
        logits = session.execute(step.inputs)
        assert logits.shape[1:] == (step.inputs.logits_rows.size, 263)
        np.testing.assert_array_equal(logits, logits[:1].repeat(size, 0))
        np.testing.assert_allclose(logits[0], expected(reference, step.paths), rtol=0, atol=BOUNDS[dtype])
    assert collectives(ranks[0]) == ["AllReduce"] * 4 + ["AllGather"]


def collectives(path: Path) -> list[str]:
    nodes = onnx.load(path, load_external_data=False).graph.node
    return [node.op_type for node in nodes if node.op_type.startswith("All")]


def test_models_that_cannot_be_cut_are_refused(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "checkpoint", "mha")
    with pytest.raises(BuildError, match="4 attention heads cannot be split over 3 ranks"):
        shard_checkpoint(Checkpoint.open(tmp_path / "checkpoint"), Shard(0, 3))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("kv_binding", KV_BINDINGS)
def test_what_tensorrt_asks_of_a_graph(dtype: str, kv_binding: str, tmp_path: Path) -> None:
    path, _ = graph(tmp_path, "attention_bias", dtype, kv_binding=kv_binding, engine_id=77)
    model = onnx.load(path, load_external_data=False)
    kind = ELEMENT_KINDS[dtype]
    assert {entry.domain: entry.version for entry in model.opset_import} == {"": 19, "apar": 1}
    inputs = {value.name: value.type.tensor_type for value in model.graph.input}
    for name in INPUT_NAMES:
        assert inputs.pop(name).elem_type == TensorProto.INT32
    pools = {} if kv_binding == "bound" else {f"past_kv_{i}": kind for i in range(2)}
    assert {name: value.elem_type for name, value in inputs.items()} == pools
    assert [value.name for value in model.graph.output] == ["logits", *(n.replace("past", "present") for n in pools)]
    assert model.graph.output[0].type.tensor_type.elem_type == TensorProto.FLOAT
    nodes = [node for node in model.graph.node if node.op_type == "ForkAttention"]
    for layer, node in enumerate(nodes):
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        assert (node.domain, attributes["plugin_version"], attributes["plugin_namespace"]) == ("apar", b"1", b"")
        assert (attributes["layer"], attributes["engine_id"]) == (layer, 77)
        assert attributes["kv_binding"] == KV_BINDINGS.index(kv_binding)
        # Pools are the network's own inputs and outputs: nothing may stand between them and the node.
        if kv_binding != "bound":
            assert (node.input[1], node.output[1]) == (f"past_kv_{layer}", f"present_kv_{layer}")
            uses = [
                n
                for n in model.graph.node
                for value in (*n.input, *n.output)
                if "_kv_" in value and str(layer) in value
            ]
            assert all(n is node or n.op_type == "ForkAttention" for n in uses)
    for tensor in model.graph.initializer:
        assert (tensor.data_location == TensorProto.EXTERNAL) == (tensor.name.endswith((".weight", ".bias")))
        if tensor.name.endswith("norm.weight"):
            assert tensor.data_type == TensorProto.FLOAT
        elif tensor.name.endswith((".weight", ".bias")):
            assert tensor.data_type == kind
    check_types(model, kind)


@pytest.mark.parametrize(("dtype", "wide"), [("float16", True), ("bfloat16", False), ("float32", False)])
def test_float16_products_are_summed_in_float32(dtype: str, wide: bool, tmp_path: Path) -> None:
    """The pattern that TensorRT fuses: both float16 operands cast to float32, and the product cast back."""
    path, _ = graph(tmp_path, "attention_bias", dtype)
    model = onnx.load(path, load_external_data=False)
    made = {output: node for node in model.graph.node for output in node.output}
    products = [node for node in model.graph.node if node.op_type == "Gemm"]
    assert len(products) == 2 * 4 + 1
    for node in products:
        assert len(node.input) == 2  # a bias is added to the rounded product
        assert (node.input[1] in made) == wide  # otherwise the stored matrix itself
        if wide:
            assert [made[value].op_type for value in node.input] == ["Cast", "Cast"]
            [user] = [user for user in model.graph.node if node.output[0] in user.input]
            assert (user.op_type, user.attribute[0].i) == ("Cast", TensorProto.FLOAT16)


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-4), ("float16", 2e-2), ("bfloat16", 0.15)])
@pytest.mark.parametrize("tied", [False, True])
def test_medusa_heads_read_the_decoders_hidden_states(tied: bool, dtype: str, bound: float, tmp_path: Path) -> None:
    """Both graphs executed by ONNX Runtime one after the other, as the executor runs them on the device."""
    reference = make_checkpoint(tmp_path / "checkpoint", "gqa", dtype=getattr(torch, dtype))
    tensors = make_heads(tmp_path / "checkpoint" / "medusa", tied=tied)
    checkpoint = Checkpoint.open(tmp_path / "checkpoint")
    assert checkpoint.heads is not None
    (tmp_path / "graph").mkdir()
    path = write_graph(
        checkpoint,
        tmp_path / "graph",
        dtype=dtype,
        block_size=SIZE,
        kv_binding="in-place",
        heads=checkpoint.heads.shape,
    )
    model = onnx.load(path.with_name(heads_name(0)), load_external_data=False)
    assert model.opset_import[0].version == 19
    check_types(model, ELEMENT_KINDS[dtype])
    decoder = CpuGraph(path, BLOCKS)
    heads = onnxruntime.InferenceSession(
        for_cpu(path.with_name(heads_name(0))).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    tokens, wanted = random_tokens(20), [1, 2, 1]
    step = one_row(tokens, [3, 19, 7], SIZE)
    decoder.execute(step)
    [found] = heads.run(["draft_logits"], {"hidden": decoder.hidden, "wanted": np.array(wanted, np.int32)})
    definition = expect(reference.float(), tensors, tokens).numpy()[[19, 7, 19]]
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, definition, rtol=0, atol=bound)


def check_types(model: onnx.ModelProto, kind: int) -> None:
    """Every operator has one element type: a strongly typed network converts nothing by itself."""
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    kinds |= {value.name: value.type.tensor_type.elem_type for value in model.graph.input}
    index_operands = {"Gather": (1,), "Split": (1,), "ReduceMean": (1,), "Unsqueeze": (1,)}
    for node in model.graph.node:
        if node.op_type == "Cast":
            kinds[node.output[0]] = next(a.i for a in node.attribute if a.name == "to")
            continue
        values = [value for i, value in enumerate(node.input) if i not in index_operands.get(node.op_type, ())]
        if node.op_type == "ForkAttention":
            assert {kinds[value] for value in values[:-1] if kinds[value] != TensorProto.INT32} == {kind}
            assert (kinds[values[-2]], kinds[values[-1]]) == (TensorProto.INT32, TensorProto.FLOAT)
            kinds.update(dict.fromkeys(node.output, kind))
            continue
        assert len({kinds[value] for value in values}) == 1, node.name
        kinds.update(dict.fromkeys(node.output, kinds[values[0]]))
    for value in model.graph.output:
        assert kinds[value.name] == value.type.tensor_type.elem_type
