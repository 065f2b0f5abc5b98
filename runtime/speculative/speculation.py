"""Speculation of an engine: plans drafts, follows them through verification, learns from what came."""

from __future__ import annotations

import numpy as np

from apar.export.errors import RequestError
from apar.export.manifest import TokenIds
from apar.runtime.booking import StepReport
from apar.runtime.branch import Branch
from apar.runtime.branch_blocks import BranchBlocks
from apar.runtime.branch_table import BranchTable
from apar.runtime.device_logits import DeviceLogits
from apar.runtime.executor.base import Executor
from apar.runtime.request_table import RequestTable
from apar.runtime.sampler import Sampler
from apar.runtime.speculative.budget import DraftBudget
from apar.runtime.speculative.draft_cost import DraftCost
from apar.runtime.speculative.drafter import Drafter
from apar.runtime.speculative.horizon import Horizon, Reach
from apar.runtime.speculative.medusa import MedusaDrafter
from apar.runtime.speculative.ngram import NgramDrafter
from apar.runtime.speculative.options import DraftOptions
from apar.runtime.speculative.pace import Pace
from apar.runtime.speculative.row_drafts import RowDrafts
from apar.runtime.speculative.runs import Runs, find_runs
from apar.runtime.speculative.tree import DraftTree
from apar.runtime.speculative.typical import typical_token
from apar.runtime.speculative.verification import Verification
from apar.runtime.step import Float32Array, Int32Array, IntArray
from apar.runtime.step_writer import Step

_CHANGING = 2
"""Steps after a change between the ways that are not measured."""
_PLAIN_COSTS = 8
"""Of so many steps without drafts one is looked at for what a token costs."""


