"""The books of the KV pool."""

from __future__ import annotations

import numpy as np
import pytest

from apar.runtime.kv_cache import ROOT_DIGEST, KVCache, KVCacheError, chain_digest


def digests(*blocks: list[int]) -> list[bytes]:
    chain, parent = [], ROOT_DIGEST
    for block in blocks:
        parent = chain_digest(parent, np.array(block, dtype=np.int32))
        chain.append(parent)
    return chain


def test_allocate_share_release() -> None:
    cache = KVCache(4, 2)
    blocks = cache.allocate(3)
    assert len(set(blocks.tolist())) == 3 and cache.available == 1
    cache.share(blocks[:2])
    cache.release(blocks)
    cache.check([blocks[:2]])
    assert cache.available == 2
    cache.release(blocks[:2])
    cache.check()
    assert cache.available == 4


def test_asking_for_too_much_changes_nothing() -> None:
    cache = KVCache(4, 2)
    blocks = cache.allocate(3)
    with pytest.raises(KVCacheError, match="2 blocks were asked for, 1 are available"):
        cache.allocate(2)
    cache.check([blocks])


def test_double_release_is_found() -> None:
    cache = KVCache(4, 2)
    blocks = cache.allocate(2)
    cache.release(blocks)
    with pytest.raises(KVCacheError, match="released more often than it was taken"):
        cache.release(blocks)


def test_released_blocks_are_found_again_by_their_path() -> None:
    cache = KVCache(8, 2)
    blocks = cache.allocate(3)
    chain = digests([1, 2], [3, 4], [5, 6])
    for block, digest in zip(blocks.tolist(), chain, strict=True):
        cache.register(block, digest)
    cache.release(blocks)
    assert cache.num_cached == 3 and cache.available == 8
    assert cache.known(digests([1, 2], [3, 4], [7, 8])) == 2
    found = cache.match(digests([1, 2], [3, 4], [7, 8]))
    assert found.tolist() == blocks[:2].tolist()
    cache.check([found])
    assert cache.match(digests([3, 4])).size == 0, "the same block behind another path is another block"


def test_eviction_takes_the_least_recently_released_and_tails_first() -> None:
    cache = KVCache(4, 2)
    first, second = cache.allocate(2), cache.allocate(2)
    old, new = digests([1, 1], [2, 2]), digests([3, 3], [4, 4])
    for block, digest in zip(first.tolist() + second.tolist(), old + new, strict=True):
        cache.register(block, digest)
    cache.release(first)
    cache.release(second)
    taken = cache.allocate(1)
    assert cache.known(old) == 1 and cache.known(new) == 2
    cache.check([taken])
    revived = cache.match(old)
    assert revived.tolist() == first[:1].tolist()
    more = cache.allocate(2)
    assert cache.known(new) == 0
    cache.check([taken, revived, more])
    assert cache.evictions == 3


def test_forgotten_blocks_are_never_matched() -> None:
    cache = KVCache(4, 2)
    blocks = cache.allocate(2)
    chain = digests([1, 2], [3, 4])
    cache.register(int(blocks[0]), chain[0])
    cache.register(int(blocks[1]), chain[1])
    cache.forget(blocks.tolist()[:1])
    cache.release(blocks)
    cache.forget(blocks.tolist())
    cache.check()
    assert cache.known(chain) == 0 and cache.num_cached == 0


@pytest.mark.parametrize("seed", range(5))
def test_tables_released_together_leave_what_they_leave_one_after_the_other(seed: int) -> None:
    """Tables that share blocks: the same blocks go, and they are evicted in the same order."""
    random = np.random.default_rng(seed)
    chain = digests(*[[i, i] for i in range(12)])
    tables = [random.permutation(12)[:6].astype(np.int32) for _ in range(4)]
    together, apart = KVCache(12, 2), KVCache(12, 2)
    for cache in (together, apart):
        blocks = cache.allocate(12)
        for block in range(12):
            if block % 4:
                cache.register(block, chain[block])
        for table in tables:
            cache.share(table)
        cache.release(blocks)
    listed = np.concatenate(tables[::-1])
    gone = listed[together.release(listed)]
    assert sorted(gone.tolist()) == sorted(set(listed.tolist()))
    for table in tables:
        apart.release(table)
    while together.num_cached:
        together.check()
        apart.check()
        assert [together.known([digest]) for digest in chain] == [apart.known([digest]) for digest in chain]
        for cache in (together, apart):
            cache.allocate(cache.available - cache.num_cached + 1)
            cache.release(np.flatnonzero(cache.references).astype(np.int32))


def test_without_prefix_caching_nothing_is_kept() -> None:
    cache = KVCache(4, 2, prefix_caching=False)
    blocks = cache.allocate(2)
    cache.register(int(blocks[0]), digests([1, 2])[0])
    cache.release(blocks)
    assert cache.num_cached == 0 and cache.available == 4


def test_eviction_order_survives_many_rounds() -> None:
    """The ring of released blocks is compacted many times over."""
    cache = KVCache(16, 1)
    random = np.random.default_rng(0)
    for round_ in range(2000):
        tokens = random.integers(0, 12, size=4)
        chain = digests(*[[int(t)] for t in tokens])
        found = cache.match(chain)
        fresh = cache.allocate(4 - found.size)
        for block, digest in zip(fresh.tolist(), chain[found.size :], strict=True):
            cache.register(block, digest)
        table = np.concatenate((found, fresh))
        if round_ % 50 == 0:
            cache.check([table])
        cache.release(table)
    cache.check()
    assert cache.hits > 100 and cache.evictions > 100


@pytest.mark.parametrize("damage", ["reference", "free", "digest"])
def test_check_finds_damage(damage: str) -> None:
    cache = KVCache(4, 2)
    blocks = cache.allocate(2)
    cache.register(int(blocks[0]), digests([1, 2])[0])
    if damage == "reference":
        cache.references[blocks[1]] += 1
    elif damage == "free":
        cache._free[cache._num_free - 1] = blocks[0]
    else:
        cache._block_of[b"other"] = int(blocks[1])
    with pytest.raises(KVCacheError):
        cache.check([blocks])
