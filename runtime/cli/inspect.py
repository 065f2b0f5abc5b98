"""`apar inspect`: facts of an engine or a checkpoint, and how it would run on this machine."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from apar.export.errors import EngineError
from apar.export.manifest import MANIFEST_NAME, Manifest
from apar.runtime.cli.parser import Parser

DESCRIPTION = """\
Show what an engine holds: the model's shape and size, types, KV bytes, control tokens, files; and which executor,
graph and kernels would run it here, with the reason. Of a checkpoint, the same for what `apar build` would make of it
with default options; nothing is built. --verify reads every file of an engine and compares its checksum: a copy with
damaged bytes is found, which loading it would not tell.
"""
EPILOG = """\
examples:
  apar inspect ./engine
  apar inspect ./vicuna-7b-apar --json
  apar inspect ./engine --verify
"""


def make_parser() -> Parser:
    """Options of `apar inspect`."""
    parser = Parser(prog="apar inspect", description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument(
        "engine", metavar="ENGINE", help="an engine directory, a Hugging Face checkpoint directory, or `tiny`"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--verify", action="store_true", help="read all files of the engine and check their checksums")
    parser.add_debug()
    return parser


def run(options: argparse.Namespace) -> int:
    """Print the facts. Raises EngineError, CheckpointError, TokenizerError."""
    facts = inspect(options.engine, verify=options.verify)
    if options.json:
        print(json.dumps(facts, indent=2, ensure_ascii=False))
    else:
        _print_table(facts)
    return 0


def inspect(source: str, verify: bool = False) -> dict[str, Any]:
    """Facts of an engine directory, a checkpoint directory, or `tiny`, as JSON-like values.

    verify: also compare the checksum of every file; only engines have them.
    """
    from apar.export.checkpoint_hints import what_is_there
    from apar.export.tokenizer_files import read_tokenizer
    from apar.runtime.engine_source import named_directory

    directory = named_directory(source)
    is_engine = (directory / MANIFEST_NAME).is_file()
    if not is_engine and not (directory / "config.json").is_file():
        hint = what_is_there(directory)
        raise EngineError(
            f"{source} is neither an engine directory nor a checkpoint directory, nor the word `tiny`"
            + (f"; {hint}" if hint else "")
        )
    manifest = Manifest.load(directory) if is_engine else _planned(directory)
    if verify:
        _verify(directory, manifest, is_engine)
    strings = {token: text for text, token in read_tokenizer(directory).ids.items()}
    decoder, tokens = manifest.decoder, manifest.tokens
    shape = {k: v for k, v in dataclasses.asdict(decoder).items() if k not in ("rope_inv_freq", "max_context")}
    ids = {"fork": tokens.fork, "child": tokens.child, "bos": tokens.bos, "pad": tokens.pad}
    named = {name: {"id": i, "text": strings.get(i)} for name, i in ids.items() if i is not None}
    files = manifest.files or {p.name: p.stat().st_size for p in sorted(directory.iterdir()) if p.is_file()}
    return {
        "kind": "engine" if is_engine else "checkpoint",
        "directory": str(directory),
        "source": manifest.source,
        "format_version": manifest.format_version if is_engine else None,
        "abi_version": manifest.abi_version if is_engine else None,
        "apar_version": manifest.apar_version if is_engine else None,
        "parameters": parameters(manifest),
        "draft_heads": None if manifest.draft_heads is None else dataclasses.asdict(manifest.draft_heads),
        "model": shape,
        "max_context": decoder.max_context,
        "dtype": manifest.dtype,
        "quantize": manifest.quantize,
        "group_size": manifest.group_size,
        "zero_points": manifest.zero_points,
        "quantize_method": manifest.quantize_method,
        "block_size": manifest.block_size,
        "kv_dtype": manifest.kv_dtype,
        "kv_bytes_per_token": decoder.kv_bytes_per_token(manifest.kv_dtype),
        "kv_bytes_per_block": decoder.kv_bytes_per_token(manifest.kv_dtype) * manifest.block_size,
        "tokens": named | {"eos": [{"id": i, "text": strings.get(i)} for i in tokens.eos]},
        "files": files,
        "bytes": sum(files.values()),
        "verified": verify,
        "tensorrt": None if manifest.tensorrt is None else dataclasses.asdict(manifest.tensorrt),
        "runs_here": _runs_here(manifest) if manifest.tensorrt is None else _tensorrt_here(directory, manifest),
    }


def parameters(manifest: Manifest) -> int:
    """Numbers that the model learned; a tied matrix counts once."""
    from apar.export.weight_plan import weight_plan

    return sum(math.prod(weight.shape) for weight in weight_plan(manifest.decoder, packed=False))


def human_bytes(count: float) -> str:
    """A number of bytes for people, in powers of ten."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.1f} {unit}" if count < 10 and unit != "B" else f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def weights_text(manifest: Manifest) -> str:
    """How weights are stored, for people."""
    if manifest.quantize == "none":
        return manifest.dtype
    return quantized_text(dataclasses.asdict(manifest))


