"""`apar doctor`: what it says of this machine, of one that has everything, and of ones that lack a part."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import tensorrt_double
from checkpoints import make_checkpoint

from apar.export import tensorrt_api
from apar.export.errors import PluginError
from apar.export.tensorrt_engine import TensorRtOptions, build
from apar.plugins import tensorrt_library
from apar.runtime import cli
from apar.runtime.doctor import Finding, examine, healthy


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


@pytest.fixture(scope="module")
def cuda(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tensorrt_double.build_fake_cuda(tmp_path_factory.mktemp("cuda"))


class _Library(tensorrt_double.Library):
    path = Path("libapar_tensorrt10.so")
    status = "registered with TensorRT 10"

    def __init__(self, path: Path) -> None:
        del path

    def check(self, major: int) -> None:
        if major != 10:
            raise PluginError(f"it is for TensorRT 10, but TensorRT {major} is running")


@pytest.fixture
def gpu_box(cuda: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tensorrt_double.Double]:
    """A machine that has everything, by doubles of the driver, TensorRT and the plugin library."""
    monkeypatch.setattr(tensorrt_library, "library_path", lambda major: _Library.path)
    monkeypatch.setattr(tensorrt_library, "TensorRtLibrary", _Library)
    monkeypatch.setattr(tensorrt_api, "library_path", lambda major: _Library.path)
    monkeypatch.setattr(tensorrt_api, "TensorRtLibrary", _Library)
    yield from tensorrt_double.installed(cuda, monkeypatch)


@pytest.fixture
def engine(gpu_box: tensorrt_double.Double, tmp_path: Path) -> Path:
    make_checkpoint(tmp_path / "checkpoint", hidden_size=256)
    build(tmp_path / "checkpoint", tmp_path / "engine", TensorRtOptions(max_rows=8, max_tokens=64))
    return tmp_path / "engine"


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="this machine has a GPU")
def test_a_machine_without_gpu_is_healthy_for_the_cpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("APAR_CUDA_DRIVER", "libno-such-driver.so")
    findings = by_name(examine())
    assert findings["onnx"].ok
    assert findings["onnx"].needed
    assert not findings["CUDA driver"].ok
    assert "install NVIDIA's driver" in findings["CUDA driver"].text
    assert not findings["GPU"].ok
    assert "engine" not in findings
    assert cli.main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(findings)
    assert all(line[0] in "✓–" for line in lines)
    assert cli.main(["doctor", "--need", "tensorrt"]) == 1
    assert any(line.startswith("✗ CUDA driver") for line in capsys.readouterr().out.splitlines())


def test_a_machine_that_has_everything(
    gpu_box: tensorrt_double.Double, engine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    findings = by_name(examine(engine))
    for name in ("CUDA driver", "GPU", "TensorRT", "plugin library", "plugin creators", "engine"):
        assert findings[name].ok, findings[name]
        assert findings[name].needed
    assert findings["CUDA driver"].text == "for CUDA up to 13.0"
    assert "Fake GPU, compute capability 9.0, 1 GiB, 0.2 free" in findings["GPU"].text
    assert "ForkAttention, ForkPlan, AllReduce, AllGather" in findings["plugin creators"].text
    assert "8 rows, 64 tokens" in findings["engine"].text
    assert cli.main(["doctor", str(engine), "--json"]) == 0
    assert {entry["name"] for entry in json.loads(capsys.readouterr().out)} == set(findings)


def test_inspect_says_whether_a_compiled_engine_runs_here(
    gpu_box: tensorrt_double.Double, engine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["inspect", str(engine)]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "tensorrt executor" in out
    assert "TensorRT 10.14.1.48 on Fake GPU" in out
    monkeypatch.setenv("FAKE_CUDA_CAPABILITY", "80")
    assert cli.main(["inspect", str(engine), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["runs_here"]["executor"] is None
    assert "the GPU here has 8.0" in facts["runs_here"]["reason"]
    assert facts["tensorrt"]["max_rows"] == 8


@pytest.mark.parametrize(
    ("capability", "version", "name", "message"),
    [
        ("80", "10.14.1.48", "engine", "was built for compute capability 9.0 (Fake GPU), the GPU here has 8.0"),
        ("90", "10.16.0.72", "engine", "was built with TensorRT 10.14.1.48, 10.16.0.72 is installed"),
        ("90", "11.1.0.106", "plugin library", "it is for TensorRT 10, but TensorRT 11 is running"),
        ("75", "10.14.1.48", "GPU", "too old for APAR's kernels, which need 8.0 or later"),
        ("90", "9.3.0", "TensorRT", "APAR works with 10.10 to 11.x"),
    ],
)
def test_what_does_not_fit_is_said(
    capability: str,
    version: str,
    name: str,
    message: str,
    engine: Path,
    gpu_box: tensorrt_double.Double,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FAKE_CUDA_CAPABILITY", capability)
    monkeypatch.setattr(tensorrt_double, "__version__", version)
    findings = by_name(examine(engine))
    assert not findings[name].ok
    assert message in findings[name].text
    assert not healthy(list(findings.values()))


@pytest.mark.parametrize(
    ("driver", "version", "name", "message"),
    [
        ("11080", "10.14.1.48", "CUDA driver", "for CUDA up to 11.8, APAR needs one for 12.0 or later"),
        ("12090", "11.1.0.106", "TensorRT", "is for CUDA 13, the driver for less"),
    ],
)
def test_old_drivers_are_named(
    driver: str,
    version: str,
    name: str,
    message: str,
    gpu_box: tensorrt_double.Double,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FAKE_CUDA_DRIVER", driver)
    monkeypatch.setattr(tensorrt_double, "__version__", version)
    finding = by_name(examine(needs=("tensorrt",)))[name]
    assert not finding.ok
    assert message in finding.text


def test_kernels_that_the_driver_would_refuse_are_assembled_otherwise(
    gpu_box: tensorrt_double.Double, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton's own choice for this GPU is an assembler of CUDA 13."""
    pytest.importorskip("triton")
    variable = "TRITON_PTXAS_BLACKWELL_PATH"
    monkeypatch.setenv(variable, "")
    monkeypatch.delenv(variable)
    monkeypatch.setenv("FAKE_CUDA_DRIVER", "12020")
    assert by_name(examine())["kernel compiler"].ok
    assert os.environ[variable].endswith("ptxas")


