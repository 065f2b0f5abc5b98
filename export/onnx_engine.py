"""Checkpoint to engine directory, for ONNX Runtime and for every executor that reads its weights.

Weights stream from the checkpoint's files to the engine's in row chunks. Everything is made in a hidden
sibling directory, which becomes the engine by one rename after the manifest, the last file, is on disk.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import onnx

from apar.export.attention import ForkAttention, TreeMaskAttention
from apar.export.calibration import CalibrationPass, Sample
from apar.export.checkpoint import Checkpoint
from apar.export.checkpoint_hints import checkpoint_name
from apar.export.control_tokens import resolve_tokens
from apar.export.decoder import Attention, Linear, build_decoder
from apar.export.errors import BuildError
from apar.export.gptq import gptq_rows
from apar.export.heads_graph import build_heads
from apar.export.linear import NativeLinear, PortableLinear
from apar.export.linear_packing import CHANNEL_MULTIPLE, TILE, round_up
from apar.export.manifest import (
    GRAPH_NAME,
    HEADS_GRAPH_NAME,
    PORTABLE_GRAPH_NAME,
    PORTABLE_HEADS_GRAPH_NAME,
    WEIGHTS_NAME,
    DraftHeads,
    Manifest,
)
from apar.export.manifest_rules import DTYPES, KV_DTYPES, METHODS, QUANTIZATIONS
from apar.export.output_directory import OutputDirectory, sync
from apar.export.quantize import BITS, GROUP_SIZES, Float32Array, QuantizedRows
from apar.export.tensor_files import FLOAT_TYPES
from apar.export.tokenizer_files import TokenizerFiles, read_tokenizer
from apar.export.weight_plan import Kind, Weight, weight_plan
from apar.export.weights_file import StoredWeight, WeightsFile

Progress = Callable[[str, int, int], None]
"""Called with the stage's name ("weights", then "graph"), and bytes done and in all."""

Calibration = Callable[[Manifest, TokenizerFiles], Sequence[Sample]]
"""Gives the tokens that an engine is calibrated with; `apar.runtime.calibration` makes them from text."""

DEFAULT_GROUP_SIZES = {"int8": 0, "int4": 32}
"""0: an output channel has one scale."""
BLOCK_SIZES = (8, 16, 32, 64, 128)
_SPARE_BYTES = 64 << 20


