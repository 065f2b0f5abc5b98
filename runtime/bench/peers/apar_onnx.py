"""APAR's ONNX Runtime executor on separate sequences; also for its graph with ONNX Runtime's own matrix kernels."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from apar.runtime.bench.peers.protocol import Task
from apar.runtime.executor import load_executor
from apar.runtime.step import StepInputs


class AparOnnx:
    """Rows with blocks of their own: nothing is shared, as between any other engine's sequences."""

    def __init__(self, task: Task) -> None:
        self._task = task
        size = 16
        self._blocks = -(-(task.context + task.most_steps + 2) // size)
        self._executor = load_executor(
            Path(task.engine), "onnx", threads=task.threads, num_blocks=self._blocks * task.most_rows
        )
        self._size = self._executor.manifest.block_size
        self._blocks = self._executor.num_blocks // task.most_rows
        self._rng = np.random.default_rng(task.seed)
        self._rows = self._length = 0
        self.detail = self._executor.detail

    def begin(self, rows: int) -> None:
        """See Peer.begin."""
        self._rows, self._length = rows, 0
        for row in range(rows):  # one at a time: a long prompt of many rows would only take memory
            self._run([row], self._task.context)
        self._length = self._task.context

    def step(self) -> None:
        """See Peer.step."""
        self._run(range(self._rows), 1)
        self._length += 1

    def _run(self, rows: range | list[int], count: int) -> None:
        tables = np.array([np.arange(self._blocks) + row * self._blocks for row in rows], np.int32)
        positions = np.arange(self._length, self._length + count)
        slots = tables[:, positions // self._size] * self._size + positions % self._size
        number = len(rows)
        starts = np.arange(number + 1, dtype=np.int32) * count
        vocab_size = self._executor.manifest.decoder.vocab_size
        self._executor.execute(
            StepInputs(
                input_ids=self._rng.integers(3, vocab_size, number * count).astype(np.int32),
                position_ids=np.tile(positions, number).astype(np.int32),
                query_start=starts,
                kv_len=np.full(number, self._length + count, np.int32),
                block_table=tables,
                slot_mapping=slots.reshape(-1).astype(np.int32),
                slot_copies=np.zeros((0, 2), np.int32),
                prefix_rows=np.arange(number + 1, dtype=np.int32),
                prefix_blocks=np.zeros(number, np.int32),
                tree_mask=np.zeros((number * count, 0), np.int32),
                logits_rows=starts[1:] - np.int32(1),
            )
        )


load = AparOnnx
