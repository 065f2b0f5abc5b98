"""`apar bench weights`: the GPU's weight formats on the CPU."""

from __future__ import annotations

import json
import sys

import pytest

from apar.runtime.cli import main


def test_without_triton(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    for name in [name for name in sys.modules if name.startswith(("apar.plugins.gpu", "apar.runtime.bench.gpu"))]:
        monkeypatch.delitem(sys.modules, name)
    assert main(["bench", "weights", "tiny", "-q"]) == 1
    assert "need the package triton; install it with: pip install 'apar[gpu]'" in capsys.readouterr().err


def test_formats_against_bf16(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("triton")
    assert main(["bench", "weights", "tiny", "--limit", "1", "--max-tokens", "5", "-q", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    rows = {row["weights"]: row for row in found["formats"]}
    loss = {name: row["prompts"]["kl_millinats"] for name, row in rows.items()}
    assert loss["bf16"] == 0 < loss["fp16"] < loss["int8"] < loss["fp8"] < 20
    size = {name: row["matrix_bytes"] for name, row in rows.items()}
    assert size["bf16"] == size["fp16"] and size["bf16"] / 2 < size["int8"] == size["fp8"] < 0.52 * size["bf16"]
    assert rows["bf16"]["same_answers"] == found["prompts"] == 1
