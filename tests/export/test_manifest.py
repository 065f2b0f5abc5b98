"""Manifests that were edited, and engines whose bytes changed: a sentence, never a traceback, and never a wrong run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest

from apar.export.engine_weights import read_weights
from apar.export.errors import EngineError
from apar.export.manifest import GRAPH_NAME, MANIFEST_NAME, WEIGHTS_NAME, Manifest
from apar.runtime.executor.onnx import OnnxExecutor

BuildTiny = Callable[..., Path]


def edited(engine: Path, target: Path, **changes: Any) -> Path:
    """A copy of an engine; `decoder__num_heads=3` changes one field of a part."""
    copytree(engine, target)
    path = target / MANIFEST_NAME
    data = json.loads(path.read_text())
    for name, value in changes.items():
        part, _, field = name.partition("__")
        if field:
            data[part][field] = value
        else:
            data[part] = value
    path.write_text(json.dumps(data))
    return target


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decoder__num_heads": 3}, "num_heads is 3, no multiple of num_kv_heads 2"),
        ({"decoder__num_heads": -4}, "num_heads is -4"),
        ({"decoder__num_kv_heads": 0}, "num_kv_heads is 0"),
        ({"decoder__num_layers": 10**12}, "num_layers is 1000000000000"),
        ({"decoder__hidden_size": 0}, "hidden_size is 0"),
        ({"decoder__intermediate_size": -1}, "intermediate_size is -1"),
        ({"decoder__head_dim": 62}, "rope_inv_freq has 32 numbers, head_dim is 62"),
        ({"decoder__rope_inv_freq": [float("nan")] * 32}, "rope_inv_freq holds a number that is not finite"),
        ({"decoder__rope_scale": 0}, "rope_scale is 0"),
        ({"decoder__rms_norm_eps": float("inf")}, "rms_norm_eps is inf"),
        ({"decoder__max_context": 2**40}, "max_context is"),
        ({"tokens__fork": 2050}, "fork is 2050, vocab_size is 2050"),
        ({"tokens__bos": -1}, "bos is -1"),
        ({"tokens__eos": []}, "eos is empty"),
        ({"tokens__eos": [5000]}, "eos is 5000"),
        ({"tokens__child": 2}, "are not all different"),
        ({"block_size": -16}, "block_size is -16"),
        ({"group_size": -1}, "group_size is -1"),
        ({"quantize_method": "guess"}, "quantize_method is 'guess'"),
        ({"draft_heads": {"count": -3, "blocks": 1}}, "count is -3"),
        ({"draft_heads": {"count": "4", "blocks": 1}}, "count is '4'"),
        ({"tensorrt": {"version": 10}}, "required positional arguments"),
        ({"files": {"../x": 1}}, "files names '../x'"),
        ({"files": {GRAPH_NAME: -5}}, "files is"),
        ({"sha256": {"y": "00"}}, "sha256 has 'y'"),
    ],
)
def test_values_that_mean_nothing_are_refused(
    tiny_engine: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    engine = edited(tiny_engine, tmp_path / "engine", **change)
    with pytest.raises(EngineError, match="does not follow the manifest schema") as caught:
        Manifest.load(engine)
    assert message in str(caught.value)


@pytest.mark.parametrize("graph", ["native", "portable"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decoder__num_layers": 3}, r"past_kv_3 is not there by the manifest, tensor\(float(16)?\) .* in the graph"),
        ({"decoder__num_layers": 5}, "past_kv_4 is tensor.* by the manifest, not there in the graph"),
        ({"decoder__vocab_size": 2051}, r"logits is tensor\(float\) \[any, 2051\] by the manifest"),
        ({"decoder__num_kv_heads": 1}, "past_kv_0 is"),
        ({"draft_heads": None}, "hidden is not there by the manifest"),
    ],
)
def test_a_manifest_of_another_graph_is_found_at_load(
    tiny_engine: Path, tmp_path: Path, graph: str, change: dict[str, Any], message: str
) -> None:
    engine = edited(tiny_engine, tmp_path / "engine", **change)
    with pytest.raises(EngineError, match=message):
        OnnxExecutor(engine, graph=graph)


def test_heads_of_another_shape_are_found_when_they_are_loaded(tiny_engine: Path, tmp_path: Path) -> None:
    engine = edited(tiny_engine, tmp_path / "engine", draft_heads__count=7)
    executor = OnnxExecutor(engine, num_blocks=4)
    with pytest.raises(EngineError, match=r"draft_logits is tensor\(float\) \[any, 7, 2050\] by the manifest"):
        executor.load_draft_heads()
    executor.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decoder__hidden_size": 128}, "weight .* by the manifest, .* in the graph"),
        ({"decoder__num_layers": 5}, r"weight layers\.4\.\S+ is \S.* by the manifest, not there in the graph"),
        ({"decoder__intermediate_size": 8}, "weight layers.0.down.weight is 256 x 8 by the manifest"),
        ({"draft_heads__count": 3}, r"weight heads\.3\..* is not there by the manifest"),
    ],
)
def test_weights_must_be_those_of_the_manifest(
    tiny_engine: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    engine = edited(tiny_engine, tmp_path / "engine", **change)
    with pytest.raises(EngineError, match=message):
        read_weights(engine)


def test_one_changed_bit_is_found_by_verify(tiny_engine: Path, tmp_path: Path) -> None:
    engine = edited(tiny_engine, tmp_path / "engine")
    manifest = Manifest.load(engine)
    assert {*manifest.sha256} == {*manifest.files}
    read: list[int] = []
    manifest.verify(engine, read.append)
    assert sum(read) == sum(manifest.files.values())
    for name in manifest.files:
        path = engine / name
        whole = path.read_bytes()
        damaged = bytearray(whole)
        damaged[len(whole) // 2] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(EngineError, match=rf"{name} is damaged"):
            Manifest.load(engine).verify(engine)
        path.write_bytes(whole)
    manifest.verify(engine)


def test_verify_needs_checksums(tiny_engine: Path, tmp_path: Path) -> None:
    engine = edited(tiny_engine, tmp_path / "engine", sha256={})
    with pytest.raises(EngineError, match=rf"has no checksum of .*{WEIGHTS_NAME}"):
        Manifest.load(engine).verify(engine)
    engine = edited(tiny_engine, tmp_path / "empty", sha256={}, files={})
    with pytest.raises(EngineError, match="has no checksum of any file"):
        Manifest.load(engine).verify(engine)
