"""`apar bench rows`: its numbers hang together; bad options are refused before anything is built."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from apar.export.errors import CapacityError
from apar.export.manifest import Manifest
from apar.runtime.bench.bandwidth import step_weight_bytes
from apar.runtime.bench.rows import bench_rows
from apar.runtime.cli import main
from apar.runtime.executor import load_executor

QUICK = ["--steps", "1", "--rounds", "1", "--context", "40", "--no-spinning", "-q"]


def test_result(tiny_engine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "rows", "--shape", str(tiny_engine), "--rows", "8,1,3,3", "--json", *QUICK]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [row["rows"] for row in result["rows"]] == [1, 3, 8]
    assert result["rows"][0]["ratio_to_fewest_rows"] == 1
    weights = result["bandwidth"]["weight_bytes_per_step"]
    assert weights == step_weight_bytes(Manifest.load(tiny_engine))
    for row in result["rows"]:
        seconds = row["ms_per_step"] / 1e3
        assert row["tokens_per_second"] == pytest.approx(row["rows"] / seconds, rel=0.01)
        assert row["gb_per_second"] == pytest.approx(weights / seconds / 1e9, rel=0.05, abs=0.01)
    assert {"bench", "engine", "settings", "machine"} < set(result)
    assert result["settings"]["format"] is None, "an engine has its own, not the default of shapes"


def test_table(tiny_engine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "rows", "--shape", str(tiny_engine), "--rows", "1,2", *QUICK]) == 0
    out = capsys.readouterr().out
    assert "% of bandwidth" in out
    assert "MB of weights" in out


@pytest.mark.parametrize("rows", ["0", "65", "1,x", ""])
def test_bad_rows(rows: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "rows", "--shape", "7b", "--rows", rows]) == 2
    assert f"--rows {rows!r}" in capsys.readouterr().err


def test_too_few_blocks(tiny_engine: Path) -> None:
    executor = load_executor(tiny_engine, "onnx", num_blocks=5, spinning=False)
    try:
        with pytest.raises(CapacityError, match="3 rows of 32 tokens need 9 KV blocks, there are 5"):
            bench_rows(executor, [1, 3], context=32)
    finally:
        executor.close()
