"""Every name of TensorRT that APAR uses exists, with that signature, in the bindings of TensorRT 10.14 and 11.1.

tests/data/tensorrt_api.json is what scripts/tensorrt_api.py read from the genuine bindings. Two ways lead to it: the
double that builder and executor run on in tests has nothing that the bindings lack, so whatever runs there exists; and
the sources are searched for names of the module itself.
"""

from __future__ import annotations

import inspect
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import tensorrt_double

ROOT = Path(__file__).resolve().parents[2]
SNAPSHOT: dict[str, Any] = json.loads((ROOT / "tests" / "data" / "tensorrt_api.json").read_text(encoding="utf-8"))
SOURCES = sorted(
    [*(ROOT / "export").glob("t*.py"), *(ROOT / "runtime").glob("**/t*.py"), ROOT / "runtime/cli/doctor.py"]
)
VERSIONS = sorted(SNAPSHOT)


def parameters(signature: str) -> list[str]:
    """Names of a pybind11 signature's parameters, without self."""
    names = re.findall(r"(?:^|, )(\w+): ", signature)
    return [name for name in names if name != "self"]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("kind", tensorrt_double.CLASSES, ids=lambda kind: kind.__name__)
def test_the_double_has_nothing_that_the_bindings_lack(kind: type, version: str) -> None:
    known = SNAPSHOT[version]["classes"][kind.__name__]
    for name, value in vars(kind).items():
        if name.startswith("_") or inspect.isclass(value):
            continue
        assert name in known, f"{kind.__name__}.{name} is not in TensorRT {version}"
        if isinstance(value, property):
            assert known[name] == ["property"]
            continue
        ours = list(inspect.signature(value).parameters)[1:]
        theirs = [parameters(text) for text in known[name]]
        assert any(ours == names[: len(ours)] for names in theirs), (name, ours, theirs)


@pytest.mark.parametrize("version", VERSIONS)
def test_settings_of_the_builder_are_properties(version: str) -> None:
    known = SNAPSHOT[version]["classes"]["IBuilderConfig"]
    settings = [name for name in vars(tensorrt_double.IBuilderConfig()) if not name.startswith("_")]
    assert settings
    assert all(known[name] == ["property"] for name in settings)


@pytest.mark.parametrize("version", VERSIONS)
def test_enumerations_of_the_double_are_the_bindings(version: str) -> None:
    for kind in tensorrt_double.ENUMS:
        assert {member.name for member in kind} <= set(SNAPSHOT[version]["enums"][kind.__name__])


@pytest.mark.parametrize("version", VERSIONS)
def test_names_in_the_sources_exist(version: str) -> None:
    known = SNAPSHOT[version]
    modules = {*known["classes"], *known["enums"], *known["functions"], "__version__"}
    used: set[str] = set()
    for path in SOURCES:
        for name, member in re.findall(r"\btrt\.([A-Za-z_]\w*)(?:\.([A-Z][A-Z0-9_]+)\b)?", path.read_text("utf-8")):
            used.add(name)
            assert name in modules, f"{path.name} uses trt.{name}"
            if member and name in known["enums"]:
                assert member in known["enums"][name], f"{path.name} uses trt.{name}.{member}"
    assert {"Builder", "OnnxParser", "Runtime", "ILogger", "IProgressMonitor", "get_plugin_registry"} <= used


@pytest.mark.parametrize("version", VERSIONS)
def test_methods_that_tensorrt_calls_have_its_signature(version: str) -> None:
    from apar.export.tensorrt_compile import BuildLog, _monitor

    known = SNAPSHOT[version]["classes"]
    monitor = type(_monitor(tensorrt_double, BuildLog(tensorrt_double, io.StringIO()), None))
    for name in ("phase_start", "step_complete", "phase_finish"):
        assert list(inspect.signature(getattr(monitor, name)).parameters)[1:] == parameters(
            known["IProgressMonitor"][name][0]
        )
    assert parameters(known["ILogger"]["log"][0]) == ["severity", "msg"]
