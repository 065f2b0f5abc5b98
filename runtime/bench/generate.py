"""An engine on its own prompts: plain decoding and branches side by side.

Greedy, prefix caching off (a repeated prompt would be free), plain and forked runs alternating, the order turned
round from repeat to repeat, medians over repeats. One request at a time is the measure of latency; `concurrency` > 1
keeps that many in flight and measures throughput.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

from apar.runtime.bench.bandwidth import read_bandwidth, step_weight_bytes
from apar.runtime.bench.machine import describe_engine, describe_machine, peak_memory
from apar.runtime.bench.timed_executor import TimedExecutor
from apar.runtime.engine import Engine
from apar.runtime.executor.base import Executor
from apar.runtime.executor.threads import default_threads
from apar.runtime.limits import SchedulerLimits
from apar.runtime.outputs import RequestOutput
from apar.runtime.sampling_params import SamplingParams
from apar.runtime.speculative.options import DraftOptions
from apar.runtime.text_engine import Prompt, TextEngine
from apar.runtime.tokenizer import Tokenizer

PLAIN, FORKED = "plain", "forked"
MODES = (PLAIN, FORKED)
DRAFTED_MODES = {
    "medusa": (False, "medusa", False),
    "forked+medusa": (True, "medusa", False),
    "forked+ngram": (True, "ngram", False),
    "forked+medusa measured": (True, "medusa", True),
    "forked+ngram measured": (True, "ngram", True),
}
"""Further modes: whether branches fork, the draft method, and whether drafts go by measured time, as in service, or
fill the budget in every step, which gives the same steps on every machine."""
Progress = Callable[[int, int], None]
"""Called with sets of prompts run, and in all."""


@dataclass(slots=True)
class _Reply:
    """One prompt in one mode, over all repeats."""

    output: RequestOutput
    seconds: list[float] = field(default_factory=list)
    first_token: list[float] = field(default_factory=list)

    def figures(self) -> dict[str, Any]:
        output = self.output
        return {
            "tokens": output.usage.completion_tokens,
            "steps": output.timing.steps,
            "branches": len(output.branches),
            "seconds": statistics.median(self.seconds),
            "time_to_first_token": statistics.median(self.first_token),
            "peak_kv_blocks": output.peak_kv_blocks,
            "finish_reason": output.finish_reason,
        }


class GenerateBench:
    """Runs prompts in both modes. Closes the executor at the end.

    Args:
        executor: a loaded executor.
        tokenizer: of the same engine.
        params: of every request; `fork` is the bench's own business.
        threads: what the executor uses, for the bandwidth measurement.
        drafts: speculative decoding of the modes with drafts, by method; methods that are not there are left out.
    """

    def __init__(
        self,
        executor: Executor,
        tokenizer: Tokenizer,
        params: dict[str, Any],
        threads: int | None = None,
        limits: SchedulerLimits | None = None,
        drafts: Mapping[str, DraftOptions] | None = None,
    ) -> None:
        self._executor = TimedExecutor(executor)
        limits = limits or SchedulerLimits(prefix_caching=False)
        self._engine = TextEngine(Engine(self._executor, limits), tokenizer)
        # Engines take turns on one executor: each is idle, with no block in use, when another one runs.
        self._engines = dict.fromkeys(MODES, self._engine)
        forks = {PLAIN: False, FORKED: True}
        self._drafts = dict(drafts or {})
        for mode, (fork, method, measured) in DRAFTED_MODES.items():
            if method in self._drafts and not (measured and self._drafts[method].draft_budget):
                draft = dataclasses.replace(self._drafts[method], measured=measured)
                self._engines[mode] = TextEngine(Engine(self._executor, limits, draft=draft), tokenizer)
                forks[mode] = fork
        self._modes = tuple(forks)
        self._params = {mode: SamplingParams(**{"seed": 0, **params, "fork": fork}) for mode, fork in forks.items()}
        self._threads = threads or default_threads()
        self._replies: dict[tuple[str, int], _Reply] = {}
        self._step_seconds: dict[int, list[float]] = {}
        self._set_seconds: dict[str, list[float]] = {mode: [] for mode in self._modes}

    def run(
        self,
        prompts: Sequence[tuple[str, Prompt]],
        repeat: int = 3,
        concurrency: int = 1,
        progress: Progress | None = None,
    ) -> dict[str, Any]:
        """Measure named prompts; the result is what `apar bench generate --json` prints.

        Raises RequestError where a prompt is not acceptable.
        """
        encoded = [self._engine.encode(prompt) for _, prompt in prompts]
        numbers = range(len(encoded))
        sets = [[i] for i in numbers] if concurrency == 1 else [list(numbers)]
        bandwidth = read_bandwidth(self._threads)
        self._run_set(encoded, sets[0][:1], PLAIN, 1, keep=False)  # first use of memory and caches
        done, total = 0, repeat * len(sets)
        for turn in range(repeat):
            took = dict.fromkeys(self._modes, 0.0)
            for chosen in sets:
                for mode in self._modes if turn % 2 == 0 else reversed(self._modes):
                    took[mode] += self._run_set(encoded, chosen, mode, concurrency)
                done += 1
                if progress:
                    progress(done, total)
            for mode in self._modes:
                self._set_seconds[mode].append(took[mode])
        bandwidth = max(bandwidth, read_bandwidth(self._threads))
        return self._result([name for name, _ in prompts], repeat, concurrency, bandwidth)

    def close(self) -> None:
        """Free the engine. Idempotent."""
        self._engine.close()

    def _run_set(
        self, encoded: Sequence[list[int]], chosen: Iterable[int], mode: str, concurrency: int, keep: bool = True
    ) -> float:
        """Run some prompts, at most `concurrency` at a time; returns seconds from first to last."""
        engine, records = self._engines[mode], self._executor.records
        waiting = list(chosen)[::-1]
        running: dict[str, int] = {}
        began = perf_counter()
        while waiting or running:
            while waiting and len(running) < concurrency:
                number = waiting.pop()
                answer = engine.submit(encoded[number], self._params[mode])
                running[answer.request.request_id] = number
            records.clear()
            before = perf_counter()
            answers = engine.step()
            seconds = perf_counter() - before
            if keep and records and records[-1].decodes and mode in MODES:
                self._step_seconds.setdefault(records[-1].rows, []).append(seconds)
            for answer in answers:
                if answer.finished:
                    number = running.pop(answer.request.request_id)
                    if keep:
                        self._book(mode, number, answer.output())
        return perf_counter() - began

    def _book(self, mode: str, number: int, output: RequestOutput) -> None:
        reply = self._replies.setdefault((mode, number), _Reply(output))
        reply.seconds.append(output.timing.total)
        reply.first_token.append(output.timing.time_to_first_token)

    def _result(self, names: Sequence[str], repeat: int, concurrency: int, bandwidth: float) -> dict[str, Any]:
        manifest = self._executor.manifest
        replies: list[dict[str, Any]] = [
            {"id": name, **{mode: self._replies[mode, i].figures() for mode in self._modes}}
            for i, name in enumerate(names)
        ]
        forked = [reply for reply in replies if reply[FORKED]["branches"] > 1]
        weight_bytes = step_weight_bytes(manifest)
        return {
            "bench": "generate",
            "engine": describe_engine(manifest, self._executor),
            "settings": {
                "repeat": repeat,
                "concurrency": concurrency,
                "max_tokens": self._params[PLAIN].max_tokens,
                "max_branches": self._params[PLAIN].max_branches,
                "max_depth": self._params[PLAIN].max_depth,
                "prefix_caching": False,
                "drafts": {method: dataclasses.asdict(options) for method, options in self._drafts.items()},
            },
            "all": _compare(replies, self._modes),
            "forked": _compare(forked, self._modes),
            "drafts": {mode: self._acceptance(mode) for mode in self._modes if mode not in MODES},
            "throughput": self._throughput(replies),
            "step": self._steps(weight_bytes, bandwidth),
            "bandwidth": {
                "read_bytes_per_second": round(bandwidth),
                "threads": self._threads,
                "weight_bytes_per_step": weight_bytes,
            },
            "replies": replies,
            "peak_memory_bytes": peak_memory(),
            "machine": describe_machine(),
        }

    def _throughput(self, replies: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Tokens a second over the whole set of prompts."""
        found: dict[str, Any] = {}
        for mode in self._modes:
            seconds = statistics.median(self._set_seconds[mode])
            found[mode] = {"seconds": seconds, "tokens_per_second": sum(r[mode]["tokens"] for r in replies) / seconds}
        found["gain"] = found[FORKED]["tokens_per_second"] / found[PLAIN]["tokens_per_second"]
        return found

    def _acceptance(self, mode: str) -> dict[str, Any]:
        """What became of a mode's drafts, over all runs."""
        speculation = self._engines[mode].engine.scheduler.speculation
        assert speculation is not None
        rows = max(int(speculation.lengths.sum()), 1)
        return {
            "draft_tokens": speculation.drafted,
            "accepted_draft_tokens": speculation.accepted,
            "accepted_lengths": speculation.lengths.tolist(),
            "drafts": rows,
            "tokens_per_draft": speculation.drafted / rows,
            "acceptance_length": 1 + speculation.accepted / rows,
        }

    def _steps(self, weight_bytes: int, bandwidth: float) -> list[dict[str, Any]]:
        """Decode steps by number of rows: how many, median milliseconds, percent of the bandwidth bound."""
        bound = weight_bytes / bandwidth
        found = []
        for rows, seconds in sorted(self._step_seconds.items()):
            median = statistics.median(seconds)
            found.append(
                {
                    "rows": rows,
                    "steps": len(seconds),
                    "ms": 1e3 * median,
                    "tokens_per_second": rows / median,
                    "percent_of_bandwidth_bound": 100 * bound / median,
                }
            )
        return found


