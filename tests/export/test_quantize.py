"""Quantised matrices: the numbers they stand for, and ONNX Runtime's kernels on them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from checkpoints import make_checkpoint
from onnx import helper, numpy_helper
from portable_graph import Portable, random_tokens, reference

from apar.export.engine_weights import read_weights
from apar.export.manifest import GRAPH_NAME
from apar.export.onnx_engine import build
from apar.export.quantize import pack, quantize_rows, unpack


@pytest.mark.parametrize("zero_points", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("columns", "group"), [(64, 32), (100, 32), (128, 128), (48, 64)])
def test_round_trip_is_within_half_a_step(bits: int, columns: int, group: int, zero_points: bool) -> None:
    rows = np.random.default_rng(0).normal(0.3, 1, (16, columns)).astype(np.float32)
    quantized = quantize_rows(rows, bits, group, zero_points)
    groups = -(-columns // group)
    assert quantized.codes.shape == (16, groups, group)
    assert quantized.codes.dtype == np.uint8
    assert quantized.codes.max() < 1 << bits
    assert quantized.scales.shape == (16, groups)
    assert (quantized.zeros is not None) == zero_points
    padded = np.pad(rows, ((0, 0), (0, groups * group - columns))).reshape(16, groups, group)
    if zero_points:
        span = np.maximum(padded.max(2), 0) - np.minimum(padded.min(2), 0)
        step = span / ((1 << bits) - 1)
    else:
        step = np.abs(padded).max(2) / (8 if bits == 4 else 127)
    # At most half a step, one at the end of the range that has a level less, and what bfloat16 scales add.
    bound = step * (1.0 if bits == 4 and not zero_points else 0.5) + np.abs(padded).max(2) * 2**-8 + step * zero_points
    error = np.abs(quantized.values() - rows)
    assert np.all(error <= np.repeat(bound, group, axis=1)[:, :columns] * 1.001)


@pytest.mark.parametrize("zero_points", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_zeros_and_tiny_numbers_stay_finite(bits: int, zero_points: bool) -> None:
    rows = np.zeros((3, 32), np.float32)
    rows[1, 3] = 1e-44
    rows[2, 5] = -3.0
    back = quantize_rows(rows, bits, 32, zero_points).values()
    assert np.all(back[:2] == 0)
    assert back[2, 5] == pytest.approx(-3.0, rel=2**-8)
    assert np.all(np.delete(back[2], 5) == 0)


def test_scales_fit_bfloat16() -> None:
    rows = np.random.default_rng(0).normal(0, 1, (64, 256)).astype(np.float32)
    for bits in (4, 8):
        for zero_points in (False, True):
            scales = quantize_rows(rows, bits, 32, zero_points).scales
            assert np.all(scales.view(np.uint32) & 0xFFFF == 0)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("count", [1, 2, 7, 32])
def test_packing_is_undone(bits: int, count: int) -> None:
    codes = np.random.default_rng(0).integers(0, 1 << bits, (3, 5, count), dtype=np.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (3, 5, -(-count * bits // 8))
    assert np.array_equal(unpack(packed, bits, count), codes)


@pytest.mark.parametrize("zero_points", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("tokens", [1, 3, 9])
@pytest.mark.parametrize(("columns", "group"), [(128, 32), (128, 128), (112, 32), (80, 32)])
def test_kernel_equals_dequantised_product(bits: int, tokens: int, columns: int, group: int, zero_points: bool) -> None:
    rng = np.random.default_rng(3)
    value = rng.normal(0, 1, (tokens, columns)).astype(np.float32)
    matrix = rng.normal(0.05, 0.1, (40, columns)).astype(np.float32)
    quantized = quantize_rows(matrix, bits, group, zero_points)
    weights = {"w": pack(quantized.codes, bits), "s": quantized.scales}
    if quantized.zeros is not None:
        weights["z"] = pack(quantized.zeros, bits)
    node = helper.make_node(
        "MatMulNBits", ["x", *weights], ["y"], domain="com.microsoft",
        K=columns, N=40, bits=bits, block_size=group, accuracy_level=4,
    )  # fmt: skip
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        [node],
        "g",
        [info("x", onnx.TensorProto.FLOAT, ["T", columns])],
        [info("y", onnx.TensorProto.FLOAT, ["T", 40])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=11)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    got = session.run(None, {"x": value})[0]
    expected = value @ quantized.values().T
    # The kernel rounds activations to int8 too: up to half a percent of the largest, over `columns` products.
    error = np.abs(got - expected).max() / np.abs(expected).max()
    assert error < 0.02


@pytest.mark.parametrize("zero_points", [False, True])
@pytest.mark.parametrize("quantize", ["int8", "int4"])
@pytest.mark.parametrize("variant", ["gqa", "tied", "mlp_bias", "attention_bias"])
def test_quantised_engine_equals_its_dequantised_weights(
    quantize: str, variant: str, zero_points: bool, tmp_path: Path
) -> None:
    model = make_checkpoint(tmp_path / "checkpoint", variant)
    manifest = build(tmp_path / "checkpoint", tmp_path / "engine", quantize=quantize, zero_points=zero_points)
    assert (manifest.dtype, manifest.kv_dtype) == ("float16", "float16")
    assert manifest.group_size == {"int8": 0, "int4": 32}[quantize]
    assert (manifest.quantize_method, manifest.zero_points) == ("rtn", zero_points)
    tokens = random_tokens(24)
    load_engine_weights(model, tmp_path / "engine")
    expected = reference(model, tokens)
    logits = Portable(tmp_path / "engine").step([(tokens, list(range(24)))])
    error = np.sqrt(np.mean((logits - expected) ** 2) / np.mean(expected**2))
    assert error < 0.03  # of rounding activations to int8; wrong weights give about 1


def test_int4_keeps_lm_head_at_int8(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "checkpoint")
    build(tmp_path / "checkpoint", tmp_path / "engine", quantize="int4", group_size=64)
    graph = onnx.load(tmp_path / "engine" / GRAPH_NAME, load_external_data=False).graph
    nodes = {n.name: {a.name: a.i for a in n.attribute} for n in graph.node if n.op_type == "Linear"}
    stored = {name: (attributes["bits"], attributes["group_size"]) for name, attributes in nodes.items()}
    assert stored.pop("logits") == (8, 0)
    assert len(stored) == 8
    assert set(stored.values()) == {(4, 64)}


def load_engine_weights(model, engine: Path) -> None:
    """Put an engine's weights into a transformers model."""
    weights, config = read_weights(engine), model.config
    split = [config.num_attention_heads * config.head_dim] + [config.num_key_value_heads * config.head_dim] * 2
    parts = {"qkv": ("self_attn", ("q", "k", "v"), split), "o": ("self_attn", ("o",), None)}
    parts |= {"gate_up": ("mlp", ("gate", "up"), [config.intermediate_size] * 2), "down": ("mlp", ("down",), None)}
    state = {}
    for name, array in weights.items():
        head, _, rest = name.removeprefix("layers.").partition(".")
        value = torch.from_numpy(np.array(array))
        part, _, leaf = rest.partition(".")
        if part in parts:
            module, names, sizes = parts[part]
            pieces = value.split(sizes) if sizes else [value]
            state |= {f"model.layers.{head}.{module}.{n}_proj.{leaf}": p for n, p in zip(names, pieces, strict=True)}
        elif name.startswith("layers."):
            norm = {"input_norm": "input_layernorm", "post_norm": "post_attention_layernorm"}[part]
            state[f"model.layers.{head}.{norm}.{leaf}"] = value
        else:
            fixed = {"embed": "model.embed_tokens", "norm": "model.norm", "lm_head": "lm_head"}
            state[f"{fixed[head]}.{rest}"] = value
    with torch.no_grad():
        if config.tie_word_embeddings:  # quantised, the two are no longer the same matrix
            model.lm_head.weight = torch.nn.Parameter(state["lm_head.weight"].clone())
        missing, surplus = model.load_state_dict(state, strict=False)
    assert not missing
    assert not surplus
