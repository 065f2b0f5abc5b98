"""Peers under one load: real workers of the engines that are installed, and what happens with those that are not."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from apar.runtime.bench import peer_process
from apar.runtime.bench.compare_peers import compare_peers
from apar.runtime.bench.peer_process import PeerProcess, PeerUnavailable
from apar.runtime.bench.peers import PACKAGES
from apar.runtime.bench.peers.apar_onnx import AparOnnx
from apar.runtime.bench.peers.protocol import Task
from apar.runtime.bench.quality import path_inputs
from apar.runtime.bench.shapes import shape_config, shape_engine
from apar.runtime.bench.stock_engine import stock_engine
from apar.runtime.cli import main

SMALL: dict[str, Any] = {"rows": (1, 3), "context": 24, "steps": 2, "rounds": 2, "layers": 1, "threads": 1}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APAR_CACHE", str(tmp_path / "cache"))


def task(weights: str, folder: Path, engine: str = "") -> Task:
    return Task(shape_config("10m", 1), weights, 1, 24, 3, 4, str(folder), 0, engine)


def test_own_peers(tmp_path: Path) -> None:
    ticks: list[tuple[int, int]] = []
    result = compare_peers("10m", "int4", names=("apar", "onnxruntime"), progress=lambda *t: ticks.append(t), **SMALL)
    json.dumps(result)
    assert [peer["peer"] for peer in result["peers"]] == ["apar", "onnxruntime"]
    assert result["missing"] == {}
    assert ticks == [(1, 4), (2, 4), (3, 4), (4, 4)]
    for peer in result["peers"]:
        assert [row["rows"] for row in peer["rows"]] == [1, 3]
        assert peer["rows"][0]["ratio_to_fewest_rows"] == 1
        for row in peer["rows"]:
            assert 0 < row["fastest_ms"] <= row["ms_per_step"]
            assert row["tokens_per_second"] == pytest.approx(1e3 * row["rows"] / row["ms_per_step"])
    one, other = (peer["rows"][1]["ms_per_step"] for peer in result["peers"])
    assert result["against_apar"]["onnxruntime"]["3"] == pytest.approx(other / one)


def test_apar_rows_are_separate_sequences(tmp_path: Path) -> None:
    """Each row's logits are those of its own tokens, whatever the others are."""
    engine = shape_engine("10m", "f32", layers=1)
    worker = AparOnnx(task("f32", tmp_path, str(engine)))
    seen: list[Any] = []
    execute = worker._executor.execute

    def spy(inputs: Any) -> Any:
        logits = execute(inputs)
        seen.append((inputs.input_ids.copy(), inputs.kv_len.copy(), logits.copy()))
        return logits

    worker._executor.execute = spy  # type: ignore[method-assign]
    worker.begin(3)
    worker.step()
    worker.step()
    assert [kv.tolist() for _, kv, _ in seen] == [[24]] * 3 + [[25] * 3, [26] * 3]
    for row in range(3):
        path = np.concatenate([seen[row][0], [seen[3][0][row]], [seen[4][0][row]]])
        alone = AparOnnx(task("f32", tmp_path, str(engine)))
        alone._rng = Fixed(path)  # type: ignore[assignment]
        alone._rows = 1
        got: list[Any] = []
        run = alone._executor.execute
        alone._executor.execute = lambda inputs, run=run, got=got: got.append(run(inputs).copy())  # type: ignore[method-assign,assignment,func-returns-value]
        alone._run([0], 26)
        assert np.allclose(got[0][0], seen[4][2][row], atol=1e-4)


@pytest.mark.parametrize("weights", ["f32", "bf16", "int8", "int4"])
def test_the_stock_twin_computes_the_same(weights: str, tmp_path: Path) -> None:
    engine = shape_engine("10m", weights, layers=2)
    twin = stock_engine(engine)
    assert stock_engine(engine) == twin
    operators = [node.op_type for node in onnx.load(twin / "model.onnx", load_external_data=False).graph.node]
    assert "Linear" not in operators and operators.count("ForkAttention") == 2
    assert operators.count("MatMulNBits" if weights.startswith("int") else "Gemm") == 9
    logits = []
    for directory in (engine, twin):
        worker = AparOnnx(task(weights, tmp_path, str(directory)))
        worker.begin(1)
        logits.append(worker._executor.execute(path_inputs(list(range(5, 25)), 0, 16)).copy())
    error = np.sqrt(np.mean((logits[0] - logits[1]) ** 2) / np.mean(logits[0] ** 2))
    assert error < (0.03 if weights.startswith("int") else 0.01)  # of rounding activations differently


