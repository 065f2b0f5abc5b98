"""Runs the `check_*.py` files of this folder, each in a process of its own.

Triton decides at its first import whether kernels are interpreted or compiled, and other tests import it too.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SCRIPT = HERE.parents[2] / "scripts" / "gpu_check.py"
SECTIONS = [
    "limits",
    "kernels",
    "matrices",
    "host blocks",
    "tiny model",
    "7b layers",
    "attention speed",
    "matrix speed",
    "host costs",
    "load 7b",
    "decode steps",
    "fork cost",
    "answers, one at a time",
    "answers, 64 at a time",
    "8-bit weights",
    "flex attention",
    "sanitizer",
]
INTERPRETED = (
    "check_plan",
    "check_attention",
    "check_ids",
    "check_dense",
    "check_executor",
    "check_padding",
    "check_report",
)
COMPILED = ("check_compiled",)


def run(name: str, interpreted: bool) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET" and not k.startswith("PYTEST")}
    if interpreted:
        environment["TRITON_INTERPRET"] = "1"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        str(HERE / f"{name}.py"),
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=HERE)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", INTERPRETED)
def test_interpreted(name: str) -> None:
    run(name, interpreted=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_compiled(name: str) -> None:
    run(name, interpreted=False)


@pytest.mark.slow
def test_gpu_check_runs_dry(tmp_path: Path) -> None:
    """The command for GPU boxes, every section of it, tiny and on the CPU: so that no slip waits for a GPU."""
    output = tmp_path / "check.json"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")} | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, str(SCRIPT), "--dry-run", "-o", str(output)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    report = json.loads(output.read_text(encoding="utf-8"))
    assert report["failed"] == [] and report["machine"]["dry_run"] is True
    assert list(report["sections"]) == SECTIONS
    assert not any("error" in found for found in report["sections"].values())
    assert report["sections"]["host blocks"]["ok"]
    assert report["sections"]["tiny model"]["float32_equal"] == 1
    assert report["sections"]["tiny model"]["float32_ngram_equal"] == 1
    assert len(report["sections"]["decode steps"]["rows"]) == 2
    for name in ("answers, one at a time", "answers, 64 at a time"):
        plain, drafted, forked, both = report["sections"][name]["rows"]
        assert drafted["steps"] < plain["steps"] > forked["steps"] >= both["steps"]
        assert drafted["accepted a step"] > 0 and plain["drafted a step"] == 0


def test_every_check_is_run() -> None:
    assert {path.stem for path in HERE.glob("check_*.py")} == {*INTERPRETED, *COMPILED}
