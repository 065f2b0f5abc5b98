"""Medusa heads of a checkpoint (arXiv 2401.10774): found, named and checked.

Head i is some residual blocks (x + SiLU(Linear(x))) on the hidden state after the last norm, then a matrix
[vocab, hidden]; it predicts the token at offset 2 + i. Files differ in how they call these tensors:

    0.0.linear.weight, 0.0.linear.bias, 0.1.weight      medusa_lm_head.pt or .safetensors (FasterDecoding, APAR)
    medusa_heads.0.0.linear.weight, ...                 the same with a prefix
    medusa_heads.0.medusa_layers.0.linear.weight, medusa_heads.0.lm_head.weight                 TensorRT-LLM
    blocks.0.layers.0.weight, lm_heads.0.weight         model.safetensors (vLLM); biases of blocks may be missing

Blocks that were trained as tied copies stand in the file once for each block, like any others.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from apar.export.errors import CheckpointError
from apar.export.llama_config import read_json
from apar.export.manifest import DecoderConfig, DraftHeads
from apar.export.tensor_files import FLOAT_TYPES, StoredTensor, read_safetensors
from apar.export.tensor_pieces import PiecedTensor
from apar.export.torch_files import read_torch_file

FOLDER = "medusa"
CONFIG_NAME = "config.json"
_FILES = {
    "medusa_lm_head.safetensors": read_safetensors,
    "medusa_lm_head.pt": read_torch_file,
    "model.safetensors": read_safetensors,
}
_PREFIX = r"(?:medusa_heads?\.)?"
_BLOCK = re.compile(_PREFIX + r"(\d+)\.(?:medusa_layers\.)?(\d+)\.linear\.(weight|bias)")
_LAST = re.compile(_PREFIX + r"(\d+)\.(?:(\d+)|lm_head)\.weight")
_VLLM_BLOCK = re.compile(_PREFIX + r"blocks\.(\d+)\.layers\.(\d+)\.(weight|bias)")
_VLLM_LAST = re.compile(_PREFIX + r"lm_heads\.(\d+)()\.weight")
_VLLM_SHARED = re.compile(_PREFIX + r"(?:lm_head|lm_heads\.\d+)\.weight")


@dataclass(frozen=True, slots=True)
class MedusaHeads:
    """Heads of a checkpoint; no weight has been read yet."""

    shape: DraftHeads
    tensors: Mapping[str, StoredTensor]
    """By canonical name: `heads.{i}.blocks.{j}.weight` and `.bias`; `heads.{i}.lm_head.weight` unless it is tied."""


def is_head_tensor(name: str) -> bool:
    """Whether a tensor of a whole checkpoint's files belongs to Medusa heads."""
    return name.startswith(("medusa_heads.", "medusa_head."))


def find_heads(checkpoint: Path, inside: Mapping[str, StoredTensor], config: DecoderConfig) -> MedusaHeads | None:
    """Heads that ride with a checkpoint: among its own tensors (`inside`), or in its `medusa` folder.

    Raises CheckpointError where there are some and they do not fit.
    """
    if inside:
        own = read_json(checkpoint / CONFIG_NAME)
        return _assemble(checkpoint, inside, own, config)
    folder = checkpoint / FOLDER
    return read_heads(folder, config) if folder.is_dir() else None


def read_heads(folder: Path, config: DecoderConfig) -> MedusaHeads:
    """Heads in a directory of their own: `config.json` and `medusa_lm_head.safetensors` or `.pt`.

    Raises CheckpointError where the files are missing, damaged or of another model.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a directory; give the directory that holds medusa_lm_head.*")
    for name, reader in _FILES.items():
        if (folder / name).is_file():
            path = folder / CONFIG_NAME
            return _assemble(folder, reader(folder / name), read_json(path) if path.is_file() else {}, config)
    raise CheckpointError(f"{folder} holds no Medusa heads: none of {', '.join(_FILES)} is there")


def expected_heads(shape: DraftHeads, config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Canonical name and shape of every tensor of the heads."""
    hidden = config.hidden_size
    tensors: dict[str, tuple[int, ...]] = {}
    for head in range(shape.count):
        for block in range(shape.blocks):
            tensors[f"heads.{head}.blocks.{block}.weight"] = (hidden, hidden)
            tensors[f"heads.{head}.blocks.{block}.bias"] = (hidden,)
        if not shape.tied_lm_head:
            tensors[f"heads.{head}.lm_head.weight"] = (config.vocab_size, hidden)
    return tensors


