"""Recorded answers through the real engine, scheduler and KV books, on a clock that a step-cost model drives.

No model runs and nothing is timed: a step lasts as long as the cost model says, requests arrive in that time, and the
same options give the same result to the last digit on any machine.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from apar.export.errors import ExecutorError, RequestError
from apar.runtime.bench.cost_model import CostModel, ModelStepCost
from apar.runtime.bench.virtual_executor import VirtualExecutor
from apar.runtime.bench.workload import Workload, forks
from apar.runtime.branch import Request
from apar.runtime.engine import Engine
from apar.runtime.executor.recorded_trees import text_tokens
from apar.runtime.executor.replay import ReplayExecutor
from apar.runtime.limits import SchedulerLimits
from apar.runtime.sampling_params import SamplingParams


@dataclass(slots=True)
class Reply:
    """Times of one request, in seconds of the virtual clock."""

    request: Request
    tree: int
    arrived: float
    text: int
    """Text tokens of the recorded answer."""
    first_token: float = -1.0
    finished: float = -1.0
    steps: int = 0
    """Steps in which it sampled."""

    @property
    def latency(self) -> float:
        """From arrival to the end."""
        return self.finished - self.arrived

    @property
    def wait(self) -> float:
        """From arrival to the first token."""
        return self.first_token - self.arrived


class ReplayBench:
    """One run of a workload.

    Args:
        workload: requests and their arrivals.
        model: duration of a step.
        kv_blocks, block_size: the KV pool; kv_blocks None: as many as the model says fit.
        host_blocks: blocks of host memory that keep what the pool has no room for.
        same_prompts: an answer that is given again was asked for with the same prompt; otherwise no prompt comes twice.
        limits: sizes of the scheduler, its fork policy, and the service level that counts as goodput.

    Raises CapacityError, RequestError or ExecutorError if these do not fit together or a tree is malformed.
    """

    def __init__(
        self,
        workload: Workload,
        model: CostModel,
        *,
        kv_blocks: int | None = None,
        block_size: int = 16,
        host_blocks: int = 0,
        same_prompts: bool = False,
        limits: SchedulerLimits | None = None,
    ) -> None:
        if block_size < 1:
            raise RequestError(f"block_size must be at least 1, not {block_size}")
        self.workload = workload
        self.model = model
        self.limits = limits or SchedulerLimits()
        self.block_size = block_size
        self.host_blocks = host_blocks
        self.same_prompts = same_prompts
        self.kv_blocks = model.kv_pool_tokens // block_size if kv_blocks is None else kv_blocks
        context = workload.longest_path
        if self.kv_blocks * block_size < context:
            raise RequestError(
                f"{self.kv_blocks} KV blocks of {block_size} do not hold the longest answer of {workload.name}: "
                f"it takes {-(-context // block_size)}"
            )
        replay = ReplayExecutor(
            workload.trees,
            num_blocks=self.kv_blocks,
            host_blocks=host_blocks,
            block_size=block_size,
            max_context=context,
        )
        self._replay = replay
        self.executor = VirtualExecutor(replay, model)
        self.engine = self.executor.engine = Engine(
            self.executor, self.limits, clock=lambda: self.executor.now, step_cost=ModelStepCost(model)
        )
        self.replies: list[Reply] = []
        self._params = SamplingParams(
            max_tokens=2**30,
            max_branches=1 + max(forks(tree) for tree in workload.trees),
            seed=0,
        )
        self._open: dict[str, Reply] = {}

    def run(self, progress: Callable[[int, int], None] | None = None) -> dict[str, Any]:
        """Replay everything and return the result (see `_result`); `progress` gets replies done and their number.

        Raises ExecutorError if a step failed or a reply lacks text: a defect of the runtime.
        """
        try:
            self._replay_all(progress)
        finally:
            self.engine.close()
        return self._result()

    def _replay_all(self, progress: Callable[[int, int], None] | None) -> None:
        workload, clock, scheduler = self.workload, self.executor, self.engine.scheduler
        total, arrivals = len(workload), workload.arrivals
        submitted = done = 0
        while done < total:
            if arrivals is None:
                while submitted < total and submitted - done < workload.concurrency:
                    self._submit(submitted, clock.now)
                    submitted += 1
            else:
                if scheduler.idle:
                    clock.now = max(clock.now, arrivals[submitted])
                while submitted < total and arrivals[submitted] <= clock.now:
                    self._submit(submitted, arrivals[submitted])
                    submitted += 1
            ended = self._step()
            done += ended
            if progress is not None and ended:
                progress(done, total)

    def _submit(self, index: int, arrived: float) -> None:
        tree = self.workload.order[index]
        name = str(index)
        # Another salt for every request: the prefix cache finds nothing of one prompt in another.
        prompt = self._replay.replay_prompt(tree, 0 if self.same_prompts else index)
        request = self.engine.submit(name, prompt, self._params, arrived=arrived)
        reply = Reply(request, tree, arrived, text_tokens(self.workload.trees[tree]))
        self.replies.append(reply)
        self._open[name] = reply

    def _step(self) -> int:
        """Run a step; returns how many replies it finished."""
        report = self.engine.step()
        if report is None:
            raise ExecutorError("the scheduler has nothing to do, but replies are open: a defect of the runtime")
        now = self.executor.now
        for branch in report.branches:
            reply = self._open[branch.request.request_id]
            if reply.first_token < 0:
                reply.first_token = now
        for request in report.finished:
            reply = self._open.pop(request.request_id)
            reply.finished = now
            reply.steps = request.steps
            said = sum(len(branch.tokens) - len(branch.forks) for branch in request.branches)
            if request.finish_reason != "stop" or said != reply.text:
                raise ExecutorError(
                    f"reply {request.request_id} ended by {request.finish_reason} with {said} of {reply.text} text "
                    f"tokens: a defect of the runtime{': ' + request.error if request.error else ''}"
                )
        return len(report.finished)

    def _result(self) -> dict[str, Any]:
        """Everything that was counted, as JSON goes. Times are seconds of the virtual clock."""
        replies, records = self.replies, self.executor.records
        counters, host = self.engine.scheduler.counters, self.engine.cache.host
        seconds = np.array([record.seconds for record in records])
        blocks = np.array([record.blocks for record in records])
        saved = np.array([record.listed - record.blocks for record in records])
        works = [record.work for record in records]
        duration = max(reply.finished for reply in replies) - replies[0].arrived
        text = sum(reply.text for reply in replies)
        request_steps = sum(reply.steps for reply in replies)
        forked = [reply for reply in replies if forks(self.workload.trees[reply.tree])]
        good = self._within_service_level()
        cached = sum(reply.request.cached_tokens for reply in replies)
        return {
            "bench": "replay",
            "settings": self._settings(),
            "requests": len(replies),
            "steps": len(records),
            "tokens": text,
            "request_steps": request_steps,
            "step_reduction": text / request_steps,
            "step_reduction_forked": sum(r.text for r in forked) / sum(r.steps for r in forked) if forked else None,
            "duration": duration,
            "busy": float(seconds.sum()),
            "mean_step": float(seconds.mean()),
            "mean_rows": float(np.average([work.rows for work in works], weights=seconds)),
            "throughput": {"tokens_per_second": text / duration, "requests_per_second": len(replies) / duration},
            "goodput": {"requests_per_second": sum(good) / duration, "share": sum(good) / len(good)},
            "latency": _spread([reply.latency for reply in replies]),
            "time_to_first_token": _spread([reply.wait for reply in replies]),
            "peak_blocks": int(blocks.max()),
            "mean_blocks": float(np.average(blocks, weights=seconds)),
            "blocks_saved": {"peak": int(saved.max()), "mean": float(np.average(saved, weights=seconds))},
            "tokens_computed": sum(work.tokens for work in works),
            "tokens_cached": cached,
            "tokens_recomputed": sum(work.tokens for work in works) + cached - sum(map(_undisturbed, replies)),
            "tokens_attended": sum(work.pairs for work in works),
            "kv_tokens_of_rows": sum(work.kv_read for work in works),
            "kv_tokens_read": sum(work.kv_read - work.kv_shared * self.model.shared_prefix_reads for work in works),
            "forks": counters.forks,
            "forks_denied": dict(sorted(counters.forks_denied.items())),
            "pauses": counters.pauses,
            "preemptions": counters.preemptions,
            "blocks_swapped_out": 0 if host is None else host.swapped_out,
            "blocks_swapped_in": 0 if host is None else host.swapped_in,
        }

    def _within_service_level(self) -> list[bool]:
        level, trees = self.limits.service_level, self.workload.trees
        alone: dict[int, float] = {}
        for reply in self.replies:
            if reply.tree not in alone:
                prompt = trees[reply.tree]["prompt_tokens"]
                alone[reply.tree] = self.model.unloaded_seconds(prompt, reply.text, self.limits.max_step_tokens)
        return [
            reply.wait <= level.first_token_seconds and reply.latency <= level.latency_factor * alone[reply.tree]
            for reply in self.replies
        ]

    def _settings(self) -> dict[str, Any]:
        return {
            "workload": self.workload.name,
            "concurrency": self.workload.concurrency if self.workload.arrivals is None else None,
            "requests_per_second": self.workload.rate,
            "seed": self.workload.seed,
            "fork_policy": self.limits.fork_policy,
            "kv_blocks": self.kv_blocks,
            "host_blocks": self.host_blocks,
            "same_prompts": self.same_prompts,
            "block_size": self.block_size,
            "max_rows": self.limits.max_rows,
            "max_step_tokens": self.limits.max_step_tokens,
            "service_level": dataclasses.asdict(self.limits.service_level),
            "cost_model": dataclasses.asdict(self.model),
        }


def _undisturbed(reply: Reply) -> int:
    """Tokens that a request computes if nothing of it is ever computed again: the prompt, of every branch all that it
    sampled but the last, and a child's [Fork] and [Child]."""
    branches = reply.request.branches
    said = sum(len(branch.tokens) + branch.end_dropped for branch in branches)
    return len(reply.request.prompt) + said - len(branches) + 2 * (len(branches) - 1)


def _spread(values: Sequence[float]) -> dict[str, float]:
    p50, p90, p99 = np.percentile(np.array(values), (50, 90, 99))
    return {"mean": sum(values) / len(values), "p50": float(p50), "p90": float(p90), "p99": float(p99)}