def quantized_text(facts: Mapping[str, Any]) -> str:
    """How quantised weights are stored, from a manifest's fields."""
    zeros = " with zero points" if facts["zero_points"] else ""
    method, size = facts["quantize_method"], facts["group_size"]
    scaled = f"in groups of {size}" if size else "by output channel"
    return f"{facts['quantize']} {scaled}{zeros} ({method}), the rest {facts['dtype']}"


def _planned(directory: Path) -> Manifest:
    """What `apar build` would write for a checkpoint, default options."""
    from apar.export.checkpoint import Checkpoint
    from apar.export.checkpoint_hints import checkpoint_name
    from apar.export.control_tokens import resolve_tokens
    from apar.export.onnx_engine import matrix_dtype, pool_dtype
    from apar.export.tokenizer_files import read_tokenizer

    checkpoint = Checkpoint.open(directory)
    tokens = resolve_tokens(checkpoint.config, read_tokenizer(directory), None, None)
    heads = checkpoint.heads.shape if checkpoint.heads else None
    dtype = matrix_dtype(checkpoint)
    return Manifest(
        checkpoint.decoder,
        tokens,
        block_size=16,
        dtype=dtype,
        kv_dtype=pool_dtype(dtype, "none"),
        draft_heads=heads,
        source=checkpoint_name(directory),
    )


def _verify(directory: Path, manifest: Manifest, is_engine: bool) -> None:
    if not is_engine:
        raise EngineError(f"{directory} is a checkpoint, which has no checksums; --verify is for engines")
    manifest.verify(directory)
    if manifest.tensorrt is None:
        from apar.export.engine_weights import read_weights

        read_weights(directory)  # compares the graphs with the manifest, which has no checksum itself


def _runs_here(manifest: Manifest) -> dict[str, Any]:
    import importlib.util

    from apar.runtime.bench.machine import cpu_model, kernel_isa
    from apar.runtime.executor.choice import choose
    from apar.runtime.executor.pool import pool_blocks
    from apar.runtime.executor.threads import default_threads

    if choose(manifest, {}) != "onnx":
        return _gpu_here(manifest)
    isa, reason = kernel_isa()
    kv_dtype = manifest.kv_dtype if isa else "float32"
    blocks = pool_blocks(manifest, kv_dtype, None, None)
    torch = importlib.util.find_spec("torch") is not None
    return {
        "executor": "onnx",
        "graph": "native" if isa else "portable",
        "isa": isa,
        "reason": reason,
        "cpu": cpu_model(),
        "threads": default_threads(),
        "kv_dtype": kv_dtype,
        "num_blocks": blocks,
        "pool_bytes": blocks * manifest.block_size * manifest.decoder.kv_bytes_per_token(kv_dtype),
        "other_executors": ["torch"] if torch else [],
    }


def _gpu_here(manifest: Manifest) -> dict[str, Any]:
    """A GPU runs the engine with the torch executor. How many blocks fit is known once the weights are there."""
    from apar.plugins.cuda_driver import CudaDevice
    from apar.runtime.bench.machine import cpu_model

    return {
        "executor": "torch",
        "graph": None,
        "isa": None,
        "reason": f"{CudaDevice().name} can run it",
        "cpu": cpu_model(),
        "threads": None,
        "kv_dtype": manifest.dtype if manifest.dtype != "float32" else "bfloat16",
        "num_blocks": None,
        "pool_bytes": None,
        "other_executors": ["onnx"],
    }


def _tensorrt_here(directory: Path, manifest: Manifest) -> dict[str, Any]:
    """Whether a TensorRT engine can run here, as `apar doctor` finds it."""
    from apar.runtime.bench.machine import cpu_model
    from apar.runtime.doctor import examine, healthy

    facts = manifest.tensorrt
    assert facts is not None
    findings = examine(directory)
    missing = [f"{finding.name}: {finding.text}" for finding in findings if finding.needed and not finding.ok]
    return {
        "executor": "tensorrt" if healthy(findings) else None,
        "reason": "; ".join(missing) or "all that the engine needs is here",
        "cpu": cpu_model(),
        "kv_dtype": manifest.kv_dtype,
        "num_blocks": facts.max_blocks,
        "pool_bytes": facts.max_blocks * manifest.block_size * manifest.decoder.kv_bytes_per_token(manifest.kv_dtype),
        "other_executors": [],
    }


