"""Writing a checkpoint in TensorRT-LLM's format: what `trtllm-build --checkpoint_dir` of 1.0 to 1.2.1 takes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from apar.export.checkpoint import Checkpoint
from apar.export.errors import BuildError
from apar.export.llama_config import read_json
from apar.export.manifest import DecoderConfig
from apar.export.output_directory import OutputDirectory, sync
from apar.export.rope import given_parameters
from apar.export.sharding import Shard, shard_checkpoint
from apar.export.tensor_files import FLOAT_TYPES, StoredTensor, to_float32
from apar.export.tensor_pieces import Piece, pieced
from apar.export.trtllm_config import CONFIG_NAME, MEDUSA_ARCHITECTURE, pretrained_config

Progress = Callable[[str, int, int], None]
_CODES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_CHUNK_ELEMENTS = 1 << 20
_SPARE_BYTES = 64 << 20
_MAX_DRAFT_LEN = 63


def write_trtllm(
    checkpoint: Path,
    output: Path,
    *,
    dtype: str = "float16",
    tp_size: int = 1,
    draft_heads: Path | str | None = None,
    progress: Progress | None = None,
) -> None:
    """Write the checkpoint directory `checkpoint` as a TensorRT-LLM one into the new directory `output`.

    Medusa heads that ride with it, or those in `draft_heads`, are written too ("none" leaves them out).
    Raises BuildError (options, disk, numbers beyond `dtype`), CheckpointError. `output` appears whole or not at all.
    """
    if dtype not in _CODES:
        raise BuildError(f"dtype {dtype!r} is not supported; choose one of {', '.join(_CODES)}")
    source = Checkpoint.open(Path(checkpoint), draft_heads)
    if source.heads is not None and source.heads.shape.tied_lm_head:
        raise BuildError("these Medusa heads end in the model's own lm_head, which TensorRT-LLM's format cannot say")
    config = pretrained_config(
        source.decoder, dtype, tp_size=tp_size, rope=rope_words(read_json(Path(checkpoint) / CONFIG_NAME))
    )
    if source.heads is not None:
        heads = source.heads.shape
        config |= {"architecture": MEDUSA_ARCHITECTURE, "num_medusa_heads": heads.count}
        config |= {"num_medusa_layers": heads.blocks, "max_draft_len": _MAX_DRAFT_LEN}
    shards = [Shard(rank, tp_size) for rank in range(tp_size)]
    ranks = [dict(_rank_tensors(source, shard)) for shard in shards]
    width = FLOAT_TYPES[dtype].itemsize
    total = sum(_size(tensor.shape, width) for tensors in ranks for tensor in tensors.values())
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress:
            progress("weights", done, total)

    with OutputDirectory(Path(output), overwrite=False, needed_bytes=total + _SPARE_BYTES) as directory:
        try:
            for shard, tensors in zip(shards, ranks, strict=True):
                _write_safetensors(directory / f"rank{shard.rank}.safetensors", tensors, dtype, advance)
            (directory / CONFIG_NAME).write_text(json.dumps(config, indent=4) + "\n", encoding="utf-8")
        except OSError as error:
            raise BuildError(f"{output} cannot be written: {error}") from error
        sync(directory)


def rope_words(config: Mapping[str, Any]) -> dict[str, Any]:
    """`rotary_base` and `rotary_scaling` of a checkpoint's own config.json, whichever format that is in."""
    if "architecture" in config:
        return {"rotary_base": config.get("rotary_base", 10000.0), "rotary_scaling": config.get("rotary_scaling")}
    given = given_parameters(config)
    base = given.pop("rope_theta", None) or config.get("rope_theta") or 10000.0
    kind = given.get("rope_type", given.get("type", "default"))
    if kind == "default":
        return {"rotary_base": float(base), "rotary_scaling": None}
    return {"rotary_base": float(base), "rotary_scaling": given | {"type": kind, "rope_type": kind}}


