"""A checkpoint in the Hugging Face layout (or TensorRT-LLM's): config, tensors, and that they belong together.

Read without torch and transformers, and without running anything that the files hold.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from apar.export.checkpoint_hints import names_hint, what_is_there
from apar.export.errors import CheckpointError
from apar.export.llama_config import LlamaConfig, read_config, read_json
from apar.export.manifest import DecoderConfig
from apar.export.medusa import MedusaHeads, find_heads, is_head_tensor, read_heads
from apar.export.tensor_files import FLOAT_TYPES, StoredTensor, read_safetensors, to_float32
from apar.export.tensor_pieces import PiecedTensor
from apar.export.torch_files import read_torch_file
from apar.export.trtllm_checkpoint import is_trtllm, read_trtllm

logger = logging.getLogger(__name__)

_Reader = Callable[[Path], dict[str, StoredTensor]]
_LAYOUTS: tuple[tuple[str, _Reader], ...] = (
    ("model.safetensors", read_safetensors),
    ("model.safetensors.index.json", read_safetensors),
    ("pytorch_model.bin", read_torch_file),
    ("pytorch_model.bin.index.json", read_torch_file),
)
_LISTED = 5
_CHUNK = 1 << 22
"""Numbers compared at a time."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A validated checkpoint; no weight has been read yet."""

    directory: Path
    config: LlamaConfig
    tensors: Mapping[str, StoredTensor]
    """Exactly the tensors that the decoder needs, by their checkpoint names, and those of the heads by ours."""
    heads: MedusaHeads | None = None

    @property
    def decoder(self) -> DecoderConfig:
        """Shape of the decoder."""
        return self.config.decoder

    @classmethod
    def open(cls, directory: Path, draft_heads: Path | str | None = None) -> Checkpoint:
        """Read headers and check every name, shape and type against config.json.

        draft_heads: a directory with Medusa heads for this checkpoint, or "none" to leave out those that ride with it
            (in its `medusa` folder, or among its tensors as `medusa_heads.*`).
        Raises CheckpointError that names the file, what is wrong with it, and what to do.
        """
        directory = Path(directory)
        if not directory.is_dir():
            raise CheckpointError(f"{directory} is not a directory; give the directory of a checkpoint")
        if is_trtllm(directory):
            read = read_trtllm(directory)
            config, found = read.config, dict(read.tensors)
        else:
            config, found = read_config(directory), _find_tensors(directory)
            if config.decoder.tie_word_embeddings and not _tied(found):
                logger.warning(
                    "%s: config.json ties lm_head to the embeddings, but lm_head.weight is there and differs from "
                    "them; it is used as it is",
                    directory,
                )
                config = replace(config, decoder=replace(config.decoder, tie_word_embeddings=False))
            if config.decoder.attention_bias and not config.output_bias:
                found = _zero_output_biases(config.decoder, directory, len(found)) | found
        inside = {name: found.pop(name) for name in list(found) if is_head_tensor(name)}
        tensors = _select(found, config.decoder, directory)
        if draft_heads is None:
            heads = find_heads(directory, inside, config.decoder)
        else:
            heads = None if draft_heads == "none" else read_heads(Path(draft_heads), config.decoder)
        return cls(directory, config, tensors | dict(heads.tensors) if heads else tensors, heads)


