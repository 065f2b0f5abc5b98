"""Fixtures of the serving tests: the real Triton server."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from triton_service import TritonService

from apar.export.errors import ServingError
from apar.runtime.llm import LLM
from apar.runtime.serving.triton_server import TritonServer, find_server


@pytest.fixture(scope="session")
def installed_server() -> TritonServer:
    """The Triton server of this machine. Missing, it fails the tests wherever `scripts/test.sh` can install it."""
    try:
        return find_server()
    except ServingError as error:
        if (platform.system(), platform.machine()) == ("Linux", "x86_64"):
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def triton(
    installed_server: TritonServer, tiny_engine: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TritonService]:
    """A server on the shipped repository with the tiny engine, under a name that is not ASCII."""
    folder = tmp_path_factory.mktemp("triton")
    engine = folder / "kleiner Motor für Tests"
    engine.symlink_to(tiny_engine)
    with TritonService(installed_server, folder, engine) as service:
        yield service


@pytest.fixture(scope="session")
def reference(tiny_engine: Path) -> Iterator[LLM]:
    """The same engine in this process."""
    with LLM(tiny_engine, num_blocks=600) as llm:
        yield llm


@pytest.fixture(scope="session")
def questions(heldout: list[dict[str, Any]]) -> list[str]:
    """What users ask: lists, mostly, since those fork."""
    return [entry["messages"][-1]["content"] for entry in heldout if len(entry["messages"]) == 1]
