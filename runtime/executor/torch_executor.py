"""The decoder in plain PyTorch: the reference that every other executor is measured against.

Written to be read: one row at a time, keys gathered through the block table, a boolean mask, a softmax in
float32. It is slow on purpose wherever speed would hide the contract.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from apar.export.errors import ExecutorError
from apar.export.manifest_rules import KV_DTYPES
from apar.runtime.executor.base import NO_HEADS_REMEDY, Executor
from apar.runtime.executor.check import check_step, padding_free
from apar.runtime.executor.model import Model
from apar.runtime.executor.pool import host_pool_blocks, pool_blocks
from apar.runtime.step import Float32Array, IntArray, StepInputs

try:
    import torch
except ModuleNotFoundError as error:
    raise ExecutorError("the torch executor needs PyTorch; install it with: pip install 'apar[torch]'") from error

from torch import Tensor
from torch.nn import functional


@dataclass(slots=True)
class _Row:
    """What attention needs to know of one row, the same in every layer."""

    tokens: slice
    blocks: Tensor
    """[ceil(kv_len / block_size)] blocks of the row's path."""
    kv_len: int
    visible: Tensor
    """bool [n, kv_len]: which keys each of the row's tokens sees."""


@dataclass(slots=True)
class _Plan:
    """One step, worked out once and used by every layer."""

    cos: Tensor
    """[T, 1, head_dim]"""
    sin: Tensor
    written: Tensor
    """[T'] tokens whose K/V is written."""
    slots: Tensor
    """[T'] their slots."""
    copy_source: Tensor
    copy_target: Tensor
    swap_out: Tensor
    """[O, 2] (block, host block)."""
    swap_in: Tensor
    """[I, 2] (host block, block)."""
    rows: list[_Row]


