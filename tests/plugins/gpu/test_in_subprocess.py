"""Runs the `check_*.py` files of this folder, each in a process of its own.

Triton decides at its first import whether kernels are interpreted or compiled, and other tests import it too.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
INTERPRETED = ("check_plan", "check_attention", "check_ids", "check_dense", "check_executor", "check_padding")
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


def test_every_check_is_run() -> None:
    assert {path.stem for path in HERE.glob("check_*.py")} == {*INTERPRETED, *COMPILED}
