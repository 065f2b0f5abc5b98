"""The books of the KV pool: which block is referenced how often, which are free, which hold a known prefix.

Nothing here touches K/V itself. A block is in exactly one of three states:
- referenced: `references[b] > 0`, once for every block table that lists it (and every pending copy source);
- cached: not referenced, but its content is known by a digest and may be revived by `match`;
- free.
Cached blocks are evicted least recently used first, only when no free block is left. Where there is a host tier
(`host_tier`), what is evicted is kept there, and `match` brings it back.

The digest of a full block chains over all tokens of its path (`chain_digest`), so equal digests mean
equal paths. BLAKE2b with 128 bits makes an accidental or crafted collision infeasible.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from apar.export.errors import AparError
from apar.runtime.step import Int32Array, IntArray

if TYPE_CHECKING:
    from apar.runtime.host_tier import HostTier

ROOT_DIGEST = b""
ONE = np.int32(1)
"""A typed number: with a plain one `ufunc.at` takes ten times as long."""
NO_ENTRIES: IntArray = np.zeros(0, dtype=np.int64)


class KVCacheError(AparError):
    """The books do not add up, or more blocks were taken than exist: a defect of the runtime."""


def chain_digest(parent: bytes, tokens: Int32Array) -> bytes:
    """Digest of a full block: of the digest before it and the block's own token ids."""
    return hashlib.blake2b(parent + tokens.tobytes(), digest_size=16).digest()


