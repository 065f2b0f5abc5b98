"""Arrays of the step contract, written from the branch table for chosen rows."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from apar.runtime.branch_blocks import NO_COPIES
from apar.runtime.branch_table import BranchTable
from apar.runtime.fork_bans import ForkBans
from apar.runtime.request_table import RequestTable
from apar.runtime.row_groups import RowGroups
from apar.runtime.speculative.row_drafts import RowDrafts
from apar.runtime.step import NO_SWAPS, BoolArray, Int32Array, IntArray, StepInputs


@dataclass(slots=True)
class Plan:
    """Rows of a step, before its arrays are written."""

    rows: IntArray
    counts: Int32Array
    copies: Int32Array = field(default_factory=lambda: NO_COPIES)
    registered: list[int] = field(default_factory=list)
    drafts: RowDrafts | None = None
    """Drafts of the rows; `counts` has their nodes."""
    swaps: tuple[Int32Array, Int32Array] = (NO_SWAPS, NO_SWAPS)
    """Blocks to copy to host memory and back: `swap_out`, `swap_in` of the step."""


@dataclass(slots=True)
class Step:
    """One promised step: what the executor gets, and what `commit` needs to book it."""

    inputs: StepInputs
    rows: IntArray
    """[R] slots of the branches in the step."""
    counts: Int32Array
    """[R] tokens of each row."""
    pending: Int32Array
    """[R] those of its path: draft nodes left out."""
    sampled: IntArray
    """[S] slots that sample, in the order of the first S logits; the others are those of draft nodes."""
    counters: Int32Array
    """[S] index of the token to be sampled within its branch."""
    fork_banned: BoolArray
    """[S] rows that may not sample [Fork] in this step."""
    groups: RowGroups
    """Requests of the sampled rows."""
    drafts: RowDrafts | None
    registered: list[int]
    """Blocks that became findable in the prefix cache on the promise that this step fills them."""


class StepWriter:
    """Turns plans into steps; holds no state but constant arrays.

    Args:
        table: live branches.
        requests: admitted requests.
        fork_bans: says which rows may not fork.
        max_step_tokens: the longest step.
    """

    def __init__(self, table: BranchTable, requests: RequestTable, fork_bans: ForkBans, max_step_tokens: int) -> None:
        self.table = table
        self.requests = requests
        self.fork_bans = fork_bans
        self._arange = np.arange(max_step_tokens + 1, dtype=np.int32)
        self._no_mask = np.zeros((max_step_tokens, 0), dtype=np.int32)

    def write(self, plan: Plan, groups: RowGroups, resuming: bool) -> Step:
        """Write the arrays of the step contract for a plan.

        `groups` are the plan's rows by request; `resuming`: some may belong to requests that lack K/V. All other rows
        compute everything that they have pending, and sample.
        """
        table, size = self.table, self.table.block_size
        rows, counts, drafts = plan.rows, plan.counts, plan.drafts
        num_rows = rows.size
        query_start = np.zeros(num_rows + 1, dtype=np.int32)
        np.add.accumulate(counts, out=query_start[1:])
        num_tokens = int(query_start[-1])
        computed = table.computed[rows]
        kv_len = computed + counts
        if num_tokens == num_rows:
            token_rows, index = rows, computed
        else:
            row_of_token = np.arange(num_rows).repeat(counts)
            token_rows = rows[row_of_token]
            index = (computed - query_start[:-1])[row_of_token] + self._arange[:num_tokens]
        # block * size + index % size, in fewer passes. Indices are int64: NumPy gathers by others in twice the time.
        column = index // size
        slot_mapping = table.block_table[token_rows, column.astype(np.int64)]
        slot_mapping -= column
        slot_mapping *= size
        slot_mapping += index
        length = table.length[rows]
        pending, last, mask = counts, query_start[1:] - 1, self._no_mask[:num_tokens]
        if drafts is None:
            ids, positions = table.tokens[token_rows, index.astype(np.int64)], index
        else:
            drafts.pad(num_rows)
            pending = counts - drafts.sizes
            last = last - drafts.sizes
            places = drafts.places(query_start)
            ids = table.tokens[token_rows, np.minimum(index, table.tokens.shape[1] - 1)]
            ids[places] = drafts.tokens
            positions = index.copy()
            positions[places] = length[drafts.rows] - 1 + drafts.tree.depth[drafts.nodes]
            if not drafts.linear:
                mask = drafts.tree_mask(query_start, index - computed.repeat(counts))
        sampled, sampled_groups = rows, groups
        if resuming:
            # A tree that is being resumed samples only when all its branches have caught up.
            waits = self.requests.catching_up[groups.owners] & (self.requests.live[groups.owners] > 1)
            complete = (computed + pending == length) & ~waits[groups.place]
            if not complete.all():
                wanted = np.flatnonzero(complete)
                sampled, length, last = rows[wanted], length[wanted], last[wanted]
                sampled_groups = RowGroups.of(groups.requests[wanted])
        inputs = StepInputs(
            input_ids=ids,
            position_ids=positions,
            query_start=query_start,
            kv_len=kv_len,
            block_table=table.block_table[rows, : int(np.maximum.reduce(table.num_blocks[rows]))],
            slot_mapping=slot_mapping,
            slot_copies=plan.copies,
            prefix_rows=groups.bounds,
            prefix_blocks=self._shared_blocks(rows, groups),
            tree_mask=mask,
            logits_rows=last if drafts is None else np.concatenate((last, places.astype(np.int32))),
            swap_out=plan.swaps[0],
            swap_in=plan.swaps[1],
        )
        return Step(
            inputs=inputs,
            rows=rows,
            counts=counts,
            pending=pending,
            sampled=sampled,
            counters=length - table.start[sampled],
            fork_banned=self.fork_bans.of(sampled, sampled_groups, length, inputs.input_ids[last]),
            groups=sampled_groups,
            drafts=drafts,
            registered=plan.registered,
        )

    def _shared_blocks(self, rows: IntArray, groups: RowGroups) -> Int32Array:
        """[G] leading blocks that all rows of a group have in common; 0 for a row alone."""
        if groups.single:
            return np.zeros(groups.starts.size, dtype=np.int32)
        shared: Int32Array = np.minimum.reduceat(self.table.share[rows], groups.starts)
        shared *= groups.sizes > 1
        return shared
