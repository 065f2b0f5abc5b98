"""ForkAttention in NumPy, in float64: the second statement of the contract in plugins/fork_attention.h.

Written to be read, not to be fast. The pool here has its natural layout, [2, B, K, BS, D]; the kernels'
own layout inside a block is private, so tests compare attention outputs and never pools.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.generic]


@dataclass(frozen=True)
class Attributes:
    """Attributes of a node."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    kv_dtype: str = "float32"
    rope_theta: float = 10000.0
    rope_scale: float = 1.0

    @property
    def scale(self) -> float:
        return float(np.float32(self.head_dim**-0.5))

    @property
    def rope_inv_freq(self) -> npt.NDArray[np.float32]:
        exponents = np.arange(0, self.head_dim, 2, dtype=np.float64) / self.head_dim
        return (self.rope_theta**-exponents).astype(np.float32)

    @property
    def qkv_size(self) -> int:
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim


def rotate(x: Array, position: int, attributes: Attributes) -> Array:
    """RoPE of [heads, D] at one position: element i pairs with i + D / 2, angles in float32."""
    angle = np.float32(position) * attributes.rope_inv_freq
    cos = np.cos(angle.astype(np.float64)) * attributes.rope_scale
    sin = np.sin(angle.astype(np.float64)) * attributes.rope_scale
    a, b = np.split(x, 2, axis=-1)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def visible_keys(token: int, tokens: int, context: int, mask: Array) -> npt.NDArray[np.int64]:
    """Key indices that step token `token` of a row's `tokens` sees; `mask` is its row of tree_mask."""
    if mask.size == 0:
        return np.arange(context + token + 1)
    step = [j for j in range(min(tokens, 32 * mask.size)) if int(mask[j // 32]) >> (j % 32) & 1]
    return np.concatenate([np.arange(context), context + np.array(step, dtype=np.int64)])


def fork_attention(inputs: dict[str, Array], pool: Array, attributes: Attributes) -> Array:
    """One step. Updates `pool` in place and returns attn [T, H * D] in float64."""
    heads, kv_heads, dim, size = (
        attributes.num_heads,
        attributes.num_kv_heads,
        attributes.head_dim,
        attributes.block_size,
    )
    slots = inputs["slot_mapping"]
    tokens = len(slots)

    # 1. Copies: all sources are read before any target is written.
    source, target = inputs["slot_copies"].T
    moved = pool[:, source // size, :, source % size].copy()
    pool[:, target // size, :, target % size] = moved

    # 2., 3. RoPE, then every write.
    packed = inputs["qkv"].astype(np.float64).reshape(tokens, heads + 2 * kv_heads, dim)
    q, k, v = np.split(packed, [heads, heads + kv_heads], axis=1)
    for t, slot in enumerate(slots):
        if slot >= 0:
            pool[0, slot // size, :, slot % size] = rotate(k[t], int(inputs["position_ids"][t]), attributes)
            pool[1, slot // size, :, slot % size] = v[t]

    # 4. Attention of each token over the visible keys of its row.
    attn = np.zeros((tokens, heads, dim))
    start = inputs["query_start"]
    for row, length in enumerate(inputs["kv_len"]):
        count = int(start[row + 1] - start[row])
        context = int(length) - count
        for t in range(start[row], start[row + 1]):
            if slots[t] < 0:
                continue
            keys = visible_keys(t - int(start[row]), count, context, inputs["tree_mask"][t])
            if keys.size == 0:
                continue
            blocks = inputs["block_table"][row][keys // size]
            rotated = rotate(q[t], int(inputs["position_ids"][t]), attributes)
            for h in range(heads):
                group = h * kv_heads // heads
                score = pool[0, blocks, group, keys % size].astype(np.float64) @ rotated[h] * attributes.scale
                weight = np.exp(score - score.max())
                attn[t, h] = weight @ pool[1, blocks, group, keys % size].astype(np.float64) / weight.sum()
    return attn.reshape(tokens, heads * dim)
