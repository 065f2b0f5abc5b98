"""The loop's body: schedule a step, execute it, sample, commit. Tokens only; text is `llm`'s business."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from itertools import count

from apar.export.errors import RequestError
from apar.runtime.booking import StepReport
from apar.runtime.branch import Request
from apar.runtime.device_logits import DeviceLogits
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
        limits: sizes of the scheduler; steps are kept to what the executor takes.
        clock: seconds, never going back; deadlines are counted by it.
    """

    def __init__(
        self,
        executor: Executor,
        limits: SchedulerLimits | None = None,
        *,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        limits = (limits or SchedulerLimits()).within(executor.step_limits)
        manifest = executor.manifest
        self.executor = executor
        self.clock = clock
        self.cache = KVCache(executor.num_blocks, manifest.block_size, limits.prefix_caching)
        self.sampler = Sampler(manifest.decoder.vocab_size, manifest.tokens, limits.max_live_branches)
        self.scheduler = Scheduler(manifest.tokens, manifest.decoder.max_context, self.cache, self.sampler, limits)
        self.host_seconds = 0.0
        """Time spent outside the executor and the sampler, over all steps."""
        self.model_seconds = 0.0
        self.sample_seconds = 0.0
        self.failed_steps = 0
        """Steps that raised since the last one that did not."""
        self._arrivals = count()

    def submit(
        self,
        request_id: str,
        prompt: Sequence[int],
        params: SamplingParams,
        priority: int = 0,
        *,
        arrived: float | None = None,
        timeout: float | None = None,
    ) -> Request:
        """Queue a tokenised prompt.

        Args:
            request_id: for people and logs.
            prompt: token ids.
            params: how to sample, and the request's own limits.
            priority: a lower one goes first.
            arrived: when it arrived, by the engine's clock; now unless given.
            timeout: seconds from its arrival after which it ends with `deadline`, in whatever state it is.

        Raises RequestError (or CapacityError) if it is not acceptable.
        """
        given: object = timeout  # callers without a type checker pass anything
        if given is not None and not (isinstance(given, int | float) and 0 < given < math.inf):
            raise RequestError(f"timeout must be a number of seconds above 0, not {timeout!r}")
        arrived = self.clock() if arrived is None else arrived
        seed = fresh_seed() if params.seed is None else params.seed
        prepared = self.sampler.prepare(params)
        request = Request(
            request_id,
            prompt,
            params,
            seed,
            prepared,
            arrival=next(self._arrivals),
            priority=priority,
            arrived=arrived,
            deadline=None if timeout is None else arrived + timeout,
        )
        self.scheduler.add(request)
        return request

    def step(self) -> StepReport | None:
        """End requests whose deadline has passed, then run one step; None if there was nothing to do.

        A step that raises ends the requests in it with an error; the engine goes on.
        """
        expired = self.scheduler.expire(self.clock())
        report = self._run_step()
        if expired is None or report is None:
            return report or expired
        report.ended = expired.ended + report.ended
        report.finished = expired.finished + report.finished
        return report

    def close(self) -> None:
        """Free the executor. Idempotent."""
        self.executor.close()

    def _run_step(self) -> StepReport | None:
        started = time.perf_counter()
        step = self.scheduler.schedule()
        if step is None:
            return None
        scheduled = time.perf_counter()
        self.host_seconds += scheduled - started
        try:
            logits = self.executor.logits(step.inputs)
            executed = time.perf_counter()
            self.model_seconds += executed - scheduled
            sampled = self._sample(step, logits)
        except Exception as error:
            self.failed_steps += 1
            logger.exception("a step failed; the %d branches in it end with an error", step.rows.size)
            return self._fail(step, error)
        self.failed_steps = 0
        done = time.perf_counter()
        self.sample_seconds += done - executed
        for row, entry in sampled.logprobs.items():
            self._keep_logprob(int(step.sampled[row]), entry)
        report = self.scheduler.commit(step, sampled.tokens, sampled.failed)
        self.host_seconds += time.perf_counter() - done
        return report

    def _sample(self, step: Step, logits: Float32Array | DeviceLogits) -> SampleResult:
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
