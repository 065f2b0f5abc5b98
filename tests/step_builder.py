"""Random valid steps for tests of executors, independent of the runtime's scheduler.

A `Books` keeps branches with their paths and blocks the slow, obvious way. `Books.step` turns "these branches
compute that many tokens" into StepInputs and says, for every wanted row of logits, which path predicts it:
an ordinary causal forward of that path is the expected result.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from apar.runtime.step import StepInputs


@dataclass(slots=True, eq=False)
class Branch:
    """One decoding path and where its keys and values lie."""

    tokens: list[int]
    done: int = 0
    """Leading tokens whose K/V is in the pool."""
    blocks: list[int] = field(default_factory=list)
    drafts: dict[int, int] = field(default_factory=dict)
    """Key index of each draft node of the last step -> key index that it followed."""


@dataclass(slots=True)
class Row:
    """What one branch computes in a step: `count` pending tokens, then draft nodes.

    parents[i] is the draft node that node i follows, -1: the branch's last token.
    """

    branch: Branch
    count: int
    drafts: Sequence[int] = ()
    parents: Sequence[int] = ()


@dataclass(slots=True)
class Step:
    inputs: StepInputs
    paths: list[list[int]]
    """[L] the path whose last token predicts each row of logits."""


class Books:
    """Blocks, reference counts and pending slot copies."""

    def __init__(self, num_blocks: int, block_size: int, seed: int = 0) -> None:
        self.size = block_size
        self.random = random.Random(seed)
        self.free = self.random.sample(range(num_blocks), num_blocks)
        self.references = [0] * num_blocks
        self.copies: list[tuple[int, int]] = []

    def add(self, tokens: Sequence[int]) -> Branch:
        """A branch of its own."""
        return Branch(list(tokens))

    def fork(self, parent: Branch, tokens: Sequence[int]) -> Branch:
        """A child that shares what the parent has computed: full blocks by reference, the last one by copy."""
        child = Branch([*parent.tokens, *tokens], parent.done)
        full = parent.done // self.size
        child.blocks = parent.blocks[:full]
        for block in child.blocks:
            self.references[block] += 1
        if parent.done % self.size:
            child.blocks.append(self._take())
            moved = {target: source for source, target in self.copies}  # sources are read before any copy is made
            for index in range(full * self.size, parent.done):
                source = self.slot(parent, index)
                self.copies.append((moved.get(source, source), self.slot(child, index)))
        return child

    def accept(self, branch: Branch, node: int) -> None:
        """Keep the draft nodes on the way to key index `node`, moved together behind the path."""
        way = []
        while node in branch.drafts:
            way.append(node)
            node = branch.drafts[node]
        for target, source in enumerate(reversed(way), branch.done):
            if source != target:
                self.copies.append((self.slot(branch, source), self.slot(branch, target)))
        branch.done += len(way)
        branch.drafts = {}

    def release(self, branch: Branch) -> None:
        """Give the branch's blocks back."""
        for block in branch.blocks:
            self.references[block] -= 1
            if not self.references[block]:
                self.copies = [copy for copy in self.copies if copy[1] // self.size != block]
                self.free.insert(self.random.randint(0, len(self.free)), block)
        branch.blocks = []

    def slot(self, branch: Branch, index: int) -> int:
        return branch.blocks[index // self.size] * self.size + index % self.size

    def step(self, rows: Sequence[Row], *, padding: int = 0, wanted: str = "all") -> Step:
        """Inputs of a step. wanted: "all" tokens in random order, or the "last" of every row. `padding`: empty
        rows at the end, of one token each."""
        rows = sorted(rows, key=lambda row: row.branch.blocks[:1])
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        starts, lengths, begins, paths = [0], [], [], []
        sees: list[list[int]] = []
        for row in rows:
            branch, begin = row.branch, row.branch.done
            total = begin + row.count + len(row.drafts)
            while len(branch.blocks) * self.size < total:
                branch.blocks.append(self._take())
            for index in range(begin, begin + row.count):
                ids.append(branch.tokens[index])
                positions.append(index)
                sees.append(list(range(index - begin + 1)))
                paths.append(branch.tokens[: index + 1])
            branch.done = begin + row.count
            for node, (token, parent) in enumerate(zip(row.drafts, row.parents, strict=True)):
                above = row.count + parent if parent >= 0 else row.count - 1
                root = len(sees) - node - row.count
                ids.append(token)
                positions.append(positions[root + above] + 1)
                sees.append([*sees[root + above], row.count + node])
                paths.append([*paths[root + above], token])
                branch.drafts[begin + row.count + node] = begin + above
            slots += [self.slot(branch, index) for index in range(begin, total)]
            starts.append(starts[-1] + total - begin)
            lengths.append(total)
            begins.append(begin)
        tables = [row.branch.blocks for row in rows]
        groups, shared = self._groups(tables, begins)
        for _ in range(padding):
            ids.append(0)
            positions.append(0)
            slots.append(-1)
            sees.append([0])
            starts.append(starts[-1] + 1)
            lengths.append(1)
            tables.append([])
            groups.append(len(tables))
            shared.append(0)
        words = max((max(seen) for seen in sees), default=0) // 32 + 1 if any(row.drafts for row in rows) else 0
        mask = np.zeros((len(ids), words), np.uint32)
        if words:
            for token, seen in enumerate(sees):
                for bit in seen:
                    mask[token, bit // 32] |= np.uint32(1 << bit % 32)
        order = list(range(len(paths)))
        self.random.shuffle(order)
        if wanted == "last":
            order = [end - 1 for end in starts[1 : len(rows) + 1]]
        width = max(len(table) for table in tables) + self.random.randint(0, 2)
        table_array = np.full((len(tables), width), -1, np.int32)
        for number, table in enumerate(tables):
            table_array[number, : len(table)] = table
        copies, self.copies = self.copies, []
        inputs = StepInputs(
            input_ids=np.array(ids, np.int32),
            position_ids=np.array(positions, np.int32),
            query_start=np.array(starts, np.int32),
            kv_len=np.array(lengths, np.int32),
            block_table=table_array,
            slot_mapping=np.array(slots, np.int32),
            slot_copies=np.array(copies, np.int32).reshape(-1, 2),
            prefix_rows=np.array(groups, np.int32),
            prefix_blocks=np.array(shared, np.int32),
            tree_mask=mask.view(np.int32),
            logits_rows=np.array(order, np.int32),
        )
        return Step(inputs, [paths[token] for token in order])

    def _groups(self, tables: list[list[int]], before: list[int]) -> tuple[list[int], list[int]]:
        """Neighbouring rows that begin with the same computed block form a group."""
        bounds, shared = [0], []
        for _, members in itertools.groupby(range(len(tables)), key=lambda r: tables[r][0] if before[r] else ~r):
            group = list(members)
            common = min(before[r] // self.size for r in group)
            while any(tables[r][:common] != tables[group[0]][:common] for r in group):
                common -= 1
            bounds.append(group[-1] + 1)
            shared.append(common)
        return bounds, shared

    def _take(self) -> int:
        block = self.free.pop()
        self.references[block] = 1
        return block


def random_steps(
    seed: int, *, vocab_size: int, num_blocks: int, block_size: int, steps: int, drafts: bool = True
) -> Iterator[Step]:
    """A life of a small tree of branches: chunked prompts, forks, decoding, drafts, ends; rows in random order.

    Needs about 40 blocks of 8 slots. Paths stay below 100 tokens.
    """
    books = Books(num_blocks, block_size, seed)
    choose = books.random

    def words(low: int, high: int) -> list[int]:
        return [choose.randrange(vocab_size) for _ in range(choose.randint(low, high))]

    branches = [books.add(words(3, 35)) for _ in range(2)]
    for number in range(steps):
        rows = []
        for branch in branches:
            pending = len(branch.tokens) - branch.done
            if pending == 0:
                branch.tokens += words(1, 2)
                pending = len(branch.tokens) - branch.done
            if len(branches) > 1 and choose.random() < 0.15:
                continue  # not scheduled in this step
            count = pending if choose.random() < 0.6 else choose.randint(1, pending)
            row = Row(branch, count)
            if drafts and number % 2 and count == pending and choose.random() < 0.6:
                row.drafts = words(1, 6)
                row.parents = [choose.randint(-1, node - 1) for node in range(len(row.drafts))]
            rows.append(row)
        if not rows:
            rows.append(Row(branches[0], 1))
        choose.shuffle(rows)
        before = {id(row): row.branch.done + row.count for row in rows}
        yield books.step(rows, padding=choose.choice((0, 0, 2)), wanted=choose.choice(("all", "last")))
        for row in rows:
            if row.drafts:
                node = choose.randrange(len(row.drafts))
                way = []
                while node >= 0:
                    way.append(node)
                    node = row.parents[node]
                row.branch.tokens += [row.drafts[node] for node in reversed(way)]
                books.accept(row.branch, before[id(row)] + way[0])
        for branch in list(branches):
            computed = branch.done == len(branch.tokens)
            if computed and len(branches) < 6 and choose.random() < 0.5:
                branch.tokens += words(0, 1)  # as [Fork] is: pending in both, computed by each for itself
                branches.append(books.fork(branch, words(1, 3)))
            elif len(branches) > 2 and choose.random() < 0.1:
                branches.remove(branch)
                books.release(branch)
        if sum(len(branch.tokens) for branch in branches) > 60 * len(branches):
            branches.append(books.add(words(2, 20)))
            books.release(branches.pop(0))
