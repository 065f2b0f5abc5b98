"""The TensorRT plugins: compiled against real headers and driven as TensorRT does, and seen by the genuine bindings.

Needs what this repository cannot carry, and is skipped without it (docs/tensorrt.md says how to get it):

    TENSORRT_INCLUDE_DIR    folders of TensorRT's headers, separated by ":"; every one is compiled and driven
    CUDA_INCLUDE_DIR        folder of cuda_runtime_api.h
    TENSORRT_BINDINGS_DIR   folders of the package tensorrt_bindings, separated by ":"
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = Path(__file__).parent / "tensorrt"
PLUGINS = ROOT / "plugins"
CXX = os.environ.get("CXX") or shutil.which("g++") or "c++"
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-Wall", "-Wextra", "-Werror"]
HEADERS = [Path(folder) for folder in os.environ.get("TENSORRT_INCLUDE_DIR", "").split(":") if folder]
CUDA = os.environ.get("CUDA_INCLUDE_DIR", "/usr/local/cuda/include")
BINDINGS = [Path(folder) for folder in os.environ.get("TENSORRT_BINDINGS_DIR", "").split(":") if folder]
SNAPSHOT = ROOT / "tests" / "data" / "tensorrt_api.json"

with_headers = pytest.mark.skipif(not HEADERS, reason="TENSORRT_INCLUDE_DIR names no headers of TensorRT")
with_bindings = pytest.mark.skipif(not BINDINGS, reason="TENSORRT_BINDINGS_DIR names no bindings of TensorRT")


def run(*command: str | Path, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False, env={**os.environ, **(env or {})}
    )
    assert done.returncode == 0, f"{command} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def version_of(headers: Path) -> tuple[int, int]:
    text = (headers / "NvInferVersion.h").read_text(encoding="utf-8")
    found = [re.search(rf"define (?:TRT|NV_TENSORRT)_{part}\w* (\d+)", text) for part in ("MAJOR", "MINOR")]
    assert found[0]
    assert found[1]
    return int(found[0][1]), int(found[1][1])


def includes(headers: Path) -> list[str]:
    return [f"-I{PLUGINS}", "-isystem", str(headers), "-isystem", CUDA]


@pytest.fixture(scope="module")
def fake_cuda(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("cuda") / "libfakecuda.so"
    run(CXX, *FLAGS, "-shared", "-o", target, SOURCES / "fake_cuda.cpp")
    return target


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Path]:
    """The plugins for each folder of headers, by the project's own CMake."""
    cmake = shutil.which("cmake")
    if cmake is None:
        pytest.skip("cmake is not installed")
    built = {}
    for headers in HEADERS:
        folder = tmp_path_factory.mktemp("plugins")
        options = {"TENSORRT_INCLUDE_DIR": headers, "CUDA_INCLUDE_DIR": CUDA, "APAR_WERROR": "ON"}
        define = [f"-D{name}={value}" for name, value in options.items()]
        run(cmake, "-S", PLUGINS / "tensorrt", "-B", folder, "-DCMAKE_BUILD_TYPE=Debug", *define)
        run(cmake, "--build", folder)
        built[headers] = folder / f"libapar_tensorrt{version_of(headers)[0]}.so"
    return built


@with_headers
@pytest.mark.slow
@pytest.mark.parametrize("headers", HEADERS, ids=str)
def test_the_plugins_do_what_tensorrt_asks(
    headers: Path, libraries: dict[Path, Path], fake_cuda: Path, tmp_path: Path
) -> None:
    harness = tmp_path / "harness"
    run(CXX, *FLAGS, "-rdynamic", *includes(headers), "-o", harness, SOURCES / "harness.cpp", "-ldl")
    environment = {"APAR_CUDA_DRIVER": str(fake_cuda), "APAR_GPU_TABLE": ""}
    assert "0 failures" in run(harness, libraries[headers], fake_cuda, tmp_path, env=environment)


