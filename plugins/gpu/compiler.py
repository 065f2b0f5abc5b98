"""Compiles builds for a GPU that need not be there, and says what each takes of the machine."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from apar.export.errors import PluginError
from apar.plugins.gpu.builds import Build

_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
_STACK = re.compile(r"(\d+) bytes stack frame")
_REGISTERS = re.compile(r"Used (\d+) registers")


@dataclass(frozen=True, slots=True)
class Compiled:
    """A build's machine code for one GPU architecture."""

    build: Build
    sm: int
    cubin: bytes
    symbol: str
    shared_bytes: int
    registers: int
    spill_bytes: int
    stack_bytes: int
    """Of a thread's stack frame: arrays that are indexed at run time, and spills."""
    extra_arguments: int
    """Null pointers that the compiler wants behind the build's own arguments."""


def compile_build(build: Build, sm: int) -> Compiled:
    """Compile `build` for compute capability `sm` (80, 90, 100).

    Raises PluginError under Triton's interpreter, which has no kernels to compile.
    """
    if knobs.runtime.interpret:
        raise PluginError("TRITON_INTERPRET is set, so there is nothing to compile; unset it")
    function = build.function
    source = ASTSource(
        function,
        build.signature,
        {(function.arg_names.index(name),): value for name, value in build.constants.items()},
        {
            (i,): [["tt.divisibility", 16]]
            for i, name in enumerate(function.arg_names)
            if build.signature[name].startswith("*")
        },
    )
    with _settings():
        kernel = triton.compile(
            source,
            target=GPUTarget("cuda", sm, 32),
            options={"num_warps": build.num_warps, "num_stages": build.num_stages, "enable_fp_fusion": True},
        )
    metadata = kernel.metadata
    if metadata.global_scratch_size or metadata.num_ctas != 1:
        raise PluginError(f"{build.name} needs global scratch or clusters, which the launch table has no words for")
    parameters = kernel.asm["ptx"].split(")", 1)[0].count(".param")
    registers, spills, stack = _resources(kernel.asm["ptx"], sm)
    return Compiled(
        build=build,
        sm=sm,
        cubin=kernel.asm["cubin"],
        symbol=metadata.name,
        shared_bytes=metadata.shared,
        registers=registers,
        spill_bytes=spills,
        stack_bytes=stack,
        extra_arguments=parameters - len(build.parameters),
    )


@contextmanager
def _settings() -> Iterator[None]:
    """Without line tables, which make cubins several times larger."""
    before = knobs.compilation.disable_line_info
    knobs.compilation.disable_line_info = True
    try:
        yield
    finally:
        knobs.compilation.disable_line_info = before


def _resources(ptx: str, sm: int) -> tuple[int, int, int]:
    """Registers a thread, bytes of spills and of the stack frame, as ptxas says them."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx, encoding="utf-8")
        suffix = "a" if sm >= 90 else ""
        done = subprocess.run(
            [
                get_ptxas(sm).path,
                "-v",
                f"--gpu-name=sm_{sm}{suffix}",
                str(source),
                "-o",
                str(Path(folder) / "kernel.cubin"),
            ],
            capture_output=True,
            text=True,
            check=False,
        )
    registers, spills, stack = (pattern.search(done.stderr) for pattern in (_REGISTERS, _SPILLS, _STACK))
    if done.returncode or registers is None or spills is None or stack is None:
        raise PluginError(f"ptxas did not report the kernel's resources: {done.stderr.strip()}")
    return int(registers[1]), int(spills[1]) + int(spills[2]), int(stack[1])
