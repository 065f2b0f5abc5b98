"""APAR: a runtime for Llama models that decode their own answers in parallel branches.

The build installs this file as `apar/__init__.py`. Names load on first use, so that `import apar`
costs nothing and `apar.export` does not pull in the runtime.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from apar.runtime.llm import LLM
    from apar.runtime.outputs import SamplingParams

__version__ = "${version}"
__all__ = ["LLM", "SamplingParams", "__version__"]

_HOMES = {"LLM": "apar.runtime.llm", "SamplingParams": "apar.runtime.outputs"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
