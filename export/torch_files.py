"""`pytorch_model*.bin`: tensors found in torch's zip format without running the pickle inside.

The pickle is interpreted by an Unpickler that knows the few names of a state dict of plain tensors and
refuses every other one. Storages are uncompressed zip members, so tensors are read where they lie.
"""

from __future__ import annotations

import collections
import math
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apar.export.errors import CheckpointError
from apar.export.tensor_files import StoredTensor

_STORAGES = {
    "FloatStorage": ("float32", 4), "HalfStorage": ("float16", 2), "BFloat16Storage": ("bfloat16", 2),
    "DoubleStorage": ("float64", 8), "LongStorage": ("int64", 8), "IntStorage": ("int32", 4),
    "ShortStorage": ("int16", 2), "CharStorage": ("int8", 1), "ByteStorage": ("uint8", 1), "BoolStorage": ("bool", 1),
}  # fmt: skip
_LOCAL_HEADER = 30
_MAX_PICKLE = 100_000_000


@dataclass(frozen=True, slots=True)
class _Storage:
    """One storage: the zip member that holds it and its element type."""

    key: str
    dtype: str
    width: int
    count: int


@dataclass(frozen=True, slots=True)
class _Tensor:
    """What `torch._utils._rebuild_tensor_v2` was asked to rebuild."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def contiguous(self) -> bool:
        step = 1
        for size, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size != 1 and stride != step:
                return False
            step *= size
        return True


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> _Tensor:
    numbers = (offset, *shape, *stride)
    if not isinstance(storage, _Storage) or any(not isinstance(n, int) or n < 0 for n in numbers):
        raise pickle.UnpicklingError("a tensor is described wrongly")
    return _Tensor(storage, offset, tuple(shape), tuple(stride))


def _rebuild_parameter(data: Any, *_: Any) -> Any:
    return data


class _StateDictUnpickler(pickle.Unpickler):
    """Knows the names that a state dict of plain tensors needs, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch._utils" and name == "_rebuild_tensor_v2":
            return _rebuild_tensor
        if module == "torch._utils" and name in ("_rebuild_parameter", "_rebuild_parameter_with_state"):
            return _rebuild_parameter
        if module == "collections" and name == "OrderedDict":
            return collections.OrderedDict
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        raise CheckpointError(
            f"its pickle asks for {module}.{name}, which a plain state dict does not need; "
            "nothing was run: do not trust this file, or save it again as safetensors"
        )

    def persistent_load(self, pid: Any) -> _Storage:
        match pid:
            case ("storage", (str(dtype), int(width)), str(key), str(), int(count)) if count >= 0:
                return _Storage(key, dtype, width, count)
        raise pickle.UnpicklingError("a storage is described wrongly")


def read_torch_file(path: Path) -> dict[str, StoredTensor]:
    """Tensors of one `.bin` file written by torch.save (zip format, torch 1.6 and later).

    Raises CheckpointError for truncated files, the older format, anything but a dict of plain tensors.
    """
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            members = {info.filename: info for info in archive.infolist()}
            pickles = [name for name in members if name == "data.pkl" or name.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise CheckpointError(
                    f"{path} is a zip file but not one of torch.save; save the checkpoint as safetensors"
                )
            root = pickles[0].removesuffix("data.pkl")
            order = root + "byteorder"
            if order in members and archive.read(order).strip() != b"little":
                raise CheckpointError(f"{path} was written big-endian; save the checkpoint as safetensors")
            if members[pickles[0]].file_size > _MAX_PICKLE:
                raise CheckpointError(f"{path}: its pickle is larger than any state dict's; save it as safetensors")
            state = _load(path, archive.open(pickles[0]))
            return {
                name: _locate(path, file, name, tensor, members, root) for name, tensor in _flatten(path, state).items()
            }
    except zipfile.BadZipFile as error:
        raise CheckpointError(
            f"{path} is truncated or in torch's format from before 1.6 ({error}); "
            "copy it again, or save the checkpoint as safetensors"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _load(path: Path, stream: Any) -> Any:
    try:
        return _StateDictUnpickler(stream).load()
    except CheckpointError as error:
        raise CheckpointError(f"{path} refused: {error}") from error
    except zipfile.BadZipFile:
        raise
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise CheckpointError(f"{path}: its pickle is damaged ({error}); copy the file again") from error


def _flatten(path: Path, state: Any) -> Mapping[str, _Tensor]:
    if not isinstance(state, dict):
        raise CheckpointError(
            f"{path} holds a {type(state).__name__}, not a state dict; save the checkpoint as safetensors"
        )
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, _Tensor):
            raise CheckpointError(f"{path}: entry {name!r} is no plain tensor; save the checkpoint as safetensors")
    return state


def _locate(
    path: Path, file: Any, name: str, tensor: _Tensor, members: Mapping[str, zipfile.ZipInfo], root: str
) -> StoredTensor:
    info = members.get(f"{root}data/{tensor.storage.key}")
    if info is None:
        raise CheckpointError(f"{path} lacks the storage of tensor {name}; copy the file again")
    if info.compress_type != zipfile.ZIP_STORED:
        raise CheckpointError(f"{path}: the storage of tensor {name} is compressed; save the checkpoint as safetensors")
    if not tensor.contiguous:
        raise CheckpointError(f"{path}: tensor {name} is a strided view; save the checkpoint as safetensors")
    width = tensor.storage.width
    if (tensor.offset + math.prod(tensor.shape)) * width > info.file_size:
        raise CheckpointError(f"{path}: tensor {name} is larger than its storage; copy the file again")
    file.seek(info.header_offset)
    header = file.read(_LOCAL_HEADER)
    if len(header) != _LOCAL_HEADER or header[:4] != b"PK\x03\x04":
        raise CheckpointError(f"{path}: the storage of tensor {name} is not where the file says; copy it again")
    start = (
        info.header_offset
        + _LOCAL_HEADER
        + int.from_bytes(header[26:28], "little")
        + int.from_bytes(header[28:30], "little")
    )
    return StoredTensor(name, tensor.storage.dtype, tensor.shape, path, start + tensor.offset * width)