PACK = """
import sys
from pathlib import Path
from apar.export.manifest import DecoderConfig, Manifest, TensorRtEngine, TokenIds
from apar.export.tensorrt_engine import _pack_kernels

decoder = DecoderConfig(10, 64, 1, 1, 1, 64, 64, 1e-5, 64, (1.0,) * 32)
manifest = Manifest(decoder, TokenIds(1, 2, (3,)), 16, dtype="float16")
_pack_kernels(manifest, TensorRtEngine("", "9.0", "", 1, 2, 3, 4, 5, 0.9), Path(sys.argv[1]))
"""


@with_headers
@pytest.mark.slow
def test_the_kernels_of_an_engine_are_found(libraries: dict[Path, Path], fake_cuda: Path, tmp_path: Path) -> None:
    """Compiled by Triton for a real GPU, as the builder does, and looked up by the plugins."""
    pytest.importorskip("triton")
    table, harness = tmp_path / "apar_gpu.table", tmp_path / "harness"
    run(sys.executable, "-c", PACK, table)
    headers = HEADERS[0]
    run(CXX, *FLAGS, "-rdynamic", *includes(headers), "-o", harness, SOURCES / "harness.cpp", "-ldl")
    environment = {"APAR_CUDA_DRIVER": str(fake_cuda), "APAR_GPU_TABLE": ""}
    assert "0 failures" in run(harness, libraries[headers], fake_cuda, tmp_path, table, env=environment)


def test_the_plugins_know_every_argument_of_the_kernels() -> None:
    pytest.importorskip("triton")
    from apar.plugins.gpu.builds import ARGUMENTS, KINDS, Choice

    header = (PLUGINS / "gpu" / "launch_table.h").read_text(encoding="utf-8")
    codes = {name: int(code) for name, code in re.findall(r"APAR_GPU_(\w+) = (\d+)", header)}

    def known(source: str) -> set[int]:
        text = (PLUGINS / "tensorrt" / source).read_text(encoding="utf-8")
        sizes = (PLUGINS / "tensorrt" / "kernels.cpp").read_text(encoding="utf-8").partition("set_sizes")[2]
        found = {codes[name] for name in re.findall(r"set(?:_float)?\(APAR_GPU_(\w+),", text + sizes)}
        return found | {codes["NULL"], codes["LAYER_STRIDE"]}

    seen = set()
    for build in Choice(["float16"], [64], [16], checked=True).builds():
        seen.add(KINDS[build.kind])
        wanted = {ARGUMENTS[name][0] for name in build.parameters}
        assert wanted <= known("fork_plan.cpp" if build.kind == "plan" else "fork_attention.cpp"), build.kind
    assert {codes[k] for k in ("COPY_READ", "COPY_WRITE", "ROPE_WRITE", "PLAN", "ATTEND", "MERGE")} <= seen


@with_headers
@pytest.mark.slow
def test_a_library_of_another_major_is_refused_with_a_sentence(
    libraries: dict[Path, Path], fake_cuda: Path, tmp_path: Path
) -> None:
    headers = HEADERS[0]
    other = 21 - version_of(headers)[0]  # 10 and 11
    harness = tmp_path / "harness"
    version = f"-DMOCK_VERSION={other * 10000}"
    run(CXX, *FLAGS, version, "-rdynamic", *includes(headers), "-o", harness, SOURCES / "harness.cpp", "-ldl")
    done = subprocess.run(
        [harness, libraries[headers], fake_cuda, tmp_path],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "APAR_CUDA_DRIVER": str(fake_cuda)},
    )
    assert done.returncode == 3
    assert f"but TensorRT {other} is running: load libapar_tensorrt{other}.so instead" in done.stdout


@with_headers
@pytest.mark.slow
def test_without_tensorrt_the_library_loads_and_says_so(libraries: dict[Path, Path]) -> None:
    for path in libraries.values():
        code = "from apar.plugins.tensorrt_library import TensorRtLibrary; import sys; from pathlib import Path\n"
        code += "library = TensorRtLibrary(Path(sys.argv[1])); print(library.major, library.status)"
        assert "not registered: this process has no TensorRT" in run(sys.executable, "-c", code, path)


