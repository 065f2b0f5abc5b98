"""A checkpoint's layers on calibration tokens, one layer in memory at a time, quantised on the way.

Each projection sees the inputs that the quantised projections before it give, so that a layer also makes up for
what the layers below it have lost. What stays in memory is one layer's matrix, its Hessian, and the hidden states of
the calibration tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from apar.export.checkpoint import Checkpoint
from apar.export.errors import BuildError
from apar.export.manifest import DecoderConfig
from apar.export.quantize import Float32Array, QuantizedRows
from apar.export.tensor_files import check_finite, to_float32
from apar.export.weight_plan import Kind, Weight, weight_plan

Quantizer = Callable[[str, Float32Array, Float32Array], QuantizedRows]
"""From a projection's name, its matrix [N, K], and the mean outer product [K, K] of its inputs, to its codes."""


@dataclass(frozen=True, slots=True)
class Sample:
    """Tokens that are computed together: a text, or the branches of an answer side by side."""

    ids: npt.NDArray[np.int64]
    """[T]"""
    positions: npt.NDArray[np.int64]
    """[T] path positions."""
    visible: npt.NDArray[np.bool_]
    """[T, T] which token (column) each token (row) sees: those of its own path, up to itself."""

    @classmethod
    def merge(cls, paths: Sequence[Sequence[int]]) -> Sample:
        """Paths of one answer: what they have in common is computed once."""
        ids: list[int] = []
        positions: list[int] = []
        parents: list[int] = []
        children: dict[tuple[int, int], int] = {}
        for path in paths:
            parent = -1
            for position, token in enumerate(path):
                number = children.setdefault((parent, token), len(ids))
                if number == len(ids):
                    ids.append(token)
                    positions.append(position)
                    parents.append(parent)
                parent = number
        visible = np.zeros((len(ids), len(ids)), np.bool_)
        for number, parent in enumerate(parents):
            if parent >= 0:
                visible[number] = visible[parent]
            visible[number, number] = True
        return cls(np.array(ids, np.int64), np.array(positions, np.int64), visible)

    def cut(self, count: int) -> Sample:
        """The first `count` tokens."""
        return Sample(self.ids[:count], self.positions[:count], self.visible[:count, :count])


