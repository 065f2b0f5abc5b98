"""Recorded answers on a real engine: how much of the steps that forks save is saved in time.

Each answer is decoded twice, its details inline (plain) and as branches (forked): the same text tokens, through the
real scheduler and the real executor. One request at a time, prefix caching off; both ways alternate, and the order
turns round from answer to answer. Times leave out what only the measurement does.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from apar.export.errors import ExecutorError, RequestError
from apar.runtime.bench.bandwidth import read_bandwidth, step_weight_bytes
from apar.runtime.bench.forced_executor import ForcedExecutor, StepRecord
from apar.runtime.bench.machine import describe_engine, describe_machine, peak_memory
from apar.runtime.bench.workload import Workload, forks
from apar.runtime.branch import Request
from apar.runtime.engine import Engine
from apar.runtime.executor.base import Executor
from apar.runtime.executor.recorded_trees import Tree, text_tokens
from apar.runtime.executor.threads import default_threads
from apar.runtime.limits import SchedulerLimits
from apar.runtime.sampling_params import SamplingParams

PLAIN, FORKED = "plain", "forked"
MODES = {PLAIN: "never", FORKED: "always"}


@dataclass(slots=True)
class _Run:
    """One answer decoded in one way."""

    request: Request
    seconds: float
    """From arrival to the end."""
    first_token: float
    records: list[StepRecord]


class TreesBench:
    """Decodes recorded answers on an engine. Closes the executor.

    Args:
        executor: a loaded executor.
        workload: the answers.
        limit: at most so many of them, spread evenly over the workload.
        threads: what the executor uses, for the bandwidth measurement.

    Raises RequestError where no answer fits the engine's context or its KV pool.
    """

    def __init__(
        self, executor: Executor, workload: Workload, limit: int | None = None, threads: int | None = None
    ) -> None:
        self._engine_manifest = executor.manifest
        self._threads = threads or default_threads()
        self._workload = workload
        context = min(executor.manifest.decoder.max_context, executor.num_blocks * executor.manifest.block_size // 2)
        fitting = [i for i, tree in enumerate(workload.trees) if _longest(tree) <= context]
        if not fitting:
            raise RequestError(
                f"no answer of {workload.name} fits into {context} tokens; take an engine with a longer context, "
                "or more KV blocks"
            )
        count = min(len(fitting), limit or len(fitting))
        self._chosen = [fitting[i * len(fitting) // count] for i in range(count)]
        self._skipped = len(workload.trees) - len(fitting)
        self._executor = ForcedExecutor(executor, workload.trees)
        self._engine = Engine(self._executor, SchedulerLimits(prefix_caching=False))
        self._executor.engine = self._engine
        most = 1 + max(forks(tree) for tree in workload.trees)
        self._params = {
            mode: SamplingParams(max_tokens=2**30, max_branches=most, seed=0, fork=policy == "always")
            for mode, policy in MODES.items()
        }
        self._runs: dict[tuple[str, int], list[_Run]] = {}

    def run(self, repeat: int = 1, progress: Callable[[int, int], None] | None = None) -> dict[str, Any]:
        """Decode everything and return what `apar bench trees --json` prints.

        Raises ExecutorError if a step failed or a reply lacks text: a defect of the runtime.
        """
        bandwidth = read_bandwidth(self._threads)
        self._decode(self._chosen[0], PLAIN, most_steps=8)  # first use of memory and caches
        total = repeat * len(self._chosen)
        for turn in range(repeat):
            for number, tree in enumerate(self._chosen):
                for mode in MODES if (turn + number) % 2 == 0 else reversed(MODES):
                    run = self._decode(tree, mode)
                    assert run is not None
                    self._runs.setdefault((mode, tree), []).append(run)
                if progress:
                    progress(turn * len(self._chosen) + number + 1, total)
        bandwidth = max(bandwidth, read_bandwidth(self._threads))
        return self._result(repeat, bandwidth)

    def close(self) -> None:
        """Free the engine. Idempotent."""
        self._engine.close()

    def _decode(self, tree: int, mode: str, most_steps: int | None = None) -> _Run | None:
        """One answer; None where it was given up after `most_steps`."""
        engine, executor = self._engine, self._executor
        executor.records = []
        foreign, began, first = executor.foreign_seconds, perf_counter(), 0.0
        request = engine.submit(f"{mode}-{tree}", executor.prompt(tree), self._params[mode])
        while not engine.scheduler.idle:
            engine.step()
            if not first and self._has_begun(request):
                first = perf_counter() - began - (executor.foreign_seconds - foreign)
            if most_steps is not None and len(executor.records) >= most_steps:
                engine.scheduler.cancel(request)
                return None
        seconds = perf_counter() - began - (executor.foreign_seconds - foreign)
        said = sum(len(branch.tokens) - len(branch.forks) for branch in request.branches)
        wanted = text_tokens(self._workload.trees[tree])
        if request.finish_reason != "stop" or said != wanted:
            raise ExecutorError(
                f"answer {tree}, {mode}, ended by {request.finish_reason} with {said} of {wanted} text tokens"
                f"{': ' + request.error if request.error else ''}"
            )
        return _Run(request, seconds, first, executor.records)

    def _has_begun(self, request: Request) -> bool:
        """Whether the request has a first token."""
        if not request.branches:
            return False
        root = request.root
        return root.slot < 0 or int(self._engine.scheduler.table.length[root.slot]) > root.start

    def _result(self, repeat: int, bandwidth: float) -> dict[str, Any]:
        manifest = self._engine_manifest
        answers = [self._answer(tree) for tree in self._chosen]
        forked = [answer for answer in answers if answer["forks"]]
        weight_bytes = step_weight_bytes(manifest)
        return {
            "bench": "trees",
            "engine": describe_engine(manifest, self._executor),
            "settings": {
                "workload": self._workload.name,
                "answers": len(answers),
                "left_out_too_long": self._skipped,
                "repeat": repeat,
                "prefix_caching": False,
            },
            "all": _compare(answers),
            "forked": _compare(forked),
            "step": self._steps(weight_bytes, bandwidth),
            "bandwidth": {
                "read_bytes_per_second": round(bandwidth),
                "threads": self._threads,
                "weight_bytes_per_step": weight_bytes,
            },
            "answers": answers,
            "example": self._example(),
            "peak_memory_bytes": peak_memory(),
            "machine": describe_machine(),
        }

    def _answer(self, tree: int) -> dict[str, Any]:
        shape = self._workload.trees[tree]
        found: dict[str, Any] = {
            "tree": tree,
            "prompt_tokens": shape["prompt_tokens"],
            "text_tokens": text_tokens(shape),
            "forks": forks(shape),
        }
        for mode in MODES:
            runs = self._runs[mode, tree]
            found[mode] = {
                "steps": runs[0].request.steps,
                "seconds": statistics.median(run.seconds for run in runs),
                "time_to_first_token": statistics.median(run.first_token for run in runs),
                "peak_kv_blocks": max(record.blocks for record in runs[0].records),
            }
        return found

    def _steps(self, weight_bytes: int, bandwidth: float) -> list[dict[str, Any]]:
        """Decode steps by number of rows: how many, median milliseconds in the executor, percent of the bound."""
        found: dict[int, list[float]] = {}
        for runs in self._runs.values():
            for run in runs:
                for record in run.records:
                    if record.rows == record.tokens:
                        found.setdefault(record.rows, []).append(record.seconds)
        one = statistics.median(found[1]) if 1 in found else None
        steps = []
        for rows, seconds in sorted(found.items()):
            median = statistics.median(seconds)
            steps.append(
                {
                    "rows": rows,
                    "steps": len(seconds),
                    "ms": 1e3 * median,
                    "ratio_to_one_row": None if one is None else median / one,
                    "tokens_per_second": rows / median,
                    "percent_of_bandwidth_bound": 100 * weight_bytes / bandwidth / median,
                }
            )
        return steps

    def _example(self) -> dict[str, Any]:
        """The answer with the most forks, step by step: its branches, and the KV books both ways."""
        tree = max(self._chosen, key=lambda i: forks(self._workload.trees[i]))
        branches = self._runs[FORKED, tree][0].request.branches
        return {
            "tree": tree,
            "branches": [
                {
                    "branch": branch.branch_id,
                    "parent": None if branch.parent is None else branch.parent.branch_id,
                    "depth": branch.depth,
                    "tokens": len(branch.tokens),
                    "first_step": branch.first_step,
                    "last_step": branch.last_step,
                }
                for branch in branches
            ],
            **{mode: _timeline(self._runs[mode, tree][0].records) for mode in MODES},
        }


def _timeline(records: Sequence[StepRecord]) -> dict[str, list[Any]]:
    return {
        "rows": [record.rows for record in records],
        "blocks": [record.blocks for record in records],
        "blocks_without_sharing": [record.listed for record in records],
        "ms": [round(1e3 * record.seconds, 4) for record in records],
    }


def _longest(tree: Tree) -> int:
    return int(tree["prompt_tokens"]) + text_tokens(tree) + forks(tree) + 4


def _compare(answers: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Both ways over some answers, and what branches gained; None where there are no answers."""
    if not answers:
        return None
    found: dict[str, Any] = {"answers": len(answers), "text_tokens": sum(a["text_tokens"] for a in answers)}
    for mode in MODES:
        rows = [answer[mode] for answer in answers]
        steps, seconds = sum(r["steps"] for r in rows), sum(r["seconds"] for r in rows)
        found[mode] = {
            "steps": steps,
            "seconds": seconds,
            "ms_per_step": 1e3 * sum(r["seconds"] - r["time_to_first_token"] for r in rows) / max(steps - len(rows), 1),
            "tokens_per_second": found["text_tokens"] / seconds,
            "mean_peak_kv_blocks": sum(r["peak_kv_blocks"] for r in rows) / len(rows),
        }
    found["step_gain"] = found[PLAIN]["steps"] / found[FORKED]["steps"]
    found["wall_gain"] = found[PLAIN]["seconds"] / found[FORKED]["seconds"]
    found["wall_gain_per_step_gain"] = found["wall_gain"] / found["step_gain"]
    return found
