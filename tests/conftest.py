"""Fixtures that several test folders share: the shipped tiny model as a checkpoint and as engines."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from apar.export import onnx_engine
from apar.runtime.engine_source import tiny_checkpoint

# torch and NumPy are references here, for models so small that a second thread only waits for the first.
for library in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(library, "1")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A run in the background has Ctrl-C ignored, and so would the commands that tests interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny_directory() -> Path:
    """The checkpoint that ships with the package."""
    return tiny_checkpoint()


@pytest.fixture(scope="session")
def heldout(tiny_directory: Path) -> list[dict[str, Any]]:
    """Prompts that the tiny model was not trained on, with the text that is right."""
    entries: list[dict[str, Any]] = json.loads((tiny_directory / "heldout.json").read_text(encoding="utf-8"))
    return entries


@pytest.fixture(scope="session")
def build_tiny(tiny_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Builds the tiny model with given options, once each."""
    built: dict[str, Path] = {}

    def build(**options: Any) -> Path:
        key = json.dumps(options, sort_keys=True)
        if key not in built:
            target = tmp_path_factory.mktemp("engines") / f"tiny{len(built)}"
            onnx_engine.build(tiny_directory, target, **options)
            built[key] = target
        return built[key]

    return build


@pytest.fixture(scope="session")
def tiny_engine(build_tiny: Callable[..., Path]) -> Path:
    """The tiny model as a float32 engine with default options."""
    return build_tiny()
