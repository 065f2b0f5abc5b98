"""The loop's body: schedule a step, execute it, sample, commit. Tokens only; text is `llm`'s business."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from itertools import count

from apar.runtime.booking import StepReport
from apar.runtime.branch import Request
from apar.runtime.executor.base import Executor
from apar.runtime.kv_cache import KVCache
from apar.runtime.limits import SchedulerLimits
from apar.runtime.outputs import Logprob
from apar.runtime.random_stream import fresh_seed
from apar.runtime.sampler import Sampler, SampleResult
from apar.runtime.sampling_params import SamplingParams
from apar.runtime.scheduler import Scheduler
from apar.runtime.step import Float32Array
from apar.runtime.step_writer import Step

logger = logging.getLogger(__name__)


class Engine:
    """One executor with its scheduler, books and sampler. Not thread-safe: one loop drives it.

    Args:
        executor: a loaded executor; the engine closes it.
        limits: sizes of the scheduler.
    """

    def __init__(self, executor: Executor, limits: SchedulerLimits | None = None) -> None:
        limits = limits or SchedulerLimits()
        manifest = executor.manifest
        self.executor = executor
        self.cache = KVCache(executor.num_blocks, manifest.block_size, limits.prefix_caching)
        self.sampler = Sampler(manifest.decoder.vocab_size, manifest.tokens, limits.max_live_branches)
        self.scheduler = Scheduler(manifest.tokens, manifest.decoder.max_context, self.cache, self.sampler, limits)
        self.host_seconds = 0.0
        """Time spent outside the executor and the sampler, over all steps."""
        self.model_seconds = 0.0
        self.sample_seconds = 0.0
        self._arrivals = count()

    def submit(self, request_id: str, prompt: Sequence[int], params: SamplingParams, priority: int = 0) -> Request:
        """Queue a tokenised prompt. Raises RequestError (or CapacityError) if it is not acceptable."""
        seed = fresh_seed() if params.seed is None else params.seed
        prepared = self.sampler.prepare(params)
        request = Request(request_id, prompt, params, seed, prepared, next(self._arrivals), priority)
        self.scheduler.add(request)
        return request

    def step(self) -> StepReport | None:
        """Run one step; None if there was nothing to do.

        A step that raises ends the requests in it with an error; the engine goes on.
        """
        started = time.perf_counter()
        step = self.scheduler.schedule()
        if step is None:
            return None
        scheduled = time.perf_counter()
        self.host_seconds += scheduled - started
        try:
            logits = self.executor.execute(step.inputs)
            executed = time.perf_counter()
            self.model_seconds += executed - scheduled
            sampled = self._sample(step, logits)
        except Exception as error:
            logger.exception("a step failed; the %d branches in it end with an error", step.rows.size)
            return self._fail(step, error)
        done = time.perf_counter()
        self.sample_seconds += done - executed
        for row, entry in sampled.logprobs.items():
            self._keep_logprob(int(step.sampled[row]), entry)
        report = self.scheduler.commit(step, sampled.tokens, sampled.failed)
        self.host_seconds += time.perf_counter() - done
        return report

    def close(self) -> None:
        """Free the executor. Idempotent."""
        self.executor.close()

    def _sample(self, step: Step, logits: Float32Array) -> SampleResult:
        table = self.scheduler.table
        return self.sampler.sample(
            logits,
            step.sampled,
            table.tokens,
            table.length,
            step.counters,
            step.fork_banned,
        )

    def _fail(self, step: Step, error: Exception) -> StepReport:
        report = StepReport(self.scheduler.step_index)
        report.finished = self.scheduler.fail(step, f"the step failed: {error}")
        for request in report.finished:
            report.ended += [branch for branch in request.branches if branch.finish_reason == "error"]
        return report

    def _keep_logprob(self, slot: int, entry: Logprob) -> None:
        branch = self.scheduler.table.branches[slot]
        assert branch is not None
        if branch.logprobs is None:
            branch.logprobs = []
        branch.logprobs.append(entry)