class KVCache:
    """Reference-counted blocks with a prefix cache.

    Args:
        num_blocks: blocks in the pool.
        block_size: slots in a block.
        prefix_caching: keep released full blocks whose digest was registered until they are evicted.
        host: keeps what is evicted.
    """

    def __init__(
        self, num_blocks: int, block_size: int, prefix_caching: bool = True, host: HostTier | None = None
    ) -> None:
        if num_blocks < 1 or block_size < 1:
            raise KVCacheError(f"a KV pool needs at least one block of one slot, not {num_blocks} of {block_size}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self.host = host
        self.references = np.zeros(num_blocks, dtype=np.int32)
        self._entry = np.empty(num_blocks, dtype=np.int64)
        """Scratch, by block: an entry of what is being released."""
        self._free = np.arange(num_blocks - 1, -1, -1, dtype=np.int32)
        self._num_free = num_blocks
        self._digests: list[bytes | None] = [None] * num_blocks
        self._registered = np.zeros(num_blocks, dtype=bool)
        self._block_of: dict[bytes, int] = {}
        self._num_cached = 0
        # Release order of cached blocks: a ring of (block, stamp); an entry is stale once the block's
        # stamp moved on. Stale entries are skipped on eviction and dropped when the ring is full.
        self._ring_blocks = np.zeros(2 * num_blocks + 16, dtype=np.int32)
        self._ring_stamps = np.zeros(2 * num_blocks + 16, dtype=np.int64)
        self._ring_start = 0
        self._ring_end = 0
        self._stamp = np.zeros(num_blocks, dtype=np.int64)
        self._clock = 0
        self.hits = 0
        self.evictions = 0

    @property
    def available(self) -> int:
        """Blocks that `allocate` can hand out: free ones and cached ones."""
        return self._num_free + self._num_cached

    @property
    def num_referenced(self) -> int:
        """Blocks that some table lists."""
        return self.num_blocks - self._num_free - self._num_cached

    @property
    def num_cached(self) -> int:
        """Blocks kept only for their content."""
        return self._num_cached

    def allocate(self, count: int) -> Int32Array:
        """Take `count` blocks, each referenced once. Evicts cached blocks if free ones do not suffice.

        Raises KVCacheError if fewer are available; the scheduler counts before it asks.
        """
        if count > self._num_free:
            if count > self.available:
                raise KVCacheError(f"{count} blocks were asked for, {self.available} are available")
            self._evict(count - self._num_free)
        self._num_free -= count
        blocks = self._free[self._num_free : self._num_free + count].copy()
        self.references[blocks] = 1
        return blocks

    def share(self, blocks: Int32Array) -> None:
        """Add a reference for each entry of `blocks` (all referenced already; some may be listed several times)."""
        np.add.at(self.references, blocks.astype(np.int64), ONE)

    def release(self, blocks: Int32Array) -> IntArray:
        """Drop a reference for each entry of `blocks` [n]; a block may be listed several times.

        Later entries are evicted first: those of a path are less useful than earlier ones. Returns indices of the
        entries with which the last reference to a block went, one for each such block.
        """
        index = blocks.astype(np.int64)
        np.subtract.at(self.references, index, ONE)
        left = self.references[index]
        least = left[left.argmin()] if left.size else 1
        if least > 0:
            return NO_ENTRIES
        if least < 0:
            np.add.at(self.references, index, ONE)
            raise KVCacheError(f"block {int(blocks[left.argmin()])} is released more often than it was taken")
        entries: IntArray = (left == 0).nonzero()[0][::-1]
        gone = index[entries]
        # Of equal blocks the one is kept that was written last: the first entry.
        self._entry[gone] = entries
        first = self._entry[gone] == entries
        if np.count_nonzero(first) < first.size:
            entries, gone = entries[first], gone[first]
        registered = self._registered[gone]
        if np.count_nonzero(registered):
            self._retire(gone[registered])
            gone = gone[~registered]
        self._free[self._num_free : self._num_free + gone.size] = gone
        self._num_free += gone.size
        return entries

    def register(self, block: int, digest: bytes) -> None:
        """Make a full block findable by its digest. A digest that another block holds is left there."""
        if self.prefix_caching and not self._registered[block] and digest not in self._block_of:
            self._digests[block] = digest
            self._registered[block] = True
            self._block_of[digest] = block

    def unregistered(self, blocks: Int32Array) -> IntArray:
        """Indices into `blocks` of those that cannot be found by a digest."""
        return (~self._registered[blocks]).nonzero()[0]

    def forget(self, blocks: Iterable[int]) -> None:
        """Remove blocks from the prefix cache, and their copies in host memory, because their content cannot be
        trusted."""
        for block in blocks:
            block = int(block)
            if self._registered[block]:
                digest = self._unregister(block)
                if self.host is not None:
                    self.host.forget(digest)
                if self.references[block] == 0:
                    self._stamp[block] = -1
                    self._num_cached -= 1
                    self._free[self._num_free] = block
                    self._num_free += 1

    def match(self, digests: Sequence[bytes]) -> Int32Array:
        """Reference and return the blocks of the longest run of known digests from the first on.

        What only the host tier holds gets blocks, as far as some are available, which the next step fills.
        """
        if self.host is not None:
            return self._match_tiers(digests, self.host)
        found: list[int] = []
        for digest in digests:
            block = self._block_of.get(digest)
            if block is None:
                break
            found.append(block)
        blocks = np.array(found, dtype=np.int32)
        if found:
            self._revive(blocks)
            self.hits += len(found)
        return blocks

    def known(self, digests: Sequence[bytes]) -> int:
        """How many leading digests `match` would find in the pool, without taking anything."""
        count = 0
        for digest in digests:
            if digest not in self._block_of:
                break
            count += 1
        return count

    def check(self, tables: Iterable[Int32Array] = ()) -> None:
        """Prove the books: every block free, cached, or referenced exactly as often as `tables` say.

        `tables` are the block lists of all live branches. Raises KVCacheError with the first discrepancy.
        """
        expected = np.zeros(self.num_blocks, dtype=np.int32)
        for table in tables:
            np.add.at(expected, np.asarray(table, dtype=np.int64), 1)
        wrong = np.flatnonzero(expected != self.references)
        if wrong.size:
            block = int(wrong[0])
            raise KVCacheError(
                f"block {block} has {int(self.references[block])} references, tables hold {int(expected[block])} "
                f"({wrong.size} blocks differ)"
            )
        free = self._free[: self._num_free]
        if np.unique(free).size != self._num_free:
            raise KVCacheError("a block is on the free list twice")
        if self.references[free].any() or self._registered[free].any():
            raise KVCacheError("a block on the free list is referenced or cached")
        cached = np.flatnonzero((self.references == 0) & self._registered)
        if cached.size != self._num_cached:
            raise KVCacheError(f"{cached.size} blocks are cached, the count says {self._num_cached}")
        if self._num_free + self._num_cached + int((self.references > 0).sum()) != self.num_blocks:
            raise KVCacheError("free, cached and referenced blocks do not add up to the pool")
        if len(self._block_of) != int(self._registered.sum()):
            raise KVCacheError("the digest map and the registered blocks differ")
        for digest, block in self._block_of.items():
            if self._digests[block] != digest:
                raise KVCacheError(f"block {block} is listed under a digest that is not its own")
        entries = slice(self._ring_start, self._ring_end)
        live = self._ring_stamps[entries] == self._stamp[self._ring_blocks[entries]]
        if set(self._ring_blocks[entries][live].tolist()) != set(cached.tolist()):
            raise KVCacheError("the eviction order does not list exactly the cached blocks")
        if self.host is not None:
            self.host.check(self._block_of)

    def _match_tiers(self, digests: Sequence[bytes], host: HostTier) -> Int32Array:
        """`match` over the pool and the host tier."""
        room = self.available
        found: list[int] = []
        for digest in digests:
            block = self._block_of.get(digest, -1)
            if block < 0 and digest not in host:
                break
            if block < 0 or self.references[block] == 0:
                room -= 1
                if room < 0:
                    break
            found.append(block)
        blocks = np.array(found, dtype=np.int32)
        self._revive(blocks[blocks >= 0])
        self.hits += len(found)
        away = np.flatnonzero(blocks < 0)
        if away.size:
            # All that was found is held fast before room is made: what is evicted for it is something else.
            wanted = [digests[i] for i in away.tolist()]
            hosts = host.pin(wanted)
            blocks[away] = taken = self.allocate(away.size)
            for block, digest in zip(taken.tolist(), wanted, strict=True):
                self.register(block, digest)
            host.bring_back(hosts, taken.tolist())
        return blocks

    def _revive(self, blocks: Int32Array) -> None:
        """Reference registered blocks (distinct), cached ones or not."""
        revived = blocks[self.references[blocks] == 0]
        self._stamp[revived] = -1
        self._num_cached -= revived.size
        self.references[blocks] += 1

    def _retire(self, blocks: IntArray) -> None:
        """Append unreferenced registered blocks to the eviction order."""
        count = blocks.size
        if self._ring_end + count > self._ring_blocks.size:
            self._compact_ring()
        stamps = np.arange(self._clock, self._clock + count, dtype=np.int64)
        self._clock += count
        self._ring_blocks[self._ring_end : self._ring_end + count] = blocks
        self._ring_stamps[self._ring_end : self._ring_end + count] = stamps
        self._ring_end += count
        self._stamp[blocks] = stamps
        self._num_cached += count

    def _compact_ring(self) -> None:
        entries = slice(self._ring_start, self._ring_end)
        blocks, stamps = self._ring_blocks[entries], self._ring_stamps[entries]
        live = stamps == self._stamp[blocks]
        blocks, stamps = blocks[live], stamps[live]
        self._ring_blocks[: blocks.size] = blocks
        self._ring_stamps[: blocks.size] = stamps
        self._ring_start, self._ring_end = 0, blocks.size

    def _evict(self, count: int) -> None:
        """Move the `count` least recently released cached blocks to the free list."""
        while count:
            end = min(self._ring_start + max(count, 32), self._ring_end)
            blocks = self._ring_blocks[self._ring_start : end]
            live = np.flatnonzero(self._ring_stamps[self._ring_start : end] == self._stamp[blocks])[:count]
            victims = blocks[live].copy()
            self._ring_start = self._ring_start + int(live[-1]) + 1 if live.size == count else end
            digests = [self._unregister(block) for block in victims.tolist()]
            if self.host is not None:
                self.host.keep(victims.tolist(), digests)
            self._stamp[victims] = -1
            self._free[self._num_free : self._num_free + victims.size] = victims
            self._num_free += victims.size
            self._num_cached -= victims.size
            self.evictions += victims.size
            count -= victims.size

    def _unregister(self, block: int) -> bytes:
        """Take a registered block out of the prefix cache; returns its digest."""
        digest = self._digests[block]
        assert digest is not None
        del self._block_of[digest]
        self._digests[block] = None
        self._registered[block] = False
        return digest
