"""What gpu_check does when a section fails, spoils the device, or hangs; and what it reads of the tiny model."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from apar.export import onnx_engine
from apar.export.engine_weights import read_weights
from apar.export.manifest import Manifest
from apar.runtime.bench.gpu import check, correctness, tiny
from apar.runtime.bench.gpu.machine import Machine
from apar.runtime.bench.gpu.report import Report
from apar.runtime.chat import render_chat
from apar.runtime.engine_source import tiny_checkpoint
from apar.runtime.tokenizer import Tokenizer

SCRIPT = Path(__file__).resolve().parents[3] / "scripts" / "gpu_check.py"
HANGS = """
import sys, time
from pathlib import Path
from apar.runtime.bench.gpu.report import Report
report = Report({}, time.perf_counter(), Path(sys.argv[1]))
report.run("first", lambda: {"seen": 1}, needs=-60)
with report.watched(0.2):
    report.run("hangs", lambda: time.sleep(60) or {}, needs=-60)
"""


def test_a_section_that_fails_is_written_down(tmp_path: Path) -> None:
    report = Report({}, time.perf_counter() + 60, tmp_path / "report.json")

    def broken() -> dict[str, object]:
        raise ValueError("no such kernel")

    report.run("broken", broken)
    report.run("late", lambda: {"seen": 1}, needs=1000)
    report.run("next", lambda: {"seen": 2})
    found = json.loads(report.path.read_text(encoding="utf-8"))
    assert found["failed"] == ["broken"] and "no such kernel" in found["sections"]["broken"]["error"]
    assert "skipped" in found["sections"]["late"] and found["sections"]["next"]["seen"] == 2


def test_a_spoiled_device_leaves_the_rest_to_a_new_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(machine: Machine) -> dict[str, object]:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(correctness, "matrices", spoil)
    monkeypatch.setattr(Machine, "works", lambda self: False)
    output = tmp_path / "report.json"
    assert check.check(output, "mat", time.perf_counter() + 120, dry=True, script=SCRIPT) == 1
    found = json.loads(output.read_text(encoding="utf-8"))
    assert found["failed"] == ["matrices"] and len(found["sections"]["matrix speed"]["rows"]) == 3


def test_a_hanging_section_ends_the_process(tmp_path: Path) -> None:
    output = tmp_path / "report.json"
    done = subprocess.run(
        [sys.executable, "-c", HANGS, output], capture_output=True, text=True, timeout=50, check=False
    )
    assert done.returncode == 3 and "hangs" in done.stderr
    found = json.loads(output.read_text(encoding="utf-8"))
    assert found["failed"] == ["hangs"] and found["sections"]["first"]["seen"] == 1


def test_the_tiny_model_is_the_one_that_ships(tmp_path: Path) -> None:
    onnx_engine.build(tiny_checkpoint(), tmp_path / "engine", dtype="float32")
    manifest = Manifest.load(tmp_path / "engine")
    model, prompts = tiny.tiny_model()
    weights = read_weights(tmp_path / "engine")
    assert set(model.weights) <= set(weights)
    for name in model.weights:
        np.testing.assert_array_equal(np.asarray(model.weights[name]), weights[name])
    assert model.manifest.decoder == manifest.decoder
    tokens, expected = model.manifest.tokens, manifest.tokens
    assert (tokens.fork, tokens.child, tokens.eos) == (expected.fork, expected.child, expected.eos)
    tokenizer = Tokenizer.load(tmp_path / "engine")
    heldout = json.loads((tiny_checkpoint() / "heldout.json").read_text(encoding="utf-8"))
    assert prompts == [list(render_chat(entry["messages"], tokenizer)) for entry in heldout[: len(prompts)]]
