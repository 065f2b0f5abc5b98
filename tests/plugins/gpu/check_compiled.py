"""Ahead-of-time compilation for GPUs that are not here, and the launch table as Python and C++ read it."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler
from triton.compiler import ASTSource

from apar.export.errors import PluginError
from apar.plugins.gpu import assembler, pack
from apar.plugins.gpu.builds import ARGUMENTS, KINDS, SMS, Choice
from apar.plugins.gpu.compiler import compile_build
from apar.plugins.gpu.dense import Matrix
from apar.plugins.gpu.fork_attention import ForkAttention, StepTensors
from apar.plugins.gpu.kernels import attend, dense, write
from apar.plugins.gpu.sizes import StepSizes

HEADER = Path(__file__).resolve().parents[3] / "plugins" / "gpu" / "launch_table.h"

# Every kernel for every architecture, each in one of its shapes: `python -m apar.plugins.gpu.pack` makes them all.
SUBSET = {
    80: Choice(["float16"], [64], [16]),
    90: Choice(["bfloat16"], [128], [16], tiles=[16]),
    100: Choice(["bfloat16"], [64], [32], tiles=[16]),
}

READER = r"""
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <vector>
#include "launch_table.h"

int main(int argc, char** argv) {
  if (argc == 6) {
    const long t = atol(argv[1]), r = atol(argv[2]), g = atol(argv[3]);
    const int h = atoi(argv[4]), k = atoi(argv[5]);
    AparGpuSizes s = apar_gpu_sizes(t, r, g, h, k);
    uint32_t grid[3];
    apar_gpu_grid(APAR_GPU_ATTEND, &s, t, 0, h, k, grid);
    std::printf("%d %d %d %d %d %d %ld %ld %ld %u %u\n", s.tile, s.tile_tokens, s.splits, s.budget, s.tiles, s.items,
                (long)s.parts, (long)s.plan_size, (long)s.scratch_size, grid[0], grid[1]);
    return 0;
  }
  std::ifstream file(argv[1], std::ios::binary);
  std::vector<char> data((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  const auto* header = reinterpret_cast<const AparGpuTableHeader*>(data.data());
  if (header->version != APAR_GPU_TABLE_VERSION || header->entry_size != sizeof(AparGpuKernel) ||
      header->header_size != sizeof(AparGpuTableHeader) || header->file_size != data.size())
    return 1;
  if (apar_gpu_checksum(data.data() + header->header_size, data.size() - header->header_size) != header->checksum)
    return 2;
  const auto* kernels = reinterpret_cast<const AparGpuKernel*>(data.data() + header->header_size);
  for (uint32_t i = 0; i < header->entry_count; ++i) {
    const AparGpuKernel& e = kernels[i];
    const bool elf = data[e.cubin_offset] == 0x7f && data[e.cubin_offset + 1] == 'E';
    std::printf("%u %u %u %u %u %u %u %s %u %u %d %llu\n", e.kind, e.sm, e.dtype, e.head_dim, e.block_size, e.tile,
                e.num_warps, e.symbol, e.argument_count, e.arguments[e.argument_count - 1], elf,
                (unsigned long long)e.cubin_size);
  }
  return 0;
}
"""


@pytest.fixture(scope="module")
def entries() -> list[pack.Entry]:
    return [pack.Entry.of(compile_build(build, sm)) for sm, choice in SUBSET.items() for build in choice.builds()]


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reader")
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    assert compiler, "the launch table's C header is checked with a C++ compiler, as the native library is"
    (folder / "reader.cpp").write_text(READER, encoding="utf-8")
    command = [
        compiler,
        "-std=c++17",
        "-Wall",
        "-Wextra",
        "-Werror",
        f"-I{HEADER.parent}",
        "reader.cpp",
        "-o",
        "reader",
    ]
    subprocess.run(command, cwd=folder, check=True)
    return folder / "reader"


def test_every_architecture_compiles_without_spills(entries: list[pack.Entry]) -> None:
    assert set(SUBSET) == set(SMS)
    for sm in SMS:
        assert {entry.kind for entry in entries if entry.sm == sm} == set(KINDS.values())
    print(pack.table_text(entries))
    for entry in entries:
        assert entry.spill_bytes == 0, entry.symbol
        assert 0 < entry.registers <= 255 and entry.shared_bytes < 100 * 1024
        assert entry.cubin.startswith(b"\x7fELF")


def test_arguments_are_those_of_the_kernels(entries: list[pack.Entry]) -> None:
    codes = {name: code for name, (code, _) in ARGUMENTS.items()}
    attend = next(entry for entry in entries if entry.kind == KINDS["attend"])
    assert attend.arguments[:5] == tuple(codes[name] for name in ("q", "pool", "plan", "block_table", "slot_mapping"))
    assert len(set(codes.values())) == len(codes)


def test_python_and_c_read_the_same_table(entries: list[pack.Entry], reader: Path, tmp_path: Path) -> None:
    file = tmp_path / "gpu.table"
    file.write_bytes(pack.write_table(entries))
    assert pack.read_table(file.read_bytes()) == entries
    printed = subprocess.run([reader, file], capture_output=True, text=True, check=True).stdout.splitlines()
    for line, entry in zip(printed, entries, strict=True):
        numbers = (entry.kind, entry.sm, entry.dtype, entry.head_dim, entry.block_size, entry.tile, entry.num_warps)
        arguments = (len(entry.arguments), entry.arguments[-1], 1, len(entry.cubin))
        assert line.split() == [str(value) for value in (*numbers, entry.symbol, *arguments)]


@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 0, 32, 32),
        (1, 1, 1, 32, 8),
        (257, 256, 64, 32, 32),
        (1024, 40, 9, 28, 4),
        (5000, 3, 1, 71, 71),
        (37, 20, 4, 6, 1),
    ],
)
def test_sizes_are_the_same_in_c(shape: tuple[int, ...], reader: Path) -> None:
    sizes = StepSizes(*shape)
    printed = subprocess.run([reader, *map(str, shape)], capture_output=True, text=True, check=True).stdout
    assert [int(word) for word in printed.split()] == [
        sizes.tile,
        sizes.tile_tokens,
        int(sizes.splits),
        sizes.budget,
        sizes.tiles,
        sizes.items,
        sizes.parts,
        sizes.plan_size,
        sizes.scratch_size,
        sizes.items,
        shape[4],
    ]


def test_damaged_tables_are_refused(entries: list[pack.Entry]) -> None:
    data = bytearray(pack.write_table(entries[:1]))
    for place, message in ((0, "no launch table"), (8, "version"), (len(data) - 1, "damaged")):
        wrong = bytearray(data)
        wrong[place] ^= 1
        with pytest.raises(PluginError, match=message):
            pack.read_table(bytes(wrong))
    with pytest.raises(PluginError, match="damaged"):
        pack.read_table(bytes(data[:-4]))


def test_the_command_compiles_side_by_side(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Kernels that are in Triton's cache since the fixture: two processes give the table of one, in the same order."""
    tables = []
    for jobs in ("1", "2"):
        file = tmp_path / f"{jobs}.table"
        options = ["--sm", "80", "--dtype", "float16", "--head-dim", "64", "--block-size", "16", "--jobs", jobs]
        assert pack.main([*options, "-o", str(file)]) == 0
        tables.append(file.read_bytes())
    assert tables[0] == tables[1]
    assert "stack frames in bytes:" in capfd.readouterr().out


def test_unknown_choices_are_refused() -> None:
    with pytest.raises(PluginError, match="head_dim 72"):
        Choice(head_dims=[72])


@pytest.fixture
def no_choice(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Triton as it is in a new process where nobody has named an assembler."""
    monkeypatch.setenv(assembler.VARIABLE, "")
    monkeypatch.delenv(assembler.VARIABLE)
    for remembered in (compiler.get_ptxas_version, compiler.get_features):
        remembered.cache_clear()
    yield
    for remembered in (compiler.get_ptxas_version, compiler.get_features):
        remembered.cache_clear()


@pytest.mark.parametrize("driver", ["12.2", "13.0"])
@pytest.mark.usefixtures("no_choice")
def test_drivers_get_code_that_they_can_load(driver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Machine code of CUDA 13's assembler is of an ELF ABI that drivers of CUDA 12 do not know."""
    monkeypatch.setattr("apar.plugins.cuda_driver.driver_version", lambda: driver)
    assembler.fit_driver()
    assert assembler.obstacle(90) is None
    merge = next(build for build in Choice(["bfloat16"], [64], [16]).builds() if build.kind == "merge")
    abi = compile_build(merge, 90).cubin[8]
    assert abi <= 7 if driver == "12.2" else abi >= 7


@pytest.mark.usefixtures("no_choice")
def test_what_no_assembler_fits_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("apar.plugins.cuda_driver.driver_version", lambda: "11.8")
    assembler.fit_driver()
    assert assembler.VARIABLE not in os.environ
    assert "a driver of CUDA 11.8 does not load; update" in (assembler.obstacle(80) or "")


def test_an_assembler_that_the_user_named_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(assembler.VARIABLE, "/somewhere/ptxas")
    monkeypatch.setattr("apar.plugins.cuda_driver.driver_version", lambda: "12.2")
    assembler.fit_driver()
    assert os.environ[assembler.VARIABLE] == "/somewhere/ptxas"


TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.int32: "i32", torch.int8: "i8"}


class Compiling:
    """Stands in for a kernel: what would be launched is compiled for compute capability 8.0 instead."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self.shared = 0

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self._launch

    def _launch(self, *arguments: Any, **named: Any) -> None:
        options = {name: named.pop(name) for name in ("num_warps", "num_stages") if name in named}
        signature = {name: self._type(value) for name, value in zip(self._kernel.arg_names, arguments, strict=False)}
        names = self._kernel.arg_names
        constants = {(names.index(name),): value for name, value in named.items()}
        aligned = {
            (i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature.get(name, "").startswith("*")
        }
        source = ASTSource(self._kernel, {name: signature.get(name, "constexpr") for name in names}, constants, aligned)
        made = triton.compile(source, target=GPUTarget("cuda", 80, 32), options=options)
        self.shared = max(self.shared, made.metadata.shared)

    def _type(self, value: Any) -> str:
        if isinstance(value, torch.Tensor):
            return f"*{TYPES[value.dtype]}"
        return "fp32" if isinstance(value, float) else "i32"


SHARED = 99 << 10
"""Bytes of shared memory that a block may have on compute capability 8.6, 8.9 and 12, the least of all."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [1, 64], ids=["small tile", "large tile"])
def test_attention_fits_consumer_gpus(dtype: torch.dtype, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Compiling(attend.attend)
    monkeypatch.setattr(attend, "attend", kernel)
    for name in ("rope_write", "merge"):
        module = attend if name == "merge" else write
        monkeypatch.setattr(module, name, Compiling(getattr(module, name)))
    operator = ForkAttention(num_heads=2, num_kv_heads=2, head_dim=128, block_size=16, inv_freq=torch.ones(64))
    sizes = operator.sizes(tokens, 1, 0)
    index = {name: torch.zeros(1, dtype=torch.int32) for name in StepTensors.__slots__}
    index |= {name: torch.zeros(1, 1, dtype=torch.int32) for name in ("block_table", "tree_mask")}
    operator.layer(
        torch.zeros(tokens, 6 * 128, dtype=dtype),
        torch.zeros(2, 1, 2, 16, 128, dtype=dtype),
        StepTensors(**index),
        torch.zeros(sizes.plan_size, dtype=torch.int32),
        sizes,
        operator.workspace(tokens, sizes.parts, dtype),
        torch.zeros(tokens, 2 * 128, dtype=dtype),
    )
    assert 0 < kernel.shared <= SHARED


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 64, 300])
def test_8_bit_matrices_fit_consumer_gpus(dtype: torch.dtype, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Compiling(dense.linear8)
    monkeypatch.setattr(dense, "linear8", kernel)
    matrix = Matrix.of(torch.ones(256, 256), None, dtype, "int8")
    matrix(torch.zeros(rows, 256, dtype=dtype))
    assert 0 < kernel.shared <= SHARED
