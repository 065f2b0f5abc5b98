"""Checkpoint to TensorRT engine directory, in TensorRT-LLM's layout with our manifest beside it.

    engine/
      manifest.json        ours (manifest.py); its `tensorrt` says for which TensorRT, GPU and steps the engine is
      config.json          TensorRT-LLM's: version, pretrained_config, build_config; and ours again as `apar`
      rank0.engine, ...    one compiled engine for each rank
      rank0_medusa.engine  Medusa heads, where the checkpoint has some
      apar_gpu.table       GPU kernels of ForkAttention for this model and GPU
      build.log            what TensorRT said
      tokenizer.json, ...

Built on the GPU that is to run it. Everything is made in a hidden sibling directory and takes the engine's name at
the end, as with every other engine.
"""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from apar.export.checkpoint import Checkpoint
from apar.export.checkpoint_hints import checkpoint_name
from apar.export.control_tokens import resolve_tokens
from apar.export.errors import AparError, BuildError
from apar.export.manifest import DraftHeads, Manifest, TensorRtEngine
from apar.export.onnx_engine import installed_version, longest_context
from apar.export.output_directory import OutputDirectory, sync
from apar.export.sharding import Shard
from apar.export.tensorrt_api import load_plugins, load_tensorrt, release
from apar.export.tensorrt_compile import BuildLog, compile_graph
from apar.export.tensorrt_graph import graph_bytes, heads_name, write_graph
from apar.export.tensorrt_profiles import DECODE, MIXED, head_ranges, ranges
from apar.export.tokenizer_files import read_tokenizer
from apar.export.trtllm_config import CONFIG_NAME, engine_config
from apar.export.typed_graph import KV_BINDINGS
from apar.plugins.cuda_driver import CudaDevice
from apar.plugins.gpu.sizes import BLOCK_SIZES, HEAD_DIMS

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
DTYPES = ("float16", "bfloat16")
LOG_NAME = "build.log"
KERNELS_NAME = "apar_gpu.table"
_SPARE_BYTES = 64 << 20
_LEAST_CAPABILITY = 8
_MAX_SLOTS = 2**31 - 1
_MAX_ELEMENTS = 2**31 - 1
"""Of one tensor: what all of TensorRT's arithmetic on dimensions is sure to bear."""


@dataclass(frozen=True, slots=True)
class TensorRtOptions:
    """How an engine is compiled. Sizes are those of one step."""

    dtype: str = "float16"
    block_size: int = 16
    max_rows: int = 64
    """Branches in one step."""
    max_tokens: int = 1024
    """Tokens in one step."""
    kv_fraction: float = 0.9
    """Part of the GPU's memory, free after the weights, for the KV pools."""
    kv_binding: str = "in-place"
    """See typed_graph.KV_BINDINGS."""
    tp_size: int = 1
    """Ranks that compute the model together."""
    workspace_bytes: int | None = None
    optimization_level: int | None = None
    timing_cache: Path | None = None
    graph_only: bool = False
    """Write the ONNX graphs and stop: needs neither TensorRT nor a GPU, and makes no engine."""
    device: int = 0

    def check(self) -> None:
        """Raise BuildError where an option is not possible."""
        for name, allowed in (("dtype", DTYPES), ("block_size", BLOCK_SIZES), ("kv_binding", KV_BINDINGS)):
            if getattr(self, name) not in allowed:
                raise BuildError(
                    f"{name} {getattr(self, name)!r} is not supported in a TensorRT engine; "
                    f"choose one of {', '.join(map(str, allowed))}"
                )
        if self.max_rows < 1 or self.tp_size < 1:
            raise BuildError("max_rows and tp_size must be at least 1")
        if self.max_tokens < 2 * self.max_rows:
            raise BuildError(
                f"max_tokens ({self.max_tokens}) must be at least twice max_rows ({self.max_rows}): "
                "a branch's first step has two tokens"
            )
        if not 0 < self.kv_fraction <= 1:
            raise BuildError(f"kv_fraction {self.kv_fraction} is not a part of the memory: give a number up to 1")


