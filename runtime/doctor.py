"""What of this machine can run APAR, and what is missing for the rest: one finding for each part.

Every check stands alone: what one finds is handed to those that build on it, and a part that is broken in a way that
nobody foresaw is a finding too, never a traceback.
"""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from apar.export.errors import AparError
from apar.export.manifest import ABI_VERSION, Manifest, TensorRtEngine
from apar.runtime.executor.choice import OLDEST_PACKAGES

NEEDS = ("onnx", "torch", "tensorrt", "triton")
"""Uses that can be asked for."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One part: whether it is there, in one line, with the remedy where it is not."""

    name: str
    ok: bool
    text: str
    needed: bool = False
    """What was asked for does not work without it."""


@dataclass(slots=True)
class _Machine:
    """What checks have found so far."""

    engine: Path | None
    needs: frozenset[str]
    manifest: Manifest | None = None
    cuda: tuple[int, ...] = ()
    """The newest CUDA that the driver runs."""
    gpu: str = ""
    trt: Any = None
    capability: str = ""
    library: Any = None
    findings: list[Finding] = field(default_factory=list)


def examine(engine: Path | None = None, needs: tuple[str, ...] = ()) -> list[Finding]:
    """Look at everything. `needs` says which uses must work; an engine needs the executor it was built for."""
    machine = _Machine(engine, frozenset(needs))
    if engine is not None:
        try:
            machine.manifest = Manifest.load(engine)
        except AparError:
            pass  # the check of the engine says so
        else:
            machine.needs |= {"tensorrt" if machine.manifest.tensorrt else "onnx"}
    if not machine.needs:
        machine.needs = frozenset({"onnx"})
    for name, uses, check in _CHECKS:
        needed = bool(machine.needs & uses) or name == "engine"
        try:
            text = check(machine)
        except AparError as error:
            machine.findings.append(Finding(name, False, str(error), needed))
        except Exception as error:  # a broken installation can fail in any way
            machine.findings.append(Finding(name, False, f"{type(error).__name__}: {error}", needed))
        else:
            if text is not None:
                machine.findings.append(Finding(name, True, text, needed))
    return machine.findings


def healthy(findings: list[Finding]) -> bool:
    """Whether all that is needed is there."""
    return all(finding.ok for finding in findings if finding.needed)


class _Missing(AparError):
    """A part is not there."""


def _apar(machine: _Machine) -> str:
    installed = _version("apar") or "run from its sources"
    return f"{installed}, ForkAttention ABI {ABI_VERSION}, Python {platform.python_version()}"


def _onnx(machine: _Machine) -> str:
    import onnxruntime

    from apar.runtime.bench.machine import kernel_isa

    isa, reason = kernel_isa()
    text = f"ONNX Runtime {onnxruntime.__version__}, "
    return text + (f"native kernels for {isa}" if isa else f"portable graph, which is slower: {reason}")


def _torch(machine: _Machine) -> str:
    version = _version("torch")
    if version is None:
        raise _Missing("not installed; for the torch executor: pip install 'apar[torch]'")
    return f"PyTorch {version}"


def _driver(machine: _Machine) -> str:
    from apar.plugins.cuda_driver import driver_version

    version = driver_version()
    if _numbers(version) < (12, 0):
        raise _Missing(f"for CUDA up to {version}, APAR needs one for 12.0 or later: update NVIDIA's driver")
    machine.cuda = _numbers(version)
    return f"for CUDA up to {version}"


def _gpu(machine: _Machine) -> str:
    from apar.plugins.cuda_driver import CudaDevice

    if not machine.cuda:
        raise _Missing("not looked at, because there is no CUDA driver that APAR could use")
    device = CudaDevice()
    machine.gpu, machine.capability = device.name, device.compute_capability
    major = int(machine.capability.split(".")[0])
    device.activate()
    free = device.free_memory
    device.close()
    text = f"{device.name}, compute capability {machine.capability}, {device.total_memory / 2**30:.0f} GiB"
    text += f", {free / 2**30:.1f} free"
    if major < 8:
        raise _Missing(f"{text}: too old for APAR's kernels, which need 8.0 or later")
    return text


def _tensorrt(machine: _Machine) -> str:
    from apar.export.tensorrt_api import load_tensorrt, major

    machine.trt = load_tensorrt()
    text = f"TensorRT {machine.trt.__version__}"
    if machine.cuda and major(machine.trt) >= 11 and machine.cuda < (13, 0):
        raise _Missing(f"{text} is for CUDA 13, the driver for less: update NVIDIA's driver, or install TensorRT 10")
    return text


def _plugins(machine: _Machine) -> str:
    from apar.export.tensorrt_api import major
    from apar.plugins.tensorrt_library import TensorRtLibrary, library_path

    if machine.trt is None:
        raise _Missing("not looked at, because TensorRT cannot be used here")
    library = TensorRtLibrary(library_path(major(machine.trt)))
    library.check(major(machine.trt))
    machine.library = library
    return f"{library.path}, {library.status}"


