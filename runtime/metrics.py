"""What an engine has done and is doing, as plain numbers: for servers, whatever they export them with.

Counting costs a few attribute updates a request and one comparison a token; gauges are read when asked for.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field

import numpy as np

from apar.runtime.answer import Answer
from apar.runtime.engine import Engine

SAMPLE_SIZE = 200
"""Most observations kept of one kind between two snapshots."""


class Sample:
    """Observations since the last `take`: all of them, or a uniform random choice where there were more than fit.

    (Reservoir sampling, "algorithm L", which draws how many to pass over instead of a number for each: Li,
    "Reservoir-sampling algorithms of time complexity O(n(1 + log(N/n)))", ACM TOMS 1994.)
    """

    def __init__(self, size: int = SAMPLE_SIZE) -> None:
        self._size = size
        self._values: list[float] = []
        self._passed_over = 0
        self._weight = 1.0

    def add(self, value: float) -> None:
        """Keep `value`, perhaps."""
        if self._passed_over:
            self._passed_over -= 1
            return
        if len(self._values) < self._size:
            self._values.append(value)
            if len(self._values) < self._size:
                return
        else:
            self._values[random.randrange(self._size)] = value
        self._weight *= (1.0 - random.random()) ** (1.0 / self._size)
        self._passed_over = int(math.log(1.0 - random.random()) / math.log1p(-self._weight))

    def take(self) -> list[float]:
        """What was kept; begins anew."""
        values, self._values = self._values, []
        self._passed_over, self._weight = 0, 1.0
        return values


@dataclass(slots=True)
class Snapshot:
    """Numbers at one moment."""

    gauges: dict[str, float] = field(default_factory=dict)
    counters: dict[str, int] = field(default_factory=dict)
    """Totals since the engine was loaded. A name with a label is written `name{label="value"}`."""
    observations: dict[str, list[float]] = field(default_factory=dict)
    """Since the last snapshot, at most `SAMPLE_SIZE` of each kind: times in seconds, depths."""


class Metrics:
    """Counts over the answers of one engine. Belongs to the thread that drives the engine."""

    def __init__(self) -> None:
        self.prompt_tokens = 0
        """Of finished requests, as are `cached_tokens`: those that the prefix cache had."""
        self.cached_tokens = 0
        self.generation_tokens = 0
        self.finished: dict[str, int] = {}
        """Requests by finish reason."""
        self.first_token = Sample()
        self.between_tokens = Sample()
        """Seconds between successive tokens of a request: its branches sample in the same steps."""
        self.latency = Sample()
        self.queued = Sample()
        self.depth = Sample()
        """Of branches."""

    def token(self, answer: Answer, now: float) -> None:
        """A request sampled in a step that ended at `now`, for the first time in that step."""
        if answer.last_token:
            self.between_tokens.add(now - answer.last_token)
        else:
            answer.first_token = now
            self.first_token.add(now - answer.request.arrived)
        answer.last_token = now

    def finish(self, answer: Answer) -> None:
        """A request has ended."""
        request = answer.request
        reason = request.finish_reason or "error"
        self.finished[reason] = self.finished.get(reason, 0) + 1
        self.prompt_tokens += len(request.prompt)
        self.cached_tokens += request.cached_tokens
        self.latency.add(answer.ended - request.arrived)
        if request.started_at:
            self.queued.add(request.started_at - request.arrived)
        for branch in request.branches:
            self.depth.add(branch.depth)

    def snapshot(self, engine: Engine) -> Snapshot:
        """Everything, with the engine's own gauges."""
        load, did = engine.scheduler.load(), engine.scheduler.counters
        total = load["kv_blocks_total"]
        references = engine.cache.references
        shared = references[references > 1]
        result = Snapshot()
        result.gauges = {
            "num_requests_running": load["running_requests"],
            "num_requests_waiting": load["waiting_requests"],
            "num_branches_live": load["live_branches"],
            "kv_blocks_total": total,
            "kv_blocks_used": load["kv_blocks_used"],
            "kv_blocks_cached": load["kv_blocks_cached"],
            "kv_blocks_shared": int(shared.size),
            "kv_blocks_saved": int(np.sum(shared, dtype=np.int64)) - int(shared.size),
            "kv_cache_usage": load["kv_blocks_used"] / total,
            "host_blocks_total": load.get("host_blocks_total", 0),
            "host_blocks_used": load.get("host_blocks_used", 0),
        }
        result.counters = {
            "prompt_tokens_total": self.prompt_tokens,
            "generation_tokens_total": self.generation_tokens,
            "prefix_cache_queries_total": self.prompt_tokens,
            "prefix_cache_hits_total": self.cached_tokens,
            "host_cache_hits_total": load.get("host_hits", 0) * engine.cache.block_size,
            "blocks_swapped_out_total": load.get("swapped_out", 0),
            "blocks_swapped_in_total": load.get("swapped_in", 0),
            "forks_total": load["forks"],
            "num_preemptions_total": load["preemptions"],
            "branch_pauses_total": did.pauses,
            "branches_parked_total": did.parked,
            "requests_late_total": did.late,
            **{f'forks_denied_total{{reason="{reason}"}}': count for reason, count in did.forks_denied.items()},
            **self._speculation(engine),
            **{f'request_finished_total{{reason="{reason}"}}': count for reason, count in self.finished.items()},
        }
        result.observations = {
            "time_to_first_token_seconds": self.first_token.take(),
            "inter_token_latency_seconds": self.between_tokens.take(),
            "e2e_request_latency_seconds": self.latency.take(),
            "request_queue_time_seconds": self.queued.take(),
            "branch_depth": self.depth.take(),
        }
        return result

    def _speculation(self, engine: Engine) -> dict[str, int]:
        speculation = engine.scheduler.speculation
        if speculation is None:
            return {}
        did = speculation.counters()
        lengths = enumerate(speculation.lengths.tolist())
        return {
            "spec_decode_num_draft_tokens_total": did["draft_tokens"],
            "spec_decode_num_accepted_tokens_total": did["accepted_draft_tokens"],
            **{f'spec_decode_accepted_length_total{{length="{length}"}}': count for length, count in lengths},
        }
