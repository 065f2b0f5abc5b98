"""How many threads a step's kernels get when nobody says so."""

from __future__ import annotations

import os
from pathlib import Path

MAX_THREADS = 1024
"""More would take ONNX Runtime minutes to start, and no machine has them."""


def default_threads() -> int:
    """Physical cores that this process may use, at most what the container's CPU quota allows, at least 1.

    Two hardware threads of one core share its vector units and its memory port, so a second one does not help.
    """
    try:
        allowed = os.sched_getaffinity(0)
    except AttributeError:
        return max(1, (os.cpu_count() or 2) // 2)
    cores = {_siblings(cpu) for cpu in allowed}
    return max(1, min(len(cores), _quota()))


def _siblings(cpu: int) -> str:
    try:
        return Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text(encoding="ascii")
    except OSError:
        return str(cpu)


def _quota() -> int:
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        return max(1, -(-int(quota) // int(period)))
    except (OSError, ValueError):
        return os.cpu_count() or 1
