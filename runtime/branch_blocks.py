"""Blocks of branches: who gets which, what siblings share, and which slots are copied when they part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from apar.runtime.branch import Branch
from apar.runtime.branch_table import NO_LIMIT, BranchTable
from apar.runtime.kv_cache import ONE, ROOT_DIGEST, KVCache, chain_digest
from apar.runtime.request_table import RequestTable
from apar.runtime.step import Int32Array, IntArray

NO_BLOCKS = np.zeros(0, dtype=np.int32)
NO_COPIES = np.zeros((0, 2), dtype=np.int32)


@dataclass(frozen=True, slots=True)
class Claim:
    """Blocks that rows of a step must take before their tokens have a place."""

    slots: IntArray
    """[n] branches that need any."""
    sizes: Int32Array
    """[n] how many, those that replace shared tails included."""
    total: int


class BranchBlocks:
    """Extends, shares, finds again and releases the block tables of branches, and keeps the requests' counts.

    Args:
        table: live branches.
        requests: admitted requests.
        cache: the books of the pool.
    """

    def __init__(self, table: BranchTable, requests: RequestTable, cache: KVCache) -> None:
        self.table = table
        self.requests = requests
        self.cache = cache
        self._offsets = np.arange(cache.block_size, dtype=np.int32).repeat(2).reshape(-1, 2)
        """[block_size, 2] places in a block, for source and target of a copy."""
        self._moves = NO_COPIES
        """[C, 2] slot copies of accepted draft nodes; the next step makes them, whoever is in it."""

    def claim(self, rows: IntArray, ends: Int32Array) -> Claim:
        """What `rows` [n] need to hold K/V of their paths up to `ends` [n]; nothing is taken yet."""
        table, size = self.table, self.cache.block_size
        missing = ends + (size - 1)
        missing //= size
        missing -= table.num_blocks[rows]
        missing += table.copy_tail[rows]
        takers = missing.nonzero()[0]
        sizes = missing[takers]
        return Claim(rows[takers], sizes, int(np.add.reduce(sizes)))

    def room(self, slot: int) -> int:
        """Tokens that a branch could compute now if it took every available block."""
        table = self.table
        blocks = int(table.num_blocks[slot]) - int(table.copy_tail[slot]) + self.cache.available
        return blocks * self.cache.block_size - int(table.computed[slot])

    def take(self, claim: Claim) -> Int32Array:
        """Extend tables by what was claimed; returns the slot copies [C, 2] that un-share their tails."""
        table, slots, sizes, total = self.table, claim.slots, claim.sizes, claim.total
        if not total:
            return NO_COPIES
        # A row with a shared tail needs at least the block that replaces it, so it is among the takers.
        tails = slots[table.copy_tail[slots].nonzero()[0]]
        if tails.size:
            table.num_blocks[tails] = last = table.num_blocks[tails] - 1
            table.copy_tail[tails] = 0
            sources = table.block_table[tails, last]
        blocks = self.cache.allocate(total)
        if total == slots.size:
            table.block_table[slots, table.num_blocks[slots]] = blocks
        else:
            first = np.add.accumulate(sizes) - sizes
            columns = np.arange(total) - (first - table.num_blocks[slots]).repeat(sizes)
            table.block_table[slots.repeat(sizes), columns] = blocks
        table.num_blocks[slots] += sizes
        owners = table.request[slots]
        np.add.at(self.requests.held, owners, sizes)
        self.requests.peak[owners] = np.maximum(self.requests.peak[owners], self.requests.held[owners])
        return self._tail_copies(tails, sources) if tails.size else NO_COPIES

    def extend(self, slot: int, end: int) -> Int32Array:
        """Claim and take what one branch needs to hold K/V of its path up to `end`; returns slot copies like `take`."""
        table, requests = self.table, self.requests
        if table.copy_tail[slot]:
            return self.take(self.claim(np.array([slot]), np.array([end], dtype=np.int32)))
        have, size = int(table.num_blocks[slot]), self.cache.block_size
        count = (end + size - 1) // size - have
        if count:
            table.block_table[slot, have : have + count] = self.cache.allocate(count)
            table.num_blocks[slot] = have + count
            owner = table.request[slot]
            requests.held[owner] += count
            requests.peak[owner] = max(requests.peak[owner], requests.held[owner])
        return NO_COPIES

    def _tail_copies(self, tails: IntArray, sources: Int32Array) -> Int32Array:
        """Slot copies of the filled part of parents' last blocks into the children's own."""
        table, size = self.table, self.cache.block_size
        computed = table.computed[tails]
        column = computed // size
        blocks = np.array((sources, table.block_table[tails, column])) * size
        copies = (blocks.T[:, None] + self._offsets)[self._offsets[:, 0] < (computed - column * size)[:, None]]
        if self._moves.size:
            # What is still to be moved into the parent's block is taken from where it lies.
            moved = dict(self._moves[:, ::-1].tolist())
            copies[:, 0] = [moved.get(source, source) for source in copies[:, 0].tolist()]
        # Copies come first in a step, so a source that is released here may be written to in the same step.
        self._give_up(sources, table.request[tails])
        return copies

    def move(self, slots: IntArray, source: Int32Array | IntArray, target: Int32Array | IntArray) -> None:
        """Let branches have at path index `target` [n] what was computed at `source` [n]: their accepted draft nodes.

        The next step that is planned makes the copies, first of all; until then the blocks are not to be registered.
        """
        moving = source != target
        if moving.any():
            slots, source, target = slots[moving], source[moving], target[moving]
            table, size = self.table.block_table, self.cache.block_size
            pairs = [table[slots, index // size] * size + index % size for index in (source, target)]
            self._moves = np.concatenate((self._moves, np.stack(pairs, axis=1).astype(np.int32)))

    def take_moves(self) -> Int32Array:
        """Slot copies [C, 2] that the step which is being planned has to make for earlier drafts."""
        moves, self._moves = self._moves, NO_COPIES
        return moves

    def trim(self, slots: IntArray) -> None:
        """Release the blocks of branches that lie behind their paths: rejected drafts.

        Accepted nodes may still have to be moved out of them; nothing is written before that.
        """
        table, size = self.table, self.cache.block_size
        keep = -(-table.length[slots] // size)
        for slot, count in zip(slots.tolist(), keep.tolist(), strict=True):
            have = int(table.num_blocks[slot])
            if have > count:
                blocks = table.block_table[slot, count:have].copy()
                table.block_table[slot, count:have] = -1
                table.num_blocks[slot] = count
                self.requests.held[table.request[slot]] -= self.cache.release(blocks).size

    def owners_of(self, slots: Int32Array) -> list[int]:
        """Requests with a branch that lists a block in which one of the pool's `slots` lies. Slow: for failures."""
        table = self.table
        hit = np.unique(slots // self.cache.block_size)
        live = [s for s, branch in enumerate(table.branches) if branch is not None]
        return list(dict.fromkeys(int(table.request[s]) for s in live if np.isin(table.blocks(s), hit).any()))

    def _give_up(self, blocks: Int32Array, owners: IntArray) -> None:
        """Drop references to `blocks` [n], each on behalf of a request of `owners` [n]."""
        gone = self.cache.release(blocks)
        if gone.size:
            np.subtract.at(self.requests.held, owners[gone], ONE)
        if self._moves.size:
            # Moves into blocks that nobody lists any more are not made.
            targets = self._moves[:, 1] // self.cache.block_size
            self._moves = self._moves[self.cache.references[targets] > 0]

    def inherit(self, children: Sequence[Branch]) -> None:
        """Let newborn branches share what their parents have of the paths before [Fork].

        Full blocks are shared for good; the partly filled one until a child's first step copies its filled slots.
        """
        table, size = self.table, self.cache.block_size
        shared = []
        for child in children:
            assert child.parent is not None
            slot, source, position = child.slot, child.parent.slot, child.start - 2
            full = position // size
            count = full + (position > full * size)
            blocks = table.block_table[source, :count]
            table.block_table[slot, :count] = blocks
            table.num_blocks[slot] = count
            table.computed[slot] = position
            table.copy_tail[slot] = count - full
            table.share[slot] = min(int(table.share[source]), full)
            shared.append(blocks)
        self.cache.share(np.concatenate(shared))

    def attach_prefix(self, branch: Branch) -> None:
        """Give a branch without blocks the longest cached prefix of its path, leaving a token to compute."""
        table, slot = self.table, branch.slot
        if table.num_blocks[slot]:
            return
        request = branch.request
        usable = (int(table.length[slot]) - 1) // self.cache.block_size
        blocks = self.cache.match(self._digests(branch, usable)) if self.cache.prefix_caching else NO_BLOCKS
        count = added = blocks.size
        siblings = [b.slot for b in request.live if b is not branch and table.num_blocks[b.slot]]
        table.block_table[slot, :count] = blocks
        table.num_blocks[slot] = count
        table.computed[slot] = count * self.cache.block_size
        if siblings:
            known = np.concatenate([table.blocks(sibling) for sibling in siblings])
            added -= int(np.count_nonzero(np.isin(blocks, known)))
            table.share[slot] = self._common_blocks(slot, siblings[0])
        held, peak = self.requests.held, self.requests.peak
        held[request.index] += added
        peak[request.index] = max(peak[request.index], held[request.index])
        if not request.preemptions and branch.parent is None and len(request.branches) == 1:
            request.cached_tokens = int(table.computed[slot])

    def _common_blocks(self, slot: int, sibling: int) -> int:
        """Leading blocks that `slot` has in common with what `sibling` shares with the others."""
        mine, theirs = self.table.blocks(slot), self.table.blocks(sibling)
        width = min(mine.size, theirs.size)
        differs = (mine[:width] != theirs[:width]).nonzero()[0]
        common = int(differs[0]) if differs.size else width
        return min(common, int(self.table.share[sibling]))

    def register(self, branch: Branch, end: int) -> list[int]:
        """Make the full blocks of `path[:end]` findable; returns those that were not before."""
        if not self.cache.prefix_caching:
            return []
        full = end // self.cache.block_size
        if self._moves.size:
            # A block whose content is still to be moved together is not what its digest says.
            unsettled = np.isin(self.table.block_table[branch.slot, :full], self._moves[:, 1] // self.cache.block_size)
            full = int(unsettled.argmax()) if unsettled.any() else full
        blocks = self.table.block_table[branch.slot, :full]
        places = self.cache.unregistered(blocks)
        if not places.size:
            return []
        fresh: list[int] = blocks[places].tolist()
        digests = self._digests(branch, full)
        for block, place in zip(fresh, places.tolist(), strict=True):
            self.cache.register(block, digests[place])
        return fresh

    def _digests(self, branch: Branch, count: int) -> list[bytes]:
        """Chain digests of the first `count` full blocks of a branch's path."""
        digests, size = branch.digests, self.cache.block_size
        path = self.table.tokens[branch.slot]
        for i in range(len(digests), count):
            parent = digests[-1] if digests else ROOT_DIGEST
            digests.append(chain_digest(parent, path[i * size : (i + 1) * size]))
        return digests[:count]

    def release(self, branches: Sequence[Branch], remember: Sequence[Branch] = ()) -> None:
        """Give up the blocks of `branches`; the full ones of `remember`, some of these, stay findable in the prefix
        cache."""
        table = self.table
        for branch in remember:
            self.register(branch, int(table.computed[branch.slot]))
        counts, owners, blocks = [], [], []
        # Blocks are evicted from the end on: those of the first branch first.
        for branch in reversed(branches):
            slot = branch.slot
            count = int(table.num_blocks[slot])
            counts.append(count)
            owners.append(branch.request.index)
            blocks.append(table.block_table[slot, :count].copy())
            table.block_table[slot, :count] = -1
            table.num_blocks[slot] = 0
            table.computed[slot] = 0
            table.copy_tail[slot] = 0
            table.share[slot] = NO_LIMIT
        self._give_up(np.concatenate(blocks), np.array(owners).repeat(counts))