class Speculation:
    """Drafts for the rows of an engine's steps.

    Args:
        options: how to draft.
        drafter: guesses tokens.
        table: live branches.
        requests: admitted requests.
        blocks: of the branches.
        tokens: ids of [Fork] and the ends.
        step_tokens: tokens up to which the executor's steps are bound by memory.
    """

    def __init__(
        self,
        options: DraftOptions,
        drafter: Drafter,
        table: BranchTable,
        requests: RequestTable,
        blocks: BranchBlocks,
        tokens: TokenIds,
        step_tokens: int,
    ) -> None:
        self.options = options
        self.drafter = drafter
        self.tree = drafter.tree
        self.table = table
        self.requests = requests
        self.blocks = blocks
        self.tokens = tokens
        self.step_tokens = step_tokens
        measures = options.measured and options.adaptive and options.draft_budget is None
        self.pace = Pace(measures)
        self.cost = DraftCost()
        self.budget = DraftBudget(self.tree, options.adaptive, table.capacity, cost=self.cost if measures else None)
        self.mixes_drafts = False
        """See Executor.mixes_drafts."""
        self._drafting = True
        """Whether the step that runs may draft."""
        self._steady = 0
        """Steps of one way since the last change between them."""
        self.horizon = Horizon(table, requests, self.tree.max_depth + 1)
        self.drafted = 0
        """Draft nodes verified so far."""
        self.accepted = 0
        """Draft nodes accepted so far."""
        self.lengths: IntArray = np.zeros(self.tree.max_depth + 1, dtype=np.int64)
        """[depth + 1] how often a row with a draft accepted so many nodes of it in a step."""

    # ---------------------------------------------------------------- planning

    def reach(self, rows: IntArray) -> Reach:
        """Which rows take part in the next step, and how far each may get (`horizon`)."""
        self._drafting = self.pace.drafting
        return self.horizon.reach(rows, self._drafting)

    def draft(self, reach: Reach, pending: Int32Array, max_step_tokens: int) -> RowDrafts | None:
        """Drafts behind the `pending` [R] tokens of each row, within the budget; None where there are none."""
        if not self._drafting:
            return None
        rows, table, tree = reach.rows, self.table, self.tree
        taken = int(pending.sum())
        budget = min(self._budget(taken, max_step_tokens), max_step_tokens - taken)
        if not rows.size or budget <= 0:
            return None
        length = table.length[rows]
        # The deepest node is followed by one more token; a branch has no use for more than it may still say.
        most = np.minimum(reach.allowance, table.limit[rows] - length)
        most = np.minimum(most, self.requests.remaining[table.request[rows]])
        limits = np.minimum(self.drafter.available(rows), tree.upto_depth[np.clip(most - 1, 0, tree.max_depth)])
        limits = np.minimum(limits, table.block_table.shape[1] * table.block_size - length).astype(np.int32)
        sizes = self.budget.sizes(rows, limits, budget, taken)
        if not sizes.any():
            return None
        linear = tree.linear or (self.mixes_drafts and int(sizes.max()) <= tree.chain)
        return RowDrafts(tree, sizes, self.drafter.tokens(rows, sizes), reach.together, reach.free, linear)

    def _budget(self, taken: int, max_step_tokens: int) -> int:
        """Draft nodes that a step with `taken` other tokens may have."""
        if self.options.draft_budget is not None:
            return self.options.draft_budget
        return self.step_tokens - taken if self.options.adaptive else max_step_tokens

    # ---------------------------------------------------------------- after the step

    def is_plain(self, step: Step) -> bool:
        """Whether a step that ran neither has drafts nor is followed by one that may: there is nothing to verify."""
        return step.drafts is None and not self._drafting

    def begin_plain(self, step: Step) -> None:
        """A plain step is about to be booked."""
        self.horizon.advanced(step.sampled)

    def settle_plain(self, step: Step, report: StepReport) -> None:
        """A plain step is booked."""
        self.drafter.rest(report)
        began = step.counters == 0
        if report.forked or began.any():
            self._start_skills(step.sampled[began], report.forked)
        self.pace.choose(step.sampled.size - len(report.ended) + len(report.forked))

    def timed(self, step: Step, tokens: int, seconds: float) -> None:
        """A step is settled; all of it took so long and gave so many tokens."""
        pace = self.pace
        if not pace.measures:
            return
        if self._drafting != pace.drafting:
            self._steady = 0
            return
        self._steady += 1
        # Right after a change there are no guesses yet and caches are cold; prompts say nothing about decoding.
        decodes = step.rows.size == step.sampled.size and int(step.pending.max()) <= 2
        if decodes and self._steady > _CHANGING:
            pace.observe(step.sampled.size, tokens, seconds, pace.drafting)
            if pace.drafting or not self.cost.ready or self._steady % _PLAIN_COSTS == 0:
                self.cost.observe(step.inputs.input_ids.size, seconds, pace.drafting)

    def verify(self, step: Step) -> Verification:
        """To follow the drafts of a step that ran. To be asked for before the step is booked."""
        return Verification(step, self.table, self.requests, self.blocks, self.tokens.fork)

    def runs(self, verification: Verification, logits: Float32Array, sampler: Sampler) -> Runs | None:
        """What the rows of a step with drafts say without consequences, to be booked together; None if that is nothing.

        logits: [L, V] of the whole step. To be asked for before the step is booked.
        """
        table, requests = self.table, self.requests
        slots, owners = verification.slots, table.request[verification.slots]
        ready = verification.free & sampler.is_bare(slots)
        ready &= ~(requests.stop_strings[owners] | requests.stop_tokens[owners])
        if not ready.any():
            return None
        # The token at which a branch has to end is not without consequences.
        left = np.minimum(table.limit[slots] - table.length[slots], requests.remaining[owners])
        room = np.where(ready, np.maximum(left - 1, 0), 0)
        runs = find_runs(verification, logits, self.tokens, room, sampler.vocab_size)
        return runs if runs.rows.size else None

    def follow(self, verification: Verification, runs: Runs) -> IntArray:
        """Runs have been booked; returns the rows that sample in this step."""
        slots = verification.slots[runs.rows]
        self.horizon.advanced_to(slots)
        drafted = verification.sizes[runs.rows] > 0
        if drafted.any():
            self.budget.learn(slots[drafted], runs.accepted[drafted] > 0)
        verification.run(runs.rows, runs.accepted, runs.nodes)
        return runs.going

    def judge(
        self,
        verification: Verification,
        rows: IntArray,
        logits: Float32Array | DeviceLogits,
        sampler: Sampler,
        tokens: Int32Array,
    ) -> None:
        """`rows` have sampled and are about to be booked: note it, and where acceptance is typical, put typical guesses
        in place of what they drew.

        logits: [n, V] of the rows, as `Sampler.sample` left them; tokens: [n] that it drew, changed in place.
        """
        self.horizon.advanced(verification.slots[rows])
        if self.options.acceptance != "typical" or isinstance(logits, DeviceLogits):
            return
        drawing = np.flatnonzero(~sampler.is_greedy(verification.slots[rows]) & (tokens >= 0))
        for i in drawing.tolist():
            branch = self.table.branches[int(verification.slots[rows[i]])]
            guesses = verification.guesses(int(rows[i]))
            if branch is None or not guesses.size or branch.request.params.logprobs is not None:
                continue
            options = self.options
            guess = typical_token(
                logits[i], guesses, branch.request.params, options.posterior_threshold, options.posterior_alpha
            )
            if guess is not None:
                tokens[i] = guess

    def advance(self, verification: Verification, rows: IntArray) -> IntArray:
        """`rows` have sampled and been booked; returns those that sample once more in this step."""
        rows = verification.live(rows)
        guessed = verification.guessed(rows)
        first = verification.accepted[rows] == 0
        drafted = (verification.sizes[rows] > 0) & first
        if drafted.any():
            self.budget.learn(verification.slots[rows[drafted]], guessed[drafted] >= 0)
        return verification.follow(rows, guessed)

    def settle(self, step: Step, verification: Verification, report: StepReport) -> None:
        """All rounds are booked: count, free blocks that drafts took, and guess what comes next."""
        drafted = verification.sizes > 0
        self.drafted += int(verification.sizes.sum())
        self.accepted += int(verification.accepted.sum())
        self.lengths += np.bincount(verification.accepted[drafted], minlength=self.lengths.size)
        rows = verification.live(np.arange(verification.slots.size))
        slots = verification.slots[rows]
        self.blocks.trim(slots[drafted[rows]])
        if step.drafts is not None:
            self.budget.keep(int(verification.accepted.sum()))
        children = [child for child in report.forked if child.slot >= 0]
        self._start_skills(slots[step.counters[rows] == 0], children)
        drafting = self.pace.choose(rows.size + len(children))
        # As many rows as fill a step leave nothing to draft for: heads are not run in vain.
        self.drafter.most = self._budget(rows.size, self.tree.size + rows.size)
        going = rows if drafting and self.drafter.most > 0 else rows[:0]
        self.drafter.learn(report, verification.slots[going], verification.wanted[going], children)

    def _start_skills(self, began: IntArray, children: list[Branch]) -> None:
        """Branches that said their first token: roots begin without a history, children with their parents'."""
        if began.size:
            self.budget.begin(began[self.table.clock_base[began] == self.table.start[began]])
        for child in children:
            parent = child.parent
            if parent is not None and parent.slot >= 0 and child.slot >= 0:
                self.budget.inherit(child.slot, parent.slot)

    def counters(self) -> dict[str, int]:
        """Counts for people and metrics."""
        return {"draft_tokens": self.drafted, "accepted_draft_tokens": self.accepted}