@with_headers
@pytest.mark.slow
def test_the_library_shows_nothing_but_its_own_functions(libraries: dict[Path, Path]) -> None:
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("nm is not installed")
    for path in libraries.values():
        names = [line.split()[-1] for line in run(nm, "-D", "--defined-only", path).splitlines()]
        assert len(names) == 9
        assert all(name.startswith("apar_tensorrt_") for name in names)
        needed = run(nm, "-D", "--undefined-only", path)
        assert not re.search(r"\b(cu[A-Z]|cuda|nvinfer|getPluginRegistry)", needed)


# ------------------------------------------------------------------ the genuine bindings

STUBS = ("nvinfer", "nvonnxparser", "nvinfer_plugin")


def major_of(bindings: Path) -> int:
    [info] = bindings.glob("*.dist-info")
    found = re.search(r"-(\d+)\.", info.name)
    assert found
    return int(found[1])


@pytest.fixture(scope="module")
def stubs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Libraries that let the bindings be imported and do nothing."""
    folder = tmp_path_factory.mktemp("stubs")
    for major in (10, 11):
        for name in STUBS:
            target = f"lib{name}.so.{major}"
            run(
                shutil.which("gcc") or "cc", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", f"-Wl,-soname,{target}",
                "-o", folder / target, SOURCES / "stub_nvinfer.c",
            )  # fmt: skip
    return folder


@with_bindings
@pytest.mark.parametrize("bindings", BINDINGS, ids=str)
def test_the_snapshot_of_the_api_is_the_bindings(bindings: Path, stubs: Path) -> None:
    snapshot = json.loads(SNAPSHOT.read_text(encoding="utf-8"))
    found = json.loads(
        run(sys.executable, ROOT / "scripts" / "tensorrt_api.py", bindings, env={"LD_LIBRARY_PATH": str(stubs)})
    )
    [version] = found
    if version not in snapshot:
        pytest.skip(f"the snapshot holds {', '.join(snapshot)}, not {version}")
    assert found[version] == snapshot[version]


PYTHON_PATH = """
import os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import numpy as np
import onnx
import tensorrt_bindings as trt
sys.modules["tensorrt"] = trt

from apar.export import tensorrt_api
from apar.export.tensorrt_compile import BuildLog, compile_graph, _monitor
from apar.export.tensorrt_profiles import ranges
from apar.export.manifest import TensorRtEngine
from apar.runtime.executor.tensorrt_session import ErrorLog

assert tensorrt_api.load_tensorrt() is trt
if os.environ.get("APAR_TENSORRT_LIBRARY"):
    library = tensorrt_api.load_plugins(trt)
    print(library.status)
    assert tensorrt_api.load_plugins(trt).major == tensorrt_api.major(trt)

    # Every plugin node of the graph, as the ONNX parser gives it to its creator.
    kinds = {onnx.AttributeProto.INT: (np.int32, trt.PluginFieldType.INT32),
             onnx.AttributeProto.FLOAT: (np.float32, trt.PluginFieldType.FLOAT32),
             onnx.AttributeProto.FLOATS: (np.float32, trt.PluginFieldType.FLOAT32)}
    registry = trt.get_plugin_registry()
    made = []
    for path in sys.argv[2:]:
        for node in onnx.load(path, load_external_data=False).graph.node:
            if node.domain != "apar":
                continue
            attributes = {a.name: a for a in node.attribute}
            version, namespace = (attributes[n].s.decode() for n in ("plugin_version", "plugin_namespace"))
            creator = registry.get_creator(node.op_type, version, namespace)
            names = [field.name for field in creator.field_names]
            assert set(names) <= set(attributes), (names, list(attributes))
            values = []
            for name in names:
                kind, field_type = kinds[attributes[name].type]
                value = onnx.helper.get_attribute_value(attributes[name])
                values.append((name, np.atleast_1d(np.array(value, kind)), field_type))
            fields = trt.PluginFieldCollection([trt.PluginField(name, value, kind) for name, value, kind in values])
            plugin = creator.create_plugin(node.name, fields, trt.TensorRTPhase.BUILD)
            assert plugin is not None, node.name
            made.append(type(plugin).__name__)
    print(len(made), set(made))

