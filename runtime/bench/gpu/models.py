"""Models of any shape with random weights, made on the device, and their plain computation in float32."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from apar.export.manifest import DecoderConfig
from apar.runtime.step import Int32Array, StepInputs


class RandomWeights(Mapping[str, Tensor]):
    """float32 weights by the names of `read_weights`: made anew, and the same, at each access."""

    def __init__(self, decoder: DecoderConfig, device: torch.device) -> None:
        hidden, ffn = decoder.hidden_size, decoder.intermediate_size
        self._device = device
        self._shapes: dict[str, tuple[int, ...]] = {
            "embed.weight": (decoder.vocab_size, hidden),
            "norm.weight": (hidden,),
            "lm_head.weight": (decoder.vocab_size, hidden),
        }
        for i in range(decoder.num_layers):
            self._shapes |= {
                f"layers.{i}.input_norm.weight": (hidden,),
                f"layers.{i}.qkv.weight": (decoder.qkv_size, hidden),
                f"layers.{i}.o.weight": (hidden, decoder.num_heads * decoder.head_dim),
                f"layers.{i}.post_norm.weight": (hidden,),
                f"layers.{i}.gate_up.weight": (2 * ffn, hidden),
                f"layers.{i}.down.weight": (hidden, ffn),
            }
        self._seeds = {name: seed for seed, name in enumerate(self._shapes)}

    def __getitem__(self, name: str) -> Tensor:
        shape = self._shapes[name]
        if len(shape) == 1:
            return torch.ones(shape, device=self._device)
        generator = torch.Generator(self._device).manual_seed(self._seeds[name])
        values = torch.randn(shape, generator=generator, device=self._device)
        return values.mul_(1.0 if name == "embed.weight" else 1.0 / math.sqrt(shape[1]))

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


@torch.inference_mode()
def plain_logits(decoder: DecoderConfig, weights: Mapping[str, Tensor], ids: Tensor) -> Tensor:
    """float32 [n, vocab] of one path `ids` [n]: an ordinary causal forward, all in float32."""
    heads, kv_heads, dim = decoder.num_heads, decoder.num_kv_heads, decoder.head_dim
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        hidden = weights["embed.weight"][ids]
        inv_freq = torch.tensor(decoder.rope_inv_freq, device=ids.device)
        angle = torch.arange(ids.numel(), device=ids.device)[:, None] * inv_freq
        cos, sin = (part.repeat(1, 2)[:, None] * decoder.rope_scale for part in (angle.cos(), angle.sin()))

        def norm(x: Tensor, name: str) -> Tensor:
            return functional.rms_norm(x, (decoder.hidden_size,), weights[name], decoder.rms_norm_eps)

        def rotate(x: Tensor) -> Tensor:
            low, high = x.chunk(2, -1)
            return x * cos + torch.cat((-high, low), -1) * sin

        for i in range(decoder.num_layers):
            qkv = norm(hidden, f"layers.{i}.input_norm.weight") @ weights[f"layers.{i}.qkv.weight"].T
            q, k, v = qkv.unflatten(-1, (-1, dim)).split((heads, kv_heads, kv_heads), 1)
            q, k = rotate(q), rotate(k)
            k, v = (part.repeat_interleave(heads // kv_heads, 1).transpose(0, 1) for part in (k, v))
            scores = q.transpose(0, 1) @ k.transpose(1, 2) * dim**-0.5
            future = torch.ones(scores.shape[1:], dtype=torch.bool, device=ids.device).triu(1)
            attended = (scores.masked_fill(future, -torch.inf).softmax(-1) @ v).transpose(0, 1).flatten(1)
            hidden = hidden + attended @ weights[f"layers.{i}.o.weight"].T
            gate, up = (norm(hidden, f"layers.{i}.post_norm.weight") @ weights[f"layers.{i}.gate_up.weight"].T).chunk(
                2, -1
            )
            hidden = hidden + (functional.silu(gate) * up) @ weights[f"layers.{i}.down.weight"].T
        return norm(hidden, "norm.weight") @ weights["lm_head.weight"].T
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def prompt_step(ids: Int32Array, computed: int, block_size: int) -> StepInputs:
    """A step of one row in blocks 0, 1, ...: path `ids` from `computed` on, with the last token's logits."""
    length = ids.size
    new = np.arange(computed, length, dtype=np.int32)
    return StepInputs(
        input_ids=ids[computed:].copy(),
        position_ids=new,
        query_start=np.array([0, new.size], np.int32),
        kv_len=np.array([length], np.int32),
        block_table=np.arange(-(-length // block_size), dtype=np.int32)[None],
        slot_mapping=new.copy(),
        slot_copies=np.zeros((0, 2), np.int32),
        prefix_rows=np.array([0, 1], np.int32),
        prefix_blocks=np.array([0], np.int32),
        tree_mask=np.zeros((new.size, 0), np.int32),
        logits_rows=np.array([new.size - 1], np.int32),
    )


def decode_step(rows: int, context: int, block_size: int, vocab_size: int, requests: int = 1) -> StepInputs:
    """A step of one token in each of `rows` rows with `context` keys before it, each row in blocks of its own."""
    width = -(-(context + 1) // block_size)
    table = np.arange(rows * width, dtype=np.int32).reshape(rows, width)
    bounds = np.linspace(0, rows, requests + 1).astype(np.int32)
    return StepInputs(
        input_ids=(np.arange(rows) * 7919 % vocab_size).astype(np.int32),
        position_ids=np.full(rows, context, np.int32),
        query_start=np.arange(rows + 1, dtype=np.int32),
        kv_len=np.full(rows, context + 1, np.int32),
        block_table=table,
        slot_mapping=(table[:, context // block_size] * block_size + context % block_size).astype(np.int32),
        slot_copies=np.zeros((0, 2), np.int32),
        prefix_rows=bounds,
        prefix_blocks=np.zeros(requests, np.int32),
        tree_mask=np.zeros((rows, 0), np.int32),
        logits_rows=np.arange(rows, dtype=np.int32),
    )
