"""The engine's numbers on the server's metrics page.

A page that counts the end of a request counts everything else about that request too: its tokens, forks and times. A
page is not read at one moment, so this takes two orders. Ends are published after all else, and the server reads their
families first: it reads counters before gauges and histograms, and counters in the order in which they were registered.
"""

from __future__ import annotations

import re
from typing import Any

import triton_python_backend_utils as pb_utils

PREFIX = "apar:"
_SECONDS = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0]
_BUCKETS = {"branch_depth": [1.0, 2.0, 3.0, 4.0, 6.0, 8.0]}
_ENDS = ("request_finished_total", "request_errors_total")
_LABEL = re.compile(r'(\w+)="([^"]*)"')

DESCRIPTIONS = {
    "engine_ready": "1 while the engine process takes requests",
    "engine_restarts_total": "Times that the engine process was started again",
    "numbers_timestamp_seconds": "When the engine took these numbers, in seconds since 1970; published last of all",
    "num_requests_running": "Requests whose branches are in the running set",
    "num_requests_waiting": "Requests that wait for admission, preempted ones included",
    "num_branches_live": "Branches alive",
    "kv_blocks_total": "Blocks of the KV pool",
    "kv_blocks_used": "Blocks referenced by live branches",
    "kv_blocks_cached": "Unreferenced blocks that the prefix cache still knows",
    "kv_blocks_shared": "Blocks referenced more than once",
    "kv_blocks_saved": "Further blocks that would be needed if nothing were shared",
    "kv_cache_usage": "Share of the pool that is referenced, 0 to 1",
    "host_blocks_total": "Blocks of host memory that keep what is evicted from the KV pool",
    "host_blocks_used": "Host blocks that hold something",
    "prompt_tokens_total": "Prompt tokens of finished requests",
    "generation_tokens_total": "Tokens sampled",
    "prefix_cache_queries_total": "Prompt tokens that were looked up in the prefix cache",
    "prefix_cache_hits_total": "Prompt tokens that the prefix cache had",
    "host_cache_hits_total": "Tokens that were found in host blocks and not in the KV pool",
    "blocks_swapped_out_total": "Blocks copied from the KV pool to host blocks",
    "blocks_swapped_in_total": "Blocks copied from host blocks back to the KV pool",
    "forks_total": "Forks",
    "forks_denied_total": "Forks that were not allowed, by reason",
    "branch_pauses_total": "Steps that running branches sat out because others took the rows",
    "branches_parked_total": "Branches whose blocks were taken while the rest of their request went on",
    "requests_late_total": "Times that a request fell behind its service level (fork policy adaptive)",
    "num_preemptions_total": "Preemptions",
    "request_finished_total": "Finished requests by reason",
    "request_errors_total": "Requests that ended with an error, by code",
    "spec_decode_num_draft_tokens_total": "Draft tokens that were verified",
    "spec_decode_num_accepted_tokens_total": "Draft tokens that were accepted",
    "spec_decode_accepted_length_total": "Rows with a draft, by how many of its tokens were accepted",
    "time_to_first_token_seconds": "From arrival in the engine to the first token",
    "inter_token_latency_seconds": "Between successive tokens of a request; a sample of the tokens",
    "e2e_request_latency_seconds": "From arrival in the engine to the end",
    "request_queue_time_seconds": "From arrival in the engine to admission",
    "branch_depth": "Depths of the branches of finished requests",
}


class EngineMetrics:
    """Keeps Triton's metrics in step with the numbers of one engine.

    Args:
        model: name of the model, the label of every metric.
    """

    def __init__(self, model: str) -> None:
        self._labels = {"model": model}
        self._families: dict[str, Any] = {}
        self._metrics: dict[str, Any] = {}
        self._levels: dict[str, float] = {}
        for family in _ENDS:
            self._family(family, "COUNTER")

    def update(self, numbers: dict[str, Any]) -> None:
        """Numbers as the engine sent them: gauges, and what was counted and observed since the last time."""
        ends = {name: more for name, more in numbers["counters"].items() if name.partition("{")[0] in _ENDS}
        for name, more in numbers["counters"].items():
            if name not in ends:
                self.count(name, more)
        if hasattr(pb_utils.MetricFamily, "HISTOGRAM"):  # not in older servers
            for name, values in numbers["observations"].items():
                for value in values:
                    self._metric(name, "HISTOGRAM").observe(value)
        for name, value in numbers["gauges"].items():
            self.level(name, value)
        for name, more in ends.items():
            self.count(name, more)
        self.level("numbers_timestamp_seconds", numbers["time"])

    def level(self, name: str, value: float) -> None:
        """Set a gauge; what has not changed is not sent."""
        if self._levels.get(name) != value:
            self._levels[name] = value
            self._metric(name, "GAUGE").set(value)

    def count(self, name: str, more: float = 1) -> None:
        """Increase a counter."""
        if more or name not in self._metrics:
            self._metric(name, "COUNTER").increment(more)

    def _metric(self, name: str, kind: str) -> Any:
        metric = self._metrics.get(name)
        if metric is None:
            family, _, labels = name.partition("{")
            own = {**self._labels, **dict(_LABEL.findall(labels))}
            extra = {"buckets": _BUCKETS.get(family, _SECONDS)} if kind == "HISTOGRAM" else {}
            metric = self._metrics[name] = self._family(family, kind).Metric(labels=own, **extra)
        return metric

    def _family(self, name: str, kind: str) -> Any:
        family = self._families.get(name)
        if family is None:
            family = self._families[name] = pb_utils.MetricFamily(
                name=PREFIX + name,
                description=DESCRIPTIONS.get(name, name.replace("_", " ")),
                kind=getattr(pb_utils.MetricFamily, kind),
            )
        return family
