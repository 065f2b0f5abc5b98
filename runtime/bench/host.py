"""The runtime's own cost a step: scheduler, books, inputs and sampling, with no model behind.

First answers of one shape are replayed: a root that forks `BRANCHES - 1` children early, then all of them decode
for as long as is measured, so every measured step has exactly `rows` rows. Steps in which branches are born come
before and are reported on their own. Then the recorded answers of a 7B model, a new one whenever fewer than `rows`
branches are alive: a busy server, in which prompts are computed and branches are born and end all the time.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import cycle
from typing import Any

from apar.export.errors import RequestError
from apar.runtime.bench.machine import describe_machine
from apar.runtime.bench.replay_server import Parts, ReplayServer
from apar.runtime.bench.text_cost import WARM_UP, measure_texts, replay_tokenizer
from apar.runtime.bench.workload import plan_workload
from apar.runtime.executor.recorded_trees import Tree
from apar.runtime.limits import ForkPolicy, SchedulerLimits
from apar.runtime.sampling_params import SamplingParams
from apar.runtime.service_level import ServiceLevel

BRANCHES = 8
"""Branches of a request, the root included; the last request has what is left."""
PROMPT = 32
MAIN = 3
"""Tokens that a root says before each fork."""
PARAMS = SamplingParams(max_tokens=2**30, max_branches=BRANCHES, seed=0)
PATIENCE = 1e6
"""Seconds, and times what a request takes alone: a service level that nobody misses."""


def bench_host(rows: int, steps: int = 200, vocab_size: int = 64, fork_policy: ForkPolicy = "always") -> dict[str, Any]:
    """Median cost of a step at `rows` live rows.

    Returns `host_us_per_step` (schedule + commit), its parts `schedule_us` and `commit_us`, `sample_us`, the
    stand-in model's `replay_us`, and `fork_step_us`: host cost of steps in which branches were born. Of the busy
    server `busy_us_per_step` (schedule + commit) and, as means, `busy_rows` of a step, `busy_births` of branches, those
    of roots included, and `busy_ends`.
    What its texts cost when every answer is streamed: `note_us_per_step` in the engine's thread, `message_us_per_step`
    in the thread that sends them, while the model computes, and `messages` of a step.
    `vocab_size` is what the sampler goes through. Under `adaptive` the service level is so wide that all rows stay in
    every step, and the policy judges all of them every few steps; where rows wait (the busy server) it does in each.
    Raises RequestError if a number is not usable.
    """
    if rows < 1 or steps < 1:
        raise RequestError(f"rows and steps must be at least 1, not {rows} and {steps}")
    sizes = [BRANCHES] * (rows // BRANCHES) + ([rows % BRANCHES] if rows % BRANCHES else [])
    # Rows are born while others decode already; everyone must still be there at the end.
    lasting = steps + (MAIN + 2) * BRANCHES + len(sizes) + 64
    trees = [_tree(size, lasting, len(sizes)) for size in sizes]
    context = PROMPT + 2 * lasting + 64
    limits = SchedulerLimits(
        max_rows=rows + 1,
        max_step_tokens=max(4096, 2 * rows + 2),
        max_live_branches=2 * rows + 8,
        fork_policy=fork_policy,
        service_level=ServiceLevel(PATIENCE, PATIENCE),
    )
    server = ReplayServer(trees, context, limits, vocab_size, PARAMS)
    try:
        for i in range(len(trees)):
            server.submit(i)
        steady, forking = _measure(server, rows, steps)
    finally:
        server.engine.close()
    workload = plan_workload("vicuna-7b", concurrency=rows)
    server = ReplayServer(workload.trees, workload.longest_path, limits, vocab_size, PARAMS)
    try:
        busy = _measure_busy(server, workload.order, rows, steps)
    finally:
        server.engine.close()
    tokenizer = replay_tokenizer()
    server = ReplayServer(workload.trees, workload.longest_path, limits, len(tokenizer.bytes_table), PARAMS)
    try:
        texts = measure_texts(server, tokenizer, workload.order, rows, steps)
    finally:
        server.engine.close()
    return {
        "bench": "host",
        **_summary(rows, steady, forking),
        **busy,
        **texts,
        "vocab_size": vocab_size,
        "fork_policy": fork_policy,
        "machine": describe_machine(),
    }


def _measure(server: ReplayServer, rows: int, steps: int) -> tuple[list[Parts], list[Parts]]:
    steady: list[Parts] = []
    forking: list[Parts] = []
    while len(steady) < steps:
        report, parts = server.step()
        record = server.executor.records[-1]
        if report.forked:
            forking.append(parts)
        elif record.decodes and record.rows == rows:
            steady.append(parts)
    return steady, forking


def _measure_busy(server: ReplayServer, order: Sequence[int], rows: int, steps: int) -> dict[str, float]:
    trees = cycle(order)
    seconds: list[float] = []
    live = born = ended = 0
    for step in range(WARM_UP + steps):
        missing = server.missing(rows)
        for _ in range(missing):
            server.submit(next(trees))
        report, (schedule, _, _, commit) = server.step()
        if step >= WARM_UP:
            seconds.append(schedule + commit)
            live += server.executor.records[-1].rows
            born += missing + len(report.forked)
            ended += len(report.ended)
    return {
        "busy_us_per_step": round(1e6 * statistics.median(seconds), 2),
        "busy_rows": round(live / steps, 1),
        "busy_births": round(born / steps, 2),
        "busy_ends": round(ended / steps, 2),
    }


def _summary(rows: int, steady: Sequence[Parts], forking: Sequence[Parts]) -> dict[str, Any]:
    schedule, model, sample, commit = (round(1e6 * statistics.median(part), 2) for part in zip(*steady, strict=True))
    host = sorted(parts[0] + parts[3] for parts in steady)
    return {
        "rows": rows,
        "steps": len(steady),
        "host_us_per_step": round(1e6 * statistics.median(host), 2),
        "host_us_p10": round(1e6 * host[len(host) // 10], 2),
        "host_us_p99": round(1e6 * host[min(len(host) - 1, int(0.99 * len(host)))], 2),
        "schedule_us": schedule,
        "commit_us": commit,
        "sample_us": sample,
        "replay_us": model,
        "fork_step_us": round(1e6 * statistics.median(p[0] + p[3] for p in forking), 2) if forking else None,
    }


def _tree(branches: int, lasting: int, trees: int) -> Tree:
    segments = [[MAIN, lasting] for _ in range(branches - 1)]
    return {"prompt_tokens": PROMPT + trees.bit_length(), "segments": [*segments, [lasting, 0]]}
