"""CUDA graphs of buckets: captured once, replayed for every step that fits."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Sequence

import torch

from apar.runtime.executor.cuda.buckets import Bucket

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Is told how many of how many CUDA graphs have been captured."""
Replay = Callable[[], None]


class Recorder:
    """Captures launches into CUDA graphs, all of which share one memory pool.

    What is captured must neither allocate outside PyTorch's allocator nor wait for the device, and must have run once
    before, so that kernels are compiled and loaded.
    """

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        # PyTorch's own capture stream belongs to the device that captured first in this process.
        self._stream = torch.cuda.Stream()

    def record(self, work: Callable[[], None]) -> Replay:
        """Capture `work` on the current device instead of running it; what is returned runs it."""
        graph = torch.cuda.CUDAGraph()
        # Other threads may allocate meanwhile: only this one is watched for calls that a graph cannot hold.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            work()
        return graph.replay


class Graphs:
    """The captured buckets. `recorder` None: nothing is captured and every step is launched kernel by kernel."""

    def __init__(self, recorder: Recorder | None) -> None:
        self._recorder = recorder
        self._replays: dict[Bucket, Replay] = {}

    def __len__(self) -> int:
        return len(self._replays)

    def get(self, bucket: Bucket | None) -> Replay | None:
        """What runs the bucket's graph, if there is one."""
        return None if bucket is None else self._replays.get(bucket)

    def capture(self, buckets: Sequence[Bucket], work: Callable[[Bucket], Callable[[], None]], told: Progress) -> None:
        """Capture each bucket that is not there yet, in this order.

        work: makes ready a step of the bucket's padding and returns its launches, which are run once and then captured.
        """
        if self._recorder is None:
            return
        missing = [bucket for bucket in buckets if bucket not in self._replays]
        started = time.perf_counter()
        for done, bucket in enumerate(missing):
            told(done, len(missing))
            launches = work(bucket)
            launches()
            self._replays[bucket] = self._recorder.record(launches)
        if missing:
            told(len(missing), len(missing))
            logger.info("captured %d CUDA graphs in %.1f s", len(missing), time.perf_counter() - started)

    def clear(self) -> None:
        """Free them."""
        self._replays.clear()


def progress_line(done: int, total: int) -> None:
    """Progress as a line that overwrites itself, where someone looks."""
    if sys.stderr.isatty():
        print(
            f"\rcapturing CUDA graphs: {done} of {total}",
            end="\n" if done == total else "",
            file=sys.stderr,
            flush=True,
        )
