"""Connections within the limit of open files: raised as far as it may be, and no more clients than fit."""

from __future__ import annotations

import resource
from collections.abc import Iterator

import pytest

from apar.export.errors import ServingError
from apar.runtime.serving.file_limit import SPARE_FILES, allow_connections


@pytest.fixture
def hard() -> Iterator[int]:
    """The hard limit; the soft one is lowered for the test."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    if before[1] != resource.RLIM_INFINITY and before[1] < 2000:
        pytest.skip("this machine allows few open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, before[1]))
    yield before[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def soft() -> int:
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def test_the_limit_is_raised_as_far_as_needed(hard: int) -> None:
    assert allow_connections(200, 100) == 200
    assert soft() == 512
    assert allow_connections(1000, 100) == 1000
    assert soft() == 1100 + SPARE_FILES


def test_fewer_connections_where_it_cannot_be_raised(hard: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise ValueError("not allowed to raise maximum limit")

    with monkeypatch.context() as patch:
        patch.setattr(resource, "setrlimit", refuse)
        assert allow_connections(4096, 100) == 512 - 100 - SPARE_FILES
        with pytest.raises(ServingError, match=r"only 512 files open, and 200 answers at once take 528.*ulimit -n"):
            allow_connections(4096, 200)
