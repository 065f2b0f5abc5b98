"""Memory bandwidth that a step could reach at best, and the bytes a step must read.

Stream bandwidth is measured by reading: each of as many threads as the executor uses takes the largest element of
its own part of an array of bytes far larger than the caches (NumPy's vectorised maximum, which runs without the
interpreter's lock; of bytes, since it reads these faster than floats, which might be NaN). The best of several passes
counts, since anything that disturbs a pass only makes it slower.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import perf_counter

import numpy as np

from apar.export.manifest import WEIGHTS_NAME, Manifest
from apar.export.tensor_files import FLOAT_TYPES
from apar.runtime.executor.pool import available_memory

CACHES = 4
"""The array is at least this many times the last-level cache."""
LEAST_BYTES, MOST_BYTES = 128 << 20, 4 << 30
PASSES = 5
DEFAULT_CACHE = 32 << 20


def read_bandwidth(threads: int, size: int | None = None, passes: int = PASSES) -> float:
    """Bytes a second that `threads` threads read from memory; `size` bytes, by default several times the cache."""
    if size is None:
        size = min(max(LEAST_BYTES, CACHES * last_level_cache()), MOST_BYTES)
        size = max(16 << 20, min(size, available_memory() // 4))
    parts = np.array_split(np.ones(size, np.int8), threads)
    best = math.inf
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(passes):
            began = perf_counter()
            for _ in pool.map(np.max, parts):
                pass
            best = min(best, perf_counter() - began)
    return size / best


def last_level_cache() -> int:
    """Bytes of the largest cache of the first processor, as the kernel tells it."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text(encoding="ascii").strip()
        factor = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:], 1)
        sizes.append(int(text.rstrip("KMG")) * factor)
    return max(sizes, default=DEFAULT_CACHE)


def step_weight_bytes(manifest: Manifest) -> int:
    """Bytes of weights that every step of the native graph reads: all, as they are stored, but the embedding.

    Of the embedding only the rows of a step's tokens are looked up.
    """
    embedding = manifest.decoder.vocab_size * manifest.decoder.hidden_size
    return manifest.files[WEIGHTS_NAME] - embedding * FLOAT_TYPES[manifest.dtype].itemsize
