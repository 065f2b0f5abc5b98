"""How a step's time grows with its rows.

Decoding reads every weight once a step, however many rows there are, so that the bound of a step is the weights' bytes
over the memory's bandwidth. Numbers of rows take turns within one run, and so does the measurement of that bandwidth:
what disturbs the machine, disturbs all of them.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any

import numpy as np

from apar.export.errors import CapacityError
from apar.runtime.bench.bandwidth import read_bandwidth, step_weight_bytes
from apar.runtime.bench.machine import describe_engine, describe_machine, peak_memory
from apar.runtime.executor import Executor
from apar.runtime.executor.threads import default_threads
from apar.runtime.step import StepInputs

_FIRST_TOKEN = 3
_PROMPT_TOKENS = 256
"""Most tokens of a step that fills the context."""


def bench_rows(
    executor: Executor,
    rows: Sequence[int],
    *,
    context: int = 128,
    steps: int = 10,
    rounds: int = 7,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Milliseconds of a decode step at each number of rows, each row with `context` tokens of its own behind it.

    A round has `steps` steps of every number of rows; a round's median counts, and of these the median.
    `blocks_needed` says how many KV blocks it takes. Raises CapacityError where the executor has fewer.
    """
    most = max(rows)
    needed = blocks_needed(most, context, executor.manifest.block_size)
    if executor.num_blocks < needed:
        raise CapacityError(f"{most} rows of {context} tokens need {needed} KV blocks, there are {executor.num_blocks}")
    threads = threads or default_threads()
    sequences = _Sequences(executor, most, context)
    took: dict[int, list[float]] = {count: [] for count in rows}
    bandwidths = []
    for turn in range(rounds):
        bandwidths.append(read_bandwidth(threads, passes=2))
        for number, count in enumerate(rows):
            sequences.step(count)  # the first one after another number of rows finds other caches
            took[count].append(statistics.median(sequences.step(count) for _ in range(steps)))
            if progress:
                progress(turn * len(rows) + number + 1, rounds * len(rows))
    bandwidth = max(bandwidths)
    weight_bytes = step_weight_bytes(executor.manifest)
    seconds = {count: statistics.median(times) for count, times in took.items()}
    fewest = min(rows)
    return {
        "bench": "rows",
        "rows": [
            {
                "rows": count,
                "ms_per_step": round(1e3 * seconds[count], 4),
                "ms_fastest_round": round(1e3 * min(took[count]), 4),
                "ratio_to_fewest_rows": round(seconds[count] / seconds[fewest], 3),
                "tokens_per_second": round(count / seconds[count], 1),
                "gb_per_second": round(weight_bytes / seconds[count] / 1e9, 2),
                "percent_of_bandwidth": round(100 * weight_bytes / seconds[count] / bandwidth, 1),
            }
            for count in rows
        ],
        "engine": describe_engine(executor.manifest, executor),
        "settings": {"context": context, "steps": steps, "rounds": rounds, "threads": threads},
        "bandwidth": {
            "read_bytes_per_second": round(bandwidth),
            "slowest_read_bytes_per_second": round(min(bandwidths)),
            "weight_bytes_per_step": weight_bytes,
        },
        "peak_memory_bytes": peak_memory(),
        "machine": describe_machine(),
    }


def blocks_needed(rows: int, context: int, block_size: int) -> int:
    """KV blocks of that many rows with a context of their own."""
    return rows * -(-(context + 1) // block_size)


class _Sequences:
    """Rows that share nothing, all at the same position."""

    def __init__(self, executor: Executor, rows: int, context: int) -> None:
        self._executor, self._context = executor, context
        self._size = executor.manifest.block_size
        self._width = -(-(context + 1) // self._size)
        self._tokens = np.random.default_rng(0)
        for row in range(rows):
            for first in range(0, context, _PROMPT_TOKENS):
                count = min(_PROMPT_TOKENS, context - first)
                executor.execute(self._inputs(np.array([row]), first, count))

    def step(self, rows: int) -> float:
        """Seconds of one decode step. It writes where the last one did, so that every step is the same."""
        inputs = self._inputs(np.arange(rows), self._context, 1)
        began = perf_counter()
        self._executor.execute(inputs)
        return perf_counter() - began

    def _inputs(self, rows: np.ndarray[Any, np.dtype[np.int64]], first: int, count: int) -> StepInputs:
        tables = (rows[:, None] * self._width + np.arange(self._width)).astype(np.int32)
        positions = np.arange(first, first + count)
        slots = tables[:, positions // self._size] * self._size + positions % self._size
        starts = np.arange(len(rows) + 1, dtype=np.int32) * np.int32(count)
        vocabulary = self._executor.manifest.decoder.vocab_size
        return StepInputs(
            input_ids=self._tokens.integers(_FIRST_TOKEN, vocabulary, len(rows) * count).astype(np.int32),
            position_ids=np.tile(positions, len(rows)).astype(np.int32),
            query_start=starts,
            kv_len=np.full(len(rows), first + count, np.int32),
            block_table=tables,
            slot_mapping=slots.reshape(-1).astype(np.int32),
            slot_copies=np.zeros((0, 2), np.int32),
            prefix_rows=np.arange(len(rows) + 1, dtype=np.int32),
            prefix_blocks=np.zeros(len(rows), np.int32),
            tree_mask=np.zeros((len(rows) * count, 0), np.int32),
            logits_rows=starts[1:] - np.int32(1),
        )
