"""The loop's body: schedule a step, execute it, sample, commit. Tokens only; text is `llm`'s business."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from itertools import count

import numpy as np

from apar.export.errors import CapacityError, RequestError
from apar.runtime.booking import StepReport
from apar.runtime.branch import Request
from apar.runtime.device_logits import DeviceLogits
from apar.runtime.executor.base import Executor
from apar.runtime.host_tier import HostTier
from apar.runtime.kv_cache import KVCache
from apar.runtime.limits import SchedulerLimits
from apar.runtime.outputs import Logprob
from apar.runtime.random_stream import fresh_seed
from apar.runtime.sampler import Sampler, SampleResult
from apar.runtime.sampling_params import SamplingParams
from apar.runtime.scheduler import Scheduler
from apar.runtime.speculative.options import DraftOptions
from apar.runtime.speculative.runs import Runs
from apar.runtime.speculative.speculation import Speculation, make_speculation
from apar.runtime.speculative.verification import Verification
from apar.runtime.step import BoolArray, Float32Array, Int32Array, IntArray
from apar.runtime.step_cost import FittedStepCost, StepCost
from apar.runtime.step_writer import Step

logger = logging.getLogger(__name__)

MAX_PRIORITY = 2**31

Reader = Callable[[StepReport], None]
"""Is shown what each round of a step gave."""


class Engine:
    """One executor with its scheduler, books and sampler. Not thread-safe: one loop drives it.

    Args:
        executor: a loaded executor; the engine closes it.
        limits: sizes of the scheduler; steps are kept to what the executor takes.
        draft: speculative decoding (docs/speculation.md): options, or a method's name; none by default.
        clock: seconds, never going back; deadlines and the service level are counted by it.
        step_cost: predicts steps for the fork policy `adaptive`; fitted to the steps that run unless given.

    Raises CapacityError where tables of the limits' sizes do not fit into memory, or the executor has host blocks and
    there is no prefix cache.
    """

    def __init__(
        self,
        executor: Executor,
        limits: SchedulerLimits | None = None,
        *,
        draft: DraftOptions | str | None = None,
        clock: Callable[[], float] = time.perf_counter,
        step_cost: StepCost | None = None,
    ) -> None:
        limits = (limits or SchedulerLimits()).within(executor.step_limits)
        manifest = executor.manifest
        self.executor = executor
        self.clock = clock
        host = HostTier(executor.host_blocks) if executor.host_blocks else None
        if host is not None and not limits.prefix_caching:
            raise CapacityError(
                "host blocks hold what the prefix cache evicts, and prefix_caching is off: turn it on, or give no "
                "host_blocks"
            )
        self.cache = KVCache(executor.num_blocks, manifest.block_size, limits.prefix_caching, host)
        self.sampler = Sampler(manifest.decoder.vocab_size, manifest.tokens, limits.max_live_branches)
        self.step_cost = FittedStepCost() if step_cost is None else step_cost
        try:
            self.scheduler = Scheduler(
                manifest.tokens, manifest.decoder.max_context, self.cache, self.sampler, limits, self.step_cost
            )
        except MemoryError as error:
            raise CapacityError(
                f"the tables of {limits.max_live_branches} branches with paths of {manifest.decoder.max_context} "
                "tokens do not fit into memory; give smaller max_rows or max_live_branches"
            ) from error
        options = DraftOptions.of(draft)
        self._typical = options.enabled and options.acceptance == "typical"
        if options.enabled:
            books = self.scheduler
            books.speculation = make_speculation(options, executor, books.table, books.requests, books.blocks)
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
            priority: a lower one goes first; -2**31 .. 2**31.
            arrived: when it arrived, by the engine's clock; now unless given.
            timeout: seconds from its arrival after which it ends with `deadline`, in whatever state it is.

        Raises RequestError (or CapacityError) if it is not acceptable.
        """
        given: object = timeout  # callers without a type checker pass anything
        if given is not None and not (isinstance(given, int | float) and 0 < given < math.inf):
            raise RequestError(f"timeout must be a number of seconds above 0, not {timeout!r}")
        rank: object = priority
        if isinstance(rank, bool) or not isinstance(rank, int) or not -MAX_PRIORITY <= rank <= MAX_PRIORITY:
            raise RequestError(
                f"priority must be a whole number from {-MAX_PRIORITY} to {MAX_PRIORITY}, not {priority!r}"
            )
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

    def step(self, read: Reader | None = None) -> StepReport | None:
        """End requests whose deadline has passed, then run one step; None if there was nothing to do.

        A step that raises ends the requests in it with an error; the engine goes on.

        read: is shown every token as soon as it is booked, and may end branches. A step with drafts has several rounds,
            each with at most one token a branch; others have one. Only what a request without stop strings says along
            a draft may be shown at once, several tokens of a branch in their order.
        """
        now = self.clock()
        expired = self.scheduler.expire(now)
        if expired is not None and read is not None:
            read(expired)
        report = self._run_step(now, read)
        if expired is None or report is None:
            return report or expired
        report.ended = expired.ended + report.ended
        report.finished = expired.finished + report.finished
        return report

    def close(self) -> None:
        """Free the executor. Idempotent."""
        self.executor.close()

    def _run_step(self, now: float, read: Reader | None) -> StepReport | None:
        started = time.perf_counter()
        step = self.scheduler.schedule(now)
        if step is None:
            return None
        scheduled = time.perf_counter()
        self.host_seconds += scheduled - started
        try:
            # Typical acceptance looks at logits itself, on the host.
            execute = self.executor.execute if self._typical else self.executor.logits
            logits = execute(step.inputs)
            executed = time.perf_counter()
            self.model_seconds += executed - scheduled
            drafts = self.scheduler.speculation
            verification = runs = None
            if drafts is not None and not drafts.is_plain(step):
                verification = drafts.verify(step)
                if step.drafts is not None and not isinstance(logits, DeviceLogits):
                    runs = drafts.runs(verification, logits, self.sampler)
            first = logits if step.drafts is None else _first_rows(logits, step.sampled.size)
            sampled = self._sample(first, step.sampled, step.counters, step.fork_banned) if runs is None else None
        except Exception as error:
            self.failed_steps += 1
            logger.exception("a step failed; the %d branches in it end with an error", step.rows.size)
            return self._tell(self._fail(step, error), read)
        done = time.perf_counter()
        self.sample_seconds += done - executed
        # A device may still compute when `logits` returns; the sampler waits for it.
        self.scheduler.observe(step, done - scheduled)
        if sampled is not None:
            self.scheduler.count_denials(step.sampled, sampled.denied)
        if drafts is not None and verification is not None:
            found = sampled if runs is None else runs
            assert found is not None
            report = self._verify(step, logits, verification, drafts, found, read)
        else:
            assert sampled is not None
            self.failed_steps = 0
            self._keep_logprobs(step.sampled, sampled)
            if drafts is not None:
                drafts.begin_plain(step)
            report = self._tell(self.scheduler.commit(step, sampled.tokens, sampled.failed), read)
            if drafts is not None:
                drafts.settle_plain(step, report)
            self.host_seconds += time.perf_counter() - done
        if drafts is not None:
            drafts.timed(step, len(report.tokens), self.clock() - now)
        return report

    def _verify(
        self,
        step: Step,
        logits: Float32Array | DeviceLogits,
        verification: Verification,
        drafts: Speculation,
        first: SampleResult | Runs,
        read: Reader | None,
    ) -> StepReport:
        """Book what came first of a step, the rows' next tokens or whole runs; then the tokens behind accepted drafts,
        round after round."""
        began, sampling, guessing = time.perf_counter(), 0.0, drafts.drafter.model_seconds
        scheduler, table = self.scheduler, self.scheduler.table
        requests = scheduler.requests_in(step)
        rows = np.arange(step.sampled.size)
        if isinstance(first, Runs):
            total = scheduler.commit_runs(step, verification.slots[first.rows], first.counts, first.tokens)
            self._tell(total, read)
            rows = drafts.follow(verification, first)
        else:
            judged = logits if isinstance(logits, DeviceLogits) else logits[: rows.size]
            drafts.judge(verification, rows, judged, self.sampler, first.tokens)
            self._keep_logprobs(step.sampled, first)
            total = self._tell(scheduler.commit(step, first.tokens, first.failed), read)
            rows = drafts.advance(verification, rows)
        try:
            while rows.size:
                slots = verification.slots[rows]
                length = table.length[slots]
                banned = scheduler.fork_bans(slots)
                before = time.perf_counter()
                wanted = _rows(logits, verification.wanted[rows])
                sampled = self._sample(wanted, slots, length - table.start[slots], banned)
                sampling += time.perf_counter() - before
                scheduler.count_denials(slots, sampled.denied)
                drafts.judge(verification, rows, wanted, self.sampler, sampled.tokens)
                self._keep_logprobs(slots, sampled)
                total.extend(self._tell(scheduler.commit_round(slots, sampled.tokens, sampled.failed), read))
                rows = drafts.advance(verification, rows)
            drafts.settle(step, verification, total)
            self.failed_steps = 0
        except Exception as error:
            self.failed_steps += 1
            logger.exception("verifying drafts failed; the %d branches in the step end with an error", step.rows.size)
            total.extend(self._tell(self._fail(step, error, requests), read))
        guessing = drafts.drafter.model_seconds - guessing
        self.sample_seconds += sampling
        self.model_seconds += guessing
        self.host_seconds += time.perf_counter() - began - sampling - guessing
        return total

    def _sample(
        self, logits: Float32Array | DeviceLogits, slots: IntArray, counters: Int32Array, fork_banned: BoolArray
    ) -> SampleResult:
        table = self.scheduler.table
        return self.sampler.sample(logits, slots, table.tokens, table.length, counters, fork_banned)

    def _fail(self, step: Step, error: Exception, requests: list[Request] | None = None) -> StepReport:
        report = StepReport(self.scheduler.step_index)
        report.finished = self.scheduler.fail(step, f"the step failed: {error}", requests)
        for request in report.finished:
            report.ended += [branch for branch in request.branches if branch.finish_reason == "error"]
        return report

    def _tell(self, report: StepReport, read: Reader | None) -> StepReport:
        if read is not None:
            read(report)
        return report

    def _keep_logprobs(self, slots: IntArray, sampled: SampleResult) -> None:
        for row, entry in sampled.logprobs.items():
            self._keep_logprob(int(slots[row]), entry)

    def _keep_logprob(self, slot: int, entry: Logprob) -> None:
        branch = self.scheduler.table.branches[slot]
        assert branch is not None
        if branch.logprobs is None:
            branch.logprobs = []
        branch.logprobs.append(entry)


def _first_rows(logits: Float32Array | DeviceLogits, count: int) -> Float32Array | DeviceLogits:
    """The first rows of logits, where they are; those on a device are copied, since drawing overwrites them."""
    return logits.take(np.arange(count)) if isinstance(logits, DeviceLogits) else logits[:count]


def _rows(logits: Float32Array | DeviceLogits, rows: IntArray) -> Float32Array | DeviceLogits:
    """A copy of some rows of logits, where they are."""
    return logits.take(rows) if isinstance(logits, DeviceLogits) else logits[rows]