def _compare(replies: Sequence[dict[str, Any]], modes: Sequence[str]) -> dict[str, Any] | None:
    """All modes over some replies, and what branches and drafts gained; None where there are no replies."""
    if not replies:
        return None
    found: dict[str, Any] = {"replies": len(replies)}
    for mode in modes:
        rows = [reply[mode] for reply in replies]
        tokens, steps = sum(r["tokens"] for r in rows), sum(r["steps"] for r in rows)
        seconds = sum(r["seconds"] for r in rows)
        decoding = sum(r["seconds"] - r["time_to_first_token"] for r in rows)
        found[mode] = {
            "tokens": tokens,
            "steps": steps,
            "tokens_per_step": tokens / steps,
            "seconds": seconds,
            "ms_per_token": 1e3 * seconds / tokens,
            "ms_per_decode_step": 1e3 * decoding / max(steps - len(rows), 1),
            "branches_per_reply": sum(r["branches"] for r in rows) / len(rows),
            "mean_peak_kv_blocks": sum(r["peak_kv_blocks"] for r in rows) / len(rows),
            "max_peak_kv_blocks": max(r["peak_kv_blocks"] for r in rows),
        }
    # An APAR model that may not fork says less (its details are in the branches), so the two replies cannot be timed
    # against each other. The baseline is the forked reply decoded plainly: a step a token, at plain decoding's pace.
    plain, forked = found[PLAIN], found[FORKED]
    first = sum(reply[FORKED]["time_to_first_token"] for reply in replies)
    same = first + (forked["tokens"] - len(replies)) * plain["ms_per_decode_step"] / 1e3
    found["same_reply_plain"] = {"steps": forked["tokens"], "seconds": same}
    found["step_gain"] = forked["tokens_per_step"]
    found["wall_gain"] = same / forked["seconds"]
    found["wall_gain_per_step_gain"] = found["wall_gain"] / found["step_gain"]
    for mode in modes:
        if mode not in MODES:
            # A mode that forks gives the forked reply, another one the plain reply; either decoded plainly is the base.
            part = found[mode]
            base = same if DRAFTED_MODES[mode][0] else plain["seconds"]
            part["step_gain"] = part["tokens_per_step"]
            part["wall_gain"] = base / part["seconds"]
    return found
