"""Copies between pool and host memory on two streams: whatever the device does first that it may, nothing is torn.

There is no GPU here. Streams and events are doubles with CUDA's rules: what is given to a stream runs later, in its
order; an event that is waited for stands for what its stream had been given when it was last recorded.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from apar.runtime.executor.cuda import host_blocks
from apar.runtime.executor.cuda.host_blocks import PLACES, HostBlocks

SHAPE = (2, 2, 1, 2, 4)
POOL, HOST = 10, 7


class Device(TorchDispatchMode):
    """Puts copies off, and runs what was put off in any order that streams and events allow."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.random = np.random.default_rng(seed)
        self.queues: dict[str, deque[Callable[[], bool]]] = {"compute": deque(), "copies": deque()}
        self.current = "compute"
        self.putting_off = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default and self.putting_off:
            self.give(lambda: func(*args))
            return args[0]
        return func(*args, **(kwargs or {}))

    def give(self, work: Callable[[], Any]) -> None:
        """Queue work on the current stream."""
        self.queues[self.current].append(lambda: (work(), True)[1])

    @contextmanager
    def stream(self, _: object) -> Iterator[None]:
        """Stands in for torch.cuda.stream with the stream for copies."""
        before, self.current = self.current, "copies"
        yield
        self.current = before

    def run(self, most: int) -> None:
        """Do up to so many things."""
        self.putting_off = False
        for _ in range(most):
            ready = [queue for queue in self.queues.values() if queue]
            if not ready:
                break
            queue = ready[int(self.random.integers(len(ready)))]
            if queue[0]():
                queue.popleft()
        self.putting_off = True


class Event:
    """Stands in for torch.cuda.Event."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.recorded = self.reached = 0

    def record(self) -> None:
        """See torch.cuda.Event."""
        self.recorded += 1
        number = self.recorded
        self.device.give(lambda: setattr(self, "reached", number))

    def wait(self) -> None:
        """See torch.cuda.Event."""
        number = self.recorded
        self.device.queues[self.device.current].append(lambda: self.reached >= number)


def life(seed: int, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Random steps; whether pool and host memory were in every step what they are without streams."""
    monkeypatch.setattr(host_blocks, "OUT_BYTES", 0)
    device = Device(seed)
    random = device.random
    host = HostBlocks(HOST, SHAPE, torch.float32, torch.device("cpu"))
    host._stream = object()  # type: ignore[assignment]
    monkeypatch.setattr(host_blocks.torch.cuda, "stream", device.stream)
    for place in (*host._out, *host._in):
        place._filled, place._free = Event(device), Event(device)  # type: ignore[assignment]
    pools = torch.zeros((*SHAPE[:2], POOL, *SHAPE[2:]))
    host._blocks.zero_()
    pool_model, host_model = pools.numpy().copy(), host._blocks.numpy().copy()
    fine: list[bool] = []

    def compute(blocks: np.ndarray, number: int) -> None:
        pools.numpy()[:, :, blocks] = number

    def compare(expected: np.ndarray) -> None:
        fine.append(np.array_equal(pools.numpy(), expected))

    with device:
        for number in range(1, 25):
            out = np.stack((random.permutation(POOL)[:HOST], random.permutation(HOST)), 1)[: random.integers(HOST + 1)]
            back = np.stack((random.permutation(HOST), random.permutation(POOL)[:HOST]), 1)
            back = back[: random.integers(HOST + 1)].astype(np.int32)
            written = random.permutation(POOL)[:4]
            host.swap_out(pools, out.astype(np.int32))
            device.give(partial(compute, written, number))
            host.swap_in(pools, back)
            host_model[out[:, 1]] = np.moveaxis(pool_model[:, :, out[:, 0]], 2, 0)
            pool_model[:, :, written] = number
            pool_model[:, :, back[:, 1]] = np.moveaxis(host_model[back[:, 0]], 0, 2)
            device.give(partial(compare, pool_model.copy()))
            device.run(int(random.integers(60)))
        device.run(100_000)
    assert not any(device.queues.values()), "streams wait for each other"
    return all(fine) and len(fine) == 24 and np.array_equal(host._blocks.numpy(), host_model)


@pytest.mark.parametrize("seed", range(20))
def test_any_order_gives_the_same(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert HOST > PLACES, "a place is used twice in a step"
    assert life(seed, monkeypatch)


@pytest.mark.parametrize("wait", ["await_free", "await_filled"])
def test_every_wait_is_needed(wait: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_blocks._Place, wait, lambda place: None)
    assert not all(life(seed, monkeypatch) for seed in range(20))
