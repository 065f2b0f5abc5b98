"""The ONNX graphs that TensorRT compiles, and their weights: for each rank the decoder, and beside it Medusa heads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx

from apar.export.checkpoint import Checkpoint
from apar.export.decoder import build_decoder
from apar.export.errors import BuildError
from apar.export.heads_graph import build_heads
from apar.export.manifest import DraftHeads
from apar.export.sharding import Shard, shard_checkpoint
from apar.export.tensor_files import FLOAT_TYPES
from apar.export.typed_graph import PlainNorm, TensorRtAttention, TypedLinear
from apar.export.weight_plan import Kind, Weight, weight_plan
from apar.export.weights_file import WeightsFile

Progress = Callable[[str, int, int], None]


def graph_name(rank: int) -> str:
    """File of a rank's decoder; the weights are beside it, in the same name + `.data`."""
    return f"rank{rank}.onnx"


def heads_name(rank: int) -> str:
    """File of a rank's Medusa heads; their weights are in the decoder's file."""
    return f"rank{rank}_medusa.onnx"


def write_graph(
    checkpoint: Checkpoint,
    directory: Path,
    *,
    dtype: str,
    block_size: int,
    kv_binding: str,
    engine_id: int = 0,
    shard: Shard | None = None,
    heads: DraftHeads | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write one rank's graphs and weights into `directory`; returns the decoder's path.

    heads: also write those of the checkpoint's Medusa heads; the decoder then gives `hidden`, which they read.
    Raises BuildError (disk, numbers beyond `dtype`, a model that cannot be cut) and CheckpointError.
    """
    shard = shard or Shard()
    local = shard_checkpoint(checkpoint, shard)
    path = directory / graph_name(shard.rank)
    plan = list(_plan(local, shard, heads))
    total = sum(_bytes(local, weight) for weight in plan)
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress:
            progress("weights", done, total)

    try:
        with WeightsFile(path.with_name(path.name + ".data"), advance) as file:
            for weight in plan:
                file.add_plain(weight, local, _storage(weight, dtype))
            linear = TypedLinear(dtype, shard)
            graphs = {
                path.name: build_decoder(
                    local.decoder,
                    file.weights,
                    TensorRtAttention(block_size, dtype, kv_binding, engine_id),
                    linear,
                    PlainNorm(),
                    hidden_output=heads is not None,
                )
            }
            if heads is not None:
                model = build_heads(local.decoder, heads, file.weights, linear, gathered=True)
                graphs[heads_name(shard.rank)] = model
        for name, model in graphs.items():
            onnx.save(model, directory / name)
            onnx.checker.check_model(str(directory / name), full_check=False)
    except OSError as error:
        raise BuildError(f"{path} cannot be written: {error}") from error
    return path


def graph_bytes(checkpoint: Checkpoint, dtype: str, shard: Shard, heads: DraftHeads | None = None) -> int:
    """Bytes that one rank's weights take on disk."""
    local = shard_checkpoint(checkpoint, shard)
    width = FLOAT_TYPES[dtype].itemsize
    return sum(
        weight.shape[0] * (weight.shape[1] if len(weight.shape) > 1 else 1) * width
        for weight in _plan(local, shard, heads)
    )


def _plan(checkpoint: Checkpoint, shard: Shard, heads: DraftHeads | None) -> list[Weight]:
    plan = list(weight_plan(checkpoint.decoder, packed=False, heads=heads))
    if shard.size > 1:
        head = checkpoint.tensors["lm_head.weight"]
        plan = [replace(weight, shape=head.shape) if weight.name == "lm_head.weight" else weight for weight in plan]
    return plan


def _storage(weight: Weight, dtype: str) -> str:
    """Biases are added to products in their type; norms are float32 arithmetic."""
    return "float32" if weight.kind is Kind.VECTOR and weight.name.endswith("norm.weight") else dtype


def _bytes(checkpoint: Checkpoint, weight: Weight) -> int:
    tensors = [checkpoint.tensors[name] for name in weight.sources]
    return sum(t.shape[0] * t.row_size * FLOAT_TYPES[t.dtype].itemsize for t in tensors)
