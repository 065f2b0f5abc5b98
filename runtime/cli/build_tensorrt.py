"""`apar build --format tensorrt` and `--format trtllm`: their options, and what they do."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from apar.export.errors import PluginError, RequestError
from apar.runtime.cli.parser import Parser, positive, whole
from apar.runtime.cli.progress import BuildProgress

FORMATS = ("onnx", "tensorrt", "trtllm")
_TENSORRT = (
    "max_rows", "max_tokens", "kv_fraction", "kv_binding", "workspace_mb", "optimization_level", "timing_cache",
    "graph_only", "device",
)  # fmt: skip
_SHARDED = ("tp_size",)
_ONNX = ("quantize", "group_size", "quantize_method", "zero_points", "calibration", "kv_dtype")
_ENGINE = ("block_size", "max_context", "fork_token", "child_token", "overwrite")


def add_tensorrt_options(parser: Parser) -> None:
    """Options of the formats beside onnx; each is None where it was not given."""
    group = parser.add_argument_group("--format tensorrt (build it on the GPU that is to run it; docs/tensorrt.md)")
    group.add_argument("--max-rows", type=whole(1), metavar="N", help="branches in one step (default: 64)")
    group.add_argument(
        "--max-tokens", type=whole(2), metavar="N", help="tokens in one step, at least twice --max-rows (default: 1024)"
    )
    group.add_argument(
        "--kv-fraction",
        type=positive,
        metavar="X",
        help="part of the GPU's memory, free after the weights, for keys and values (default: 0.9)",
    )
    group.add_argument(
        "--kv-binding",
        choices=("in-place", "aliased", "bound"),
        help="how the plugin gets at the KV pools; choose bound where loading says that TensorRT copies them "
        "(default: in-place)",
    )
    group.add_argument(
        "--tp-size",
        type=whole(1),
        metavar="N",
        help="also of trtllm: GPUs that compute the model together (default: 1)",
    )
    group.add_argument(
        "--workspace-mb", type=whole(1), metavar="MB", help="most scratch memory that a layer may ask for"
    )
    group.add_argument(
        "--optimization-level",
        type=whole(0, 5),
        metavar="N",
        help="TensorRT's 0 to 5; higher builds longer (default: 3)",
    )
    group.add_argument(
        "--timing-cache",
        type=Path,
        metavar="FILE",
        help="measurements of earlier builds, used and added to (default: one in the cache directory for each TensorRT "
        "and kind of GPU)",
    )
    group.add_argument(
        "--graph-only",
        action="store_const",
        const=True,
        help="write the ONNX graphs for TensorRT and stop; needs neither TensorRT nor a GPU",
    )
    group.add_argument("--device", type=whole(0), metavar="N", help="number of the GPU (default: 0)")


def check_format(options: argparse.Namespace, defaults: dict[str, Any]) -> None:
    """Raise RequestError where an option was given that the format does not have.

    `defaults` are the values of options that were not given.
    """
    wrong = {
        "onnx": (*_TENSORRT, *_SHARDED),
        "tensorrt": _ONNX,
        "trtllm": (*_TENSORRT, *_ONNX, *_ENGINE, "tokenizer"),
    }[options.format]
    for name in wrong:
        if getattr(options, name) != defaults.get(name):
            raise RequestError(f"--{name.replace('_', '-')} is not for --format {options.format}")


def build_tensorrt(options: argparse.Namespace) -> int:
    """Compile an engine, or write its graphs, and say what came out."""
    from apar.export.tensorrt_engine import TensorRtOptions, build
    from apar.runtime.cli.build import summary

    given = {name: getattr(options, name) for name in (*_TENSORRT, *_SHARDED, "dtype", "block_size")}
    workspace = given.pop("workspace_mb")
    settings = {name: value for name, value in given.items() if value is not None}
    if workspace is not None:
        settings["workspace_bytes"] = workspace << 20
    if not options.graph_only:
        settings.setdefault("timing_cache", _timing_cache(options.device or 0))
    began = time.monotonic()
    with BuildProgress(sys.stderr, "", quiet=options.quiet) as progress:
        manifest = build(
            options.checkpoint,
            options.output,
            TensorRtOptions(**settings),
            tokenizer=options.tokenizer,
            fork_token=options.fork_token,
            child_token=options.child_token,
            max_context=options.max_context,
            draft_heads=options.draft_heads,
            overwrite=options.overwrite,
            progress=progress,
        )
    if not options.quiet:
        seconds = time.monotonic() - began
        text = f"{options.output}: ONNX graphs for TensorRT in {seconds:.1f} s (docs/tensorrt.md says what takes them)"
        print(summary(options.output, manifest, seconds) if manifest else text, file=sys.stderr)
    return 0


def build_trtllm(options: argparse.Namespace) -> int:
    """Write a TensorRT-LLM checkpoint and say so."""
    from apar.export.trtllm_writer import write_trtllm

    began = time.monotonic()
    with BuildProgress(sys.stderr, "", quiet=options.quiet) as progress:
        write_trtllm(
            options.checkpoint,
            options.output,
            dtype=options.dtype or "float16",
            tp_size=options.tp_size or 1,
            draft_heads=options.draft_heads,
            progress=progress,
        )
    if not options.quiet:
        print(
            f"{options.output}: TensorRT-LLM checkpoint in {time.monotonic() - began:.1f} s\n"
            f"  next: trtllm-build --checkpoint_dir {options.output} --output_dir ENGINE (TensorRT-LLM 1.0 to 1.2.1)",
            file=sys.stderr,
        )
    return 0


def _timing_cache(device: int) -> Path | None:
    """One file for each TensorRT and kind of GPU; None where either is missing, which the build will say."""
    from apar.export.tensorrt_api import load_tensorrt, release
    from apar.plugins.cuda_driver import CudaDevice
    from apar.runtime.engine_source import cache_directory

    try:
        gpu = CudaDevice(device)
        kind = "".join(c if c.isalnum() else "-" for c in f"{gpu.name} {gpu.compute_capability}")
        return cache_directory() / f"tensorrt-{release(load_tensorrt())}-{kind}.timing"
    except PluginError:
        return None