# The classes of ours that TensorRT calls.
log = BuildLog(trt, sys.stderr)
log.logger.log(trt.ILogger.Severity.ERROR, "of the logger")
assert log.errors == ["of the logger"]
seen = []
monitor = _monitor(trt, log, lambda *event: seen.append(event))
monitor.phase_start("a", None, 2)
assert monitor.step_complete("a", 0) is True
monitor.phase_finish("a")
assert seen[-1] == ("engine", 1000, 1000)

errors = ErrorLog(trt)
errors.logger.log(trt.ILogger.Severity.WARNING, "not an error")
errors.logger.log(trt.ILogger.Severity.ERROR, "an error")
assert str(errors) == " (an error)"
assert tensorrt_api.release(trt).count(".") == 3

# Up to the first call that needs the real library, which a stub's builder cannot be.
facts = TensorRtEngine(tensorrt_api.release(trt), "9.0", "none", 4, 16, 8, 4, 32, 0.9)
try:
    compile_graph(trt, Path(sys.argv[2]), Path("/nowhere"), [ranges(facts, 0)], log=log)
except TypeError as error:
    assert "Factory function returned nullptr" in str(error) or "pybind11" in str(error), error
    print("stopped at", error)
"""


@with_bindings
@pytest.mark.parametrize("bindings", BINDINGS, ids=str)
def test_our_classes_are_made_of_the_genuine_bindings(bindings: Path, stubs: Path) -> None:
    environment = {"LD_LIBRARY_PATH": str(stubs), "APAR_TENSORRT_LIBRARY": ""}
    assert "stopped at" in run(sys.executable, "-c", PYTHON_PATH, bindings, "/no/graph.onnx", env=environment)


@with_headers
@with_bindings
@pytest.mark.slow
@pytest.mark.parametrize("bindings", BINDINGS, ids=str)
def test_the_genuine_bindings_find_and_make_the_plugins(
    bindings: Path, libraries: dict[Path, Path], tmp_path: Path
) -> None:
    from checkpoints import make_checkpoint

    from apar.export.tensorrt_engine import TensorRtOptions, build

    major = major_of(bindings)
    headers = next((folder for folder in HEADERS if version_of(folder)[0] == major), None)
    if headers is None:
        pytest.skip(f"TENSORRT_INCLUDE_DIR has no headers of TensorRT {major}")
    for name in STUBS:
        target = f"lib{name}.so.{major}"
        soname = f"-Wl,-soname,{target}"
        run(
            CXX, *FLAGS, "-shared", soname, *includes(headers), "-o", tmp_path / target, SOURCES / "mock_nvinfer.cpp"
        )  # fmt: skip
    make_checkpoint(tmp_path / "checkpoint", "gqa", hidden_size=256)
    graphs = []
    for ranks, binding in ((1, "in-place"), (2, "bound")):
        options = TensorRtOptions(graph_only=True, tp_size=ranks, kv_binding=binding)
        build(tmp_path / "checkpoint", tmp_path / binding, options)
        graphs.append(tmp_path / binding / "rank0.onnx")
    environment = {"LD_LIBRARY_PATH": str(tmp_path), "APAR_TENSORRT_LIBRARY": str(libraries[headers])}
    out = run(sys.executable, "-c", PYTHON_PATH, bindings, *graphs, env=environment)
    assert "stopped at" in out
    assert f"registered with TensorRT {major}" in out
    assert "11 {'IPluginV3'}" in out  # 3 of the first graph; 3, four sums and a gather of the second
