"""What `auto` chooses. No GPU is needed: the driver and PyTorch's view of it are doubles here."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from apar.export import onnx_engine
from apar.export.errors import ExecutorError, PluginError
from apar.export.manifest import Manifest
from apar.runtime.engine_source import tiny_checkpoint
from apar.runtime.executor import choice, load_executor

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("tiny") / "engine"
    onnx_engine.build(tiny_checkpoint(), target)
    return target


@pytest.fixture
def manifest(engine: Path) -> Manifest:
    return Manifest.load(engine)


class Driver:
    """A GPU as the driver shows it."""

    name = "GPU of a test"
    compute_capability = "9.0"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> type[Driver]:
    found = type("Driver", (Driver,), {})
    monkeypatch.setattr(choice, "CudaDevice", found)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 30, 2 << 30))
    monkeypatch.setattr(choice.importlib.util, "find_spec", lambda name: object())
    return found


def test_without_a_gpu(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise PluginError("there is no CUDA driver here")

    monkeypatch.setattr(choice, "CudaDevice", missing)
    assert choice.choose(manifest, {}) == "onnx"
    assert choice.gpu_obstacle(manifest) == "there is no CUDA driver here"


def test_a_gpu_is_used(manifest: Manifest, gpu: type[Driver]) -> None:
    assert choice.gpu_obstacle(manifest) is None
    assert choice.choose(manifest, {}) == choice.choose(manifest, {"num_blocks": 7}) == "torch"


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"device": "cpu"}, "onnx"),
        ({"threads": 2}, "onnx"),
        ({"graph": "portable"}, "onnx"),
        ({"device": "cuda:1"}, "torch"),
        ({"weights": "int8"}, "torch"),
    ],
)
def test_options_decide(manifest: Manifest, gpu: type[Driver], options: dict[str, Any], name: str) -> None:
    assert choice.choose(manifest, options) == name


def test_what_keeps_a_gpu_from_running_a_model(
    manifest: Manifest, gpu: type[Driver], monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = dataclasses.replace(manifest, decoder=dataclasses.replace(manifest.decoder, head_dim=72))
    assert "head_dim 72" in str(choice.gpu_obstacle(odd))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 20, 2 << 30))
    assert "the weights take 0.0 GB" in str(choice.gpu_obstacle(manifest))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "finds no CUDA device" in str(choice.gpu_obstacle(manifest))
    monkeypatch.setattr(choice.importlib.util, "find_spec", lambda name: None)
    assert "pip install 'apar[gpu]'" in str(choice.gpu_obstacle(manifest))
    gpu.compute_capability = "7.5"
    assert "compute capability 7.5" in str(choice.gpu_obstacle(manifest))
    assert choice.choose(manifest, {}) == "onnx"


def test_device_cpu_suits_every_executor(engine: Path) -> None:
    for name in ("auto", "onnx", "torch"):
        load_executor(engine, name, device="cpu", num_blocks=4, room=(2, 8)).close()
    with pytest.raises(ExecutorError, match="runs on the CPU, not on 'cuda'"):
        load_executor(engine, "onnx", device="cuda")
    with pytest.raises(ExecutorError, match="weights is an option for GPUs"):
        load_executor(engine, "torch", device="cpu", weights="int8")


@pytest.mark.parametrize(("name", "version"), [("torch", "2.7.1+cu126"), ("triton", "3.5.0+git.nv")])
def test_packages_that_are_too_old(
    name: str, version: str, engine: Path, manifest: Manifest, gpu: type[Driver], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An environment that had PyTorch before apar: pip leaves it as it is where no extra was asked for."""
    versions = {"torch": "2.8.0", "triton": "3.6.0"} | {name: version}
    monkeypatch.setattr(choice.metadata, "version", versions.__getitem__)
    assert f"since {name} {version} is older than" in str(choice.gpu_obstacle(manifest))
    with pytest.raises(ExecutorError, match=rf"cannot run on a GPU: {name} \d.*pip install -U 'apar\[gpu\]'"):
        load_executor(engine, "torch", device="cuda")
