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
from apar.runtime.bench.cost_model import CostModel
from apar.runtime.bench.virtual_executor import VirtualExecutor
from apar.runtime.bench.workload import Workload, forks
from apar.runtime.branch import Request
from apar.runtime.engine import Engine
from apar.runtime.executor.replay import ReplayExecutor
from apar.runtime.executor.replay_script import text_tokens
from apar.runtime.limits import SchedulerLimits
from apar.runtime.sampling_params import SamplingParams

FORKING: dict[str, dict[str, Any]] = {"always": {"fork": True}, "never": {"fork": False}}
"""Sampling parameters by the name of a policy. Where a fork is banned, its detail comes inline."""


@dataclass(frozen=True, slots=True)
class ServiceLevel:
    """What a user puts up with; requests within it count as goodput."""

    first_token_seconds: float = 0.5
    """From arrival to the first token, at most."""
    latency_factor: float = 2.5
    """From arrival to the end, at most this many times what the request takes alone and without forks."""

    def __post_init__(self) -> None:
        if not (self.first_token_seconds > 0 and self.latency_factor > 0):
            raise RequestError(
                "the limits of a service level must be above 0, not "
                f"{self.first_token_seconds} s and {self.latency_factor}"
            )


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
        fork: `always` (wherever the recorded answer has a detail) or `never`.
        kv_blocks, block_size: the KV pool; kv_blocks None: as many as the model says fit.
        limits: sizes of the scheduler.
        service_level: what counts as goodput.

    Raises CapacityError, RequestError or ExecutorError if these do not fit together or a tree is malformed.
    """

    def __init__(
        self,
        workload: Workload,
        model: CostModel,
        *,
        fork: str = "always",
        kv_blocks: int | None = None,
        block_size: int = 16,
        limits: SchedulerLimits | None = None,
        service_level: ServiceLevel | None = None,
    ) -> None:
        if fork not in FORKING:
            raise RequestError(f"fork is {fork!r}, it must be one of {', '.join(FORKING)}")
        if block_size < 1:
            raise RequestError(f"block_size must be at least 1, not {block_size}")
        self.workload = workload
        self.model = model
        self.fork = fork
        self.limits = limits or SchedulerLimits()
        self.service_level = service_level or ServiceLevel()
        self.block_size = block_size
        self.kv_blocks = model.kv_pool_tokens // block_size if kv_blocks is None else kv_blocks
        context = workload.longest_path
        if self.kv_blocks * block_size < context:
            raise RequestError(
                f"{self.kv_blocks} KV blocks of {block_size} do not hold the longest answer of {workload.name}: "
                f"it takes {-(-context // block_size)}"
            )
        replay = ReplayExecutor(workload.trees, num_blocks=self.kv_blocks, block_size=block_size, max_context=context)
        self._replay = replay
        self.executor = VirtualExecutor(replay, model)
        self.engine = self.executor.engine = Engine(self.executor, self.limits)
        self.replies: list[Reply] = []
        self._params = SamplingParams(
            max_tokens=2**30,
            max_branches=1 + max(forks(tree) for tree in workload.trees),
            seed=0,
            **FORKING[fork],
        )
        self._open: dict[str, Reply] = {}
        self._silent: list[Reply] = []
        """Replies without a first token, in the order of arrival, in which requests are admitted."""

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
        request = self.engine.submit(name, self._replay.replay_prompt(tree, index), self._params)
        reply = Reply(request, tree, arrived, text_tokens(self.workload.trees[tree]))
        self.replies.append(reply)
        self._open[name] = reply
        self._silent.append(reply)

    def _step(self) -> int:
        """Run a step; returns how many replies it finished."""
        report = self.engine.step()
        if report is None:
            raise ExecutorError("the scheduler has nothing to do, but replies are open: a defect of the runtime")
        now = self.executor.now
        self._note_first_tokens()
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

    def _note_first_tokens(self) -> None:
        table, now = self.engine.scheduler.table, self.executor.now
        silent = []
        for index, reply in enumerate(self._silent):
            if not reply.request.branches:
                silent += self._silent[index:]
                break
            root = reply.request.root
            if root.slot < 0 or table.length[root.slot] > root.start:
                reply.first_token = now
            else:
                silent.append(reply)
        self._silent = silent

    def _result(self) -> dict[str, Any]:
        """Everything that was counted, as JSON goes. Times are seconds of the virtual clock."""
        replies, records = self.replies, self.executor.records
        scheduler = self.engine.scheduler
        seconds = np.array([record.seconds for record in records])
        blocks = np.array([record.blocks for record in records])
        saved = np.array([record.listed - record.blocks for record in records])
        works = [record.work for record in records]
        duration = max(reply.finished for reply in replies) - replies[0].arrived
        text = sum(reply.text for reply in replies)
        request_steps = sum(reply.steps for reply in replies)
        forked = [reply for reply in replies if forks(self.workload.trees[reply.tree])]
        good = self._within_service_level()
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
            "tokens_attended": sum(work.pairs for work in works),
            "kv_tokens_of_rows": sum(work.kv_read for work in works),
            "kv_tokens_read": sum(work.kv_read - work.kv_shared * self.model.shared_prefix_reads for work in works),
            "forks": scheduler.forks,
            "preemptions": scheduler.preemptions,
        }

    def _within_service_level(self) -> list[bool]:
        level, trees = self.service_level, self.workload.trees
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
            "fork": self.fork,
            "kv_blocks": self.kv_blocks,
            "block_size": self.block_size,
            "max_rows": self.limits.max_rows,
            "max_step_tokens": self.limits.max_step_tokens,
            "service_level": dataclasses.asdict(self.service_level),
            "cost_model": dataclasses.asdict(self.model),
        }


def _spread(values: Sequence[float]) -> dict[str, float]:
    p50, p90, p99 = np.percentile(np.array(values), (50, 90, 99))
    return {"mean": sum(values) / len(values), "p50": float(p50), "p90": float(p90), "p99": float(p99)}
