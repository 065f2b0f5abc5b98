"""The decoder on the device: weights once, and a forward pass of launches only, which a CUDA graph can hold."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from apar.plugins.gpu.dense import Matrix, add_norm, embed, selected_norm, silu_mul
from apar.plugins.gpu.fork_attention import ForkAttention, Workspace
from apar.plugins.gpu.sizes import StepSizes
from apar.runtime.executor.cuda.step_buffers import attention_tensors
from apar.runtime.executor.model import Model


@dataclass(frozen=True, slots=True)
class _Layer:
    input_norm: Tensor
    qkv: Matrix
    o: Matrix
    post_norm: Tensor
    gate_up: Matrix
    down: Matrix


@dataclass(frozen=True, slots=True)
class _Head:
    """A Medusa head."""

    blocks: tuple[Matrix, ...]
    lm_head: Matrix


class CudaDecoder:
    """Weights of an engine on `device`. Query, key and value share a matrix, and so do gate and up.

    The residual stream is float32, everything else `dtype`; embedding and lm_head keep 16 bits in every format.
    """

    def __init__(
        self,
        model: Model,
        *,
        device: torch.device,
        dtype: torch.dtype,
        form: str,
        checked: bool,
    ) -> None:
        manifest, weights = model.manifest, model.weights
        decoder = manifest.decoder
        self.manifest = manifest
        self.device = device
        self.dtype = dtype

        def tensor(name: str) -> Tensor:
            value = weights[name]
            if isinstance(value, Tensor):
                return value.to(device)
            return torch.from_numpy(np.require(value, np.float32, ["C", "W"])).to(device)

        def matrix(name: str, form: str) -> Matrix:
            bias = tensor(f"{name}.bias") if f"{name}.bias" in weights else None
            return Matrix.of(tensor(f"{name}.weight"), bias, dtype, form)

        self.attention = ForkAttention(
            num_heads=decoder.num_heads,
            num_kv_heads=decoder.num_kv_heads,
            head_dim=decoder.head_dim,
            block_size=manifest.block_size,
            inv_freq=torch.tensor(decoder.rope_inv_freq, dtype=torch.float32, device=device),
            rope_scale=decoder.rope_scale,
            checked=checked,
        )
        self._embed = tensor("embed.weight").to(dtype)
        self._layers = [
            _Layer(
                input_norm=tensor(f"layers.{i}.input_norm.weight").to(dtype),
                qkv=matrix(f"layers.{i}.qkv", form),
                o=matrix(f"layers.{i}.o", form),
                post_norm=tensor(f"layers.{i}.post_norm.weight").to(dtype),
                gate_up=matrix(f"layers.{i}.gate_up", form),
                down=matrix(f"layers.{i}.down", form),
            )
            for i in range(decoder.num_layers)
        ]
        self._norm = tensor("norm.weight").to(dtype)
        tied = decoder.tie_word_embeddings or "lm_head.weight" not in weights
        self._lm_head = Matrix(self._embed, None, None) if tied else matrix("lm_head", "16bit")
        self._heads: list[_Head] = []
        if manifest.draft_heads is not None:
            heads = manifest.draft_heads
            self._heads = [
                _Head(
                    tuple(matrix(f"heads.{i}.blocks.{j}", "16bit") for j in range(heads.blocks)),
                    self._lm_head if heads.tied_lm_head else matrix(f"heads.{i}.lm_head", "16bit"),
                )
                for i in range(heads.count)
            ]

    @property
    def matrix_bytes(self) -> int:
        """Bytes of weights that every step reads."""
        layers = [m.bytes for layer in self._layers for m in (layer.qkv, layer.o, layer.gate_up, layer.down)]
        return sum(layers) + self._lm_head.bytes

    def forward(
        self,
        tensors: dict[str, Tensor],
        pools: Tensor,
        sizes: StepSizes,
        workspace: Workspace,
        hidden: Tensor,
        logits: Tensor,
    ) -> None:
        """One step over `pools` [layers, 2, B, K, block_size, D]; `tensors` are a layout's.

        Writes `hidden` [L, hidden], the states behind the last norm, and `logits` float32 [L, vocab].
        """
        decoder = self.manifest.decoder
        tokens, eps = sizes.tokens, decoder.rms_norm_eps
        step = attention_tensors(tensors)
        residual = torch.empty((tokens, decoder.hidden_size), dtype=torch.float32, device=self.device)
        normed = torch.empty((tokens, decoder.hidden_size), dtype=self.dtype, device=self.device)
        attended = torch.empty((tokens, decoder.num_heads * decoder.head_dim), dtype=self.dtype, device=self.device)
        gated = torch.empty((tokens, decoder.intermediate_size), dtype=self.dtype, device=self.device)
        embed(tensors["input_ids"], self._embed, residual)
        update: Tensor | None = None
        for layer, pool in zip(self._layers, pools, strict=True):
            qkv = layer.qkv(add_norm(update, residual, layer.input_norm, eps, normed))
            self.attention.layer(qkv, pool, step, tensors["plan"], sizes, workspace, attended)
            gate_up = layer.gate_up(add_norm(layer.o(attended), residual, layer.post_norm, eps, normed))
            update = layer.down(silu_mul(gate_up, gated))
        assert update is not None
        selected_norm(update, residual, self._norm, eps, tensors["logits_rows"], hidden)
        self._lm_head.float32(hidden, logits)

    def draft_logits(self, hidden: Tensor) -> Tensor:
        """float32 [N, heads, vocab] of hidden states [N, hidden]."""
        logits = []
        for head in self._heads:
            state = hidden
            for block in head.blocks:
                state = state + torch.nn.functional.silu(block(state))
            logits.append(head.lm_head.float32(state))
        return torch.stack(logits, 1)