class CalibrationPass:
    """Runs samples through a checkpoint's layers."""

    hidden: Float32Array
    """[T, hidden] hidden states of all samples' tokens after the layers that have been gone through."""

    def __init__(self, checkpoint: Checkpoint, samples: Sequence[Sample], quantizer: Quantizer) -> None:
        """Raises BuildError where a sample has a token that the checkpoint does not know, or there are no tokens."""
        self._checkpoint = checkpoint
        self._quantizer = quantizer
        self._config = checkpoint.decoder
        self._samples = samples = [sample for sample in samples if sample.ids.size]
        _check(samples, self._config)
        ends = np.cumsum([sample.ids.size for sample in samples]).tolist()
        self._parts = [slice(end - sample.ids.size, end) for end, sample in zip(ends, samples, strict=True)]
        self._ids = np.concatenate([sample.ids for sample in samples])
        self._cos, self._sin = _rotation(self._config, np.concatenate([sample.positions for sample in samples]))
        plan = weight_plan(self._config, packed=True)
        self._matrices = {weight.name: weight for weight in plan if weight.kind is Kind.LINEAR}

    def layers(self) -> Iterator[tuple[str, QuantizedRows]]:
        """Name and codes of every layer's projections, in the order of the plan; lm_head is not among them."""
        self.hidden = self._embed()
        for layer in range(self._config.num_layers):
            ours, theirs = f"layers.{layer}", f"model.layers.{layer}"
            codes, qkv = self._project(f"{ours}.qkv", self._norm(f"{theirs}.input_layernorm.weight"))
            yield f"{ours}.qkv.weight", codes
            codes, out = self._project(f"{ours}.o", self._attention(qkv))
            del qkv
            yield f"{ours}.o.weight", codes
            self.hidden += out
            codes, gate_up = self._project(f"{ours}.gate_up", self._norm(f"{theirs}.post_attention_layernorm.weight"))
            yield f"{ours}.gate_up.weight", codes
            codes, out = self._project(f"{ours}.down", _gated(gate_up))
            del gate_up
            yield f"{ours}.down.weight", codes
            self.hidden += out

    def _embed(self) -> Float32Array:
        """[T, hidden] rows of the embedding, read a row at a time where the table is large."""
        table = self._checkpoint.tensors["model.embed_tokens.weight"]
        wanted, where = np.unique(self._ids, return_inverse=True)
        rows = np.concatenate([table.read(token, token + 1) for token in wanted.tolist()])
        return check_finite(to_float32(rows), table)[where]

    def _norm(self, name: str) -> Float32Array:
        hidden = self.hidden
        tensor = self._checkpoint.tensors[name]
        scale = check_finite(to_float32(tensor.read()), tensor)
        mean = np.mean(np.square(hidden), axis=1, keepdims=True)
        normed: Float32Array = hidden / np.sqrt(mean + np.float32(self._config.rms_norm_eps)) * scale
        return normed

    def _project(self, name: str, inputs: Float32Array) -> tuple[QuantizedRows, Float32Array]:
        """Codes of one projection, and what they make of `inputs` [T, K]."""
        weight = self._matrices[f"{name}.weight"]
        rows = self._read(weight)
        codes = self._quantizer(weight.name, rows, inputs.T @ inputs / np.float32(len(inputs)))
        del rows
        outputs = inputs @ codes.values().T
        if (bias := _bias(weight)) and bias[0] in self._checkpoint.tensors:
            outputs += np.concatenate([to_float32(self._checkpoint.tensors[source].read()) for source in bias])
        return codes, outputs

    def _read(self, weight: Weight) -> Float32Array:
        rows = np.empty(weight.shape, np.float32)
        start = 0
        for source in weight.sources:
            tensor = self._checkpoint.tensors[source]
            stop = start + tensor.shape[0]
            rows[start:stop] = check_finite(to_float32(tensor.read()), tensor)
            start = stop
        return rows

    def _attention(self, qkv: Float32Array) -> Float32Array:
        """[T, qkv_size] before RoPE -> [T, num_heads * head_dim]."""
        config = self._config
        heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
        packed = qkv.reshape(-1, heads + 2 * kv_heads, dim)
        out = np.empty((len(qkv), kv_heads, heads // kv_heads, dim), np.float32)
        for sample, part in zip(self._samples, self._parts, strict=True):
            cos, sin = self._cos[part, None], self._sin[part, None]
            turned, values = packed[part, : heads + kv_heads], packed[part, heads + kv_heads :]
            low, high = turned[:, :, : dim // 2], turned[:, :, dim // 2 :]
            turned = np.concatenate((low * cos - high * sin, high * cos + low * sin), axis=2)
            hidden_from = np.where(sample.visible, np.float32(0), np.float32(-np.inf))
            for head in range(kv_heads):
                own = turned[:, head * heads // kv_heads : (head + 1) * heads // kv_heads].transpose(1, 0, 2)
                scores = own @ turned[:, heads + head].T * np.float32(dim**-0.5) + hidden_from
                scores -= scores.max(axis=2, keepdims=True)
                np.exp(scores, out=scores)
                scores /= scores.sum(axis=2, keepdims=True)
                out[part, head] = (scores @ values[:, head]).transpose(1, 0, 2)
        return out.reshape(len(qkv), heads * dim)


def _rotation(config: DecoderConfig, positions: npt.NDArray[np.int64]) -> tuple[Float32Array, Float32Array]:
    """Cosine and sine [T, head_dim / 2] of RoPE's angles."""
    angle = positions.astype(np.float32)[:, None] * np.array(config.rope_inv_freq, np.float32)
    scale = np.float32(config.rope_scale)
    return np.cos(angle) * scale, np.sin(angle) * scale


def _gated(gate_up: Float32Array) -> Float32Array:
    """silu(gate) * up."""
    gate, up = np.split(gate_up, 2, axis=1)
    with np.errstate(over="ignore"):
        gated: Float32Array = gate / (1 + np.exp(-gate)) * up
    return gated


def _bias(weight: Weight) -> list[str]:
    return [source.removesuffix(".weight") + ".bias" for source in weight.sources]


def _check(samples: Sequence[Sample], config: DecoderConfig) -> None:
    if not samples:
        raise BuildError("the calibration has no tokens; give texts with --calibration FILE")
    for sample in samples:
        if not 0 <= sample.ids.min() <= sample.ids.max() < config.vocab_size:
            raise BuildError(
                f"a calibration token is outside the vocabulary of {config.vocab_size}; "
                "the tokenizer does not belong to this checkpoint"
            )
