"""An engine's weights by their canonical names, for executors that do not run the ONNX graph."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from apar.export.errors import EngineError
from apar.export.manifest import GRAPH_NAME, HEADS_GRAPH_NAME, Manifest
from apar.export.quantize import QuantizedRows, unpack
from apar.export.tensor_files import FLOAT_TYPES, to_float32


@dataclass(frozen=True, slots=True)
class _Region:
    """Where an initialiser lies."""

    path: Path
    offset: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    def map(self) -> npt.NDArray[Any]:
        return np.memmap(self.path, self.dtype, mode="r", offset=self.offset, shape=self.shape)


@dataclass(frozen=True, slots=True)
class _Grouped:
    packed: _Region
    scales: _Region
    zeros: _Region | None
    bits: int
    columns: int

    def values(self) -> npt.NDArray[np.float32]:
        packed, groups = self.packed.map(), self.scales.shape[1]
        codes = unpack(packed, self.bits, packed.shape[2] * 8 // self.bits)
        zeros = None if self.zeros is None else unpack(self.zeros.map(), self.bits, groups)
        return QuantizedRows(codes, self.scales.map(), zeros, self.bits, self.columns).values()


class EngineWeights(Mapping[str, npt.NDArray[np.float32]]):
    """Canonical name -> float32 array, matrices as [out, in]; read when asked for, nothing is kept."""

    def __init__(self, entries: Mapping[str, _Region | _Grouped]) -> None:
        self._entries = entries

    def __getitem__(self, name: str) -> npt.NDArray[np.float32]:
        entry = self._entries[name]
        if isinstance(entry, _Grouped):
            return entry.values()
        return to_float32(entry.map())

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def read_weights(engine_dir: Path) -> EngineWeights:
    """Weights of the engine in `engine_dir`, a mapping from name to float32 array.

    Names: `embed.weight` [vocab, hidden]; for each layer i `layers.{i}.` with `input_norm.weight`,
    `qkv.weight` [(H + 2K) * D, hidden], `o.weight`, `post_norm.weight`, `gate_up.weight` [2 * ffn, hidden],
    `down.weight`, and `.bias` of the projections where the model has them; `norm.weight`;
    `lm_head.weight` [vocab, hidden] (also where it is tied); of Medusa heads `heads.{i}.blocks.{j}.weight` and `.bias`,
    and `heads.{i}.lm_head.weight` where they have their own. Float32 storage is memory-mapped (read-only),
    other storage is converted or dequantised at each access, so take each weight once.

    Raises EngineError if the directory is no engine.
    """
    engine_dir = Path(engine_dir)
    manifest = Manifest.load(engine_dir)
    entries: dict[str, _Region | _Grouped] = {}
    name = GRAPH_NAME
    try:
        for name in (GRAPH_NAME, HEADS_GRAPH_NAME) if manifest.draft_heads else (GRAPH_NAME,):
            entries |= _entries(engine_dir, onnx.load(engine_dir / name, load_external_data=False).graph)
    except EngineError:
        raise
    except Exception as error:  # protobuf's decoding errors share no base worth naming
        raise EngineError(f"{engine_dir / name} cannot be read ({error}); build the engine again") from error
    if manifest.decoder.tie_word_embeddings:
        entries.setdefault("lm_head.weight", entries["embed.weight"])
    return EngineWeights(entries)


def _entries(engine_dir: Path, graph: onnx.GraphProto) -> dict[str, _Region | _Grouped]:
    """Where the weights of one graph lie."""
    regions = {tensor.name: _region(engine_dir, tensor) for tensor in graph.initializer if tensor.external_data}
    entries: dict[str, _Region | _Grouped] = {}
    used = set()
    for node in graph.node:
        if node.op_type == "MatMulNBits":
            attributes = {a.name: a.i for a in node.attribute}
            packed, scales, zeros = (*node.input[1:4], "")[:3]
            used |= {packed, scales, zeros}
            entries[packed.removesuffix(".packed")] = _Grouped(
                regions[packed],
                regions[scales],
                regions[zeros] if zeros else None,
                attributes["bits"],
                attributes["K"],
            )
    return entries | {name: region for name, region in regions.items() if name not in used}


def _region(engine_dir: Path, tensor: onnx.TensorProto) -> _Region:
    where = {entry.key: entry.value for entry in tensor.external_data}
    path = engine_dir / Path(where["location"]).name
    dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
    offset, length = int(where.get("offset", 0)), int(where["length"])
    if not path.is_file() or path.stat().st_size < offset + length:
        raise EngineError(f"{path} ends before weight {tensor.name}; copy the engine again or build it again")
    if dtype not in (*FLOAT_TYPES.values(), np.dtype(np.uint8)):
        raise EngineError(f"weight {tensor.name} has the unknown type {dtype}; build the engine again")
    return _Region(path, offset, dtype, tuple(tensor.dims))