def make_speculation(
    options: DraftOptions,
    executor: Executor,
    table: BranchTable,
    requests: RequestTable,
    blocks: BranchBlocks,
) -> Speculation:
    """The speculation that `options` ask for.

    Raises ExecutorError where the engine or the executor cannot, RequestError where the tree is deeper than there are
    heads.
    """
    manifest = executor.manifest
    drafter: Drafter
    if options.method == "medusa":
        heads = manifest.draft_heads.count if manifest.draft_heads else 0
        paths = options.paths(heads)
        deepest = max(len(path) for path in paths)
        if heads and deepest > heads:
            raise RequestError(
                f"the draft tree is {deepest} deep, the engine has {heads} Medusa heads: use a lower tree"
            )
        tree = DraftTree(paths, options.num_speculative_tokens)
        drafter = MedusaDrafter(executor, table, tree, manifest.decoder.vocab_size, manifest.tokens)
    else:
        tree = DraftTree(options.paths())
        drafter = NgramDrafter(table, tree, manifest.tokens, options.prompt_lookup_min, options.prompt_lookup_max)
    executor.expect_drafts(tree.linear)
    step_tokens = executor.memory_bound_tokens
    speculation = Speculation(options, drafter, table, requests, blocks, manifest.tokens, step_tokens)
    speculation.mixes_drafts = executor.mixes_drafts
    return speculation
