"""The installed distribution: what it imports, what it ships, and what the native library shows to the world."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import apar.plugins
from apar.export.errors import PluginError

ROOT = Path(__file__).resolve().parents[1]
PLUGINS = ROOT / "plugins"
ISA_FILE = re.compile(r"_avx\w+\.cpp")

IMPORT_ALL = """
import importlib, pkgutil, sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "transformers", "sentencepiece", "safetensors", "tensorrt", "triton"}:
            raise ModuleNotFoundError(f"{name} is blocked")

sys.meta_path.insert(0, Block())
import apar
optional = ("apar.runtime.executor.torch", "apar.runtime.executor.tensorrt", "apar.export.tensorrt", "apar.plugins.gpu",
            "apar.plugins.tensorrt", "apar.runtime.bench.gpu", "apar.runtime.bench.peers.",
            "apar.runtime.executor.cuda")
for package in ("export", "runtime", "plugins"):
    package = importlib.import_module("apar." + package)
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if not module.name.startswith(optional) and ".lib" not in module.name:
            importlib.import_module(module.name)
            print(module.name)
"""


def run(*command: str | Path, **kwargs: object) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False, **kwargs)  # type: ignore[call-overload]
    assert done.returncode == 0, f"{command} failed:\n{done.stdout}\n{done.stderr}"
    return str(done.stdout)


def native_library() -> Path:
    try:
        return apar.plugins.library_path()
    except PluginError as error:
        pytest.skip(f"portable installation: {error}")


def test_building_and_generating_need_neither_torch_nor_transformers(tmp_path: Path) -> None:
    imported = run(sys.executable, "-c", IMPORT_ALL, cwd=tmp_path).split()
    assert {"apar.export.onnx_engine", "apar.runtime.llm", "apar.runtime.cli"} <= set(imported)


def test_importing_the_package_loads_nothing_else(tmp_path: Path) -> None:
    program = "import sys, apar; print(*(m for m in sys.modules if m.startswith('apar.') or m == 'numpy'))"
    assert run(sys.executable, "-c", program, cwd=tmp_path).split() == []


def test_package_offers_its_public_names() -> None:
    assert apar.__version__ == metadata.version("apar")
    for name in apar.__all__:
        assert getattr(apar, name) is getattr(apar, name)
        assert name in dir(apar)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = apar.no_such_name


def test_console_script_is_installed() -> None:
    (script,) = metadata.entry_points(group="console_scripts", name="apar")
    assert script.value == "apar.runtime.cli:main"
    assert callable(script.load())


def test_required_distributions_are_light() -> None:
    required = [r for r in metadata.requires("apar") or [] if "extra ==" not in r]
    names = {re.split(r"[^A-Za-z0-9_.-]", r)[0].lower() for r in required}
    assert "onnxruntime" in names
    assert not names & {"torch", "transformers", "sentencepiece", "safetensors"}


def test_library_speaks_this_abi() -> None:
    library = native_library()
    apar.plugins.check_versions(library)
    assert apar.plugins.cpu_isa(library) in {"generic", "avx2", "avx512", "avx512_vnni"}


def test_other_abi_is_refused_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    library = native_library()
    monkeypatch.setattr(apar.plugins, "ABI_VERSION", 99)
    with pytest.raises(PluginError, match=r"needs 99.*Install apar again"):
        apar.plugins.check_versions(library)


def test_unknown_instruction_set_is_refused() -> None:
    native_library()
    program = "import apar.plugins as p; p.cpu_isa(p.library_path())"
    done = subprocess.run(
        [sys.executable, "-c", program], env={"APAR_CPU_ISA": "abacus"}, capture_output=True, text=True, check=False
    )
    assert "PluginError: APAR_CPU_ISA is 'abacus'" in done.stderr


def test_library_can_be_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    other = tmp_path / "other.so"
    monkeypatch.setenv("APAR_PLUGIN_LIBRARY", str(other))
    with pytest.raises(PluginError, match="is no file"):
        apar.plugins.library_path()
    other.write_bytes(b"not a library")
    assert apar.plugins.library_path() == other.resolve()
    with pytest.raises(PluginError, match="cannot be loaded"):
        apar.plugins.check_versions(other)


def test_missing_library_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("APAR_PLUGIN_LIBRARY", raising=False)
    monkeypatch.setattr(apar.plugins, "LIBRARY_NAME", "libmissing.so")
    with pytest.raises(PluginError, match=r"portable graph.*C\+\+ compiler.*ONNXRUNTIME_INCLUDE_DIR"):
        apar.plugins.library_path()


@pytest.mark.skipif(not shutil.which("nm"), reason="nm (binutils) is not installed")
def test_library_exports_its_contract_and_nothing_else() -> None:
    library = native_library()
    declared = {"RegisterCustomOps"}
    for header in PLUGINS.glob("*.h"):
        declared |= set(re.findall(r"^APAR_EXPORT[^;(]*?(\w+)\(", header.read_text(), re.MULTILINE))
    exported = {line.split()[-1] for line in run("nm", "-D", "--defined-only", library).splitlines()}
    assert exported == declared
    undefined = run("nm", "-D", "--undefined-only", library)
    assert "Ort" not in undefined, "the library must not be linked to ONNX Runtime"


def compile_commands() -> dict[Path, str]:
    """Compiler command of every native source, from the build tree that an editable install leaves."""
    found = {}
    for file in ROOT.glob("build/*/compile_commands.json"):
        for entry in json.loads(file.read_text()):
            if Path(entry["file"]).exists():
                found[Path(entry["directory"]) / entry["output"]] = entry["command"]
    if not found:
        pytest.skip("no native build tree in this checkout")
    return found


def test_only_files_named_for_it_use_more_than_the_baseline() -> None:
    for output, command in compile_commands().items():
        assert not re.search(r"-m(arch|tune|cpu)=native", command), command
        if not ISA_FILE.search(output.name):
            assert "-mavx" not in command, command


@pytest.mark.skipif(not shutil.which("nm"), reason="nm (binutils) is not installed")
def test_objects_of_instruction_sets_share_no_code() -> None:
    # The linker keeps one copy of an inline function; if that is an AVX-512 one, older processors crash.
    for output in compile_commands():
        if ISA_FILE.search(output.name) and output.exists():
            symbols = run("nm", "-C", "--defined-only", output).splitlines()
            assert [line for line in symbols if line.split()[1] in "WwVvu"] == []


def test_build_files_never_ask_for_this_machines_processor() -> None:
    for file in [*PLUGINS.rglob("CMakeLists.txt"), *PLUGINS.rglob("*.cmake"), ROOT / "pyproject.toml"]:
        assert "=native" not in file.read_text(), file


def test_tracked_files_name_no_path_of_this_machine() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    names = run("git", "-c", "safe.directory=*", "-C", ROOT, "ls-files", "-z").split("\0")
    paths = [re.escape(f"{place}/") for place in (ROOT, Path(sys.prefix)) if len(place.parts) > 2]
    pattern = re.compile("|".join([*paths, r"/home/[a-z]", r"/Users/[A-Za-z]"]).encode())
    found = [
        name
        for name in names
        if name
        and name != "tests/test_packaging.py"
        and (ROOT / name).is_file()
        and pattern.search((ROOT / name).read_bytes())
    ]
    assert found == []


def test_wheel_carries_the_model_and_no_sources(tmp_path: Path) -> None:
    pytest.importorskip("scikit_build_core", reason="building a wheel here needs scikit-build-core")
    settings = ("build-dir=" + str(tmp_path / "build"), "cmake.define.APAR_NATIVE=OFF")
    options = [f"--config-settings={setting}" for setting in settings]
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "--no-index"]
    run(*pip, *options, "-w", tmp_path, ROOT, cwd=tmp_path)
    (wheel,) = tmp_path.glob("apar-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    model = ROOT / "export" / "models" / "tiny"
    wanted = {f"apar/export/models/tiny/{file.name}" for file in model.iterdir() if file.is_file()}
    assert wanted
    assert {"apar/__init__.py", "apar/py.typed", *wanted} <= names
    sources = (".cpp", ".h", ".cu", ".so", ".cmake", ".txt", ".in")
    assert [n for n in names if n.endswith(sources) and not re.search(r"dist-info/|/models/", n)] == []
    assert any(n.endswith("licenses/LICENSE") for n in names)
