"""Test double of an executor: its "K/V" are the token ids themselves, its logits a hash of the whole path.

Whatever the host does wrong shows: a table that lists a wrong block, a copy that was forgotten, a write into
a block that somebody shares, a slot used before it was filled. `reference_tree` decodes the same "model"
without scheduler, blocks or batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from apar.export.manifest import DecoderConfig, Manifest, TokenIds
from apar.runtime.branch import Branch
from apar.runtime.executor.base import Executor
from apar.runtime.executor.tree_mask import visible
from apar.runtime.sampling_params import SamplingParams
from apar.runtime.step import Float32Array, StepInputs

VOCAB = 24
FORK, CHILD, EOS = 20, 21, 2
TOKENS = TokenIds(fork=FORK, child=CHILD, eos=(EOS,), bos=1, pad=0)
UNWRITTEN = -7


@lru_cache(maxsize=200_000)
def scores(path: tuple[int, ...]) -> Float32Array:
    """Logits after a path: pseudo-random, with [Fork] and end-of-sequence likelier than other tokens."""
    random = np.random.Generator(np.random.PCG64(abs(hash(path)) % (1 << 63)))
    values = random.random(VOCAB).astype(np.float32)
    values[FORK] += np.float32(0.5 * random.random())
    values[EOS] += np.float32(0.1 * random.random())
    return values


class PathExecutor(Executor):
    """Checks every step against the contract and its own memory of what was written where."""

    name = "path"

    def __init__(self, num_blocks: int, block_size: int, max_context: int, host_blocks: int = 0) -> None:
        self.num_blocks = num_blocks
        self.host_blocks = host_blocks
        self.detail = "test double"
        self.manifest = Manifest(
            decoder=DecoderConfig(
                vocab_size=VOCAB,
                hidden_size=2,
                num_layers=1,
                num_heads=1,
                num_kv_heads=1,
                head_dim=2,
                intermediate_size=2,
                rms_norm_eps=1e-6,
                max_context=max_context,
                rope_inv_freq=(1.0,),
            ),
            tokens=TOKENS,
            block_size=block_size,
        )
        self.slots = np.full(num_blocks * block_size, UNWRITTEN, dtype=np.int64)
        self.host = np.full((host_blocks, block_size), UNWRITTEN, dtype=np.int64)
        self.fail_next = False
        """The next step leaves garbage wherever it was to write, and raises."""
        self.poison: set[int] = set()
        """Prompt-starting tokens whose rows get NaN logits."""
        self.hidden: list[tuple[int, ...]] = []
        """Paths of the last step's logits."""
        self.computed_tokens = 0
        self.swapped_in = 0
        self.block_reads = 0

    def execute(self, inputs: StepInputs) -> Float32Array:
        size = self.manifest.block_size
        blocks = self.slots.reshape(self.num_blocks, size)
        if self.fail_next:
            self.fail_next = False
            self.host[inputs.swap_out[:, 1]] = UNWRITTEN
            blocks[inputs.swap_in[:, 1]] = UNWRITTEN
            self.slots[inputs.slot_copies[:, 1]] = UNWRITTEN
            self.slots[inputs.slot_mapping] = UNWRITTEN
            raise RuntimeError("injected failure")
        rows = inputs.kv_len.size
        tokens = inputs.input_ids.size
        assert inputs.query_start[0] == 0 and inputs.query_start[-1] == tokens
        assert all(getattr(inputs, name).flags.c_contiguous for name in inputs.__slots__)
        assert all(getattr(inputs, name).dtype == np.int32 for name in inputs.__slots__)
        for targets in (inputs.swap_out[:, 1], inputs.swap_in[:, 1], inputs.slot_copies[:, 1]):
            assert np.unique(targets).size == targets.size, "something is copied to twice"
        filled = set(inputs.swap_in[:, 1].tolist())
        assert filled.isdisjoint((inputs.slot_copies[:, 1] // size).tolist()), (
            "a slot is copied into a block swapped in"
        )
        assert filled.isdisjoint((inputs.slot_mapping // size).tolist()), "a token is written into a block swapped in"
        self.host[inputs.swap_out[:, 1]] = blocks[inputs.swap_out[:, 0]]
        self.slots[inputs.slot_copies[:, 1]] = self.slots[inputs.slot_copies[:, 0]]
        blocks[inputs.swap_in[:, 1]] = self.host[inputs.swap_in[:, 0]]
        assert (self.host[inputs.swap_out[:, 1]] >= 0).all(), "a block is kept that was never full"
        self.swapped_in += len(inputs.swap_in)
        assert len(set(inputs.slot_mapping.tolist())) == tokens, "two tokens write one slot"
        self.slots[inputs.slot_mapping] = inputs.input_ids
        self.computed_tokens += tokens
        paths = []
        for row in range(rows):
            table, length = inputs.block_table[row], int(inputs.kv_len[row])
            used = -(-length // size)
            assert (table[:used] >= 0).all() and (table[used:] == -1).all()
            assert len(set(table[:used].tolist())) == used, "a block stands twice in a table"
            index = np.arange(length)
            where = table[index // size] * size + index % size
            start, end = int(inputs.query_start[row]), int(inputs.query_start[row + 1])
            assert (inputs.slot_mapping[start:end] == where[length - (end - start) :]).all()
            before = length - (end - start)
            path = self.slots[where[:before]]
            assert (path >= 0).all(), "a slot is read before it was written"
            seen = visible(inputs.tree_mask[start:end], end - start)
            for i in range(end - start):
                assert seen[i, i] and not seen[i, i + 1 :].any()
                ancestors = np.flatnonzero(seen[i, :i])
                # A token's ancestors are those of the last of them, and that one.
                assert not ancestors.size or (seen[ancestors[-1], : ancestors[-1] + 1].nonzero()[0] == ancestors).all()
                assert inputs.position_ids[start + i] == before + ancestors.size
            tails = [inputs.input_ids[start:end][seen[i, : end - start]] for i in range(end - start)]
            paths += [(path, tail) for tail in tails]
        self._check_groups(inputs)
        self.hidden = [(*path.tolist(), *tail.tolist()) for path, tail in (paths[i] for i in inputs.logits_rows)]
        logits = np.zeros((inputs.logits_rows.size, VOCAB), dtype=np.float32)
        for i, whole in enumerate(self.hidden):
            logits[i] = np.nan if whole[0] in self.poison else scores(whole)
        return logits

    def _check_groups(self, inputs: StepInputs) -> None:
        rows = inputs.prefix_rows
        assert rows[0] == 0 and rows[-1] == inputs.kv_len.size and (np.diff(rows) > 0).all()
        for group, shared in enumerate(inputs.prefix_blocks.tolist()):
            tables = inputs.block_table[rows[group] : rows[group + 1], :shared]
            assert (tables == tables[0]).all(), "rows of a group do not share the blocks they are said to share"
            assert (tables >= 0).all()
            # Shared blocks are full before the step: nobody writes them in it.
            first_written = inputs.kv_len - np.diff(inputs.query_start)
            assert (first_written[rows[group] : rows[group + 1]] >= shared * self.manifest.block_size).all()

    def close(self) -> None:
        pass


@dataclass
class PlainBranch:
    """A branch of the reference: own tokens and children in fork order."""

    tokens: list[int] = field(default_factory=list)
    children: list[PlainBranch] = field(default_factory=list)
    reason: str = ""


def reference_tree(
    prompt: list[int], params: SamplingParams, max_context: int, forks_of: Branch | None = None
) -> PlainBranch:
    """Decode greedily, one path after the other, with the bans that do not depend on other branches.

    `forks_of`: fork only where this tree did, too; where it did not, [Fork] was banned because of load.
    """

    def decode(path: list[int], depth: int, other: Branch | None) -> PlainBranch:
        branch = PlainBranch()
        start = len(path)
        limit = max_context
        if params.max_branch_tokens is not None:
            limit = min(limit, start + params.max_branch_tokens)
        while True:
            values = scores(tuple(path)).copy()
            values[CHILD] = -np.inf
            deepest = depth >= (params.max_depth if params.fork else 1)
            if path[-1] in (FORK, CHILD) or deepest or len(path) + 3 > limit:
                values[FORK] = -np.inf
            if other is not None and other.tokens[len(branch.tokens) : len(branch.tokens) + 1] != [FORK]:
                values[FORK] = -np.inf
            token = int(values.argmax())
            path = [*path, token]
            if token == EOS:
                branch.reason = "stop"
                return branch
            branch.tokens.append(token)
            if len(path) >= limit:
                branch.reason = "length"
                return branch
            if token == FORK:
                child = None if other is None else other.children[len(branch.children)]
                branch.children.append(decode([*path, CHILD], depth + 1, child))

    return decode(list(prompt), 1, forks_of)


def count_branches(branch: PlainBranch) -> int:
    """Branches of a reference tree."""
    return 1 + sum(count_branches(child) for child in branch.children)


def shape(branch: object) -> tuple[object, ...]:
    """A branch and all below it, of the reference or of the runtime, as plain tuples."""
    reason = getattr(branch, "reason", None) or getattr(branch, "finish_reason", None)
    return (tuple(branch.tokens), reason, tuple(shape(child) for child in branch.children))  # type: ignore[attr-defined]
