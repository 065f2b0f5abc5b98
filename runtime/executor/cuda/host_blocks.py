"""Blocks in pinned host memory beside the pool on a device, and the copies between the two.

A block of the pool lies in pieces, one for each layer and kind; a host block is one piece. So every block goes through
a place of its shape on the device: gathered by the stream that computes, carried over by a stream for copies alone.
Blocks go out while the step computes, as many as there are places. It begins when those that come in are there; they
wait for earlier copies out, which may be what fills them.
"""

from __future__ import annotations

import weakref
from collections import deque
from contextlib import AbstractContextManager, nullcontext, suppress

import torch
from torch import Tensor

from apar.export.errors import ExecutorError
from apar.runtime.step import Int32Array

PLACES = 4
"""Blocks on the way, each way, at least: one of 8 MiB takes 0.2 ms, so that these keep a link busy."""
OUT_BYTES = 256 << 20
"""Device memory that blocks on their way out may take, so that a step which evicts many need not wait for the link."""


class HostBlocks:
    """Host blocks and the way to them.

    Args:
        num_blocks: host blocks.
        shape: of a block over all layers, (layers, 2, kv_heads, block_size, head_dim).
        dtype: of the pool.
        device: of the pool; on "cpu", for tests, everything is done at once.

    Raises ExecutorError if so much host memory cannot be had or pinned.
    """

    def __init__(self, num_blocks: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        try:
            self._blocks = torch.empty((num_blocks, *shape), dtype=dtype)
        except RuntimeError as error:
            raise ExecutorError(f"{num_blocks} host blocks do not fit into memory: {error}; give fewer") from error
        self.bytes = self._blocks.numel() * self._blocks.element_size()
        if on_gpu:
            # PyTorch's own pinned memory comes in powers of two.
            status = int(torch.cuda.cudart().cudaHostRegister(self._blocks.data_ptr(), self.bytes, 0))
            if status:
                raise ExecutorError(
                    f"{self.bytes / 1e9:.1f} GB of host memory cannot be pinned (CUDA error {status}): give fewer host "
                    "blocks, or free memory of the host"
                )
        # Also where nobody closes it, such as after a load that failed: pages must not be given back pinned.
        self._unpin = weakref.finalize(self, _unpin, self._blocks if on_gpu else None)
        self._stream = torch.cuda.Stream(device) if on_gpu else None
        places = max(PLACES, min(num_blocks, OUT_BYTES // (self.bytes // num_blocks)))
        self._out = deque(_Place(shape, dtype, device) for _ in range(places))
        self._in = deque(_Place(shape, dtype, device) for _ in range(PLACES))

    def swap_out(self, pools: Tensor, pairs: Int32Array) -> None:
        """Copy blocks of `pools` [layers, 2, B, ...] to host blocks: `pairs` [O, 2]."""
        for block, host in pairs.tolist():
            place = _next(self._out)
            place.await_free()
            place.memory.copy_(pools[:, :, block])
            place.filled()
            with self._copying():
                place.await_filled()
                self._blocks[host].copy_(place.memory, non_blocking=True)
                place.free()

    def swap_in(self, pools: Tensor, pairs: Int32Array) -> None:
        """Copy host blocks to blocks of `pools`: `pairs` [I, 2]."""
        for host, block in pairs.tolist():
            place = _next(self._in)
            with self._copying():
                place.await_free()
                place.memory.copy_(self._blocks[host], non_blocking=True)
                place.filled()
            place.await_filled()
            pools[:, :, block].copy_(place.memory)
            place.free()

    def close(self) -> None:
        """Wait for what is on the way and free the memory. Idempotent."""
        if self._stream is not None:
            with suppress(RuntimeError):  # after an illegal access the device refuses this too
                self._stream.synchronize()
        self._unpin()
        self._blocks = self._blocks[:0]
        self._out.clear()
        self._in.clear()

    def _copying(self) -> AbstractContextManager[object]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)


def _next(places: deque[_Place]) -> _Place:
    """The place that was used longest ago."""
    places.rotate(-1)
    return places[-1]


def _unpin(blocks: Tensor | None) -> None:
    if blocks is not None:
        torch.cuda.cudart().cudaHostUnregister(blocks.data_ptr())


class _Place:
    """Memory for one block on its way. Two streams take turns with it: what is said here is said of the current one."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self.memory = torch.empty(shape, dtype=dtype, device=device)
        on_gpu = device.type == "cuda"
        self._filled = torch.cuda.Event() if on_gpu else None
        self._free = torch.cuda.Event() if on_gpu else None

    def await_free(self) -> None:
        """Have the stream wait until the last block has left; an event that was never recorded keeps nobody waiting."""
        if self._free is not None:
            self._free.wait()

    def filled(self) -> None:
        """What the stream has been given so far puts a block here."""
        if self._filled is not None:
            self._filled.record()

    def await_filled(self) -> None:
        """Have the stream wait for the block."""
        if self._filled is not None:
            self._filled.wait()

    def free(self) -> None:
        """What the stream has been given so far takes the block away."""
        if self._free is not None:
            self._free.record()
