"""The tiny model that ships, read with nothing but PyTorch: GPU boxes may have no other package of `apar`'s."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from apar.export import errors
from apar.export.errors import CheckpointError
from apar.export.llama_config import read_config
from apar.export.manifest import Manifest, TokenIds
from apar.export.weight_plan import weight_plan
from apar.runtime.executor.model import Model

FOLDER = Path(errors.__file__).parent / "models" / "tiny"
PROMPTS = Path(__file__).with_name("tiny_prompts.json")
"""Held-out questions as token ids, and the ids of the control tokens; a test compares them with the tokenizer's."""
_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


class CheckpointWeights(Mapping[str, Tensor]):
    """float32 weights of `model.safetensors` by the names of `read_weights`."""

    def __init__(self, folder: Path) -> None:
        path = folder / "model.safetensors"
        self._data = bytearray(path.read_bytes())
        (size,) = struct.unpack_from("<Q", self._data)
        self._entries = json.loads(self._data[8 : 8 + size])
        self._begin = 8 + size
        self._plan = {weight.name: weight for weight in weight_plan(read_config(folder).decoder, packed=False)}
        for source in (source for weight in self._plan.values() for source in weight.sources):
            if self._entries.get(source, {}).get("dtype") not in _DTYPES:
                raise CheckpointError(f"{path} has no float tensor {source}; copy the checkpoint again")

    def __getitem__(self, name: str) -> Tensor:
        return torch.cat([self._tensor(source) for source in self._plan[name].sources]).float()

    def __iter__(self) -> Iterator[str]:
        return iter(self._plan)

    def __len__(self) -> int:
        return len(self._plan)

    def _tensor(self, source: str) -> Tensor:
        entry = self._entries[source]
        dtype = _DTYPES[entry["dtype"]]
        first, end = entry["data_offsets"]
        values = torch.frombuffer(
            self._data, dtype=dtype, count=(end - first) // dtype.itemsize, offset=self._begin + first
        )
        return values.view(entry["shape"])


def tiny_model() -> tuple[Model, list[list[int]]]:
    """The model, and prompts as token ids."""
    known = json.loads(PROMPTS.read_text(encoding="utf-8"))
    tokens = TokenIds(fork=known["fork"], child=known["child"], eos=tuple(known["eos"]))
    return Model(Manifest(read_config(FOLDER).decoder, tokens, 16), CheckpointWeights(FOLDER)), known["prompts"]
