"""The calibration pass computes the model, a layer at a time, and engines built with it are what its codes say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import VARIANTS, make_checkpoint
from portable_graph import Portable, random_tokens

from apar.export.calibration import CalibrationPass, Sample
from apar.export.checkpoint import Checkpoint
from apar.export.engine_weights import read_weights
from apar.export.errors import BuildError, CheckpointError
from apar.export.gptq import output_error
from apar.export.manifest import Manifest
from apar.export.onnx_engine import build
from apar.export.quantize import QuantizedRows, quantize_rows

SCRIPTS = Path(__file__).parents[2] / "scripts"


class Exact:
    """Stands in for codes that lose nothing."""

    def __init__(self, rows: np.ndarray) -> None:
        self._rows = rows

    def values(self) -> np.ndarray:
        return self._rows


def run_exact(directory: Path, samples: list[Sample]) -> CalibrationPass:
    run: Any = CalibrationPass(Checkpoint.open(directory), samples, lambda name, rows, hessian: Exact(rows))  # type: ignore[arg-type,return-value]
    for _ in run.layers():
        pass
    return run


def samples(count: int = 6, length: int = 40) -> list[Sample]:
    return [Sample.merge([random_tokens(length, seed)]) for seed in range(count)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_hidden_states_are_the_models(variant: str, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path, variant)
    first, second = random_tokens(40, 1), random_tokens(23, 2)
    run = run_exact(tmp_path, [Sample.merge([first]), Sample.merge([]), Sample.merge([second])])
    got = torch.from_numpy(run.hidden)
    with torch.no_grad():
        normed = model.model.norm(got)
        expected = [model.model(torch.tensor([tokens])).last_hidden_state[0] for tokens in (first, second)]
    assert torch.allclose(normed, torch.cat(expected), atol=2e-4, rtol=1e-3)


def test_merged_paths_are_computed_as_if_alone(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "gqa")
    main = random_tokens(30, 1)
    paths = [main, [*main[:12], 7, 8, 9], [*main[:25], *random_tokens(10, 3)], main[:5]]
    merged = Sample.merge(paths)
    assert merged.ids.size == 30 + 3 + 10
    together = run_exact(tmp_path, [merged]).hidden
    for path in paths:
        numbers, parent = [], -1
        for position, token in enumerate(path):
            here = [n for n in np.flatnonzero(merged.ids == token) if merged.positions[n] == position]
            numbers.append(next(n for n in here if parent < 0 or merged.visible[n, parent]))
            parent = numbers[-1]
        alone = run_exact(tmp_path, [Sample.merge([path])]).hidden
        assert np.allclose(together[numbers], alone, atol=1e-4)


def test_a_cut_sample_is_a_prefix(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    sample = Sample.merge([random_tokens(30, 1), [*random_tokens(30, 1)[:9], *random_tokens(9, 2)]])
    whole, cut = run_exact(tmp_path, [sample]).hidden, run_exact(tmp_path, [sample.cut(33)]).hidden
    assert np.allclose(whole[:33], cut, atol=1e-4)


def test_projections_see_what_quantised_ones_below_them_give(tmp_path: Path) -> None:
    """Hessians after a lossy projection differ from the exact ones; before it they are the same."""
    make_checkpoint(tmp_path, "gqa")

    def hessians(quantise: bool) -> dict[str, np.ndarray]:
        seen = {}

        def quantizer(name: str, rows: np.ndarray, hessian: np.ndarray) -> QuantizedRows:
            seen[name] = hessian
            return quantize_rows(rows, 4, 32) if quantise else Exact(rows)  # type: ignore[return-value]

        names = [name for name, _ in CalibrationPass(Checkpoint.open(tmp_path), samples(), quantizer).layers()]
        assert names == list(seen)
        return seen

    exact, lossy = hessians(False), hessians(True)
    assert list(exact) == [f"layers.{i}.{part}.weight" for i in (0, 1) for part in ("qkv", "o", "gate_up", "down")]
    same = [np.array_equal(exact[name], lossy[name]) for name in exact]
    assert same == [True] + [False] * 7
    assert all(np.allclose(h, h.T) and np.all(np.diagonal(h) >= 0) for h in exact.values())


@pytest.mark.parametrize("variant", ["gqa", "tied", "attention_bias", "mlp_bias"])
@pytest.mark.parametrize("options", [{}, {"zero_points": True, "group_size": 64}, {"quantize": "int8"}])
def test_gptq_engines(variant: str, options: dict[str, Any], tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "checkpoint", variant)
    settings: dict[str, Any] = {"quantize": "int4", "quantize_method": "gptq"} | options
    errors: dict[str, dict[str, float]] = {}
    for method in ("rtn", "gptq"):
        engine = tmp_path / method
        calibration = (lambda *_: samples()) if method == "gptq" else None
        manifest = build(
            tmp_path / "checkpoint", engine, **(settings | {"quantize_method": method, "calibration": calibration})
        )
        assert manifest == Manifest.load(engine)
        assert (manifest.quantize_method, manifest.zero_points) == (method, settings.get("zero_points", False))
        weights = read_weights(engine)
        errors[method] = {}

        def compare(
            name: str, rows: np.ndarray, hessian: np.ndarray, method: str = method, weights: Any = weights
        ) -> QuantizedRows:
            errors[method][name] = output_error(rows, weights[name], hessian)
            return Exact(rows)  # type: ignore[return-value]

        for _ in CalibrationPass(Checkpoint.open(tmp_path / "checkpoint"), samples(), compare).layers():
            pass
        logits = Portable(engine).step([(random_tokens(24), list(range(24)))])
        assert np.isfinite(logits).all()
    better = [errors["gptq"][name] < errors["rtn"][name] for name in errors["rtn"]]
    assert all(better), errors
    assert sum(errors["gptq"].values()) < 0.7 * sum(errors["rtn"].values())


def test_a_build_can_be_repeated(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "checkpoint", "gqa")
    for name in "ab":
        build(tmp_path / "checkpoint", tmp_path / name, quantize="int4", calibration=lambda *_: samples())
    files = [(tmp_path / name / "model.onnx.data").read_bytes() for name in "ab"]
    assert files[0] == files[1]


def test_gptq_reports_progress_and_damaged_weights(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "checkpoint", "gqa")
    seen: list[tuple[str, int, int]] = []
    options: dict[str, Any] = {"quantize": "int4", "calibration": lambda *_: samples()}
    build(tmp_path / "checkpoint", tmp_path / "e", progress=lambda *event: seen.append(event), **options)
    weights = [(done, total) for stage, done, total in seen if stage == "weights"]
    assert weights[-1][0] == weights[-1][1]
    assert [done for done, _ in weights] == sorted(done for done, _ in weights)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 4] = float("nan")
    model.save_pretrained(tmp_path / "checkpoint")
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.down_proj\.weight holds NaN or infinity"):
        build(tmp_path / "checkpoint", tmp_path / "f", **options)
    assert not (tmp_path / "f").exists()


def test_tokens_must_be_the_checkpoints(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "checkpoint")
    for wrong in (-1, 264):
        with pytest.raises(BuildError, match="outside the vocabulary of 264"):
            build(
                tmp_path / "checkpoint",
                tmp_path / "e",
                quantize="int4",
                calibration=lambda *_: [Sample.merge([[1, 2, wrong]])],  # noqa: B023
            )


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_layers(tmp_path: Path) -> None:
    command = """
import resource, sys, pathlib
from apar.export.calibration import Sample
from apar.export.onnx_engine import build
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
sample = [Sample.merge([list(range(3, 200))])]
before = peak()
build(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), quantize="int4", calibration=lambda *_: sample)
print(peak() - before)
"""
    grown = {}
    for layers in (1, 4):
        source = tmp_path / f"layers{layers}"
        make = [sys.executable, SCRIPTS / "make_checkpoint.py", source, "--shape", "100m", "--layers", str(layers)]
        subprocess.run(make, check=True, capture_output=True)
        run = [sys.executable, "-c", command, source, tmp_path / f"engine{layers}"]
        grown[layers] = int(subprocess.run(run, capture_output=True, check=True).stdout)
    one_layer = 4 * 7.1e6  # of the 100m shape, as float32
    assert grown[4] < grown[1] + one_layer, grown
