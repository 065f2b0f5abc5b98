"""TensorRT-LLM's checkpoint format: there and back, over ranks, and what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import make_checkpoint
from safetensors.numpy import load_file
from safetensors.torch import save_file

from apar.export.checkpoint import Checkpoint
from apar.export.engine_weights import read_weights
from apar.export.errors import BuildError, CheckpointError
from apar.export.onnx_engine import build
from apar.export.tensorrt_engine import TensorRtOptions
from apar.export.tensorrt_engine import build as build_tensorrt
from apar.export.trtllm_writer import write_trtllm


def opened(path: Path) -> dict[str, np.ndarray]:
    return {name: tensor.read() for name, tensor in Checkpoint.open(path).tensors.items()}


@pytest.mark.parametrize(
    ("variant", "ranks"),
    [
        *(("mha", 1), ("mha", 2), ("gqa", 4), ("attention_bias", 2), ("mlp_bias", 4), ("head_dim", 2)),
        *(("rope_llama3", 1), ("mistral", 2), ("qwen2", 2)),
    ],
)
def test_there_and_back(variant: str, ranks: int, tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "hf", variant, vocab_size=263)  # 263 is no multiple of the ranks
    write_trtllm(tmp_path / "hf", tmp_path / "trtllm", dtype="float32", tp_size=ranks)
    files = {path.name for path in (tmp_path / "trtllm").iterdir()}
    assert files == {"config.json", *(f"rank{rank}.safetensors" for rank in range(ranks))}
    before, after = opened(tmp_path / "hf"), opened(tmp_path / "trtllm")
    assert before.keys() == after.keys()
    for name, array in before.items():
        np.testing.assert_array_equal(after[name], array, err_msg=name)
    first, second = (Checkpoint.open(tmp_path / name).decoder for name in ("hf", "trtllm"))
    assert first == second


def test_the_files_are_as_tensorrt_llm_reads_them(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "hf", "gqa", dtype=torch.float16)
    write_trtllm(tmp_path / "hf", tmp_path / "trtllm", tp_size=2)
    config = json.loads((tmp_path / "trtllm" / "config.json").read_text())
    assert config["architecture"] == "LlamaForCausalLM"
    assert config["dtype"] == "float16"
    assert config["mapping"]["tp_size"] == config["mapping"]["world_size"] == 2
    assert (config["head_size"], config["num_key_value_heads"], config["norm_epsilon"]) == (16, 2, 1e-5)
    state = {name: value.numpy().astype(np.float16) for name, value in model.state_dict().items()}
    rank = load_file(tmp_path / "trtllm" / "rank1.safetensors")
    prefix = "model.layers.1.self_attn"
    q, k, v = (state[f"{prefix}.{part}_proj.weight"] for part in "qkv")
    np.testing.assert_array_equal(
        rank["transformer.layers.1.attention.qkv.weight"], np.concatenate([q[32:], k[16:], v[16:]])
    )
    np.testing.assert_array_equal(
        rank["transformer.layers.1.attention.dense.weight"], state[f"{prefix}.o_proj.weight"][:, 32:]
    )
    gate, up, down = (state[f"model.layers.1.mlp.{part}_proj.weight"] for part in ("gate", "up", "down"))
    np.testing.assert_array_equal(rank["transformer.layers.1.mlp.fc.weight"], gate[56:])
    np.testing.assert_array_equal(rank["transformer.layers.1.mlp.gate.weight"], up[56:])
    np.testing.assert_array_equal(rank["transformer.layers.1.mlp.proj.weight"], down[:, 56:])
    np.testing.assert_array_equal(rank["lm_head.weight"], state["lm_head.weight"][132:])
    assert {array.dtype for array in rank.values()} == {np.dtype(np.float16)}


def test_engines_build_from_it(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "hf", "gqa", hidden_size=256)
    write_trtllm(tmp_path / "hf", tmp_path / "trtllm", dtype="float32", tp_size=2)
    build(tmp_path / "trtllm", tmp_path / "engine", tokenizer=tmp_path / "hf")
    weights = read_weights(tmp_path / "engine")
    np.testing.assert_array_equal(weights["lm_head.weight"], model.state_dict()["lm_head.weight"])
    build_tensorrt(
        tmp_path / "trtllm", tmp_path / "graphs", TensorRtOptions(graph_only=True), tokenizer=tmp_path / "hf"
    )
    assert (tmp_path / "graphs" / "rank0.onnx").is_file()


def test_medusa_heads_ride_along(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "hf", vocab_size=263)
    (tmp_path / "hf" / "medusa").mkdir()
    generator = torch.Generator().manual_seed(1)
    heads = {}
    for head in range(3):
        heads[f"{head}.0.linear.weight"] = torch.randn(64, 64, generator=generator)
        heads[f"{head}.0.linear.bias"] = torch.randn(64, generator=generator)
        heads[f"{head}.1.weight"] = torch.randn(263, 64, generator=generator)
    save_file(heads, tmp_path / "hf" / "medusa" / "medusa_lm_head.safetensors")
    write_trtllm(tmp_path / "hf", tmp_path / "trtllm", dtype="float32", tp_size=2)
    config = json.loads((tmp_path / "trtllm" / "config.json").read_text())
    assert (config["architecture"], config["num_medusa_heads"], config["num_medusa_layers"]) == (
        "MedusaForCausalLM", 3, 1,
    )  # fmt: skip
    names = load_file(tmp_path / "trtllm" / "rank0.safetensors").keys()
    assert {"medusa_heads.2.medusa_layers.0.linear.bias", "medusa_heads.0.lm_head.weight"} <= names
    before, after = (Checkpoint.open(tmp_path / name).heads for name in ("hf", "trtllm"))
    assert before is not None
    assert after is not None
    assert before.shape == after.shape
    for name, tensor in before.tensors.items():
        np.testing.assert_array_equal(after.tensors[name].read(), tensor.read(), err_msg=name)


def test_an_embedding_cut_by_either_dimension_is_put_together(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "hf")
    write_trtllm(tmp_path / "hf", tmp_path / "trtllm", dtype="float32", tp_size=2)
    whole = opened(tmp_path / "hf")["model.embed_tokens.weight"]
    config = json.loads((tmp_path / "trtllm" / "config.json").read_text())
    for axis in (0, 1):
        for rank, part in enumerate(np.split(whole, 2, axis)):
            path = tmp_path / "trtllm" / f"rank{rank}.safetensors"
            tensors = {name: torch.from_numpy(array.copy()) for name, array in load_file(path).items()}
            tensors["transformer.vocab_embedding.weight"] = torch.from_numpy(part.copy())
            save_file(tensors, path)
        change(tmp_path / "trtllm", config | {"use_parallel_embedding": True, "embedding_sharding_dim": axis})
        np.testing.assert_array_equal(opened(tmp_path / "trtllm")["model.embed_tokens.weight"], whole)


def change(directory: Path, config: dict[str, Any]) -> None:
    (directory / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"quantization": {"quant_algo": "W4A16_AWQ"}}, "quant_algo 'W4A16_AWQ' is not supported"),
        ({"quantization": {"kv_cache_quant_algo": "FP8"}}, "kv_cache_quant_algo 'FP8'"),
        ({"architecture": "GPTForCausalLM"}, "architecture 'GPTForCausalLM'"),
        ({"mapping": {"tp_size": 1, "pp_size": 2}}, "pp_size 2"),
        ({"mapping": {"tp_size": 2}}, r"cut over 2 ranks but lacks rank1\.safetensors"),
        ({"mapping": {"tp_size": "1e9"}}, "tp_size must be a number of ranks, not '1e9'"),
        ({"mapping": {"tp_size": -1}}, "tp_size must be a number of ranks, not -1"),
        ({"mapping": {"cp_size": float("inf")}}, "cp_size must be a number of ranks, not inf"),
        ({"mapping": 5}, "mapping must be an object, not 5"),
        ({"quantization": ["x"]}, "quantization must be an object"),
        ({"position_embedding_type": "alibi"}, "position_embedding_type 'alibi'"),
        ({"qk_layernorm": True}, "qk_layernorm True"),
        ({"moe": {"num_experts": 8}}, "mixture of 8 experts"),
        ({"rotary_embedding_dim": 8}, "rotary_embedding_dim 8 is not head_size 16"),
        ({"rotary_scaling": {"type": "longrope", "factor": 2.0}}, "RoPE scaling of type 'longrope'"),
        ({"num_key_value_heads": 1}, "has 192 rows, config.json asks for 96"),
    ],
)
def test_what_the_decoder_does_not_have_is_refused_by_name(
    fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    make_checkpoint(tmp_path / "hf")
    write_trtllm(tmp_path / "hf", tmp_path / "trtllm")
    change(tmp_path / "trtllm", json.loads((tmp_path / "trtllm" / "config.json").read_text()) | fields)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(tmp_path / "trtllm")


def test_tensors_of_a_quantised_conversion_are_refused(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "hf")
    write_trtllm(tmp_path / "hf", tmp_path / "trtllm")
    path = tmp_path / "trtllm" / "rank0.safetensors"
    tensors = {name: torch.from_numpy(array.copy()) for name, array in load_file(path).items()}
    tensors["transformer.layers.0.attention.qkv.per_channel_scale"] = torch.ones(3)
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match="per_channel_scale"):
        Checkpoint.open(tmp_path / "trtllm")


def test_numbers_beyond_float16_are_refused(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "hf")
    with torch.no_grad():
        model.lm_head.weight[5, 5] = 1e6
    model.save_pretrained(tmp_path / "hf")
    with pytest.raises(BuildError, match="beyond float16's range"):
        write_trtllm(tmp_path / "hf", tmp_path / "trtllm")
    assert not (tmp_path / "trtllm").exists()


def test_without_tensorrt_llm_its_network_is_refused_with_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import metadata

    from apar.export import trtllm_network

    with pytest.raises(BuildError, match="TensorRT-LLM is not installed"):
        trtllm_network.load_tensorrt_llm()
    for version in ("0.21.0", "1.3.0rc20", "2.0"):
        monkeypatch.setattr(metadata, "version", lambda name, version=version: version)
        with pytest.raises(BuildError, match=r"is in 1\.0 to 1\.2\.1 only"):
            trtllm_network.load_tensorrt_llm()


def test_fields_of_its_plugins_are_those_of_the_graph(tmp_path: Path) -> None:
    import onnx

    from apar.export.manifest import TensorRtEngine
    from apar.export.tensorrt_graph import write_graph
    from apar.export.trtllm_network import attention_fields, plan_fields

    make_checkpoint(tmp_path / "hf", "gqa")
    checkpoint = Checkpoint.open(tmp_path / "hf")
    (tmp_path / "graph").mkdir()
    settings = {"dtype": "float16", "block_size": 16, "kv_binding": "aliased", "engine_id": 9}
    path = write_graph(checkpoint, tmp_path / "graph", **settings)  # type: ignore[arg-type]
    facts = TensorRtEngine("", "", "", 4, 16, 8, 4, 8, 0.9, kv_binding="aliased", engine_id=9)
    nodes = onnx.load(path, load_external_data=False).graph.node
    seen = 0
    for node in nodes:
        if node.op_type not in ("ForkAttention", "ForkPlan"):
            continue
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        attributes = {name: value for name, value in attributes.items() if not isinstance(value, bytes)}
        fields = plan_fields(checkpoint.decoder, 16)
        if node.op_type == "ForkAttention":
            fields = attention_fields(checkpoint.decoder, facts, 16, attributes["layer"])
        assert fields.arrays.keys() == attributes.keys()
        for name, array in fields.arrays.items():
            np.testing.assert_array_equal(array, np.atleast_1d(np.array(attributes[name], array.dtype)))
        seen += 1
    assert seen == 3