def expected_tensors(config: DecoderConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of each tensor of a checkpoint, in the order of computation."""
    hidden, ffn = config.hidden_size, config.intermediate_size
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    yield "model.embed_tokens.weight", (config.vocab_size, hidden)
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", (hidden,)
        for name, rows, columns in (("q", q, hidden), ("k", kv, hidden), ("v", kv, hidden), ("o", hidden, q)):
            yield f"{prefix}.self_attn.{name}_proj.weight", (rows, columns)
            if config.attention_bias:
                yield f"{prefix}.self_attn.{name}_proj.bias", (rows,)
        yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
        for name, rows, columns in (("gate", ffn, hidden), ("up", ffn, hidden), ("down", hidden, ffn)):
            yield f"{prefix}.mlp.{name}_proj.weight", (rows, columns)
            if config.mlp_bias:
                yield f"{prefix}.mlp.{name}_proj.bias", (rows,)
    yield "model.norm.weight", (hidden,)
    if not config.tie_word_embeddings:
        yield "lm_head.weight", (config.vocab_size, hidden)


def _find_tensors(directory: Path) -> dict[str, StoredTensor]:
    for name, reader in _LAYOUTS:
        path = directory / name
        if path.is_file():
            return _read_shards(path, reader) if name.endswith(".index.json") else reader(path)
    raise CheckpointError(
        f"{directory} holds no weights: none of {', '.join(name for name, _ in _LAYOUTS)} is there; "
        f"{what_is_there(directory) or 'give the whole checkpoint directory'}"
    )


def _read_shards(index: Path, reader: _Reader) -> dict[str, StoredTensor]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map; copy the checkpoint again")
    shards = sorted({str(shard) for shard in weight_map.values()})
    for shard in shards:
        if shard in ("", ".", "..") or Path(shard).name != shard or "\\" in shard or "\0" in shard:
            raise CheckpointError(
                f"{index} names the shard {shard!r}, which is not a plain file name; do not trust this checkpoint"
            )
    missing = [shard for shard in shards if not (index.parent / shard).is_file()]
    if missing:
        raise CheckpointError(f"{index} names shards that are not there: {_list(missing)}; fetch the whole checkpoint")
    tensors: dict[str, StoredTensor] = {}
    for shard in shards:
        found = reader(index.parent / shard)
        absent = [name for name, where in weight_map.items() if where == shard and name not in found]
        if absent:
            raise CheckpointError(f"{index.parent / shard} lacks tensors that {index.name} promises: {_list(absent)}")
        tensors.update((name, tensor) for name, tensor in found.items() if weight_map.get(name, shard) == shard)
    return tensors


def _zero_output_biases(config: DecoderConfig, directory: Path, most: int) -> dict[str, StoredTensor]:
    """Biases of o_proj for a checkpoint that has them at q, k and v alone: the decoder has them everywhere."""
    names = [f"model.layers.{layer}.self_attn.o_proj.bias" for layer in range(min(config.num_layers, most))]
    return {name: PiecedTensor(name, "float32", (config.hidden_size,), directory, 0) for name in names}


def _tied(found: Mapping[str, StoredTensor]) -> bool:
    """Whether there is no lm_head beside the embeddings, or it is the same matrix.

    Tuning that adds tokens often trains both on their own and leaves the config as it was; transformers 5 then unties
    them too.
    """
    head, embedding = found.get("lm_head.weight"), found.get("model.embed_tokens.weight")
    if head is None or embedding is None:
        return True
    alike = head.shape == embedding.shape and len(head.shape) == 2
    if not alike or head.dtype not in FLOAT_TYPES or embedding.dtype not in FLOAT_TYPES:
        return False  # what is wrong with them is said where all tensors are checked
    if (head.path, head.offset) == (embedding.path, embedding.offset):
        return True
    step = max(1, _CHUNK // max(head.row_size, 1))
    for start in range(0, head.shape[0], step):
        stop = min(start + step, head.shape[0])
        if not np.array_equal(to_float32(head.read(start, stop)), to_float32(embedding.read(start, stop))):
            return False
    return True


def _select(found: Mapping[str, StoredTensor], config: DecoderConfig, directory: Path) -> dict[str, StoredTensor]:
    if config.num_layers > len(found):
        raise CheckpointError(
            f"{directory} holds {len(found)} tensors, too few for the {config.num_layers} layers of its config.json; "
            "check num_hidden_layers, or fetch the whole checkpoint"
        )
    expected = dict(expected_tensors(config))
    missing = [name for name in expected if name not in found]
    if missing:
        hint = names_hint(found)
        if missing == ["lm_head.weight"]:
            hint = ' (if the model shares it with its embeddings, config.json must say "tie_word_embeddings": true)'
        raise CheckpointError(f"{directory} lacks tensors of the model in its config.json: {_list(missing)}{hint}")
    surplus = [name for name in found if name not in expected and not _harmless(name, config)]
    if surplus:
        raise CheckpointError(
            f"{directory} holds tensors that config.json does not account for: {_list(surplus)}; "
            "check num_hidden_layers, attention_bias and mlp_bias, or remove tensors that are not the decoder's"
        )
    for name, shape in expected.items():
        tensor = found[name]
        if tensor.shape != shape:
            raise CheckpointError(
                f"{tensor.path}: tensor {name} has shape {list(tensor.shape)}, config.json asks for {list(shape)}"
            )
        if tensor.dtype not in FLOAT_TYPES:
            raise CheckpointError(
                f"{tensor.path}: tensor {name} is {tensor.dtype}, which is not supported; "
                f"convert it to one of {', '.join(FLOAT_TYPES)}"
            )
    return {name: found[name] for name in expected}


def _harmless(name: str, config: DecoderConfig) -> bool:
    """Tensors that old or tied checkpoints carry without need."""
    return name.endswith(".rotary_emb.inv_freq") or (name == "lm_head.weight" and config.tie_word_embeddings)


def _list(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
