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
from apar.export.linear_packing import unpack_groups, unpack_matrix
from apar.export.manifest import GRAPH_NAME, HEADS_GRAPH_NAME, MANIFEST_NAME, Manifest
from apar.export.quantize import QuantizedRows, unpack
from apar.export.tensor_files import FLOAT_TYPES, to_float32
from apar.export.weight_plan import weight_plan


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
class _Packed:
    """A matrix in the layout of linear_packing.py."""

    packed: _Region
    scales: _Region | None
    zeros: _Region | None
    bits: int
    out: int
    columns: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.out, self.columns

    def values(self) -> npt.NDArray[np.float32]:
        rows = unpack_matrix(self.packed.map(), self.out, self.columns, self.bits)
        if self.scales is None:
            return to_float32(rows)
        scales = to_float32(unpack_groups(self.scales.map(), self.out))
        codes = unpack(rows, self.bits, rows.shape[1] * 8 // self.bits).reshape(*scales.shape, -1)
        zeros = None if self.zeros is None else unpack_groups(self.zeros.map(), self.out)
        return QuantizedRows(codes, scales, zeros, self.bits, self.columns).values()


class EngineWeights(Mapping[str, npt.NDArray[np.float32]]):
    """Canonical name -> float32 array, matrices as [out, in]; read when asked for, nothing is kept."""

    def __init__(self, entries: Mapping[str, _Region | _Packed]) -> None:
        self._entries = entries

    def __getitem__(self, name: str) -> npt.NDArray[np.float32]:
        entry = self._entries[name]
        if isinstance(entry, _Packed):
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
    and `heads.{i}.lm_head.weight` where they have their own. Matrices are unpacked, converted and dequantised at each
    access, so take each weight once.

    Raises EngineError if the directory is no engine, or its manifest and its graphs differ.
    """
    engine_dir = Path(engine_dir)
    manifest = Manifest.load(engine_dir)
    entries: dict[str, _Region | _Packed] = {}
    name = GRAPH_NAME
    try:
        for name in (GRAPH_NAME, HEADS_GRAPH_NAME) if manifest.draft_heads else (GRAPH_NAME,):
            entries |= _entries(engine_dir, onnx.load(engine_dir / name, load_external_data=False).graph)
    except EngineError:
        raise
    except Exception as error:  # protobuf's decoding errors share no base worth naming
        raise EngineError(f"{engine_dir / name} cannot be read ({error}); build the engine again") from error
    _check_shapes(entries, manifest, engine_dir)
    return EngineWeights(entries)


def _check_shapes(entries: Mapping[str, _Region | _Packed], manifest: Manifest, engine_dir: Path) -> None:
    """The graphs must hold the weights that the manifest's sizes call for."""
    planned = {
        weight.name: weight.shape for weight in weight_plan(manifest.decoder, packed=True, heads=manifest.draft_heads)
    }
    stored = {name: entry.shape for name, entry in entries.items()}
    for name in sorted({*planned, *stored}, key=lambda name: (name in stored, name)):
        if planned.get(name) != stored.get(name):
            raise EngineError(
                f"{engine_dir / MANIFEST_NAME} does not describe this engine's graph: weight {name} is "
                f"{_shown(planned.get(name))} by the manifest, {_shown(stored.get(name))} in the graph; "
                "copy the engine again or build it again"
            )


def _shown(shape: tuple[int, ...] | None) -> str:
    return "not there" if shape is None else " x ".join(map(str, shape))


def _entries(engine_dir: Path, graph: onnx.GraphProto) -> dict[str, _Region | _Packed]:
    """Where the weights of one graph lie."""
    regions = {tensor.name: _region(engine_dir, tensor) for tensor in graph.initializer if tensor.external_data}
    entries: dict[str, _Region | _Packed] = {}
    used = set()
    for node in graph.node:
        if node.op_type != "Linear":
            continue
        attributes = {a.name: a.i for a in node.attribute}
        packed, scales, zeros = (*node.input[1:4], "", "")[:3]
        used |= {packed, scales, zeros}
        entries[packed.removesuffix(".packed")] = _Packed(
            regions[packed],
            regions[scales] if scales else None,
            regions[zeros] if zeros else None,
            attributes["bits"],
            attributes["out_features"],
            attributes["in_features"],
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