def build(
    checkpoint: Path,
    output: Path,
    options: TensorRtOptions | None = None,
    *,
    tokenizer: Path | None = None,
    fork_token: str | int | None = None,
    child_token: str | int | None = None,
    max_context: int | None = None,
    draft_heads: Path | str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Manifest | None:
    """Build the engine directory `output` from the checkpoint directory `checkpoint`.

    The checkpoint is one in the Hugging Face layout, or TensorRT-LLM's; `tokenizer` is the directory of the tokenizer
    where it is not in the checkpoint. `draft_heads` is a directory with Medusa heads; "none" leaves out those that ride
    with the checkpoint. Returns the manifest, or None for `graph_only`.

    Raises BuildError, CheckpointError, TokenizerError, and PluginError where TensorRT, its plugins, the GPU or its
    driver are missing. Whatever happens, `output` is afterwards either what it was or complete.
    """
    options = options or TensorRtOptions()
    options.check()
    checkpoint, output = Path(checkpoint), Path(output)
    source = Checkpoint.open(checkpoint, draft_heads)
    heads = source.heads.shape if source.heads else None
    if heads and options.tp_size > 1:
        if draft_heads is not None:
            raise BuildError("Medusa heads are built for one rank only; leave out draft_heads, or build with tp_size 1")
        logger.warning("engines of several ranks have no Medusa heads; those of %s are left out", checkpoint)
        heads = None
    files = read_tokenizer(tokenizer or checkpoint)
    decoder = replace(source.decoder, max_context=longest_context(source, max_context))
    if decoder.head_dim not in HEAD_DIMS:
        raise BuildError(
            f"the model's head_dim is {decoder.head_dim}, the GPU kernels have {', '.join(map(str, HEAD_DIMS))}; "
            "build it for another executor (without --format tensorrt)"
        )
    if options.max_tokens * decoder.vocab_size > _MAX_ELEMENTS:
        raise BuildError(
            f"the logits of {options.max_tokens} tokens are more numbers than a tensor of TensorRT holds; give "
            f"max_tokens of at most {_MAX_ELEMENTS // decoder.vocab_size}"
        )
    manifest = Manifest(
        decoder=decoder,
        tokens=resolve_tokens(source.config, files, fork_token, child_token),
        block_size=options.block_size,
        dtype=options.dtype,
        kv_dtype=options.dtype,
        draft_heads=heads,
        source=checkpoint_name(checkpoint),
        apar_version=installed_version(),
    )
    shards = [Shard(rank, options.tp_size) for rank in range(options.tp_size)]
    weight_bytes = [graph_bytes(source, options.dtype, shard, heads) for shard in shards]
    needed = sum(weight_bytes) + (0 if options.graph_only else max(weight_bytes)) + _SPARE_BYTES
    engine_id = secrets.randbelow(2**31)
    with OutputDirectory(output, overwrite=overwrite, needed_bytes=needed) as directory:
        if options.graph_only:
            for shard in shards:
                _graph(source, directory, options, engine_id, shard, heads, progress)
            sync(directory)
            return None
        facts = _compile(manifest, source, directory, options, engine_id, shards, max(weight_bytes), progress)
        files.write(directory)
        manifest = replace(manifest, tensorrt=facts)
        _write_config(directory, manifest)
        sync(directory)
        manifest = manifest.with_files(directory)
        manifest.save(directory)
        sync(directory)
    return manifest


def _graph(
    source: Checkpoint,
    directory: Path,
    options: TensorRtOptions,
    engine_id: int,
    shard: Shard,
    heads: DraftHeads | None,
    progress: Progress | None,
) -> Path:
    return write_graph(
        source,
        directory,
        dtype=options.dtype,
        block_size=options.block_size,
        kv_binding=options.kv_binding,
        engine_id=engine_id,
        shard=shard,
        heads=heads,
        progress=progress,
    )


def _compile(
    manifest: Manifest,
    source: Checkpoint,
    directory: Path,
    options: TensorRtOptions,
    engine_id: int,
    shards: list[Shard],
    weight_bytes: int,
    progress: Progress | None,
) -> TensorRtEngine:
    trt = load_tensorrt()
    load_plugins(trt)
    device = CudaDevice(options.device)
    if int(device.compute_capability.split(".")[0]) < _LEAST_CAPABILITY:
        raise BuildError(
            f"{device.name} has compute capability {device.compute_capability}, too old for the GPU kernels, which "
            f"need {_LEAST_CAPABILITY}.0 or later"
        )
    device.activate()
    try:
        block_bytes = manifest.decoder.kv_bytes_per_token(manifest.kv_dtype) * manifest.block_size // options.tp_size
        facts = TensorRtEngine(
            version=release(trt),
            compute_capability=device.compute_capability,
            device=device.name,
            max_rows=options.max_rows,
            max_tokens=options.max_tokens,
            max_blocks=_max_blocks(device.total_memory - weight_bytes, options, block_bytes, manifest),
            table_width=-(-manifest.decoder.max_context // manifest.block_size),
            max_copies=options.max_rows * manifest.block_size + options.max_tokens,
            kv_fraction=options.kv_fraction,
            kv_binding=options.kv_binding,
            engine_id=engine_id,
            tp_size=options.tp_size,
        )
        _pack_kernels(manifest, facts, directory / KERNELS_NAME)
        with (directory / LOG_NAME).open("w", encoding="utf-8", errors="replace") as file:
            log = BuildLog(trt, file)
            for shard in shards:
                graph = _graph(source, directory, options, engine_id, shard, manifest.draft_heads, progress)
                jobs = [(graph, f"rank{shard.rank}", [ranges(facts, DECODE), ranges(facts, MIXED)])]
                if manifest.draft_heads:
                    path = directory / heads_name(shard.rank)
                    jobs.append((path, path.stem, [head_ranges(facts)]))
                for path, name, profiles in jobs:
                    compile_graph(
                        trt,
                        path,
                        directory / f"{name}.engine",
                        profiles,
                        log=log,
                        workspace_bytes=options.workspace_bytes,
                        optimization_level=options.optimization_level,
                        timing_cache=options.timing_cache,
                        progress=progress,
                    )
                    path.unlink()
                graph.with_name(graph.name + ".data").unlink()
        return facts
    finally:
        device.close()


def _max_blocks(memory: int, options: TensorRtOptions, block_bytes: int, manifest: Manifest) -> int:
    blocks = int(options.kv_fraction * memory) // block_bytes
    if blocks < 1:
        raise BuildError(
            f"after the weights, {options.kv_fraction:.0%} of the GPU's memory holds no block of {block_bytes} bytes; "
            "use a larger GPU, or more ranks (--tp-size)"
        )
    decoder = manifest.decoder
    elements = 2 * max(1, decoder.num_kv_heads // options.tp_size) * options.block_size * decoder.head_dim
    most = _MAX_SLOTS if options.kv_binding == "bound" else _MAX_ELEMENTS // elements * options.block_size
    return min(blocks, most // options.block_size)


def _pack_kernels(manifest: Manifest, facts: TensorRtEngine, path: Path) -> None:
    """Compile the GPU kernels that this engine launches. Raises BuildError where the compiler is missing."""
    try:
        from apar.plugins.gpu.assembler import fit_driver, obstacle
        from apar.plugins.gpu.builds import Choice
        from apar.plugins.gpu.compiler import compile_build
        from apar.plugins.gpu.pack import Entry, write_table
    except ModuleNotFoundError as error:
        raise BuildError(
            f"the GPU kernels need the package {error.name} to be compiled; install it with: pip install triton"
        ) from error
    major, minor = (int(part) for part in facts.compute_capability.split("."))
    sm = 80 if major == 8 else 10 * major + minor
    choice = Choice([manifest.dtype], [manifest.decoder.head_dim], [manifest.block_size], checked=True)
    fit_driver()
    problem = obstacle(sm)
    if problem:
        raise BuildError(f"the GPU kernels cannot be compiled for this machine: {problem}")
    try:
        entries = [Entry.of(compile_build(build, sm)) for build in choice.builds()]
    except AparError:
        raise
    except Exception as error:  # a compiler that does not know the GPU fails in ways of its own
        raise BuildError(
            f"triton cannot compile the GPU kernels for compute capability {facts.compute_capability}: {error}; "
            "the newest may: pip install -U triton"
        ) from error
    path.write_bytes(write_table(entries))


def _write_config(directory: Path, manifest: Manifest) -> None:
    text = json.dumps(engine_config(manifest), indent=2) + "\n"
    (directory / CONFIG_NAME).write_text(text, encoding="utf-8")