def _assemble(
    where: Path, found: Mapping[str, StoredTensor], settings: Mapping[str, object], config: DecoderConfig
) -> MedusaHeads:
    tensors: dict[str, StoredTensor] = {}
    lasts: list[int] = []
    if "token_map" in found:
        raise CheckpointError(f"{where}: these Medusa heads know a part of the vocabulary only, which is not supported")
    shared = settings.get("original_lm_head") is True  # vLLM's word for medusa_tied_lm_head, with a copy in the file
    for name, tensor in found.items():
        if shared and _VLLM_SHARED.fullmatch(name):
            continue
        if match := _BLOCK.fullmatch(name) or _VLLM_BLOCK.fullmatch(name):
            ours = f"heads.{int(match[1])}.blocks.{int(match[2])}.{match[3]}"
        elif match := _LAST.fullmatch(name) or _VLLM_LAST.fullmatch(name):
            ours = f"heads.{int(match[1])}.lm_head.weight"
            lasts += [int(match[2])] if match[2] else []
        else:
            raise CheckpointError(f"{tensor.path}: tensor {name} is not one that Medusa heads have")
        if ours in tensors:
            raise CheckpointError(f"{tensor.path}: {name} and {tensors[ours].name} are the same tensor of a head")
        tensors[ours] = tensor
    if any(_VLLM_BLOCK.fullmatch(name) for name in found) and not any(name.endswith(".bias") for name in found):
        tensors |= dict(_zero_biases(tensors, config))
    blocks = {int(name.split(".")[3]) for name in tensors if ".blocks." in name}
    shape = DraftHeads(
        count=1 + max((int(name.split(".")[1]) for name in tensors), default=-1),
        blocks=len(blocks),
        tied_lm_head=bool(settings.get("medusa_tied_lm_head", False)) or shared,
    )
    wanted = settings.get("medusa_num_heads", shape.count)
    if (
        isinstance(wanted, int) and wanted is not True and 0 < wanted < shape.count
    ):  # a config may ask for fewer heads than were trained
        shape = replace(shape, count=wanted)
        tensors = {name: tensor for name, tensor in tensors.items() if int(name.split(".")[1]) < wanted}
    for key, count in (("medusa_num_heads", shape.count), ("medusa_num_layers", shape.blocks)):
        if settings.get(key, count) != count:
            raise CheckpointError(
                f"{where / CONFIG_NAME}: {key} is {settings[key]!r}, the tensors are those of {count}"
            )
    if any(number != shape.blocks for number in lasts):
        raise CheckpointError(f"{where}: the last matrix of a head has not the number {shape.blocks} of its blocks")
    _check(where, tensors, shape, config)
    return MedusaHeads(shape, tensors)


def _zero_biases(tensors: Mapping[str, StoredTensor], config: DecoderConfig) -> Iterator[tuple[str, StoredTensor]]:
    for name, tensor in tensors.items():
        if ".blocks." in name:
            bias = name.removesuffix("weight") + "bias"
            yield bias, PiecedTensor(bias, "float32", (config.hidden_size,), tensor.path, 0)


def _check(where: Path, tensors: Mapping[str, StoredTensor], shape: DraftHeads, config: DecoderConfig) -> None:
    if shape.count > len(tensors):
        raise CheckpointError(f"{where} names {shape.count} Medusa heads, and holds {len(tensors)} tensors of them")
    expected = expected_heads(shape, config)
    if not expected:
        raise CheckpointError(f"{where} holds no tensors of Medusa heads")
    for name, wanted in expected.items():
        tensor = tensors.get(name)
        if tensor is None:
            hint = ""
            if name.endswith("lm_head.weight"):
                hint = '; if heads use the model\'s own, its config.json must say "medusa_tied_lm_head": true'
            raise CheckpointError(f"{where}: {name} is missing from the Medusa heads{hint}")
        if tensor.shape != wanted:
            raise CheckpointError(
                f"{tensor.path}: tensor {tensor.name} has shape {list(tensor.shape)}, the model asks for "
                f"{list(wanted)}; these heads belong to another model"
            )
        if tensor.dtype not in FLOAT_TYPES:
            raise CheckpointError(
                f"{tensor.path}: tensor {tensor.name} is {tensor.dtype}, which is not supported; "
                f"convert it to one of {', '.join(FLOAT_TYPES)}"
            )
    surplus = [name for name in tensors if name not in expected]
    if surplus:
        raise CheckpointError(f"{where}: {surplus[0]} is one tensor too many for {shape.count} Medusa heads")