def test_a_missing_c_compiler_is_mentioned(gpu_box: tensorrt_double.Double, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    assert "C compiler" not in by_name(examine())["kernel compiler"].text
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "")
    assert "apt-get install gcc python3-dev" in by_name(examine())["kernel compiler"].text


def test_another_model_of_gpu_is_mentioned(engine: Path, gpu_box: tensorrt_double.Double) -> None:
    path = engine / "manifest.json"
    data = json.loads(path.read_text())
    data["tensorrt"]["device"] = "Another GPU"
    path.write_text(json.dumps(data))
    finding = by_name(examine(engine))["engine"]
    assert finding.ok
    assert "built on Another GPU, and may be slow on this GPU" in finding.text


def test_an_engine_for_cpus_needs_no_gpu(tiny_engine: Path, tmp_path: Path) -> None:
    findings = examine(tiny_engine)
    assert healthy(findings)
    assert by_name(findings)["engine"].text.startswith(str(tiny_engine))
    findings = examine(tmp_path)
    assert not healthy(findings)
    assert "so it is no engine" in by_name(findings)["engine"].text


def test_a_broken_package_is_a_finding(monkeypatch: pytest.MonkeyPatch, cuda: Path) -> None:
    from apar.plugins import cuda_driver

    def breaks() -> str:
        raise ZeroDivisionError("of the driver")

    monkeypatch.setattr(cuda_driver, "driver_version", breaks)
    assert by_name(examine())["CUDA driver"].text == "ZeroDivisionError: of the driver"
