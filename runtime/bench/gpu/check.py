"""The sections of scripts/gpu_check.py, in order: what is wrong is found before anything is timed."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from apar.plugins.gpu.assembler import fit_driver
from apar.plugins.gpu.kernels.dot import INTERPRETED
from apar.runtime.bench.gpu import answers, attention, correctness, decoding
from apar.runtime.bench.gpu.host_copies import host_copies
from apar.runtime.bench.gpu.machine import Machine
from apar.runtime.bench.gpu.report import Report
from apar.runtime.executor.cuda.executor import CudaExecutor

GRACE = 30.0
"""Seconds that the section at the deadline may still take."""


def check(output: Path, only: str, deadline: float, *, dry: bool, script: Path, resume: bool = False) -> int:
    """Run the sections whose names begin with `only`; write `output`. Returns the exit status.

    resume: take over the sections that `output` holds, and run the others.
    """
    if dry != bool(INTERPRETED.value):
        print("error: a dry run needs TRITON_INTERPRET=1, and a real one must not have it", file=sys.stderr)
        return 2
    if not dry and not torch.cuda.is_available():
        print("error: PyTorch finds no CUDA device; --dry-run tries the script on a CPU", file=sys.stderr)
        return 2
    if not dry:
        fit_driver()
    machine = Machine(torch.device("cpu" if dry else "cuda"), dry)
    report = Report(machine.describe(), deadline, output)
    if resume:
        report.read()
        machine.recall_limits(report.sections.get("limits", {}))
    model = decoding.model_7b(machine)
    loaded: list[CudaExecutor] = []

    def load_model() -> dict[str, Any]:
        loaded.append(decoding.load(machine, model))
        return {"detail": loaded[0].detail}

    def with_model(section: Callable[[CudaExecutor], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
        def run() -> dict[str, Any]:
            if not loaded:
                load_model()
            return section(loaded[0])

        return run

    requests = machine.pick((20, 192), (1, 2))
    sections: list[tuple[str, float, Callable[[], dict[str, Any]]]] = [
        ("limits", 0, machine.measure_limits),
        ("kernels", 0, lambda: correctness.kernels(machine)),
        ("matrices", 0, lambda: correctness.matrices(machine)),
        ("host blocks", 0, lambda: host_copies(machine)),
        ("tiny model", 30, lambda: correctness.tiny_model(machine)),
        ("7b layers", 30, lambda: correctness.seven_b(machine)),
        ("attention speed", 20, lambda: attention.attention(machine)),
        ("matrix speed", 10, lambda: decoding.matrices(machine)),
        ("host costs", 1, lambda: decoding.host_costs(machine)),
        ("load 7b", 60, load_model),
        ("decode steps", 10, with_model(lambda e: decoding.decode_steps(machine, e))),
        ("fork cost", 5, with_model(lambda e: decoding.fork_cost(machine, e))),
        ("answers, one at a time", 60, with_model(lambda e: answers.recorded_answers(machine, e, 1, requests[0]))),
        ("answers, 64 at a time", 90, with_model(lambda e: answers.recorded_answers(machine, e, 64, requests[1]))),
        ("8-bit weights", 60, lambda: _after(loaded, lambda: decoding.weight_formats(machine, model))),
        ("flex attention", 40, lambda: attention.flex_attention(machine)),
        # Last: it takes what time is left, and the device's memory is free again.
        ("sanitizer", 60, lambda: correctness.sanitizer(machine, script, deadline - time.perf_counter())),
    ]
    if only == "small kernels":
        sections = [("small kernels", 0, lambda: correctness.kernels(machine, small=True))]
        only = ""
    with report.watched(GRACE):
        for name, needs, section in sections:
            if not name.startswith(only) or name in report.sections:
                continue
            report.run(name, section, needs)
            if report.sections[name].get("ok") is False and not machine.works():
                # Nothing more can run here: another process goes on where this one has to stop.
                return _go_on(report, script, only, dry)
    print(f"\n{output}: {len(report.sections)} sections, failed: {', '.join(report.failed) or 'none'}")
    return 1 if report.failed else 0


def _go_on(report: Report, script: Path, only: str, dry: bool) -> int:
    """Run the rest in a process of its own, which has a CUDA context of its own."""
    minutes = max(0.0, report.deadline - time.perf_counter()) / 60
    command = [sys.executable, str(script), "-o", str(report.path), "--only", only, "--minutes", f"{minutes:.3f}"]
    print("\nthe device does not answer any more; a new process goes on", flush=True)
    return subprocess.run([*command, "--resume", *(["--dry-run"] if dry else [])], check=False).returncode or 1


def _after(loaded: list[CudaExecutor], section: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Run a section that needs the memory of the loaded model."""
    while loaded:
        loaded.pop().close()
    return section()
