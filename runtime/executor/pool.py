"""How many blocks a KV pool gets when nobody says so, and how many host blocks it gets beside it."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from apar.export.errors import ExecutorError
from apar.export.manifest import Manifest

DEFAULT_CONTEXTS = 8
DEFAULT_SHARE = 0.25
MAX_SLOTS = 2**31 - 1


def available_memory() -> int:
    """Bytes that can still be allocated without swapping, by the kernel's estimate and the container's limit."""
    found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    with contextlib.suppress(OSError, ValueError):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    with contextlib.suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / name).read_text(encoding="ascii")) for name in ("memory.max", "memory.current"))
        found.append(max(0, limit - used))
    return min(found)


def pool_blocks(manifest: Manifest, kv_dtype: str, num_blocks: int | None, kv_memory_bytes: int | None) -> int:
    """Blocks of a pool: `num_blocks` if given, else what fits `kv_memory_bytes`, else the default.

    The default holds eight full contexts, but takes at most a quarter of the memory that is free; the pool
    costs memory only where it has been written.
    Raises ExecutorError if both are given, or the result is no usable pool.
    """
    block_bytes = manifest.decoder.kv_bytes_per_token(kv_dtype) * manifest.block_size
    if num_blocks is not None and kv_memory_bytes is not None:
        raise ExecutorError("give num_blocks or kv_memory_bytes, not both")
    if num_blocks is None:
        context = -(-manifest.decoder.max_context // manifest.block_size)
        if kv_memory_bytes is not None:
            num_blocks = kv_memory_bytes // block_bytes
        else:
            num_blocks = min(DEFAULT_CONTEXTS * context, int(DEFAULT_SHARE * available_memory()) // block_bytes)
        if num_blocks < 1:
            raise ExecutorError(
                f"one block of {manifest.block_size} tokens takes {block_bytes} bytes over all layers, which is more "
                "than the memory for the KV pool; give more with kv_memory_bytes, or free some"
            )
        num_blocks = min(num_blocks, MAX_SLOTS // manifest.block_size)
    if num_blocks < 1:
        raise ExecutorError(f"num_blocks must be at least 1, not {num_blocks}")
    if num_blocks * manifest.block_size > MAX_SLOTS:
        raise ExecutorError(f"{num_blocks} blocks of {manifest.block_size} tokens are more than {MAX_SLOTS} slots")
    return num_blocks


def host_pool_blocks(
    manifest: Manifest, kv_dtype: str, host_blocks: int | None, kv_host_memory_bytes: int | None
) -> int:
    """Host blocks beside a pool: `host_blocks` if given, else what fits `kv_host_memory_bytes`, else none.

    Raises ExecutorError if both are given, or a number is not usable.
    """
    if host_blocks is not None and kv_host_memory_bytes is not None:
        raise ExecutorError("give host_blocks or kv_host_memory_bytes, not both")
    if host_blocks is None and kv_host_memory_bytes is None:
        return 0
    block_bytes = manifest.decoder.kv_bytes_per_token(kv_dtype) * manifest.block_size
    if kv_host_memory_bytes is not None:
        host_blocks = kv_host_memory_bytes // block_bytes
        if 0 < kv_host_memory_bytes < block_bytes:
            raise ExecutorError(
                f"one block of {manifest.block_size} tokens takes {block_bytes} bytes over all layers, which is more "
                f"than the {kv_host_memory_bytes} bytes for host blocks; give more with kv_host_memory_bytes"
            )
    assert host_blocks is not None
    if host_blocks < 0:
        raise ExecutorError(f"host_blocks must be at least 0, not {host_blocks}")
    available = available_memory()
    if host_blocks * block_bytes > available:
        raise ExecutorError(
            f"{host_blocks} host blocks take {host_blocks * block_bytes / 1e9:.1f} GB, and {available / 1e9:.1f} GB of "
            "memory are free; give fewer"
        )
    return host_blocks