def _creators(machine: _Machine) -> str:
    from apar.export.tensorrt_api import CREATORS, load_plugins

    if machine.library is None:
        raise _Missing("not looked at, because the plugin library cannot be used here")
    load_plugins(machine.trt)
    return f"TensorRT finds {', '.join(CREATORS)}"


def _kernels(machine: _Machine) -> str:
    version = _version("triton")
    if version is None:
        raise _Missing("not installed; building TensorRT engines needs it: pip install triton")
    oldest = OLDEST_PACKAGES["triton"]
    if _numbers(version) < oldest:
        least = ".".join(map(str, oldest))
        raise _Missing(f"triton {version} is older than the {least} that the GPU kernels need: pip install -U triton")
    text = f"triton {version}"
    if machine.cuda and machine.capability:
        from apar.plugins.gpu.assembler import fit_driver, obstacle

        fit_driver()
        problem = obstacle(int(machine.capability.replace(".", "")))
        if problem:
            raise _Missing(f"{text}: {problem}")
    text += ", compiles the GPU kernels when an engine is built"
    if machine.capability and not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        text += "; the torch executor needs a C compiler besides: apt-get install gcc python3-dev"
    return text


def _tensorrt_llm(machine: _Machine) -> str:
    version = _version("tensorrt_llm") or _version("tensorrt-llm")
    if version is None:
        raise _Missing("not installed; only `apar.export.trtllm_network` needs it (1.0 to 1.2.1)")
    if not (1, 0) <= _numbers(version)[:2] < (1, 3):
        raise _Missing(f"{version} is installed; its engine backend, which APAR uses, is in 1.0 to 1.2.1 only")
    return f"TensorRT-LLM {version}"


def _server(machine: _Machine) -> str:
    from apar.runtime.serving.triton_server import find_server

    server = find_server()
    return f"Triton server {getattr(server, 'binary', server)}"


def _engine(machine: _Machine) -> str | None:
    if machine.engine is None:
        return None
    manifest = machine.manifest or Manifest.load(machine.engine)
    if manifest.tensorrt is None:
        return f"{machine.engine}: for the onnx and torch executors, {manifest.dtype}, all files are there"
    facts = manifest.tensorrt
    wrong = list(_mismatches(machine, facts))
    if wrong:
        raise _Missing(f"{machine.engine}: {'; '.join(wrong)}")
    return (
        f"{machine.engine}: TensorRT {facts.version} on compute capability {facts.compute_capability}, "
        f"{facts.max_rows} rows, {facts.max_tokens} tokens, blocks of {manifest.block_size}, "
        f"{'Medusa heads, ' if manifest.draft_heads else ''}all files are there"
        + (f"; it was built on {facts.device}, and may be slow on this GPU" if facts.device != machine.gpu else "")
    )


def _mismatches(machine: _Machine, facts: TensorRtEngine) -> list[str]:
    from apar.export.tensorrt_api import release

    wrong = []
    if machine.trt is None:
        wrong.append(f"needs TensorRT {facts.version}: pip install 'tensorrt=={facts.version}.*'")
    elif release(machine.trt) != facts.version:
        wrong.append(
            f"was built with TensorRT {facts.version}, {release(machine.trt)} is installed: build it again here, or "
            f"pip install 'tensorrt=={facts.version}.*'"
        )
    if machine.capability != facts.compute_capability:
        here = f"the GPU here has {machine.capability}" if machine.capability else "there is no GPU here"
        wrong.append(f"was built for compute capability {facts.compute_capability} ({facts.device}), {here}")
    if facts.tp_size != 1:
        wrong.append(f"is cut over {facts.tp_size} GPUs, which the executor does not drive")
    return wrong


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2] if part.isdigit())


_CHECKS: tuple[tuple[str, frozenset[str], Callable[[_Machine], str | None]], ...] = (
    ("apar", frozenset(NEEDS), _apar),
    ("onnx", frozenset({"onnx"}), _onnx),
    ("torch", frozenset({"torch"}), _torch),
    ("CUDA driver", frozenset({"tensorrt"}), _driver),
    ("GPU", frozenset({"tensorrt"}), _gpu),
    ("TensorRT", frozenset({"tensorrt"}), _tensorrt),
    ("plugin library", frozenset({"tensorrt"}), _plugins),
    ("plugin creators", frozenset({"tensorrt"}), _creators),
    ("kernel compiler", frozenset(), _kernels),
    ("TensorRT-LLM", frozenset(), _tensorrt_llm),
    ("Triton server", frozenset({"triton"}), _server),
    ("engine", frozenset(), _engine),
)