class TorchExecutor(Executor):
    """Runs an engine's weights, dequantised to float32, with PyTorch on the CPU."""

    name = "torch"
    mixes_drafts = True

    def __init__(
        self,
        engine: Path | Model,
        *,
        num_blocks: int | None = None,
        kv_memory_bytes: int | None = None,
        host_blocks: int | None = None,
        kv_host_memory_bytes: int | None = None,
        kv_dtype: str = "float32",
    ) -> None:
        """Load the weights of an engine directory, or take a model that is in memory.

        num_blocks, kv_memory_bytes: size of the KV pool; see `pool_blocks`.
        host_blocks, kv_host_memory_bytes: blocks to swap out to, none by default. The pool is in the same memory: they
            are for tests of what swaps.
        kv_dtype: "float32", or "float16" to round keys and values as such a pool does.
        Raises EngineError for a damaged engine, ExecutorError for options that do not fit.
        """
        if kv_dtype not in KV_DTYPES:
            raise ExecutorError(f"kv_dtype must be one of {', '.join(KV_DTYPES)}, not {kv_dtype!r}")
        model = Model.of(engine)
        self.manifest = model.manifest
        decoder = self.manifest.decoder
        self.num_blocks = pool_blocks(self.manifest, kv_dtype, num_blocks, kv_memory_bytes)
        self._device = torch.device("cpu")
        self._weights = {
            name: array.float()
            if isinstance(array, Tensor)
            else torch.from_numpy(np.require(array, np.float32, ["C", "W"])).to(self._device)
            for name, array in model.weights.items()
        }
        self._inv_freq = torch.tensor(decoder.rope_inv_freq, dtype=torch.float32, device=self._device)
        self.host_blocks = host_pool_blocks(self.manifest, kv_dtype, host_blocks, kv_host_memory_bytes)
        self._pools, self._host_pools = (
            [
                torch.zeros(
                    (2, blocks, decoder.num_kv_heads, self.manifest.block_size, decoder.head_dim),
                    dtype=getattr(torch, kv_dtype),
                    device=self._device,
                )
                for _ in range(decoder.num_layers)
            ]
            for blocks in (self.num_blocks, self.host_blocks)
        )
        self._lm_head = "lm_head" if "lm_head.weight" in self._weights else "embed"
        self._wanted = torch.empty(0, decoder.hidden_size)
        self._closed = False
        self.detail = (
            f"PyTorch {torch.__version__} reference on the {self._device.type}, {torch.get_num_threads()} threads, "
            f"{self.num_blocks} blocks of {self.manifest.block_size} ({kv_dtype})"
        )
        if self.host_blocks:
            self.detail += f", {self.host_blocks} host blocks"

    def execute(self, inputs: StepInputs) -> Float32Array:
        """See Executor.execute."""
        if self._closed:
            raise ExecutorError("the torch executor is closed")
        decoder = self.manifest.decoder
        check_step(
            inputs,
            num_blocks=self.num_blocks,
            block_size=self.manifest.block_size,
            vocab_size=decoder.vocab_size,
            host_blocks=self.host_blocks,
        )
        try:
            with torch.inference_mode():
                return self._forward(inputs)
        except (RuntimeError, IndexError) as error:
            raise ExecutorError(f"the step failed in PyTorch: {error}") from error

    def load_draft_heads(self) -> None:
        """See Executor.load_draft_heads; the weights are here already."""
        if self.manifest.draft_heads is None:
            raise ExecutorError(f"the engine has no Medusa heads; {NO_HEADS_REMEDY}")

    def draft_logits(self, wanted: IntArray) -> Float32Array:
        """See Executor.draft_logits."""
        heads = self.manifest.draft_heads
        assert heads is not None
        with torch.inference_mode():
            hidden = self._wanted[torch.from_numpy(wanted).to(self._device)]
            logits = []
            for head in range(heads.count):
                state = hidden
                for block in range(heads.blocks):
                    state = state + functional.silu(self._linear(state, f"heads.{head}.blocks.{block}"))
                logits.append(self._linear(state, self._lm_head if heads.tied_lm_head else f"heads.{head}.lm_head"))
            stacked: Float32Array = torch.stack(logits, 1).cpu().numpy()
            return stacked

    def close(self) -> None:
        """Free weights and pools. Idempotent."""
        self._closed = True
        self._weights.clear()
        self._pools.clear()
        self._host_pools.clear()

    def _forward(self, inputs: StepInputs) -> Float32Array:
        plan = self._plan(inputs)
        hidden = self._weights["embed.weight"][self._index(inputs.input_ids)]
        for pool, host in zip(self._pools, self._host_pools, strict=True):
            _copy(pool, host, plan, self.manifest.block_size)
        for layer, pool in enumerate(self._pools):
            prefix = f"layers.{layer}."
            normed = self._norm(hidden, prefix + "input_norm.weight")
            attention = self._attention(self._linear(normed, prefix + "qkv"), pool, plan)
            hidden = hidden + self._linear(attention, prefix + "o")
            gate, up = self._linear(self._norm(hidden, prefix + "post_norm.weight"), prefix + "gate_up").chunk(2, -1)
            hidden = hidden + self._linear(functional.silu(gate) * up, prefix + "down")
        self._wanted = self._norm(hidden[self._index(inputs.logits_rows)], "norm.weight")
        logits: Float32Array = self._linear(self._wanted, self._lm_head).cpu().numpy()
        return logits

    def _index(self, values: np.ndarray[tuple[int, ...], np.dtype[np.int32]]) -> Tensor:
        return torch.from_numpy(values.astype(np.int64)).to(self._device)

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return functional.linear(x, self._weights[name + ".weight"], self._weights.get(name + ".bias"))

    def _norm(self, x: Tensor, name: str) -> Tensor:
        """RMSNorm: x / sqrt(mean(x^2) + eps) * weight."""
        variance = x.square().mean(-1, keepdim=True)
        return x * torch.rsqrt(variance + self.manifest.decoder.rms_norm_eps) * self._weights[name]

    def _plan(self, inputs: StepInputs) -> _Plan:
        size = self.manifest.block_size
        angle = self._index(inputs.position_ids).float()[:, None] * self._inv_freq
        angle = torch.cat((angle, angle), -1)[:, None, :]
        scale = self.manifest.decoder.rope_scale
        rows = []
        for row in np.flatnonzero(padding_free(inputs)).tolist():
            begin, end = inputs.query_start[row : row + 2].tolist()
            kv_len = int(inputs.kv_len[row])
            blocks = self._index(inputs.block_table[row, : -(-kv_len // size)])
            rows.append(_Row(slice(begin, end), blocks, kv_len, self._visible(inputs, begin, end, kv_len)))
        written = np.flatnonzero(inputs.slot_mapping >= 0).astype(np.int32)
        return _Plan(
            cos=angle.cos() * scale,
            sin=angle.sin() * scale,
            written=self._index(written),
            slots=self._index(inputs.slot_mapping[written]),
            copy_source=self._index(inputs.slot_copies[:, 0]),
            copy_target=self._index(inputs.slot_copies[:, 1]),
            swap_out=self._index(inputs.swap_out),
            swap_in=self._index(inputs.swap_in),
            rows=rows,
        )

    def _visible(self, inputs: StepInputs, begin: int, end: int, kv_len: int) -> Tensor:
        """bool [n, kv_len]: everything before the step, and of the row's own step tokens those of the mask."""
        count = end - begin
        visible = torch.ones(count, kv_len, dtype=torch.bool, device=self._device)
        if inputs.tree_mask.shape[1]:
            bit = torch.arange(count, device=self._device)
            words = self._index(inputs.tree_mask[begin:end])[:, bit // 32]
            own = (words >> (bit % 32) & 1).bool()
        else:
            own = torch.ones(count, count, dtype=torch.bool, device=self._device).tril()
        visible[:, kv_len - count :] = own
        return visible

    def _attention(self, qkv: Tensor, pool: Tensor, plan: _Plan) -> Tensor:
        """[T, qkv_size] -> [T, num_heads * head_dim]; the step's K/V go to `pool` [2, B, kv_heads, block_size, D]."""
        decoder = self.manifest.decoder
        heads, kv_heads, dim = decoder.num_heads, decoder.num_kv_heads, decoder.head_dim
        size = self.manifest.block_size
        q, k, v = qkv.unflatten(-1, (heads + 2 * kv_heads, dim)).split((heads, kv_heads, kv_heads), 1)
        q, k = (x * plan.cos + _rotate_half(x) * plan.sin for x in (q, k))
        block, offset = plan.slots // size, plan.slots % size
        pool[0, block, :, offset] = k[plan.written].to(pool.dtype)
        pool[1, block, :, offset] = v[plan.written].to(pool.dtype)
        out = torch.zeros_like(q)
        for row in plan.rows:
            keys, values = (
                part[row.blocks].float().transpose(0, 1).flatten(1, 2)[:, : row.kv_len] for part in pool
            )  # [kv_heads, kv_len, D]
            query = q[row.tokens].unflatten(1, (kv_heads, heads // kv_heads)).permute(1, 2, 0, 3)
            scores = query @ keys[:, None].transpose(-1, -2) * dim**-0.5
            weights = scores.masked_fill(~row.visible, -torch.inf).softmax(-1).nan_to_num(0.0)
            out[row.tokens] = (weights @ values[:, None]).permute(2, 0, 1, 3).flatten(1, 2)
        return out.flatten(1)


def _copy(pool: Tensor, host: Tensor, plan: _Plan, size: int) -> None:
    """Blocks out of the `pool` [2, B, kv_heads, block_size, D] of a layer, slots within it, blocks back."""
    if plan.swap_out.numel():
        block, kept = plan.swap_out.unbind(1)
        host[:, kept] = pool[:, block]
    if plan.copy_source.numel():
        source, target = plan.copy_source, plan.copy_target
        pool[:, target // size, :, target % size] = pool[:, source // size, :, source % size]
    if plan.swap_in.numel():
        kept, block = plan.swap_in.unbind(1)
        pool[:, block] = host[:, kept]


def _rotate_half(x: Tensor) -> Tensor:
    """Element i is paired with i + D / 2, as Hugging Face's Llama does."""
    low, high = x.chunk(2, -1)
    return torch.cat((-high, low), -1)
