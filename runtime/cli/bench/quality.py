"""`apar bench quality`: what quantisation costs in quality."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apar.export.errors import RequestError
from apar.runtime.cli.bench.progress import show_progress
from apar.runtime.cli.bench.shape_options import SHAPES
from apar.runtime.cli.parser import Parser, whole

if TYPE_CHECKING:
    from rich.table import Table

DESCRIPTION = """\
Build a checkpoint in float32 and quantised in several ways, and compare. The float32 engine answers the prompts,
greedily and with forks; each other engine reads prompts and answers through its own kernels (KL divergence,
perplexity, same likeliest token) and answers the prompts itself (same trees of branches, same answers to the last
token).

With --shape instead of a checkpoint: errors of single projections of that size, on random weights and made-up inputs.
That compares methods at sizes for which no checkpoint is at hand; it does not say what a real model loses.
"""
WIDTH = 120


def add_options(parser: Parser) -> None:
    """Options of this measurement."""
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", nargs="?", default="tiny", help="a checkpoint directory, or `tiny`"
    )
    parser.add_argument("--shape", choices=SHAPES, help="projections of this shape instead")
    parser.add_argument(
        "--format", choices=("int4", "int8", "all"), default="all", help="which quantisations are compared"
    )
    parser.add_argument(
        "--group-sizes", default="32,64,128", metavar="N,N", help="which group sizes: 16, 32, 64, 128 or 256"
    )
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="prompts, as for `apar generate --file` (default: heldout.json of the checkpoint, as `tiny` has it)",
    )
    parser.add_argument("--limit", type=whole(1), metavar="N", help="only the first N prompts")
    parser.add_argument("--max-tokens", type=whole(1), default=512, metavar="N", help="tokens of a reply at most")
    parser.add_argument(
        "--calibration", type=Path, metavar="FILE", help="calibration text of gptq, as for `apar build`"
    )
    parser.add_argument(
        "--calibration-tokens", type=whole(1), default=8192, metavar="N", help="use at most N tokens of it"
    )
    parser.add_argument("--threads", type=whole(1), metavar="N", help="threads of a step (default: physical cores)")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The result, as `--json` prints it."""
    from apar.runtime.bench.quality import QualityBench, variants
    from apar.runtime.calibration import CalibrationText
    from apar.runtime.engine_source import named_directory

    formats = ("int8", "int4") if options.format == "all" else (options.format,)
    progress = None if options.quiet else show_progress
    try:
        chosen = variants(formats, _group_sizes(options.group_sizes))
        if options.shape is not None:
            from apar.runtime.bench.layer_error import bench_layers

            return bench_layers(options.shape, chosen, tokens=options.calibration_tokens, progress=progress)
        checkpoint = named_directory(options.checkpoint)
        prompts = _prompts(options, checkpoint)
        calibration = CalibrationText(options.calibration, options.calibration_tokens)
    except RequestError as error:
        options.parser.error(str(error))
    threads = {} if options.threads is None else {"threads": options.threads}
    bench = QualityBench(checkpoint, prompts, calibration, options.max_tokens, "onnx", **threads)
    return bench.run(chosen, progress)


def show(result: dict[str, Any]) -> None:
    """Print the result as a table."""
    from rich.console import Console

    from apar.runtime.bench.tables import machine_line

    console = Console(highlight=False)
    console.width = max(console.width, WIDTH)  # more columns than a pipe is given
    if "layers" in result:
        console.print(_layers(result))
    else:
        console.print(_engines(result))
        console.print("KL in thousandths of a nat a token; perplexity of the float32 engine's answers")
    console.print(machine_line(result["machine"]))


def _engines(result: dict[str, Any]) -> Table:
    from apar.runtime.bench.tables import new_table

    tokens = result["tokens"]
    table = new_table(
        f"{result['checkpoint']}: {result['prompts']} prompts ({tokens['prompts']:,d} tokens), answers of "
        f"{tokens['answers']:,d} tokens and {result['forks']} forks; gptq calibrated with {result['calibration']}"
    )
    table.add_column("weights")
    names = ("group", "zeros", "bits", "MB", "KL prompts", "KL answers", "perplexity", "same trees", "same answers")
    for name in names:
        table.add_column(name, justify="right")
    for row in result["engines"]:
        plain = row["quantize"] == "none"
        table.add_row(
            "float32" if plain else f"{row['quantize']} {row['method']}",
            str(row["group_size"] or ""),
            "yes" if row["zero_points"] else "",
            f"{row['bits']:.2f}",
            f"{row['weight_bytes'] / 1e6:.2f}",
            f"{row['prompts']['kl_millinats']:.2f}",
            f"{row['answers']['kl_millinats']:.3f}",
            f"{row['answers']['perplexity']:.5f}",
            str(row["same_trees"]),
            str(row["same_answers"]),
        )
    return table


def _layers(result: dict[str, Any]) -> Table:
    from apar.runtime.bench.tables import new_table

    table = new_table(f"{result['shape']}: error of outputs, random weights, {result['tokens']:,d} made-up inputs")
    for name in ("projection", "inputs", "weights", "group", "zeros", "bits", "error %", "on other inputs %"):
        table.add_column(name, justify="left" if name in ("projection", "weights") else "right")
    for row in result["layers"]:
        table.add_row(
            row["projection"],
            f"{row['columns']:,d}",
            f"{row['quantize']} {row['method']}",
            str(row["group_size"]),
            "yes" if row["zero_points"] else "",
            f"{row['bits']:.2f}",
            f"{row['error_percent']:.2f}",
            f"{row['error_percent_other_tokens']:.2f}",
        )
    return table


def _group_sizes(text: str) -> list[int]:
    from apar.export.quantize import GROUP_SIZES

    parts = text.split(",")
    if not all(part.isascii() and part.isdigit() and int(part) in GROUP_SIZES for part in parts):
        raise RequestError(f"--group-sizes {text}: give sizes out of {', '.join(map(str, GROUP_SIZES))}, with commas")
    return [int(part) for part in parts]


def _prompts(options: argparse.Namespace, checkpoint: Path) -> list[Any]:
    from apar.runtime.cli.prompts import read_prompts

    path = options.prompts or checkpoint / "heldout.json"
    if options.prompts is None and not path.is_file():
        raise RequestError(f"{checkpoint} has no prompts of its own (heldout.json); give some with --prompts FILE")
    return [entry.prompt for entry in read_prompts(path)][: options.limit]