def build(
    checkpoint: Path,
    output: Path,
    *,
    dtype: str = "auto",
    quantize: str = "none",
    group_size: int | None = None,
    quantize_method: str | None = None,
    zero_points: bool = False,
    calibration: Calibration | None = None,
    block_size: int = 16,
    kv_dtype: str = "auto",
    tokenizer: Path | None = None,
    fork_token: str | int | None = None,
    child_token: str | int | None = None,
    max_context: int | None = None,
    draft_heads: Path | str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Manifest:
    """Build the engine directory `output` from the checkpoint directory `checkpoint`.

    Args:
        dtype: how weights that are not quantised are stored: float32, float16 or bfloat16 (norms and biases
            are always float32); "auto" is what the checkpoint stores its matrices as, so that nothing is lost and no
            step reads more than it must. A quantised build stores its embeddings as float16 where this says float32.
        quantize: "none", "int8" or "int4" for all projections; int4 keeps lm_head at int8.
        group_size: input channels that share a scale. By default 32 for int4, and for int8 all of an output
            channel, as they always do in an int8 lm_head beside int4.
        quantize_method: "rtn" rounds to nearest; "gptq" makes codes of the layers' projections make up for each
            other's errors on the tokens of `calibration`. By default gptq for int4 with a calibration, else rtn.
        zero_points: groups have zero points of their own, not only scales.
        calibration: tokens for gptq.
        block_size: tokens in a block of the KV pool.
        kv_dtype: element type of the pools of `model.onnx`; "auto" is float32 for a plain float32 engine,
            otherwise float16.
        tokenizer: directory of the tokenizer where it is not in the checkpoint.
        fork_token, child_token: string or id of APAR's control tokens where the tokenizer calls them otherwise.
        max_context: longest path in tokens; by default the checkpoint's max_position_embeddings.
        draft_heads: a directory with Medusa heads for the checkpoint; "none" leaves out those that ride with it, which
            are taken by default.
        overwrite: replace an engine that is already at `output`, at the very end.

    Raises BuildError (options, disk), CheckpointError, TokenizerError. Whatever happens, `output` is
    afterwards either what it was or a complete engine.
    """
    checkpoint, output = Path(checkpoint), Path(output)
    group_size = _check_options(dtype, quantize, group_size, block_size, kv_dtype)
    method = _method(quantize, quantize_method, zero_points, calibration)
    source = Checkpoint.open(checkpoint, draft_heads)
    files = read_tokenizer(tokenizer or checkpoint)
    dtype = matrix_dtype(source) if dtype == "auto" else dtype
    manifest = Manifest(
        decoder=replace(source.decoder, max_context=longest_context(source, max_context)),
        tokens=resolve_tokens(source.config, files, fork_token, child_token),
        block_size=block_size,
        dtype="float16" if quantize != "none" and dtype == "float32" else dtype,
        kv_dtype=pool_dtype(dtype, quantize) if kv_dtype == "auto" else kv_dtype,
        quantize=quantize,
        group_size=group_size,
        zero_points=zero_points,
        quantize_method=method,
        draft_heads=source.heads.shape if source.heads else None,
        source=checkpoint_name(checkpoint),
        apar_version=installed_version(),
    )
    plan = list(weight_plan(manifest.decoder, packed=True, heads=manifest.draft_heads))
    storage = {weight.name: _storage(weight, manifest) for weight in plan}
    samples = calibration(manifest, files) if calibration is not None and method == "gptq" else ()
    needed = sum(_stored_bytes(weight, storage[weight.name], manifest) for weight in plan)
    with OutputDirectory(output, overwrite=overwrite, needed_bytes=needed + _SPARE_BYTES) as directory:
        chosen = _calibrated(source, samples, manifest) if method == "gptq" else iter(())
        weights, digest = _write_weights(source, plan, storage, manifest, chosen, directory, progress)
        _write_graphs(manifest, weights, directory, progress)
        files.write(directory)
        sync(directory)
        manifest = manifest.with_files(directory, {WEIGHTS_NAME: digest})
        manifest.save(directory)
        sync(directory)
    return manifest


def _check_options(dtype: str, quantize: str, group_size: int | None, block_size: int, kv_dtype: str) -> int:
    for name, value, allowed in (
        ("dtype", dtype, ("auto", *DTYPES)),
        ("quantize", quantize, QUANTIZATIONS),
        ("kv_dtype", kv_dtype, ("auto", *KV_DTYPES)),
        ("block_size", block_size, BLOCK_SIZES),
    ):
        if value not in allowed:
            raise BuildError(f"{name} {value!r} is not supported; choose one of {', '.join(map(str, allowed))}")
    if quantize == "none":
        if group_size is not None:
            raise BuildError("group_size has no meaning without quantize; give quantize int8 or int4 too")
        return 0
    if group_size is None:
        return DEFAULT_GROUP_SIZES[quantize]
    if group_size not in GROUP_SIZES:
        raise BuildError(
            f"group_size {group_size!r} is not supported; choose one of {', '.join(map(str, GROUP_SIZES))}"
        )
    return group_size


def _method(quantize: str, method: str | None, zero_points: bool, calibration: Calibration | None) -> str:
    if quantize == "none":
        if method is not None or zero_points or calibration is not None:
            raise BuildError(
                "quantize_method, zero_points and calibration have no meaning without quantize; "
                "give quantize int8 or int4 too"
            )
        return "none"
    if method is None:
        return "gptq" if quantize == "int4" and calibration is not None else "rtn"
    if method not in METHODS:
        raise BuildError(f"quantize_method {method!r} is not supported; choose one of {', '.join(METHODS)}")
    if method == "gptq" and calibration is None:
        raise BuildError("quantize_method gptq needs a calibration; give one, or choose rtn")
    return method


def longest_context(source: Checkpoint, wanted: int | None) -> int:
    if wanted is None:
        return source.decoder.max_context
    if not 0 < wanted <= source.config.context_limit:
        raise BuildError(
            f"max_context {wanted} is not between 1 and {source.config.context_limit}, "
            "the longest context that the checkpoint's config.json allows"
        )
    return wanted


def matrix_dtype(source: Checkpoint) -> str:
    """The element type of all of a checkpoint's matrices; float32 where they differ."""
    plan = weight_plan(source.decoder, packed=True)
    names = {name for weight in plan if weight.kind is not Kind.VECTOR for name in weight.sources}
    found = {source.tensors[name].dtype for name in names}
    return found.pop() if len(found) == 1 else "float32"


def pool_dtype(dtype: str, quantize: str) -> str:
    """The element type of KV pools where nothing else is asked for."""
    return "float32" if dtype == "float32" and quantize == "none" else "float16"


def _storage(weight: Weight, manifest: Manifest) -> str:
    """How a weight is stored: an element type, or a quantisation."""
    if weight.kind is Kind.VECTOR:
        return "float32"
    if weight.kind is Kind.EMBEDDING or manifest.quantize == "none":
        return manifest.dtype
    # The logits' error is not averaged out by later layers, and this is a small part of the bytes.
    return "int8" if weight.name.endswith("lm_head.weight") else manifest.quantize


def _group_size(storage: str, manifest: Manifest) -> int:
    return manifest.group_size if storage == manifest.quantize else 0


def _stored_bytes(weight: Weight, storage: str, manifest: Manifest) -> int:
    rows, columns = weight.shape[0], weight.shape[1] if len(weight.shape) > 1 else 1
    if weight.kind is Kind.LINEAR:
        rows = round_up(rows, TILE)
    if storage in BITS:
        size = _group_size(storage, manifest)
        groups, scale = (-(-columns // size), 2) if size else (1, 4)
        width = groups * size if size else round_up(columns, CHANNEL_MULTIPLE)
        return rows * (width * BITS[storage] // 8 + groups * (scale + manifest.zero_points))
    return rows * columns * FLOAT_TYPES[storage].itemsize


def _calibrated(
    source: Checkpoint, samples: Sequence[Sample], manifest: Manifest
) -> Iterator[tuple[str, QuantizedRows]]:
    """Name and codes of every layer's projections, in the order of the plan."""

    def quantize(name: str, rows: Float32Array, hessian: Float32Array) -> QuantizedRows:
        size = manifest.group_size or rows.shape[1]
        return gptq_rows(rows, hessian, BITS[manifest.quantize], size, manifest.zero_points)

    return CalibrationPass(source, samples, quantize).layers()


def _write_weights(
    source: Checkpoint,
    plan: Sequence[Weight],
    storage: Mapping[str, str],
    manifest: Manifest,
    chosen: Iterator[tuple[str, QuantizedRows]],
    directory: Path,
    progress: Progress | None,
) -> tuple[Mapping[str, StoredWeight], str]:
    """Weights as they were stored, and the file's SHA-256."""
    total = sum(_checkpoint_bytes(source, weight) for weight in plan)
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress:
            progress("weights", done, total)

    try:
        with WeightsFile(directory / WEIGHTS_NAME, advance) as file:
            for weight in plan:
                kind = storage[weight.name]
                if (
                    manifest.quantize_method == "gptq"
                    and weight.kind is Kind.LINEAR
                    and weight.name.startswith("layers.")
                ):
                    name, codes = next(chosen)
                    assert name == weight.name, f"{name} comes where {weight.name} is due"
                    file.add_quantized(weight, codes, manifest.group_size)
                    advance(_checkpoint_bytes(source, weight))
                elif kind in BITS:
                    size = _group_size(kind, manifest)
                    file.add_grouped(weight, source, BITS[kind], size, manifest.zero_points)
                elif weight.kind is Kind.LINEAR:
                    file.add_packed(weight, source, kind)
                else:
                    file.add_plain(weight, source, kind)
        return file.weights, file.sha256
    except OSError as error:
        raise BuildError(f"{directory / WEIGHTS_NAME} cannot be written: {error}") from error


def _write_graphs(
    manifest: Manifest, weights: Mapping[str, StoredWeight], directory: Path, progress: Progress | None
) -> None:
    config, heads = manifest.decoder, manifest.draft_heads
    native, portable = NativeLinear(), PortableLinear()
    fork = ForkAttention(manifest.block_size, manifest.kv_dtype)
    graphs: list[tuple[str, Attention | DraftHeads, Linear]] = [
        (GRAPH_NAME, fork, native),
        (PORTABLE_GRAPH_NAME, TreeMaskAttention(), portable),
    ]
    if heads:
        graphs += [(HEADS_GRAPH_NAME, heads, native), (PORTABLE_HEADS_GRAPH_NAME, heads, portable)]
    for done, (name, content, linear) in enumerate(graphs):
        if progress:
            progress("graph", done, len(graphs))
        if isinstance(content, DraftHeads):
            model = build_heads(config, content, weights, linear)
        else:
            model = build_decoder(config, weights, content, linear, hidden_output=heads is not None)
        onnx.save(model, directory / name)
        onnx.checker.check_model(str(directory / name))
    if progress:
        progress("graph", len(graphs), len(graphs))


def _checkpoint_bytes(source: Checkpoint, weight: Weight) -> int:
    tensors = [source.tensors[name] for name in weight.sources]
    return sum(t.shape[0] * t.row_size * FLOAT_TYPES[t.dtype].itemsize for t in tensors)


def installed_version() -> str:
    try:
        return importlib.metadata.version("apar")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
