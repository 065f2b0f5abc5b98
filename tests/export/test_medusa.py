"""Medusa heads: every naming reads alike, every executor computes the same draft logits, defects say what to do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import VOCAB, make_checkpoint, make_heads
from medusa_reference import expect, one_row
from portable_graph import random_tokens
from safetensors.torch import load_file, save_file
from torch import Tensor

from apar.export.checkpoint import Checkpoint
from apar.export.engine_weights import read_weights
from apar.export.errors import CheckpointError, EngineError, ExecutorError
from apar.export.manifest import DraftHeads, Manifest
from apar.export.onnx_engine import build
from apar.runtime.executor import load_executor

EXACT = 1e-4
EXECUTORS = (("onnx", {"graph": "native"}), ("onnx", {"graph": "portable"}), ("torch", {}))


@pytest.mark.parametrize(("variant", "tied"), [("gqa", False), ("gqa", True), ("tied", False), ("tied", True)])
def test_draft_logits_equal_the_definition(variant: str, tied: bool, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "checkpoint", variant)
    heads = make_heads(tmp_path / "checkpoint" / "medusa", tied=tied)
    manifest = build(tmp_path / "checkpoint", tmp_path / "engine")
    assert manifest.draft_heads == DraftHeads(3, 2, tied) == Manifest.load(tmp_path / "engine").draft_heads
    tokens = random_tokens(20)
    expected = expect(model, heads, tokens).numpy()
    for name, options in EXECUTORS:
        executor = load_executor(tmp_path / "engine", name, num_blocks=4, **options)
        executor.load_draft_heads()
        executor.execute(one_row(tokens, [3, 19, 7]))
        found = executor.draft_logits(np.array([1, 2, 1]))
        assert np.abs(found - expected[[19, 7, 19]]).max() <= EXACT
        assert executor.draft_logits(np.zeros(0, np.int64)).shape == (0, 3, VOCAB)
        # The logits themselves do not change.
        again = executor.execute(one_row(tokens, [19]))
        with torch.inference_mode():
            assert np.abs(again[0] - model(torch.tensor([tokens])).logits[0, -1].numpy()).max() <= EXACT
        executor.close()


def test_heads_may_be_a_matrix_each_and_nothing_else(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "checkpoint", "gqa")
    heads = make_heads(tmp_path / "checkpoint" / "medusa", count=2, blocks=0)
    manifest = build(tmp_path / "checkpoint", tmp_path / "engine")
    assert manifest.draft_heads == DraftHeads(2, 0) == Manifest.load(tmp_path / "engine").draft_heads
    tokens = random_tokens(20)
    expected = expect(model, heads, tokens).numpy()
    for name, options in EXECUTORS:
        executor = load_executor(tmp_path / "engine", name, num_blocks=4, **options)
        executor.load_draft_heads()
        executor.execute(one_row(tokens, [19]))
        assert np.abs(executor.draft_logits(np.array([0])) - expected[[19]]).max() <= EXACT
        executor.close()


@pytest.mark.parametrize("quantize", ["int8", "int4"])
@pytest.mark.parametrize("tied", [False, True])
def test_quantised_engines_draft_with_quantised_heads(quantize: str, tied: bool, tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "checkpoint", "gqa")
    make_heads(tmp_path / "checkpoint" / "medusa", tied=tied)
    build(tmp_path / "checkpoint", tmp_path / "engine", quantize=quantize)
    weights = read_weights(tmp_path / "engine")
    assert ("heads.0.lm_head.weight" in weights) != tied
    tokens, found = random_tokens(20), []
    for name, options in EXECUTORS:
        executor = load_executor(tmp_path / "engine", name, num_blocks=4, **options)
        executor.load_draft_heads()
        executor.execute(one_row(tokens, [19]))
        found.append(executor.draft_logits(np.array([0])).copy())
        executor.close()
    # ONNX Runtime rounds activations to int8, the reference does not (docs/step-contract.md).
    assert np.abs(found[0] - found[1]).max() <= 0.25
    assert np.abs(found[0] - found[2]).max() <= 0.25


def rename_tensorrt_llm(name: str, blocks: int) -> str:
    head, rest = name.split(".", 1)
    if rest == f"{blocks}.weight":
        return f"medusa_heads.{head}.lm_head.weight"
    return f"medusa_heads.{head}.medusa_layers.{rest}"


def test_every_naming_and_place_reads_alike(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "plain", "gqa")
    heads = make_heads(tmp_path / "heads")
    places: dict[str, Path | None] = {}
    for name in ("folder", "tensorrt_llm", "prefixed", "apart", "safetensors"):
        shutil.copytree(tmp_path / "plain", tmp_path / name)
        places[name] = None
    shutil.copytree(tmp_path / "heads", tmp_path / "folder" / "medusa")
    places["apart"] = tmp_path / "heads"
    inside = load_file(tmp_path / "plain" / "model.safetensors")
    renamed = {rename_tensorrt_llm(name, 2): tensor for name, tensor in heads.items()}
    save_file(inside | renamed, tmp_path / "tensorrt_llm" / "model.safetensors")
    prefixed = {f"medusa_head.{name}": tensor for name, tensor in heads.items()}
    save_file(inside | prefixed, tmp_path / "prefixed" / "model.safetensors")
    folder = tmp_path / "safetensors" / "medusa"
    folder.mkdir()
    save_file(heads, folder / "medusa_lm_head.safetensors")
    (folder / "config.json").write_text("{}")
    for name, apart in places.items():
        checkpoint = Checkpoint.open(tmp_path / name, apart)
        assert checkpoint.heads is not None and checkpoint.heads.shape == DraftHeads(3, 2), name
        for key, tensor in heads.items():
            head, rest = key.split(".", 1)
            ours = "lm_head.weight" if rest == "2.weight" else f"blocks.{rest.replace('linear.', '')}"
            stored = checkpoint.tensors[f"heads.{head}.{ours}"]
            np.testing.assert_array_equal(stored.read().reshape(tensor.shape), tensor.numpy())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_vllms_naming(bias: bool, shared: bool, tmp_path: Path) -> None:
    """One safetensors file; blocks without biases, and heads that share the model's last matrix, of which a copy lies
    there."""
    make_checkpoint(tmp_path / "checkpoint")
    (tmp_path / "heads").mkdir()
    stored, expected = {}, {}
    for name, tensor in make_heads(tmp_path / "source").items():
        head, rest = name.split(".", 1)
        ours = f"heads.{head}.lm_head.weight" if rest == "2.weight" else f"heads.{head}.blocks.{rest}"
        ours = ours.replace("linear.", "")
        if name.endswith("bias") and not bias:
            expected[ours] = torch.zeros_like(tensor)
        elif rest != "2.weight":
            block, _, leaf = rest.split(".")
            stored[f"blocks.{head}.layers.{block}.{leaf}"] = expected[ours] = tensor
        elif shared:
            stored["lm_head.weight"] = tensor
        else:
            stored[f"lm_heads.{head}.weight"] = expected[ours] = tensor
    save_file(stored, tmp_path / "heads" / "model.safetensors")
    config = {"model_type": "medusa", "num_heads": 3, "num_hidden_layers": 2, "original_lm_head": shared}
    (tmp_path / "heads" / "config.json").write_text(json.dumps(config))
    heads = Checkpoint.open(tmp_path / "checkpoint", tmp_path / "heads").heads
    assert heads is not None and heads.shape == DraftHeads(3, 2, shared)
    assert heads.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(heads.tensors[name].read(), tensor.numpy())


def test_tied_blocks_as_the_reference_saves_them(tmp_path: Path) -> None:
    """`[block] * n` is one block with n names; torch.save keeps one copy of its numbers."""
    make_checkpoint(tmp_path / "checkpoint")
    heads = make_heads(tmp_path / "checkpoint" / "medusa", count=2, blocks=2)
    for head in range(2):
        for part in ("weight", "bias"):
            heads[f"{head}.1.linear.{part}"] = heads[f"{head}.0.linear.{part}"]
    torch.save({name: t.to(torch.float16) for name, t in heads.items()}, tmp_path / "half.pt")
    torch.save(heads, tmp_path / "checkpoint" / "medusa" / "medusa_lm_head.pt")
    tensors = Checkpoint.open(tmp_path / "checkpoint").tensors
    first, second = (tensors[f"heads.1.blocks.{block}.weight"] for block in range(2))
    assert first.offset == second.offset
    np.testing.assert_array_equal(second.read(), heads["1.0.linear.weight"].numpy())


def test_engines_without_heads_are_as_before(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "checkpoint")
    make_heads(tmp_path / "checkpoint" / "medusa")
    build(tmp_path / "checkpoint", tmp_path / "engine", draft_heads="none")
    assert not (tmp_path / "engine" / "heads.onnx").exists()
    path = tmp_path / "engine" / "manifest.json"
    data = json.loads(path.read_text())
    assert data.pop("draft_heads") is None
    path.write_text(json.dumps(data))  # as an engine from before heads
    for name in ("onnx", "torch"):
        executor = load_executor(tmp_path / "engine", name, num_blocks=4)
        assert executor.execute(one_row([1, 5], [1])).shape == (1, VOCAB)
        with pytest.raises(ExecutorError, match=r"no Medusa heads.*--draft-heads"):
            executor.load_draft_heads()
        executor.close()


def test_fewer_heads_than_were_trained(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "checkpoint")
    make_heads(tmp_path / "heads", count=4)
    (tmp_path / "heads" / "config.json").write_text(json.dumps({"medusa_num_heads": 2, "medusa_num_layers": 2}))
    heads = Checkpoint.open(tmp_path / "checkpoint", tmp_path / "heads").heads
    assert heads is not None and heads.shape.count == 2
    (tmp_path / "heads" / "config.json").write_text(json.dumps({"medusa_num_heads": True}))
    with pytest.raises(CheckpointError, match="medusa_num_heads is True"):
        Checkpoint.open(tmp_path / "checkpoint", tmp_path / "heads")


def test_defects_name_the_remedy(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "checkpoint")
    good = make_heads(tmp_path / "heads")

    def refuse(match: str, tensors: dict[str, Tensor] | None = None, **config: object) -> None:
        folder = tmp_path / "bad"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "heads", folder)
        if tensors is not None:
            torch.save(tensors, folder / "medusa_lm_head.pt")
        if config:
            (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=match):
            Checkpoint.open(tmp_path / "checkpoint", folder)

    refuse("medusa_num_heads is 'x'", medusa_num_heads="x")
    refuse("belong to another model", good | {"0.0.linear.weight": torch.zeros(32, 32)})
    refuse("belong to another model", {n: t[:100] if n.endswith("2.weight") else t for n, t in good.items()})
    refuse("heads.1.blocks.0.bias is missing", {n: t for n, t in good.items() if n != "1.0.linear.bias"})
    refuse("medusa_tied_lm_head", {n: t for n, t in good.items() if not n.endswith("2.weight")})
    refuse("medusa_num_layers is 1", medusa_num_heads=3, medusa_num_layers=1)
    refuse("medusa_num_heads is 5", medusa_num_heads=5, medusa_num_layers=2)
    refuse("not one that Medusa heads have", good | {"0.0.attention.weight": torch.zeros(2, 2)})
    refuse("has not the number", {n.replace("2.weight", "3.weight"): t for n, t in good.items()})
    refuse("know a part of the vocabulary only", good | {"token_map": torch.arange(100)})
    refuse("is int64", good | {"0.0.linear.weight": torch.zeros(64, 64, dtype=torch.int64)})
    with pytest.raises(CheckpointError, match="holds no Medusa heads"):
        Checkpoint.open(tmp_path / "checkpoint", tmp_path)
    with pytest.raises(CheckpointError, match="is not a directory"):
        Checkpoint.open(tmp_path / "checkpoint", tmp_path / "nowhere")


def test_a_heads_graph_that_is_missing_is_found_at_load(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "checkpoint")
    make_heads(tmp_path / "checkpoint" / "medusa")
    build(tmp_path / "checkpoint", tmp_path / "engine")
    (tmp_path / "engine" / "heads.onnx").unlink()
    with pytest.raises(EngineError, match=r"heads\.onnx is missing"):
        load_executor(tmp_path / "engine", num_blocks=4)
