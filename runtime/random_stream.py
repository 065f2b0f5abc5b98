"""Random numbers that depend on nothing but (request seed, branch path, token index).

Every branch owns a 64-bit key, derived from its request's seed and the fork ordinals that lead to it
from the root (`root_key`, then `child_key` once per fork). The branch's i-th token uses `uniform(key, i)`.
No state is kept, so neither batching, preemption nor the order of scheduling changes a result, and
siblings draw from unrelated streams.

The mixing function is the finaliser of SplitMix64 (G. L. Steele, D. Lea, C. H. Flood, "Fast splittable
pseudorandom number generators", OOPSLA 2014) with the constants of D. Stafford's variant 13. Two rounds are
used: the first over an arithmetic sequence with odd increment, the second keyed again, so that streams of
different keys are no shifted copies of each other. Each round is a bijection, so the 64-bit values of one
branch never repeat.
"""

from __future__ import annotations

import secrets

import numpy as np
import numpy.typing as npt

UInt64Array = npt.NDArray[np.uint64]
Float64Array = npt.NDArray[np.float64]

_MASK = (1 << 64) - 1
_MULTIPLY_1 = 0xBF58476D1CE4E5B9
_MULTIPLY_2 = 0x94D049BB133111EB
# Odd increments: the golden ratio's for tokens, another for forks, so that a child's key is no value of its
# parent's token stream.
_TOKEN_STEP = 0x9E3779B97F4A7C15
_FORK_STEP = 0xD1B54A32D192ED03
_ROOT_TAG = 0x41504152526F6F74  # "APARRoot"
_FORK_TAG = 0x41504152466F726B  # "APARFork"


def _mix(z: int) -> int:
    """SplitMix64's finaliser on one 64-bit integer."""
    z = ((z ^ (z >> 30)) * _MULTIPLY_1) & _MASK
    z = ((z ^ (z >> 27)) * _MULTIPLY_2) & _MASK
    return z ^ (z >> 31)


def _mix_array(z: UInt64Array) -> UInt64Array:
    """SplitMix64's finaliser on an array (arithmetic modulo 2**64)."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(_MULTIPLY_1)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(_MULTIPLY_2)
    return z ^ (z >> np.uint64(31))


def fresh_seed() -> int:
    """A seed for a request that named none: 53 random bits, so that it survives JSON readers that use doubles."""
    return secrets.randbits(53)


def root_key(seed: int) -> int:
    """Key of a request's root branch. `seed` in 0..2**64-1."""
    return _mix(_mix((seed + _TOKEN_STEP) & _MASK) ^ _ROOT_TAG)


def child_key(parent_key: int, ordinal: int) -> int:
    """Key of the child born at its parent's fork number `ordinal` (0 for the first)."""
    return _mix(_mix((parent_key + (ordinal + 1) * _FORK_STEP) & _MASK) ^ parent_key ^ _FORK_TAG)


def bits(keys: UInt64Array, counters: UInt64Array) -> UInt64Array:
    """64 random bits for each pair of key and counter; arrays of one shape, uint64."""
    first = _mix_array(keys + (counters + np.uint64(1)) * np.uint64(_TOKEN_STEP))
    return _mix_array(first ^ keys)


def uniform(keys: UInt64Array, counters: UInt64Array) -> Float64Array:
    """Uniform numbers strictly inside (0, 1), one for each pair of key and counter.

    keys, counters: uint64 [n]. Returns float64 [n], each (k + 1/2) / 2**52 with k of 52 bits, so exact and
    symmetric: neither 0 nor 1 can come out.
    """
    return ((bits(keys, counters) >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
