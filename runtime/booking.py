"""Booking: what the tokens of a step change. They extend paths, bear children, end branches and requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from apar.export.manifest import TokenIds
from apar.runtime.branch import Branch, Request, RequestState
from apar.runtime.branch_table import BranchTable
from apar.runtime.lifecycle import Ending, Lifecycle
from apar.runtime.request_queues import RequestQueues
from apar.runtime.request_table import RequestTable
from apar.runtime.row_groups import RowGroups
from apar.runtime.step import BoolArray, Int32Array, IntArray
from apar.runtime.step_writer import Step


@dataclass(slots=True)
class StepReport:
    """What changed in a step or between two, for those who turn it into text and events."""

    step: int
    branches: list[Branch] = field(default_factory=list)
    """Branches that grew, once for each token; those that it ended are listed too."""
    tokens: list[int] = field(default_factory=list)
    """Their tokens."""
    forked: list[Branch] = field(default_factory=list)
    """Children born."""
    ended: list[Branch] = field(default_factory=list)
    finished: list[Request] = field(default_factory=list)

    def extend(self, later: StepReport) -> None:
        """Take in what a later round of the same step gave."""
        self.branches += later.branches
        self.tokens += later.tokens
        self.forked += later.forked
        self.ended += later.ended
        self.finished += later.finished


class Booking:
    """Writes sampled tokens into the tables and lets happen what follows from them.

    Args:
        queues: know the branches of a step's rows.
        table: live branches.
        requests: admitted requests.
        lifecycle: bears and ends branches.
        tokens: ids of [Fork] and the ends.
    """

    def __init__(
        self,
        queues: RequestQueues,
        table: BranchTable,
        requests: RequestTable,
        lifecycle: Lifecycle,
        tokens: TokenIds,
    ) -> None:
        self.queues = queues
        self.table = table
        self.requests = requests
        self.lifecycle = lifecycle
        self.tokens = tokens

    def book(self, step: Step, tokens: Int32Array, failed: Sequence[int] = ()) -> StepReport:
        """Book a step that ran: `tokens` [L] were sampled for `step.sampled`.

        `failed` lists rows of L whose logits were unusable (not finite): their requests end with an error.
        """
        self.table.computed[step.rows] += step.pending
        self.lifecycle.step_index += 1
        report = StepReport(self.lifecycle.step_index)
        self._grow(report, step.sampled, step.counters, step.groups, tokens, failed, steps=1)
        return report

    def book_runs(self, step: Step, slots: IntArray, counts: Int32Array, tokens: Int32Array) -> StepReport:
        """Begin to book a step that ran with `counts` [n] plain `tokens`, one after the other, of branches in `slots`
        [n]: tokens from which nothing follows, far from every limit. `book_round` books the rest."""
        table, requests = self.table, self.requests
        table.computed[step.rows] += step.pending
        self.lifecycle.step_index += 1
        requests.steps[step.groups.owners] += 1
        self.lifecycle.counters.tokens += tokens.size
        self.lifecycle.counters.request_steps += step.groups.owners.size
        report = StepReport(self.lifecycle.step_index)
        length = table.length[slots]
        place = np.repeat(length - (np.cumsum(counts) - counts), counts) + np.arange(tokens.size)
        table.tokens[np.repeat(slots, counts), place] = tokens
        table.first_step[slots[length == table.start[slots]]] = report.step
        table.length[slots] = length + counts
        np.subtract.at(requests.remaining, table.request[slots], counts)
        for slot, count in zip(slots.tolist(), counts.tolist(), strict=True):
            report.branches += [table.branches[slot]] * count
        report.tokens = tokens.tolist()
        return report

    def book_round(self, slots: IntArray, tokens: Int32Array, failed: Sequence[int] = ()) -> StepReport:
        """Book further tokens [n] of branches in `slots`, sampled behind accepted drafts of the same step."""
        report = StepReport(self.lifecycle.step_index)
        groups = RowGroups.of(self.table.request[slots])
        counters = self.table.length[slots] - self.table.start[slots]
        self._grow(report, slots, counters, groups, tokens, failed, steps=0)
        return report

    def _grow(
        self,
        report: StepReport,
        slots: IntArray,
        counters: Int32Array,
        groups: RowGroups,
        tokens: Int32Array,
        failed: Sequence[int],
        steps: int,
    ) -> None:
        """Append a token to each branch and do what follows from it; their requests took so many more `steps`."""
        table, requests = self.table, self.requests
        if failed:
            kept = self._fail_rows(report, slots, failed)
            slots, counters, tokens = slots[kept], counters[kept], tokens[kept]
            groups = RowGroups.of(groups.requests[kept])
        if not slots.size:
            return
        owners, place = groups.owners, groups.place
        remaining = requests.remaining[owners] - groups.sizes
        requests.remaining[owners] = remaining
        requests.steps[owners] += steps
        self.lifecycle.counters.tokens += slots.size
        self.lifecycle.counters.request_steps += steps * owners.size
        exhausted = remaining <= 0
        dropped: list[Branch] = []
        if np.count_nonzero(exhausted):
            kept = self._within_budget(groups)
            dropped = self.queues.branches_at(slots[~kept])
            slots, counters, tokens, place = slots[kept], counters[kept], tokens[kept], place[kept]
        length = table.length[slots]
        table.tokens[slots, length] = tokens
        length += 1
        table.length[slots] = length
        if np.count_nonzero(counters) < counters.size:
            table.first_step[slots[counters == 0]] = report.step
        happens = length >= table.limit[slots]
        for token in (self.tokens.fork, *self.tokens.eos):
            happens |= tokens == token
        watched = exhausted | requests.stop_tokens[owners]
        if np.count_nonzero(watched):
            happens |= watched[place]
        report.branches = self.queues.branches_at(slots)
        report.tokens = tokens.tolist()
        self._book_events(report, happens.nonzero()[0].tolist(), dropped)

    def _book_events(self, report: StepReport, rows: list[int], dropped: list[Branch]) -> None:
        """Handle rows whose token forked, ended a branch, or met a limit; `dropped` branches end without one."""
        table, remaining = self.table, self.requests.remaining
        forking: list[Branch] = []
        endings: list[Ending] = []
        for i in rows:
            branch, token = report.branches[i], report.tokens[i]
            slot, request = branch.slot, branch.request
            params = request.params
            ends = token in self.tokens.eos
            if ends or token in params.stop_token_ids:
                endings.append((branch, "stop", ends or not params.include_stop_in_output))
            elif remaining[request.index] <= 0 or table.length[slot] >= table.limit[slot]:
                endings.append((branch, "length", False))
            elif token == self.tokens.fork:
                forking.append(branch)
        endings += [(branch, "length", False) for branch in dropped]
        if endings:
            self.lifecycle.finish(endings)
            ended = [branch for branch, _, _ in endings]
            report.ended += ended
            report.finished += dict.fromkeys(b.request for b in ended if b.request.state is RequestState.FINISHED)
        if forking:
            report.forked += self.lifecycle.fork(forking)

    def _within_budget(self, groups: RowGroups) -> BoolArray:
        """Rows whose token still fits `max_tokens`: of a request's rows the first ones (`Branch.order`).

        Takes the tokens that do not fit back out of the requests' counts.
        """
        requests, owners = self.requests, groups.owners
        surplus = np.maximum(-requests.remaining[owners], 0)
        requests.remaining[owners] += surplus
        kept: BoolArray = groups.rank() < (groups.sizes - surplus)[groups.place]
        return kept

    def _fail_rows(self, report: StepReport, slots: IntArray, failed: Sequence[int]) -> BoolArray:
        """End the requests of rows with unusable logits; returns which rows go on."""
        requests = self.table.request[slots]
        hit = np.unique(requests[list(failed)])
        for index in hit.tolist():
            request = self.requests.at(index)
            report.ended += request.live
            report.finished.append(request)
            self.lifecycle.fail(
                request,
                "the model's logits are not finite; check the checkpoint and its quantisation, and build with "
                "--kv-dtype float32 where keys or values may exceed float16's range",
            )
        kept: BoolArray = ~np.isin(requests, hit)
        return kept
