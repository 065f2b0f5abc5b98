"""The engine's weights by name, and the checkpoint tensors that each is made of.

q, k and v are one matrix in the engine, and so are gate and up: their rows are stacked in that order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from apar.export.manifest import DecoderConfig, DraftHeads


class Kind(Enum):
    """How a weight is used, which decides how it may be stored."""

    VECTOR = "vector"
    """Norm or bias: always float32."""
    EMBEDDING = "embedding"
    """Looked up by row: stored in the engine's dtype, never quantised."""
    LINEAR = "linear"
    """Matrix [out, in] of a projection: may be quantised."""


@dataclass(frozen=True, slots=True)
class Weight:
    """One weight of the engine."""

    name: str
    kind: Kind
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    """Checkpoint tensors, stacked by rows."""


def weight_plan(config: DecoderConfig, *, packed: bool, heads: DraftHeads | None = None) -> Iterator[Weight]:
    """All weights in the order of computation, those of Medusa heads last.

    packed: matrices are laid out for `apar::Linear`. A tied lm_head is then a matrix of its own; otherwise it is not
    listed, `embed.weight` serves.
    """
    hidden, ffn = config.hidden_size, config.intermediate_size
    q = config.num_heads * config.head_dim

    def linear(name: str, rows: int, columns: int, bias: bool, module: str, parts: tuple[str, ...]) -> Iterator[Weight]:
        yield Weight(f"{name}.weight", Kind.LINEAR, (rows, columns), tuple(f"{module}.{p}_proj.weight" for p in parts))
        if bias:
            yield Weight(f"{name}.bias", Kind.VECTOR, (rows,), tuple(f"{module}.{p}_proj.bias" for p in parts))

    yield Weight("embed.weight", Kind.EMBEDDING, (config.vocab_size, hidden), ("model.embed_tokens.weight",))
    for i in range(config.num_layers):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        attention, mlp = f"{theirs}.self_attn", f"{theirs}.mlp"
        yield Weight(f"{ours}.input_norm.weight", Kind.VECTOR, (hidden,), (f"{theirs}.input_layernorm.weight",))
        yield from linear(f"{ours}.qkv", config.qkv_size, hidden, config.attention_bias, attention, ("q", "k", "v"))
        yield from linear(f"{ours}.o", hidden, q, config.attention_bias, attention, ("o",))
        yield Weight(f"{ours}.post_norm.weight", Kind.VECTOR, (hidden,), (f"{theirs}.post_attention_layernorm.weight",))
        yield from linear(f"{ours}.gate_up", 2 * ffn, hidden, config.mlp_bias, mlp, ("gate", "up"))
        yield from linear(f"{ours}.down", hidden, ffn, config.mlp_bias, mlp, ("down",))
    yield Weight("norm.weight", Kind.VECTOR, (hidden,), ("model.norm.weight",))
    if packed or not config.tie_word_embeddings:
        source = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
        yield Weight("lm_head.weight", Kind.LINEAR, (config.vocab_size, hidden), (source,))
    if heads is None:
        return
    for head in range(heads.count):
        name = f"heads.{head}"
        for block in range(heads.blocks):
            part = f"{name}.blocks.{block}"
            yield Weight(f"{part}.weight", Kind.LINEAR, (hidden, hidden), (f"{part}.weight",))
            yield Weight(f"{part}.bias", Kind.VECTOR, (hidden,), (f"{part}.bias",))
        if not heads.tied_lm_head:
            last = f"{name}.lm_head.weight"
            yield Weight(last, Kind.LINEAR, (config.vocab_size, hidden), (last,))