def _print_table(facts: dict[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=box.SIMPLE, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _lines(facts):
        table.add_row(name, escape(value))
    console = Console(highlight=False)
    if not console.is_terminal:  # a file or a pipe has no right edge to fold paths at
        console.width = max(console.width, console.measure(table, options=console.options.update(width=10_000)).maximum)
    console.print(table)


def _lines(facts: dict[str, Any]) -> list[tuple[str, str]]:
    model, here, tokens = facts["model"], facts["runs_here"], facts["tokens"]
    heads, kv_heads = model["num_heads"], model["num_kv_heads"]
    kind = f"{facts['kind']}, built from {facts['source']}" if facts["kind"] == "engine" else "checkpoint (not built)"
    if facts["apar_version"]:
        kind += f" by apar {facts['apar_version']} (format {facts['format_version']}, ABI {facts['abi_version']})"
    weights = facts["dtype"]
    if facts["quantize"] != "none":
        weights = quantized_text(facts)
    extra = [n.replace("_", " ") for n in ("attention_bias", "mlp_bias", "tie_word_embeddings") if model[n]]
    compiled = facts["tensorrt"]
    if here["executor"] == "torch":
        runs = "torch executor, on the GPU"
    elif compiled is None:
        graph = here["graph"] + (f" graph, {here['isa']} kernels" if here["isa"] else " graph")
        runs = f"{here['executor']} executor, {graph}, {here['threads']} threads"
    else:
        runs = "tensorrt executor" if here["executor"] else "no"
    lines = [
        ("directory", facts["directory"]),
        ("kind", kind),
        ("parameters", f"{facts['parameters']:,}"),
        ("layers", f"{model['num_layers']} of {model['hidden_size']}, feed-forward {model['intermediate_size']}"),
        (
            "heads",
            f"{heads} of {model['head_dim']}" + (f", {kv_heads} for keys and values" if kv_heads != heads else ""),
        ),
        ("vocabulary", f"{model['vocab_size']:,}"),
        *([("also", ", ".join(extra))] if extra else []),
        *([("draft heads", _heads_text(facts["draft_heads"]))] if facts["draft_heads"] else []),
        ("context", f"{facts['max_context']:,} tokens"),
        ("weights", weights),
        (
            "keys and values",
            f"{facts['kv_dtype']}, {facts['kv_bytes_per_token']:,} bytes a token, "
            f"{facts['kv_bytes_per_block']:,} a block of {facts['block_size']}",
        ),
        ("[Fork], [Child]", ", ".join(_token(tokens[name]) for name in ("fork", "child"))),
        ("begin, end", ", ".join(_token(t) for t in [*([tokens["bos"]] if "bos" in tokens else []), *tokens["eos"]])),
        ("size", human_bytes(facts["bytes"]) + (", checksums are right" if facts["verified"] else "")),
        ("files", "\n".join(f"{human_bytes(size):>7}  {name}" for name, size in facts["files"].items())),
        *([("compiled for", _compiled_text(compiled))] if compiled else []),
        ("runs here", runs),
        ("because", here["reason"]),
        ("processor", here["cpu"]),
        ("KV pool", _pool_text(here, "at most" if compiled else "by default")),
    ]
    if compiled is None:
        lines.append(("other executors", ", ".join(here["other_executors"]) or "none (torch is not installed)"))
    return lines


def _pool_text(here: Mapping[str, Any], how: str) -> str:
    if here["num_blocks"] is None:
        return f"what the weights leave of the GPU's memory ({here['kv_dtype']})"
    return f"{here['num_blocks']:,} blocks {how}, up to {human_bytes(here['pool_bytes'])} ({here['kv_dtype']})"


def _compiled_text(facts: dict[str, Any]) -> str:
    return (
        f"TensorRT {facts['version']} on {facts['device']} (compute capability {facts['compute_capability']}), "
        f"{facts['max_rows']} rows, {facts['max_tokens']} tokens a step, GPUs: {facts['tp_size']}"
    )


def _heads_text(heads: dict[str, Any]) -> str:
    last = "the model's own lm_head" if heads["tied_lm_head"] else "an lm_head each"
    return f"{heads['count']} Medusa heads of {heads['blocks']} blocks and {last}"


def _token(token: dict[str, Any]) -> str:
    return f"{token['text']} = {token['id']}"
