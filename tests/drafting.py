"""Test doubles of drafters: guesses that are right as often as a test wants."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from path_executor import CHILD, FORK, VOCAB, scores

from apar.runtime.booking import StepReport
from apar.runtime.branch import Branch
from apar.runtime.branch_table import BranchTable
from apar.runtime.engine import Engine
from apar.runtime.speculative.drafter import Drafter
from apar.runtime.speculative.options import DraftOptions
from apar.runtime.speculative.speculation import Speculation
from apar.runtime.speculative.tree import DraftTree
from apar.runtime.step import Int32Array, IntArray
from apar.runtime.step_writer import Step


class RandomDrafter(Drafter):
    """Guesses that know the path executor's "model": each is right with a chance, otherwise any token at all."""

    def __init__(self, table: BranchTable, tree: DraftTree, chance: float, seed: int = 0) -> None:
        self.table = table
        self.tree = tree
        self.chance = chance
        self.random = np.random.default_rng(seed)

    def available(self, slots: IntArray) -> Int32Array:
        return self.random.integers(0, self.tree.size + 1, size=slots.size).astype(np.int32)

    def tokens(self, slots: IntArray, sizes: Int32Array) -> Int32Array:
        drafts: list[int] = []
        for slot, size in zip(slots.tolist(), sizes.tolist(), strict=True):
            path = self.table.tokens[slot, : self.table.length[slot]].tolist()
            nodes: list[int] = []
            for node in range(size):
                above, parent = [], int(self.tree.parent[node])
                while parent >= 0:
                    above.insert(0, nodes[parent])
                    parent = int(self.tree.parent[parent])
                said = scores((*path, *above)).copy()
                said[CHILD] = -np.inf
                if (path + above)[-1] in (FORK, CHILD):
                    said[FORK] = -np.inf
                likely = np.argsort(-said)
                right = self.random.random() < self.chance
                nodes.append(int(likely[self.tree.rank[node]]) if right else int(self.random.integers(0, VOCAB)))
            drafts += nodes
        return np.array(drafts, dtype=np.int32)

    def learn(self, report: StepReport, slots: IntArray, wanted: IntArray, children: Sequence[Branch]) -> None:
        """Nothing: it knows."""

    def rest(self, report: StepReport) -> None:
        """Nothing: it knows."""


def speculate(engine: Engine, drafter: Drafter, step_tokens: int = 64, **options: object) -> Speculation:
    """Let an engine draft with a test's drafter."""
    books = engine.scheduler
    chosen = DraftOptions(method="medusa", measured=False, **options)  # type: ignore[arg-type]
    tokens = engine.executor.manifest.tokens
    books.speculation = Speculation(chosen, drafter, books.table, books.requests, books.blocks, tokens, step_tokens)
    return books.speculation


def random_tree(random: np.random.Generator, nodes: int, width: int = 3, depth: int = 4) -> DraftTree:
    """A tree of at most `nodes` nodes; ranks need not be without gaps."""
    paths: set[tuple[int, ...]] = set()
    for _ in range(nodes):
        path = tuple(int(random.integers(width)) for _ in range(int(random.integers(1, depth + 1))))
        paths |= {path[:length] for length in range(1, len(path) + 1)}
    return DraftTree(sorted(paths), max(nodes, 1))


def run_planned(engine: Engine, step: Step) -> None:
    """Run and book a step that a test has looked at after planning it."""
    speculation = engine.scheduler.speculation
    assert speculation is not None
    logits = engine.executor.execute(step.inputs)
    verification = speculation.verify(step)
    runs = None if step.drafts is None else speculation.runs(verification, logits, engine.sampler)
    if runs is None:
        first = logits[: step.sampled.size]
        sampled = engine._sample(first, step.sampled, step.counters, step.fork_banned)
        engine._verify(step, logits, verification, speculation, sampled, None)
    else:
        engine._verify(step, logits, verification, speculation, runs, None)
