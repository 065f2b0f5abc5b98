"""Recorded Vicuna-7B answers through the real scheduler and the device's executor: forks and drafts, off and on."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import numpy as np

from apar.runtime.bench.gpu.machine import Machine
from apar.runtime.bench.gpu.recorded_drafts import RecordedDrafter
from apar.runtime.bench.workload import Workload, forks, plan_workload
from apar.runtime.engine import Engine
from apar.runtime.executor.cuda.executor import CudaExecutor
from apar.runtime.executor.recorded_trees import text_tokens
from apar.runtime.executor.replay import ReplayExecutor
from apar.runtime.executor.replay_script import Script
from apar.runtime.limits import SchedulerLimits
from apar.runtime.sampling_params import SamplingParams
from apar.runtime.speculative.options import DraftOptions
from apar.runtime.speculative.speculation import Speculation
from apar.runtime.speculative.tree import DraftTree, rank_share
from apar.runtime.step import Float32Array, StepInputs

DRY_TREES = [
    {"prompt_tokens": 5, "segments": [[2, 3], [2, 0]]},
    {"prompt_tokens": 4, "segments": [[3, 2]]},
]


class ForcedExecutor(ReplayExecutor):
    """Computes every step on the device, samples from it, and then says what a recorded answer goes on with."""

    def __init__(self, executor: CudaExecutor, workload: Workload) -> None:
        decoder = executor.manifest.decoder
        super().__init__(
            workload.trees,
            num_blocks=executor.num_blocks,
            block_size=executor.manifest.block_size,
            vocab_size=decoder.vocab_size,
            max_context=decoder.max_context,
        )
        self.memory_bound_tokens = executor.memory_bound_tokens
        self._inner = executor
        self.foreign_seconds = 0.0
        """Time of the replay, which a server would not spend."""

    @property
    def script(self) -> Script:
        """The automaton of the recorded answers."""
        return self._script

    def expect_drafts(self, chains: bool) -> None:
        """See Executor.expect_drafts."""
        self._inner.expect_drafts(chains)

    def execute(self, inputs: StepInputs) -> Float32Array:
        """See Executor.execute."""
        logits = self._inner.logits(inputs)
        count = inputs.logits_rows.size
        nobody, numbers = np.zeros(count, np.bool_), np.zeros((count, 4))
        if count:
            logits.draw(logits.shape[1], [], nobody, numbers, numbers[:, 0])
        began = time.perf_counter()
        forced = super().execute(inputs)
        self.foreign_seconds += time.perf_counter() - began
        return forced


def recorded_answers(machine: Machine, executor: CudaExecutor, concurrency: int, requests: int) -> dict[str, Any]:
    """Forks off and on, without and with drafts, `concurrency` requests at a time.

    Times are of everything but the replay, its sampling and its drafter: what a server with this model would take.
    Drafts are made from the recorded text, the default Medusa tree's shape, right as often as `rank_share` says;
    they cost their share of the step, while the heads that real ones take are not computed.
    """
    if machine.dry:
        workload = Workload("dry", DRY_TREES, list(range(requests)), None, concurrency)
    else:
        workload = plan_workload("vicuna-7b", requests=requests, concurrency=concurrency)
    rows = [
        _run(machine, executor, workload, fork=fork, drafts=drafts)
        for fork in (False, True)
        for drafts in (False, True)
    ]
    plain, drafted, forked, both = rows
    return {
        "ok": all(row["requests"] == len(workload.order) for row in rows),
        "rows": rows,
        "gain of forks, tokens/s": forked["tokens/s"] / plain["tokens/s"],
        "gain of forks, steps": plain["steps"] / forked["steps"],
        "gain of drafts, tokens/s": drafted["tokens/s"] / plain["tokens/s"],
        "gain of forks and drafts, tokens/s": both["tokens/s"] / plain["tokens/s"],
        "gain of forks and drafts, steps": plain["steps"] / both["steps"],
        "drafts": f"from the recorded text; the token that comes is a depth's first guess with {rank_share(0)}, its "
        f"second with {rank_share(1)}, its third with {rank_share(2):.3f}, ...; no heads are computed",
        "target": "gain of forks, tokens/s at 64 requests >= 1.7",
    }


def _run(machine: Machine, executor: CudaExecutor, workload: Workload, *, fork: bool, drafts: bool) -> dict[str, Any]:
    """All requests of a workload, one way."""
    forced = ForcedExecutor(executor, workload)
    limits = SchedulerLimits(
        max_rows=machine.pick(256, 4), max_step_tokens=machine.pick(1024, 16), prefix_caching=False
    )
    engine = Engine(forced, limits)
    drafter = _draft(engine, forced) if drafts else None
    most = 1 + max(forks(tree) for tree in workload.trees)
    params = SamplingParams(max_tokens=2**30, max_branches=most, seed=0, fork=fork)
    waiting, live, steps, tokens, done = deque(workload.order), 0, 0, 0, 0
    planned = executor.foreseen_plans
    began = time.perf_counter()
    while waiting or live:
        while waiting and live < workload.concurrency:
            tree = waiting.popleft()
            engine.submit(str(len(waiting)), forced.replay_prompt(tree, len(waiting)), params)
            tokens += text_tokens(workload.trees[tree])
            live += 1
        report = engine.step()
        steps += 1
        if report is not None:
            live -= len(report.finished)
            done += sum(request.finish_reason == "stop" for request in report.finished)
    seconds = time.perf_counter() - began - forced.foreign_seconds - engine.sample_seconds
    speculation = engine.scheduler.speculation
    if drafter is not None:
        seconds -= drafter.foreign_seconds
    engine.close()
    return {
        "forks": fork,
        "drafts": drafts,
        "requests": done,
        "steps": steps,
        "text tokens": tokens,
        "seconds": seconds,
        "tokens/s": tokens / seconds,
        "ms a step": 1e3 * seconds / steps,
        "host ms a step": 1e3 * (engine.host_seconds - (drafter.foreign_seconds if drafter else 0.0)) / steps,
        "plans foreseen %": 100 * (executor.foreseen_plans - planned) / steps,
        "drafted a step": speculation.drafted / steps if speculation else 0.0,
        "accepted a step": speculation.accepted / steps if speculation else 0.0,
    }


def _draft(engine: Engine, forced: ForcedExecutor) -> RecordedDrafter:
    """Give an engine drafts from the recorded answers."""
    # Not by measured time: what this executor's steps take includes the replay.
    options = DraftOptions("medusa", measured=False)
    tree = DraftTree(options.paths())
    books = engine.scheduler
    drafter = RecordedDrafter(forced.script, books.table, tree, forced.manifest.decoder.vocab_size)
    books.speculation = Speculation(
        options, drafter, books.table, books.requests, books.blocks, forced.manifest.tokens, forced.memory_bound_tokens
    )
    forced.expect_drafts(tree.linear)
    return drafter
