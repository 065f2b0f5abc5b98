"""The portable graph against transformers: every variant, prefill, decode, two rows on a shared prefix."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from checkpoints import VARIANTS, make_checkpoint
from portable_graph import Portable, random_tokens, reference

from apar.export import manifest as m
from apar.export.onnx_engine import build


@pytest.mark.parametrize("variant", VARIANTS)
def test_portable_graph_equals_transformers(variant: str, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "checkpoint", variant)
    build(tmp_path / "checkpoint", tmp_path / "engine")
    runner = Portable(tmp_path / "engine")
    tokens = random_tokens(40)
    slots = np.random.default_rng(1).permutation(96).tolist()
    expected = reference(model, tokens)
    logits = np.concatenate(
        [
            runner.step([(tokens[:30], slots[:30])]),
            runner.step([(tokens[30:37], slots[:37])]),
            *(runner.step([(tokens[i : i + 1], slots[: i + 1])]) for i in range(37, 40)),
        ]
    )
    np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("variant", ["mha", "gqa"])
def test_rows_share_a_prefix_and_copy_what_they_need(variant: str, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "checkpoint", variant)
    build(tmp_path / "checkpoint", tmp_path / "engine")
    runner = Portable(tmp_path / "engine")
    prompt, left, right = random_tokens(20), random_tokens(4, 1), random_tokens(4, 2)
    prefix = list(range(20))
    runner.step([(prompt, prefix)], wanted=[19])
    # The right row owns copies of slots 16..19, made in the step that first reads them; the left overwrites none.
    left_slots = [*prefix, 40, 41, 42, 43]
    right_slots = [*prefix[:16], *range(50, 58)]
    copies = [(16 + i, 50 + i) for i in range(4)]
    first = runner.step([(left[:1], left_slots[:21]), (right[:2], right_slots[:22])], copies)
    rest = [
        runner.step([(left[i : i + 1], left_slots[: 21 + i]), (right[i + 1 : i + 2], right_slots[: 22 + i])])
        for i in range(1, 3)
    ]
    expected_left, expected_right = reference(model, prompt + left)[20:], reference(model, prompt + right)[20:]
    np.testing.assert_allclose(first, [expected_left[0], *expected_right[:2]], atol=1e-4, rtol=1e-4)
    for i, logits in enumerate(rest, 1):
        np.testing.assert_allclose(logits, [expected_left[i], expected_right[i + 1]], atol=1e-4, rtol=1e-4)


def test_copies_read_every_source_before_a_target_is_written(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "checkpoint")
    build(tmp_path / "checkpoint", tmp_path / "engine")
    runner = Portable(tmp_path / "engine")
    runner.step([(random_tokens(8), list(range(8)))])
    before = {name: pool.copy() for name, pool in runner.pools.items()}
    runner.step([([5], [20])], copies=[(0, 1), (1, 2), (2, 0), (3, 30), (20, 31)])
    for name, pool in runner.pools.items():
        np.testing.assert_array_equal(pool[:, [1, 2, 0, 30, 31]], before[name][:, [0, 1, 2, 3, 20]])
        np.testing.assert_array_equal(pool[:, 3:8], before[name][:, 3:8])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("variant", ["gqa", "tied"])
def test_narrow_storage_is_exact_where_the_checkpoint_is_as_narrow(variant: str, dtype: str, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "checkpoint", variant, dtype=getattr(torch, dtype))
    build(tmp_path / "checkpoint", tmp_path / "engine", dtype=dtype)
    tokens = random_tokens(24)
    logits = Portable(tmp_path / "engine").step([(tokens, list(range(24)))])
    np.testing.assert_allclose(logits, reference(model, tokens), atol=1e-4, rtol=1e-4)
    wide = build(tmp_path / "checkpoint", tmp_path / "wide", dtype="float32")
    assert build(tmp_path / "checkpoint", tmp_path / "auto").dtype == dtype
    narrow = m.Manifest.load(tmp_path / "engine")
    assert narrow.files[m.WEIGHTS_NAME] < 0.55 * wide.files[m.WEIGHTS_NAME]


def test_pools_bound_in_and_out_are_written_in_place(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "checkpoint")
    build(tmp_path / "checkpoint", tmp_path / "engine")
    runner = Portable(tmp_path / "engine")
    tokens = random_tokens(6)
    binding = runner.session.io_binding()
    values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(pool) for name, pool in runner.pools.items()}
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    binding.bind_output("logits")
    for name, value in values.items():
        binding.bind_ortvalue_output(name.replace("past", "present"), value)
    none, six = np.zeros(0, np.int64), np.arange(6)
    for name, array in {
        "input_ids": np.array(tokens, np.int32),
        "position_ids": six.astype(np.int32),
        "slot_mapping": six,
        "copy_source": none,
        "copy_target": none,
        "context_slots": six,
        "visible": np.tril(np.ones((6, 6), bool)),
        "logits_rows": np.array([5], np.int32),
    }.items():
        binding.bind_cpu_input(name, array)
    runner.session.run_with_iobinding(binding)
    np.testing.assert_allclose(binding.copy_outputs_to_cpu()[0][0], reference(model, tokens)[-1], atol=1e-4, rtol=1e-4)
    for pool in runner.pools.values():
        assert not np.any(pool[:, :6] == 7.0)
        assert np.all(pool[:, 6:] == 7.0)


def test_fork_attention_graph_keeps_the_contract(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "checkpoint", "gqa")
    build(tmp_path / "checkpoint", tmp_path / "engine", kv_dtype="float16", block_size=32)
    model = onnx.load(tmp_path / "engine" / m.GRAPH_NAME, load_external_data=False)
    from apar.runtime.step import INPUT_NAMES

    inputs = [value.name for value in model.graph.input]
    assert set(inputs) == {*INPUT_NAMES, "past_kv_0", "past_kv_1"}
    assert [value.name for value in model.graph.output] == ["logits", "present_kv_0", "present_kv_1"]
    types = {value.name: value.type.tensor_type for value in model.graph.input}
    assert all(types[name].elem_type == onnx.TensorProto.INT32 for name in INPUT_NAMES)
    assert types["past_kv_0"].elem_type == onnx.TensorProto.FLOAT16
    assert [d.dim_value for d in types["past_kv_0"].shape.dim] == [2, 0, 2, 32, 16]
    node = next(node for node in model.graph.node if node.op_type == "ForkAttention")
    assert node.input[:2] == ["layers.0.qkv", "past_kv_0"]
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    assert attributes["abi_version"] == m.ABI_VERSION
    assert (attributes["num_heads"], attributes["num_kv_heads"], attributes["head_dim"]) == (4, 2, 16)
    assert attributes["scale"] == pytest.approx(0.25)
    assert (attributes["plugin_version"], attributes["plugin_namespace"]) == (b"1", b"")
    assert len(attributes["rope_inv_freq"]) == 8
