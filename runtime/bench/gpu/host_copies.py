"""Blocks that go to host memory and come back: whether they are the same, and how fast the way is."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from apar.runtime.bench.gpu.machine import Machine
from apar.runtime.executor.cuda.host_blocks import HostBlocks

ROUNDS = 30


def host_copies(machine: Machine) -> dict[str, Any]:
    """Random blocks out and back, with work between; then bytes a second each way: `host_bytes_per_second` of a cost
    model (`apar bench replay --cost-model`)."""
    blocks = machine.pick(64, 6)
    shape = machine.pick((32, 2, 32, 16, 128), (2, 2, 1, 8, 8))
    pools = torch.zeros((*shape[:2], blocks, *shape[2:]), dtype=machine.dtype, device=machine.device)
    host = HostBlocks(blocks, shape, machine.dtype, machine.device)
    try:
        same = _same_contents(host, pools, blocks)
        pairs = np.stack([np.random.default_rng(1).permutation(blocks) for _ in range(2)], 1).astype(np.int32)
        moved = pools.numel() * pools.element_size()
        out = moved / _seconds(machine, lambda: host.swap_out(pools, pairs))
        back = moved / _seconds(machine, lambda: host.swap_in(pools, pairs))
    finally:
        host.close()
    return {"ok": same, "block_bytes": moved // blocks, "out_bytes_per_second": out, "in_bytes_per_second": back}


def _same_contents(host: HostBlocks, pools: torch.Tensor, blocks: int) -> bool:
    """Whether every block holds what a model of it says, over rounds of copies that follow each other at once."""
    random = np.random.default_rng(0)
    pool, memory = np.zeros(blocks, np.int64), np.full(blocks, -1, np.int64)
    for number in range(1, ROUNDS + 1):
        out = np.stack([random.permutation(blocks) for _ in range(2)], 1)[: blocks // 2].astype(np.int32)
        host.swap_out(pools, out)
        memory[out[:, 1]] = pool[out[:, 0]]
        written = random.permutation(blocks)[: blocks // 3]
        pools[:, :, torch.from_numpy(written).to(pools.device)] = number
        pool[written] = number
        known = random.permutation(np.flatnonzero(memory >= 0))[: blocks // 4]
        back = np.stack((known, random.permutation(blocks)[: known.size]), 1).astype(np.int32)
        host.swap_in(pools, back)
        pool[back[:, 1]] = memory[back[:, 0]]
    expected = torch.from_numpy(pool).to(pools.device, pools.dtype)
    return bool((pools == expected.view(1, 1, -1, 1, 1, 1)).all())


def _seconds(machine: Machine, work: Callable[[], object]) -> float:
    """Best of a few: another process may use the link."""
    best = float("inf")
    for _ in range(machine.pick(5, 1)):
        machine.synchronize()
        began = time.perf_counter()
        work()
        machine.synchronize()
        best = min(best, time.perf_counter() - began)
    return best
