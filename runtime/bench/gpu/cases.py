"""Steps for the attention kernels alone: groups of rows over shared and own keys, and their plain computation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from apar.plugins.gpu.fork_attention import ForkAttention, StepTensors, Workspace
from apar.plugins.gpu.plan import make_plan
from apar.plugins.gpu.sizes import StepSizes
from apar.runtime.step import Int32Array


@dataclass(frozen=True, slots=True)
class Shape:
    """`groups` requests of `rows` branches: `shared` keys in common, `own` more each, `tokens` new ones each."""

    groups: int
    rows: int
    shared: int
    own: int
    tokens: int = 1
    drafts: bool = False
    """The new tokens are draft nodes under a tree mask."""

    @property
    def read_bytes_shared(self) -> int:
        """Keys read where a prefix is read once for its group; times the bytes of one key and value over all heads."""
        return self.groups * (self.shared + self.rows * (self.own + self.tokens))

    @property
    def read_bytes_alone(self) -> int:
        return self.groups * self.rows * (self.shared + self.own + self.tokens)


@dataclass(frozen=True, slots=True)
class Heads:
    """A model's attention."""

    num_heads: int = 32
    num_kv_heads: int = 32
    head_dim: int = 128
    block_size: int = 16


class Case:
    """A step of random keys, values and queries. Blocks lie in random places of the pool."""

    def __init__(self, shape: Shape, heads: Heads, device: torch.device, dtype: torch.dtype, seed: int = 0) -> None:
        self.shape, self.heads = shape, heads
        random = np.random.default_rng(seed)
        size = heads.block_size
        total_rows = shape.groups * shape.rows
        shared_blocks = shape.shared // size
        length = shape.shared + shape.own + shape.tokens
        width = -(-length // size)
        blocks = shape.groups * shared_blocks + total_rows * (width - shared_blocks)
        ids = random.permutation(blocks).astype(np.int32)
        table = np.empty((total_rows, width), np.int32)
        at = 0
        for group in range(shape.groups):
            rows = slice(group * shape.rows, (group + 1) * shape.rows)
            table[rows, :shared_blocks] = ids[at : at + shared_blocks]
            at += shared_blocks
        table[:, shared_blocks:] = ids[at:].reshape(total_rows, width - shared_blocks)
        keys = np.arange(length - shape.tokens, length)
        tokens = total_rows * shape.tokens
        parents = [-1, *(int(random.integers(-1, node)) for node in range(1, shape.tokens))]
        self.arrays: dict[str, Int32Array] = {
            "position_ids": np.tile(keys, total_rows).astype(np.int32),
            "query_start": np.arange(0, tokens + 1, shape.tokens, dtype=np.int32),
            "kv_len": np.full(total_rows, length, np.int32),
            "block_table": table,
            "slot_mapping": (table[:, keys // size] * size + keys % size).ravel().astype(np.int32),
            "prefix_rows": np.arange(0, total_rows + 1, shape.rows, dtype=np.int32),
            "prefix_blocks": np.full(shape.groups, shared_blocks if shape.rows > 1 else 0, np.int32),
            "tree_mask": np.tile(_mask(parents), (total_rows, 1)) if shape.drafts else np.zeros((tokens, 0), np.int32),
        }
        self.step = StepTensors(**{name: torch.from_numpy(array).to(device) for name, array in self.arrays.items()})
        generator = torch.Generator(device).manual_seed(seed)
        h, k, d = heads.num_heads, heads.num_kv_heads, heads.head_dim

        def normal(*sizes: int) -> Tensor:
            return torch.randn(*sizes, generator=generator, device=device).to(dtype)

        self.qkv = normal(tokens, (h + 2 * k) * d)
        self.pool = torch.empty((2, blocks, k, size, d), dtype=dtype, device=device)
        for part in self.pool:
            for start in range(0, blocks, 4096):
                part[start : start + 4096] = normal(*part[start : start + 4096].shape)
        exponents = torch.arange(0, d, 2, dtype=torch.float64, device=device) / d
        self.operator = ForkAttention(
            num_heads=h,
            num_kv_heads=k,
            head_dim=d,
            block_size=size,
            inv_freq=(10000.0**-exponents).float(),
        )
        self.sizes: StepSizes = self.operator.sizes(tokens, total_rows, shape.groups)
        self.workspace: Workspace = self.operator.workspace(tokens, self.sizes.parts, dtype)
        self.out = torch.empty((tokens, h * d), dtype=dtype, device=device)

    def host_plan(self, share: bool) -> Int32Array:
        names = ("query_start", "kv_len", "slot_mapping", "prefix_rows", "prefix_blocks")
        return make_plan(
            self.sizes,
            **{name: self.arrays[name] for name in names},
            block_size=self.heads.block_size,
            masked=self.shape.drafts,
            share=share,
        )

    def plan(self, share: bool = True) -> Tensor:
        return torch.from_numpy(self.host_plan(share)).to(self.qkv.device)

    def run(self, plan: Tensor) -> Tensor:
        """RoPE, write, attend, merge."""
        return self.operator.layer(self.qkv, self.pool, self.step, plan, self.sizes, self.workspace, self.out)

    @property
    def key_bytes(self) -> int:
        """Bytes of one key and value over all heads."""
        return 2 * self.heads.num_kv_heads * self.heads.head_dim * self.pool.element_size()

    def reference(self) -> Tensor:
        """float32 [T, H D]: a row at a time, after `run` has written the step's keys."""
        heads = self.heads
        h, k, d = heads.num_heads, heads.num_kv_heads, heads.head_dim
        tokens, n = self.qkv.shape[0], self.shape.tokens
        q = self.qkv.float().view(tokens, h + 2 * k, d)[:, :h]
        exponents = torch.arange(0, d, 2, dtype=torch.float64, device=q.device) / d
        angle = self.step.position_ids.float()[:, None] * (10000.0**-exponents).float()
        cos, sin = angle.cos().repeat(1, 2)[:, None], angle.sin().repeat(1, 2)[:, None]
        low, high = q.chunk(2, -1)
        q = q * cos + torch.cat((-high, low), -1) * sin
        length = int(self.arrays["kv_len"][0])
        visible = torch.ones((n, length), dtype=torch.bool, device=q.device)
        if self.shape.drafts:
            bits = torch.arange(n, device=q.device)
            visible[:, length - n :] = (self.step.tree_mask[:n][:, bits // 32] >> (bits % 32) & 1).bool()
        else:
            visible[:, length - n :] = torch.ones((n, n), dtype=torch.bool, device=q.device).tril()
        out = torch.empty((tokens, h, d), device=q.device)
        for row in range(self.arrays["kv_len"].size):
            blocks = self.step.block_table[row].long()
            keys, values = (part[blocks].float().transpose(0, 1).flatten(1, 2)[:, :length] for part in self.pool)
            mine = q[row * n : (row + 1) * n].unflatten(1, (k, h // k)).permute(1, 2, 0, 3)
            scores = mine @ keys[:, None].transpose(-1, -2) * d**-0.5
            weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
            out[row * n : (row + 1) * n] = (weights @ values[:, None]).permute(2, 0, 1, 3).flatten(1, 2)
        return out.flatten(1)


def _mask(parents: list[int]) -> Int32Array:
    """Mask words [n, W] of draft nodes."""
    words = np.zeros((len(parents), -(-len(parents) // 32)), np.uint32)
    for node, parent in enumerate(parents):
        if parent >= 0:
            words[node] = words[parent]
        words[node, node // 32] |= np.uint32(1 << (node % 32))
    return words.view(np.int32)
