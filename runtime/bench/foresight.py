"""How far a fork policy is from what could be done: schedules that know every answer in advance, and a bound for all.

A server learns how long an answer gets, and whether it forks, as it is said. The policies here are told at arrival, so
they show what that ignorance costs. They are to measure by, and no server can have them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from apar.runtime.adaptive import LEAST_CHUNK, Adaptive
from apar.runtime.bench.cost_model import CostModel, ModelStepCost
from apar.runtime.bench.replay import ReplayBench
from apar.runtime.bench.workload import Workload, forks
from apar.runtime.branch import Request
from apar.runtime.branch_table import BranchTable
from apar.runtime.catching_up import CatchingUp
from apar.runtime.counters import ForkDenial, SchedulerCounters
from apar.runtime.executor.recorded_trees import Tree, text_tokens
from apar.runtime.fork_policy import FirstCome
from apar.runtime.limits import SchedulerLimits
from apar.runtime.pacing import Pacing
from apar.runtime.request_queues import RequestQueues
from apar.runtime.request_table import RequestTable
from apar.runtime.row_groups import RowGroups
from apar.runtime.scheduler import Scheduler
from apar.runtime.step import BoolArray, IntArray
from apar.runtime.step_cost import StepCost

GIVEN_UP = (0.03, 0.07)
"""Parts of the requests, those with most work, that the schedules turn away at arrival: which is best is found out."""
HOPELESS = 1.3
"""Who would need steps shorter than so many times a step of its own alone cannot be in time any more."""
SHORTEST = 1.6
"""Steps of so many times a lone one's length are the shortest that are planned for."""
TIGHTEST = 0.05
"""Part of the requests in time that may find a step longer than they can afford."""
AIM = 0.99
"""Part of the allowed latency that is aimed at by who knows every answer."""
LEAST_PROMPT = 64
"""Tokens of prompts in a step even where it then lasts too long."""
LAST = 0.1
"""Part of the arrivals of which nobody is turned away: the run would last until those had ended."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a recorded answer with all its forks takes, whatever else runs."""

    steps: int
    """Steps in which it takes part, those of its prompt included."""
    samples: int
    """Those of them in which it samples."""
    rows: int
    """Over all its steps, as are the following."""
    blocks: int
    moved_bytes: float
    """Without weights."""
    operations: float
    alone: float
    """Seconds it takes alone, with forks."""
    unforked: float
    """Seconds it takes alone, without forks: what the service level is a multiple of."""

    @classmethod
    def of(cls, tree: Tree, model: CostModel, limits: SchedulerLimits, block_size: int) -> Answer:
        """Replay one answer alone."""
        limits = dataclasses.replace(limits, fork_policy="always")
        workload = Workload("one", [tree], [0], None)
        plenty = (2 + forks(tree)) * -(-workload.longest_path // block_size)
        bench = ReplayBench(workload, model, kv_blocks=plenty, block_size=block_size, limits=limits)
        bench.run()
        records = bench.executor.records
        return cls(
            len(records),
            bench.replies[0].steps,
            sum(record.work.rows for record in records),
            sum(record.blocks for record in records),
            sum(model.moved_bytes(record.work) - model.weight_bytes for record in records),
            sum(model.operations(record.work) for record in records),
            sum(record.seconds for record in records),
            model.unloaded_seconds(tree["prompt_tokens"], text_tokens(tree), limits.max_step_tokens),
        )


def shortest_run(
    workload: Workload, answers: Sequence[Answer], model: CostModel, max_rows: int, kv_blocks: int
) -> tuple[float, str]:
    """Seconds that no schedule with these forks can go below, whoever is in time, and what they are due to.

    Every step reads the weights and has `max_rows` rows and `kv_blocks` blocks at most; K/V read, operations, rows and
    blocks of an answer whose prompt has no blocks in common with others are never less than alone; and nobody ends
    sooner after arrival than alone.
    """
    asked = [answers[tree] for tree in workload.order]
    needed = {
        "rows": sum(answer.rows for answer in asked) / max_rows,
        "blocks": sum(answer.blocks for answer in asked) / kv_blocks,
        "the longest answer": float(max(answer.steps for answer in asked)),
    }
    due = max(needed, key=lambda name: needed[name])
    steps = needed[due]
    moving = (steps * model.weight_bytes + sum(answer.moved_bytes for answer in asked)) / model.memory_bytes_per_second
    computing = sum(answer.operations for answer in asked) / model.flops_per_second
    seconds = steps * model.overhead_seconds + max(moving, computing)
    for arrival, answer in zip(workload.arrivals or (), asked, strict=False):
        if arrival + answer.alone > seconds:
            seconds, due = arrival + answer.alone, "arrivals"
    return seconds, due


def heaviest(workload: Workload, answers: Sequence[Answer], part: float) -> BoolArray:
    """[N] the `part` of the requests that move most bytes; of those that arrive last none."""
    moved = np.array([answers[tree].moved_bytes for tree in workload.order])
    chosen: BoolArray = moved > np.quantile(moved, 1 - part) if part else np.zeros(moved.size, dtype=bool)
    if workload.arrivals is not None:
        chosen &= np.array(workload.arrivals) <= (1 - LAST) * workload.arrivals[-1]
    return chosen


class ToldPacing(Pacing):
    """Paces, where some requests are late from the beginning."""

    given_up: BoolArray

    def judge(self, owners: IntArray, now: float) -> BoolArray:
        """See Pacing.judge."""
        late = super().judge(owners, now)
        late |= self.given_up[[number(self.requests.at(index)) for index in owners.tolist()]]
        return late


class Told(Adaptive):
    """`adaptive`, told at arrival which requests to turn away; it knows nothing else."""

    def __init__(self, scheduler: Scheduler, model: CostModel, given_up: BoolArray) -> None:
        super().__init__(*parts(scheduler, model))
        self.pacing = ToldPacing(self.requests, self.counters, self.limits, self.cost)
        self.pacing.given_up = self.given_up = given_up

    def _judge_waiting(self, now: float) -> None:
        super()._judge_waiting(now)
        for request in self.queues.waiting_in_time():
            if self.given_up[number(request)]:
                self._mark(request, True)


class Foreseeing(Adaptive):
    """Knows every answer: who has least time left for each of the steps still to come goes first.

    All are admitted at once. A step may last as long as nearly all of those in time afford. Late are those who were
    given up at arrival or cannot make it any more; they come last, the longest first.

    Args:
        scheduler: whose policy it is to be.
        model: predicts steps.
        samples: [N] steps in which each request will sample.
        allowed: [N] seconds from arrival within which each has to end.
        given_up: [N] requests that are late from the beginning.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        model: CostModel,
        samples: IntArray,
        allowed: npt.NDArray[np.float64],
        given_up: BoolArray,
    ) -> None:
        super().__init__(*parts(scheduler, model))
        self._samples = samples
        self._allowed = AIM * allowed
        self._given_up = given_up
        self._left = np.zeros(self.limits.max_live_branches)
        """By request index: steps still to come."""
        self._pace = np.zeros(self.limits.max_live_branches)
        """By request index: seconds that each of them may take."""

    def begin_step(self, now: float) -> None:
        """See FirstCome.begin_step."""
        self._last_kv = self._last_paths = None
        rows = self.queues.rows()
        known = [*self.queues.running, *self.queues.waiting]
        numbers = np.array([number(request) for request in known], dtype=np.int64)
        owners = np.array([request.index for request in known], dtype=np.int64)
        admitted = owners >= 0
        sampled = np.where(admitted, self.requests.steps[owners], 0)
        waited = now - np.array([request.arrived for request in known])
        left = self._samples[numbers] - sampled
        pace = (self._allowed[numbers] - waited) / np.maximum(left, 1)
        alone = self.cost.one(1, int(self.table.length[rows].sum()) / rows.size if rows.size else 1)
        silent = (sampled == 0) & (waited > self.limits.service_level.first_token_seconds)
        late = self._given_up[numbers] | (pace < HOPELESS * alone) | silent
        self._left[owners[admitted]], self._pace[owners[admitted]] = left[admitted], pace[admitted]
        for request, is_late in zip(known, late.tolist(), strict=True):
            if request.late != is_late:
                self._mark(request, is_late)
        tight = pace[: len(self.queues.running)][~late[: len(self.queues.running)]]
        self.budget = math.inf
        if tight.size:
            place = int(TIGHTEST * (tight.size - 1))
            self.budget = max(SHORTEST * alone, float(np.partition(tight, place)[place]))

    def next_waiting(self) -> Request | None:
        """See FirstCome.next_waiting."""
        first = self.queues.waiting[0]
        return FirstCome.next_waiting(self) if first.late else first

    def take_turns(self, rows: IntArray, seats: int) -> BoolArray | None:
        """See FirstCome.take_turns."""
        groups = self.queues.groups_of(rows)
        owners, kv = groups.owners, self._kv(rows, groups)
        late = self.requests.late[owners]
        order = np.lexsort((np.where(late, -self._left[owners], self._pace[owners]), late))
        size = np.cumsum(groups.sizes[order])
        fits = (size <= seats) & (self.cost.seconds(size, np.cumsum(kv[order])) <= self.budget)
        return self._mask(groups, order[: max(1, int(np.argmin(fits)) if not fits.all() else fits.size)])

    def prompt_tokens(self, rows: IntArray) -> int:
        """See FirstCome.prompt_tokens."""
        most = super().prompt_tokens(rows)
        return most if most > self.limits.max_step_tokens // LEAST_CHUNK else min(most, LEAST_PROMPT)

    def deny_forks(self, candidates: BoolArray, groups: RowGroups) -> tuple[BoolArray, ForkDenial] | None:
        """See FirstCome.deny_forks. Lengths are known for answers with all their forks."""
        return None


def number(request: Request) -> int:
    """Which request of the workload it is."""
    return int(request.request_id)


Parts = tuple[
    RequestQueues, BranchTable, RequestTable, CatchingUp, SchedulerCounters, SchedulerLimits, StepCost
]  # fmt: skip


def parts(scheduler: Scheduler, model: CostModel) -> Parts:
    """What `Adaptive` works on."""
    return (
        scheduler.queues,
        scheduler.table,
        scheduler.requests,
        scheduler.catching,
        scheduler.counters,
        scheduler.limits,
        ModelStepCost(model),
    )


def bench_foresight(
    workload: Workload,
    model: CostModel,
    limits: SchedulerLimits,
    *,
    kv_blocks: int | None = None,
    block_size: int = 16,
    given_up: Sequence[float] = GIVEN_UP,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Replay a load under `always`, `adaptive` and the schedules that know more; and the bound.

    Args:
        workload, model, limits, kv_blocks, block_size: see ReplayBench.
        given_up: parts of the requests to turn away, each tried in turn.
        progress: gets runs done and their number.

    Raises what ReplayBench does.
    """
    answers = [Answer.of(tree, model, limits, block_size) for tree in workload.trees]
    samples = np.array([answers[tree].samples for tree in workload.order])
    allowed = limits.service_level.latency_factor * np.array([answers[tree].unforked for tree in workload.order])
    settings: dict[str, Any] = {}

    def run(policy: Callable[[Scheduler], FirstCome] | None, name: str = "adaptive") -> dict[str, float]:
        chosen = dataclasses.replace(limits, fork_policy=name)  # type: ignore[arg-type]
        bench = ReplayBench(workload, model, kv_blocks=kv_blocks, block_size=block_size, limits=chosen)
        if policy is not None:
            bench.engine.scheduler.use_policy(policy(bench.engine.scheduler))
        result = bench.run()
        settings.update(result["settings"])
        if progress is not None:
            progress(len(done) + 1, 3 + 2 * len(given_up))
        done.append(name)
        return {
            "goodput": result["goodput"]["requests_per_second"],
            "share": result["goodput"]["share"],
            "requests_per_second": result["throughput"]["requests_per_second"],
        }

    done: list[str] = []
    policies = {name: run(None, name) for name in ("always", "adaptive")}
    told, known = [], []
    for part in (0.0, *given_up):
        away = heaviest(workload, answers, part)
        if part:
            told.append({"given_up": part, **run(lambda s, away=away: Told(s, model, away))})  # type: ignore[misc]
        known.append(
            {
                "given_up": part,
                **run(lambda s, away=away: Foreseeing(s, model, samples, allowed, away)),  # type: ignore[misc]
            }
        )
    seconds, due = shortest_run(workload, answers, model, limits.max_rows, settings["kv_blocks"])
    del settings["fork_policy"]
    return {
        "bench": "foresight",
        "settings": settings,
        "requests": len(workload),
        "bound": {"requests_per_second": len(workload) / seconds, "seconds": seconds, "due_to": due},
        **policies,
        "adaptive_told_the_heaviest": told,
        "all_known": known,
        "best": max((*policies.values(), *told, *known), key=lambda entry: entry["goodput"])["goodput"],
    }
