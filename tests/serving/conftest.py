"""Fixtures of the serving tests: the real Triton server."""

from __future__ import annotations

import platform

import pytest

from apar.export.errors import ServingError
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