def _rank_tensors(source: Checkpoint, shard: Shard) -> Iterator[tuple[str, StoredTensor]]:
    """One rank's tensors by TensorRT-LLM's names."""
    local = shard_checkpoint(replace(source, heads=None), shard)
    tensors, decoder = local.tensors, local.decoder

    def stacked(name: str, *parts: str) -> tuple[str, StoredTensor]:
        return name, _stack(name, [tensors[part] for part in parts])

    yield stacked("transformer.vocab_embedding.weight", "model.embed_tokens.weight")
    for i in range(decoder.num_layers):
        ours, theirs = f"model.layers.{i}", f"transformer.layers.{i}"
        yield stacked(f"{theirs}.input_layernorm.weight", f"{ours}.input_layernorm.weight")
        yield stacked(f"{theirs}.post_layernorm.weight", f"{ours}.post_attention_layernorm.weight")
        for leaf in ("weight", "bias") if decoder.attention_bias else ("weight",):
            qkv = [f"{ours}.self_attn.{part}_proj.{leaf}" for part in "qkv"]
            yield stacked(f"{theirs}.attention.qkv.{leaf}", *qkv)
            yield stacked(f"{theirs}.attention.dense.{leaf}", f"{ours}.self_attn.o_proj.{leaf}")
        for leaf in ("weight", "bias") if decoder.mlp_bias else ("weight",):
            for name, part in (("fc", "gate"), ("gate", "up"), ("proj", "down")):
                yield stacked(f"{theirs}.mlp.{name}.{leaf}", f"{ours}.mlp.{part}_proj.{leaf}")
    yield stacked("transformer.ln_f.weight", "model.norm.weight")
    yield stacked("lm_head.weight", "lm_head.weight" if "lm_head.weight" in tensors else "model.embed_tokens.weight")
    for ours, tensor in source.heads.tensors.items() if source.heads else ():
        _, head, part, *rest = ours.split(".")
        name = f"medusa_heads.{head}." + (
            "lm_head.weight" if part == "lm_head" else f"medusa_layers.{rest[0]}.linear.{rest[1]}"
        )
        yield name, _own_rows(name, tensor, shard, decoder)


def _stack(name: str, parts: list[StoredTensor]) -> StoredTensor:
    pieces, at = [], 0
    for part in parts:
        pieces.append(Piece(part, range(part.shape[0]), row=at))
        at += part.shape[0]
    return pieced(name, (at, *parts[0].shape[1:]), *pieces)


def _own_rows(name: str, tensor: StoredTensor, shard: Shard, decoder: DecoderConfig) -> StoredTensor:
    """A rank's rows of a head's matrix; the vocabulary is padded to a multiple of the ranks."""
    rows = shard.vocab_rows(tensor.shape[0])
    if rows * shard.size != tensor.shape[0] and tensor.shape[0] != decoder.vocab_size:
        raise BuildError(f"{tensor.shape[0]} rows of {tensor.name} cannot be split over {shard.size} ranks")
    first = shard.rank * rows
    held = range(first, min(first + rows, tensor.shape[0]))
    return pieced(name, (rows, *tensor.shape[1:]), Piece(tensor, held))


def _size(shape: tuple[int, ...], width: int) -> int:
    return int(np.prod(shape, dtype=np.int64)) * width


def _write_safetensors(
    path: Path, tensors: Mapping[str, StoredTensor], dtype: str, advance: Callable[[int], None]
) -> None:
    """Header and tensors, in row chunks."""
    element = FLOAT_TYPES[dtype]
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + _size(tensor.shape, element.itemsize)
        header[name] = {"dtype": _CODES[dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            rows = max(1, _CHUNK_ELEMENTS // max(tensor.row_size, 1))
            for start in range(0, tensor.shape[0], rows):
                values = tensor.read(start, min(start + rows, tensor.shape[0]))
                if values.dtype != element:
                    wide = to_float32(values)
                    if dtype == "float16" and wide.size and max(-wide.min(), wide.max()) > np.finfo(np.float16).max:
                        raise BuildError(f"tensor {tensor.name} has numbers beyond float16's range; choose bfloat16")
                    values = wide.astype(element)
                file.write(np.ascontiguousarray(values).view(np.uint8).data)
                advance(values.nbytes)