class Fixed:
    """A generator that gives these tokens."""

    def __init__(self, tokens: np.ndarray) -> None:
        self._tokens = tokens

    def integers(self, low: int, high: int, count: int) -> np.ndarray:
        return self._tokens[:count]


@pytest.mark.parametrize(
    ("name", "weights"),
    [(name, weights) for name in ("llama.cpp", "openvino") for weights in ("int4", "int8", "bf16", "f32")]
    + [("transformers", "bf16")],
)
def test_installed_peers(name: str, weights: str, tmp_path: Path) -> None:
    imported = {"llama.cpp": "llama_cpp gguf", "openvino": "openvino", "transformers": "transformers torch"}[name]
    if any(importlib.util.find_spec(module) is None for module in imported.split()):
        message = f"has no package .*; install it with: .* -m pip install {PACKAGES[name]}"
        with pytest.raises(PeerUnavailable, match=message):
            PeerProcess(name, task(weights, tmp_path))
        return
    with PeerProcess(name, task(weights, tmp_path)) as peer:
        assert "1 threads" in peer.detail
        for rows in (1, 3, 1):
            seconds = peer.measure(rows, 2)
            assert len(seconds) == 2 and min(seconds) > 0


def test_formats_that_a_peer_has_not(tmp_path: Path) -> None:
    for weights in ("int8", "int4"):
        with pytest.raises(PeerUnavailable, match=f"no {weights} on a CPU; compare it with --format f32 or bf16"):
            PeerProcess("transformers", task(weights, tmp_path))


def test_peers_that_cannot_run_are_named(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho out of paper >&2\nexit 3\n")
    python.chmod(0o755)
    result = compare_peers("10m", "int4", names=("apar", "openvino"), python=str(python), **SMALL)
    assert [peer["peer"] for peer in result["peers"]] == ["apar"]
    assert "out of paper" in result["missing"]["openvino"]
    with pytest.raises(PeerUnavailable, match=r"cannot be run .*; give another --peer-python"):
        compare_peers("10m", "int4", names=("openvino",), python=str(tmp_path / "none"), **SMALL)


def test_a_peer_that_dies_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure = PeerProcess.measure

    def die(self: PeerProcess, rows: int, steps: int) -> list[float]:
        if self.name == "onnxruntime" and rows == 3:
            self._process.kill()
        return measure(self, rows, steps)

    monkeypatch.setattr(PeerProcess, "measure", die)
    result = compare_peers("10m", "int4", names=("apar", "onnxruntime"), **SMALL)
    assert [peer["peer"] for peer in result["peers"]] == ["apar"]
    assert "its process ended" in result["missing"]["onnxruntime"]


def test_workers_do_not_see_this_environment(tmp_path: Path) -> None:
    peer_process._copy_workers(tmp_path)
    found = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.py"))
    assert "apar/runtime/bench/peers/openvino.py" in found
    assert not any("export" in path or "executor" in path for path in found)


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["bench", "peers", "--shape", "10m", "--layers", "1", "--rows", "2,1", "--steps", "1", "--rounds", "1"]
    options += ["--peers", "apar,llama.cpp", "--peer-python", sys.executable, "--context", "8", "--threads", "1", "-q"]
    assert main([*options, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["settings"]["shape"] == "10m"
    assert [row["rows"] for row in result["peers"][0]["rows"]] == [1, 2]
    assert set(result["missing"]) | {peer["peer"] for peer in result["peers"]} == {"apar", "llama.cpp"}
    assert main(options) == 0
    assert "growth" in capsys.readouterr().out
    for wrong in (["--rows", "0"], ["--rows", "a"], ["--peers", "vllm"], ["--format", "fp4"]):
        assert main([*options, *wrong]) == 2
        assert "apar bench peers: error:" in capsys.readouterr().err
