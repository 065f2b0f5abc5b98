"""Writes and reads the launch table: `python -m apar.plugins.gpu.pack -o FILE` (layout: launch_table.h)."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import struct
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import triton

from apar.export.errors import AparError, PluginError
from apar.export.manifest import ABI_VERSION
from apar.plugins.gpu.builds import ARGUMENTS, CHECKED, DTYPE_CODES, DTYPES, KINDS, NULL_ARGUMENT, SMS, Choice
from apar.plugins.gpu.compiler import Compiled, compile_build
from apar.plugins.gpu.sizes import HEAD_DIMS

MAGIC = b"APARGPU\0"
VERSION = 1
_HEADER = struct.Struct("<8s6I2Q32s")
_ENTRY = struct.Struct("<12I32s64s2Q")
_ALIGN = 16


@dataclass(frozen=True, slots=True)
class Entry:
    """One kernel of a table, as AparGpuKernel has it."""

    kind: int
    sm: int
    dtype: int
    head_dim: int
    block_size: int
    tile: int
    flags: int
    num_warps: int
    shared_bytes: int
    registers: int
    spill_bytes: int
    arguments: tuple[int, ...]
    symbol: str
    cubin: bytes

    @classmethod
    def of(cls, compiled: Compiled) -> Entry:
        build = compiled.build
        codes = [ARGUMENTS[name][0] for name in build.parameters] + [NULL_ARGUMENT] * compiled.extra_arguments
        return cls(
            KINDS[build.kind],
            compiled.sm,
            DTYPE_CODES[build.dtype],
            build.head_dim,
            build.block_size,
            build.tile,
            CHECKED if build.checked else 0,
            build.num_warps,
            compiled.shared_bytes,
            compiled.registers,
            compiled.spill_bytes,
            tuple(codes),
            compiled.symbol,
            compiled.cubin,
        )


def checksum(data: bytes) -> int:
    """FNV-1a, 64 bits."""
    value = 0xCBF29CE484222325
    for byte in data:
        value = ((value ^ byte) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    return value


def write_table(entries: Sequence[Entry]) -> bytes:
    """The file's bytes."""
    at = _HEADER.size + _ENTRY.size * len(entries)
    rows, blobs = [], []
    for entry in entries:
        padding = -at % _ALIGN
        at += padding
        rows.append(
            _ENTRY.pack(
                entry.kind,
                entry.sm,
                entry.dtype,
                entry.head_dim,
                entry.block_size,
                entry.tile,
                entry.flags,
                entry.num_warps,
                entry.shared_bytes,
                entry.registers,
                entry.spill_bytes,
                len(entry.arguments),
                bytes(entry.arguments),
                entry.symbol.encode("ascii"),
                at,
                len(entry.cubin),
            )
        )
        blobs.append(bytes(padding) + entry.cubin)
        at += len(entry.cubin)
    body = b"".join((*rows, *blobs))
    compiler = f"triton {triton.__version__}".encode("ascii")
    sizes = (VERSION, ABI_VERSION, _HEADER.size, _ENTRY.size, len(entries), 0)
    return _HEADER.pack(MAGIC, *sizes, _HEADER.size + len(body), checksum(body), compiler) + body


def read_table(data: bytes) -> list[Entry]:
    """The entries of a file's bytes. Raises PluginError for a damaged file or another version."""
    remedy = "pack it again with: python -m apar.plugins.gpu.pack"
    if len(data) < _HEADER.size or not data.startswith(MAGIC):
        raise PluginError(f"this is no launch table of GPU kernels; {remedy}")
    _, version, abi, header_size, entry_size, count, _, size, stated, _ = _HEADER.unpack_from(data)
    if (version, abi, header_size, entry_size) != (VERSION, ABI_VERSION, _HEADER.size, _ENTRY.size):
        raise PluginError(
            f"the launch table has version {version}, ABI {abi}; {VERSION} and {ABI_VERSION} run; {remedy}"
        )
    if size != len(data) or checksum(data[header_size:]) != stated:
        raise PluginError(f"the launch table is damaged: its size or checksum is wrong; {remedy}")
    entries = []
    for i in range(count):
        fields = _ENTRY.unpack_from(data, header_size + i * entry_size)
        numbers: dict[str, Any] = dict(zip(Entry.__slots__, fields[:11], strict=False))
        used, codes, symbol, offset, length = fields[11:]
        name = symbol.rstrip(b"\0").decode("ascii")
        entries.append(
            Entry(**numbers, arguments=tuple(codes[:used]), symbol=name, cubin=data[offset : offset + length])
        )
    return entries


