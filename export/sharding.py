"""Tensor parallelism: the part of a checkpoint that one rank of several computes.

The split is Megatron's (arXiv 1909.08053, section 3): q, k, v, gate and up are cut by output rows, o and down by input
columns, so that a layer needs two all-reduces; lm_head is cut by vocabulary rows and its logits are gathered. The
embedding is on every rank. Where there are fewer key/value heads than ranks, ranks share copies of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from apar.export.checkpoint import Checkpoint, expected_tensors
from apar.export.errors import BuildError
from apar.export.manifest import DecoderConfig
from apar.export.tensor_files import StoredTensor
from apar.export.tensor_pieces import Piece, pieced

ROW_PARALLEL = ("o", "down")
"""Projections whose partial results are summed over the ranks."""
_ROW_PARALLEL_SOURCES = ("self_attn.o_proj.weight", "mlp.down_proj.weight")
_WHOLE_SUFFIXES = ("norm.weight", "layernorm.weight", "o_proj.bias", "down_proj.bias")


@dataclass(frozen=True, slots=True)
class Shard:
    """Rank `rank` of `size` that compute one model together."""

    rank: int = 0
    size: int = 1

    def decoder(self, whole: DecoderConfig) -> DecoderConfig:
        """Shape of this rank's part; `vocab_size` stays that of the whole, since logits are gathered.

        Raises BuildError where the model cannot be cut into so many parts.
        """
        if self.size == 1:
            return whole
        for name, value in (("attention heads", whole.num_heads), ("feed-forward size", whole.intermediate_size)):
            if value % self.size:
                raise BuildError(
                    f"{value} {name} cannot be split over {self.size} ranks; choose a tp_size that divides it"
                )
        if whole.num_kv_heads % self.size and self.size % whole.num_kv_heads:
            raise BuildError(
                f"{whole.num_kv_heads} key/value heads can neither be split over nor shared by {self.size} ranks; "
                "choose a tp_size that divides them or is a multiple of them"
            )
        return replace(
            whole,
            num_heads=whole.num_heads // self.size,
            num_kv_heads=max(1, whole.num_kv_heads // self.size),
            intermediate_size=whole.intermediate_size // self.size,
            tie_word_embeddings=False,
        )

    def vocab_rows(self, vocab_size: int) -> int:
        """Rows of lm_head on each rank: the vocabulary is padded with zero rows to a multiple of `size`."""
        return -(-vocab_size // self.size)


def shard_checkpoint(checkpoint: Checkpoint, shard: Shard) -> Checkpoint:
    """What `checkpoint` looks like to one rank: the same names, its own shapes, read from the same files.

    Raises BuildError where the model cannot be cut into so many parts.
    """
    if shard.size == 1:
        return checkpoint
    whole = checkpoint.decoder
    local = shard.decoder(whole)
    tensors = {name: _part(name, checkpoint.tensors[name], whole, local, shard) for name, _ in expected_tensors(whole)}
    head = checkpoint.tensors["model.embed_tokens.weight" if whole.tie_word_embeddings else "lm_head.weight"]
    tensors["lm_head.weight"] = _lm_head(head, whole, shard)
    return replace(checkpoint, config=replace(checkpoint.config, decoder=local), tensors=tensors)


def _part(name: str, tensor: StoredTensor, whole: DecoderConfig, local: DecoderConfig, shard: Shard) -> StoredTensor:
    if name.endswith(_WHOLE_SUFFIXES) or name.startswith(("model.embed_tokens", "lm_head")):
        return tensor
    if name.endswith(_ROW_PARALLEL_SOURCES):
        width = tensor.shape[1] // shard.size
        columns = range(shard.rank * width, (shard.rank + 1) * width)
        return pieced(name, (tensor.shape[0], width), Piece(tensor, range(tensor.shape[0]), columns))
    rows, index = tensor.shape[0] // shard.size, shard.rank
    if ".k_proj." in name or ".v_proj." in name:
        rows = local.num_kv_heads * local.head_dim
        index = shard.rank * whole.num_kv_heads // shard.size if whole.num_kv_heads < shard.size else shard.rank
    return pieced(name, (rows, *tensor.shape[1:]), Piece(tensor, range(index * rows, (index + 1) * rows)))


def _lm_head(tensor: StoredTensor, whole: DecoderConfig, shard: Shard) -> StoredTensor:
    rows = shard.vocab_rows(whole.vocab_size)
    first = shard.rank * rows
    held = range(first, min(first + rows, whole.vocab_size))
    return pieced("lm_head.weight", (rows, whole.hidden_size), Piece(tensor, held))
