"""Engines of random weights: real builds of small checkpoints, kept until the code that builds them changes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from apar.export.checkpoint import Checkpoint
from apar.export.engine_weights import read_weights
from apar.export.errors import EngineError
from apar.export.manifest import Manifest
from apar.runtime.bench import shapes
from apar.runtime.bench.shapes import FORMATS, shape_config, shape_engine, write_overlapping_checkpoint


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("APAR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_an_overlapping_checkpoint_is_a_whole_one(tmp_path: Path) -> None:
    write_overlapping_checkpoint(tmp_path / "c", shape_config("10m", layers=2))
    checkpoint = Checkpoint.open(tmp_path / "c")
    assert checkpoint.decoder.num_layers == 2
    norm = checkpoint.tensors["model.layers.1.input_layernorm.weight"].read()
    assert np.all(norm == 1)
    matrices = [checkpoint.tensors[f"model.layers.{i}.mlp.up_proj.weight"].read().astype(np.float32) for i in (0, 1)]
    assert not np.array_equal(*matrices)
    assert all(abs(m.std() / shapes.STANDARD_DEVIATION - 1) < 0.02 for m in matrices)
    size = sum(path.stat().st_size for path in (tmp_path / "c").iterdir())
    assert size < 1.3 * 2 * 32002 * 256  # little more than its largest matrix


@pytest.mark.parametrize("weights", FORMATS)
def test_formats(weights: str) -> None:
    engine = shape_engine("10m", weights, layers=1)
    manifest = Manifest.load(engine)
    assert (manifest.quantize, manifest.dtype) == {
        "f32": ("none", "float32"),
        "bf16": ("none", "bfloat16"),
        "int8": ("int8", "bfloat16"),
        "int4": ("int4", "bfloat16"),
    }[weights]
    assert manifest.decoder.num_layers == 1
    assert np.isfinite(read_weights(engine)["layers.0.down.weight"]).all()


def test_engines_are_kept_and_rebuilt(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = shape_engine("10m", "int4", layers=1)
    made = (first / "manifest.json").stat().st_mtime_ns
    assert shape_engine("10m", "int4", layers=1) == first
    assert (first / "manifest.json").stat().st_mtime_ns == made
    (first / "model.onnx.data").write_bytes(b"")
    assert shape_engine("10m", "int4", layers=1) == first
    Manifest.load(first)
    monkeypatch.setattr(shapes, "_recipe", lambda: "other")
    second = shape_engine("10m", "int4", layers=1)
    assert second != first
    assert not first.exists()
    assert sorted(path.name for path in (cache / "shapes").iterdir() if path.is_dir()) == [second.name]


def test_an_engine_by_path_is_taken_as_it_is(tiny_engine: Path) -> None:
    assert shape_engine(str(tiny_engine)) == tiny_engine
    with pytest.raises(EngineError, match="shapes with random weights are 7b, 1b, 100m, 10m"):
        shape_engine("13b")
    with pytest.raises(EngineError, match="no weight format 'fp4'; formats are f32, bf16, int8, int4"):
        shape_engine("10m", "fp4")


def test_command_options_name_the_same_shapes() -> None:
    from apar.runtime.cli.bench import shape_options

    assert set(shape_options.SHAPES) == set(shapes.SHAPES)
    assert set(shape_options.FORMATS) == set(FORMATS)