def table_text(entries: Sequence[Entry]) -> str:
    """A line for each kernel: what it is and what it takes."""
    kinds = {code: name for name, code in KINDS.items()}
    dtypes = {code: name or "-" for name, code in DTYPE_CODES.items()}
    lines = [f"{'kernel':<12}{'sm':>4}  {'dtype':<9}{'dim':>4}{'block':>6}{'tile':>5}"]
    lines[0] += f"{'warps':>6}{'registers':>10}{'shared':>8}{'spills':>7}{'bytes':>8}"
    lines += [
        f"{kinds[e.kind]:<12}{e.sm:>4}  {dtypes[e.dtype]:<9}{e.head_dim or '-':>4}{e.block_size or '-':>6}"
        f"{e.tile or '-':>5}{e.num_warps:>6}{e.registers:>10}{e.shared_bytes:>8}{e.spill_bytes:>7}{len(e.cubin):>8}"
        for e in entries
    ]
    spilling = sum(e.spill_bytes > 0 for e in entries)
    total = sum(len(e.cubin) for e in entries)
    return "\n".join([*lines, f"{len(entries)} kernels, {total} bytes, {spilling} with spills"])


@dataclass(frozen=True, slots=True)
class Packed:
    """An entry, and what only its maker is told."""

    entry: Entry
    name: str
    stack_bytes: int


def compile_all(choice: Choice, sms: Sequence[int], jobs: int) -> list[Packed]:
    """Every build for every architecture, `jobs` at a time, with progress on stderr.

    Triton keeps what it has compiled in its cache directory: a run that was broken off goes on where it was.
    """
    tasks = [(choice, index, sm) for sm in sms for index in range(len(list(choice.builds())))]
    done: list[Packed] = []
    if jobs <= 1:
        results: Iterator[Packed] = map(_compile, tasks)
        pool: AbstractContextManager[object] = nullcontext()
    else:
        # Fresh processes: Triton's compiler keeps threads and locks that a fork would copy.
        workers = ProcessPoolExecutor(min(jobs, len(tasks)), mp_context=multiprocessing.get_context("spawn"))
        pool, results = workers, workers.map(_compile, tasks)
    with pool:
        for kernel in results:
            done.append(kernel)
            progress = f"{len(done)} of {len(tasks)}: sm_{kernel.entry.sm} {kernel.name}"
            print(f"\r{progress:<70}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return done


def _compile(task: tuple[Choice, int, int]) -> Packed:
    """One build. Triton's functions do not travel between processes, so that builds are named by their place."""
    choice, index, sm = task
    compiled = compile_build(next(islice(choice.builds(), index, None)), sm)
    return Packed(Entry.of(compiled), compiled.build.name, compiled.stack_bytes)


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m apar.plugins.gpu.pack", description=__doc__)
    parser.add_argument("-o", "--output", type=Path, help="file to write")
    parser.add_argument("--list", type=Path, metavar="FILE", help="print what a file holds instead")
    parser.add_argument("--sm", default=list(SMS), type=_numbers, metavar="N,...")
    parser.add_argument("--head-dim", default=list(HEAD_DIMS), type=_numbers, metavar="N,...")
    parser.add_argument("--block-size", default=[16, 32, 64], type=_numbers, metavar="N,...")
    parser.add_argument("--dtype", default=list(DTYPES), type=lambda text: text.split(","), metavar="NAME,...")
    parser.add_argument(
        "--jobs", default=_processors(), type=int, metavar="N", help="compilers at a time (default: %(default)s)"
    )
    parser.add_argument("--checked", action="store_true", help="kernels that check every id")
    options = parser.parse_args(arguments)
    try:
        if options.list is not None:
            print(table_text(read_table(options.list.read_bytes())))
            return 0
        choice = Choice(options.dtype, options.head_dim, options.block_size, checked=options.checked)
        kernels = compile_all(choice, options.sm, options.jobs)
        entries = [kernel.entry for kernel in kernels]
        print(table_text(entries))
        framed = [
            f"{kernel.name} sm_{kernel.entry.sm} {kernel.stack_bytes}" for kernel in kernels if kernel.stack_bytes
        ]
        print(f"stack frames in bytes: {', '.join(framed) or 'none'}")
        if options.output is not None:
            partial = options.output.with_suffix(options.output.suffix + ".partial")
            partial.write_bytes(write_table(entries))
            partial.replace(options.output)
    except (AparError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
