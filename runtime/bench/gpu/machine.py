"""The machine under test: its device, how things are timed on it, and the limits that times are held against."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import triton


@dataclass(slots=True)
class Machine:
    """A CUDA device, or in a dry run the CPU with Triton's interpreter: then sizes are tiny and times mean nothing."""

    device: torch.device
    dry: bool
    copy_bandwidth: float = 0.0
    """Bytes a second, read and written, that a large copy moves."""
    gemm_rate: float = 0.0
    """Floating-point operations a second of a large bfloat16 product."""
    notes: list[str] = field(default_factory=list)

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.dry else torch.bfloat16

    def pick(self, real: Any, dry: Any) -> Any:
        """`real` on a GPU, `dry` in a dry run."""
        return dry if self.dry else real

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def works(self) -> bool:
        """Whether the device still answers: an illegal access in a kernel spoils the whole process."""
        try:
            self.synchronize()
            torch.ones(1, device=self.device).item()
        except RuntimeError:
            return False
        return True

    def recall_limits(self, found: dict[str, Any]) -> None:
        """Take over what `measure_limits` returned before."""
        self.copy_bandwidth = float(found.get("copy_bytes_per_second", 0.0))
        self.gemm_rate = float(found.get("gemm_flops_per_second", 0.0))

    def seconds(self, work: Callable[[], object], *, repeats: int = 20, graph: bool = True) -> float:
        """Median seconds of `work`, which must be launches only. On a GPU a captured graph is replayed: the host's
        own time is left out; `graph` False times calls as they are."""
        if self.device.type != "cuda":
            began = time.perf_counter()
            work()
            return time.perf_counter() - began
        for _ in range(3):
            work()
        self.synchronize()
        run: Callable[[], object] = work
        if graph:
            captured = torch.cuda.CUDAGraph()
            with torch.cuda.graph(captured):
                work()
            run = captured.replay
            for _ in range(3):
                run()
        times = []
        for _ in range(repeats):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            run()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) * 1e-3)
        return statistics.median(times)

    def percent_of_copy(self, moved: float, seconds: float) -> float:
        """Percent of the copy bandwidth that reading `moved` bytes in `seconds` reaches."""
        return 100.0 * moved / seconds / self.copy_bandwidth if self.copy_bandwidth else 0.0

    def percent_of_gemm(self, operations: float, seconds: float) -> float:
        """Percent of the GEMM rate that so many floating-point operations in `seconds` reach."""
        return 100.0 * operations / seconds / self.gemm_rate if self.gemm_rate else 0.0

    def measure_limits(self) -> dict[str, Any]:
        """Copy bandwidth and GEMM rate, on random data: zeros would flatter both."""
        size = self.pick(2 << 30, 1 << 16)
        source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        copy = self.seconds(lambda: target.copy_(source))
        self.copy_bandwidth = 2 * size / copy
        n = self.pick(8192, 64)
        a, b = (torch.randn(n, n, device=self.device).to(self.dtype) for _ in range(2))
        out = torch.empty_like(a)
        gemm = self.seconds(lambda: torch.mm(a, b, out=out))
        self.gemm_rate = 2 * n**3 / gemm
        return {
            "copy_bytes_per_second": self.copy_bandwidth,
            "copy_seconds": copy,
            "gemm_flops_per_second": self.gemm_rate,
            "gemm_seconds": gemm,
        }

    def describe(self) -> dict[str, Any]:
        """What it is, for the report."""
        found: dict[str, Any] = {
            "torch": torch.__version__,
            "triton": triton.__version__,
            "python": platform.python_version(),
            "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
            "dry_run": self.dry,
        }
        if self.device.type == "cuda":
            properties = torch.cuda.get_device_properties(self.device)
            found |= {
                "gpu": properties.name,
                "compute_capability": f"{properties.major}.{properties.minor}",
                "multiprocessors": properties.multi_processor_count,
                "memory_bytes": properties.total_memory,
                "cuda": torch.version.cuda,
            }
        return found
