"""The books of the prefix cache's second tier: blocks in host memory that hold what was evicted from the KV pool.

A host block is free or holds the content of one digest. What it holds was copied out of the pool by a step, and
comes back by a copy in another step; nothing here touches K/V. A digest that has come back is in both tiers: should
its block in the pool be evicted again, nothing has to be copied.

Copies are planned while a step is planned and made by the next step that is written, whoever is in it: first all
copies out, then slot copies, then all copies in (docs/step-contract.md). Until then
- a host block that is to be copied in is not given to other content;
- a host block that is to be filled may be: its copy out is then dropped with its content.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from apar.runtime.kv_cache import KVCacheError
from apar.runtime.step import NO_SWAPS, Int32Array

_COMING = -1
"""In place of a block of the pool that is still to be allocated."""


class HostTier:
    """What host blocks hold, in the order in which they are given up, and the copies of the next step.

    Args:
        num_blocks: host blocks that the executor offers, at least 1.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.swapped_out = 0
        """Blocks that steps copied to host memory."""
        self.swapped_in = 0
        """Blocks that steps copied back."""
        self.hits = 0
        """Blocks that were found here by those who did not find them in the pool."""
        self._held: OrderedDict[bytes, int] = OrderedDict()
        """Digest -> host block; the first one is given up first."""
        self._digests: list[bytes | None] = [None] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._out: dict[int, int] = {}
        """Host block -> block of the pool that the next step copies to it."""
        self._in: dict[int, int] = {}
        """Host block -> block of the pool that the next step copies it to."""

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._held

    @property
    def num_held(self) -> int:
        """Host blocks that hold something."""
        return len(self._held)

    def counters(self) -> dict[str, int]:
        """Gauges and totals, by the names of `Scheduler.load`."""
        return {
            "host_blocks_total": self.num_blocks,
            "host_blocks_used": self.num_held,
            "swapped_out": self.swapped_out,
            "swapped_in": self.swapped_in,
            "host_hits": self.hits,
        }

    def keep(self, blocks: Sequence[int], digests: Sequence[bytes]) -> None:
        """Keep the contents of blocks of the pool that are being evicted; the most useful one comes last.

        Where there is not enough room, what was kept first goes.
        """
        held = self._held
        for block, digest in zip(blocks, digests, strict=True):
            host = held.get(digest)
            if host is not None:
                held.move_to_end(digest)
                if self._in.get(host) == block:
                    del self._in[host]
        for block, digest in zip(blocks, digests, strict=True):
            if digest not in held:
                host = self._room()
                if host < 0:
                    return
                held[digest] = host
                self._digests[host] = digest
                self._out[host] = block

    def pin(self, digests: Sequence[bytes]) -> list[int]:
        """Host blocks of `digests`, all of which are here; they stay until they have been copied in."""
        hosts = [self._held[digest] for digest in digests]
        for digest, host in zip(digests, hosts, strict=True):
            self._held.move_to_end(digest)
            self._in[host] = _COMING
        return hosts

    def bring_back(self, hosts: Sequence[int], blocks: Sequence[int]) -> None:
        """Have the next step copy pinned host blocks to `blocks` of the pool."""
        self._in.update(zip(hosts, blocks, strict=True))
        self.hits += len(hosts)

    def forget(self, digest: bytes) -> None:
        """Give up a content that cannot be trusted, if it is here, and its copies."""
        host = self._held.pop(digest, None)
        if host is not None:
            self._release(host)

    def distrust(self, hosts: Iterable[int]) -> None:
        """Give up what a step that failed was to fill."""
        for host in hosts:
            digest = self._digests[host]
            if digest is not None:
                self.forget(digest)

    def take_swaps(self) -> tuple[Int32Array, Int32Array]:
        """The copies that the step which is being written has to make: `swap_out`, `swap_in` (see `StepInputs`)."""
        if not self._out and not self._in:
            return NO_SWAPS, NO_SWAPS
        out = np.array([(block, host) for host, block in self._out.items()], dtype=np.int32).reshape(-1, 2)
        back = np.array(list(self._in.items()), dtype=np.int32).reshape(-1, 2)
        self.swapped_out += len(out)
        self.swapped_in += len(back)
        # The pool has these now: here they are the first to go.
        for host in self._in:
            digest = self._digests[host]
            assert digest is not None
            self._held.move_to_end(digest, last=False)
        self._out.clear()
        self._in.clear()
        return out, back

    def check(self, block_of: Mapping[bytes, int]) -> None:
        """Prove the books; `block_of` says which block of the pool holds a digest. Raises KVCacheError."""
        held = set(self._held.values())
        if len(held) != len(self._held):
            raise KVCacheError("a host block holds two contents")
        if len(set(self._free)) != len(self._free) or not held.isdisjoint(self._free):
            raise KVCacheError("a host block is on the free list twice, or holds something")
        if held.union(self._free) != set(range(self.num_blocks)):
            raise KVCacheError("free host blocks and those that hold something do not add up")
        known = [digest for digest in self._digests if digest is not None]
        if len(known) != len(held) or any(self._digests[host] != digest for digest, host in self._held.items()):
            raise KVCacheError("a host block is listed under a digest that is not its own")
        if not held.issuperset(self._out) or not held.issuperset(self._in):
            raise KVCacheError("a host block that holds nothing is to be copied")
        if len(set(self._out.values())) != len(self._out):
            raise KVCacheError("a block is to be copied out twice")
        for host, block in self._in.items():
            digest = self._digests[host]
            if digest is None or block_of.get(digest) != block:
                raise KVCacheError(f"block {block} is to be filled from a host block that holds something else")

    def _room(self) -> int:
        """A host block to be filled: a free one, or the first that may be given up; -1 if there is none."""
        if self._free:
            return self._free.pop()
        for digest, host in self._held.items():
            if host not in self._in:
                self.forget(digest)
                return self._free.pop()
        return -1

    def _release(self, host: int) -> None:
        self._digests[host] = None
        self._out.pop(host, None)
        self._in.pop(host, None)
        self._free.append(host)
