"""`apar bench weights`: what the GPU executor's weight formats cost in quality."""

from __future__ import annotations

import argparse
from typing import Any

from apar.export.errors import ExecutorError, RequestError
from apar.runtime.cli.bench.progress import show_progress
from apar.runtime.cli.parser import Parser, whole

DESCRIPTION = """\
Compare the weight formats of the torch executor on a GPU (bf16, fp16, int8, fp8) on an engine's prompts, without a
GPU: weights are rounded as the GPU stores them, arithmetic is float32. bf16 answers the prompts, greedily and with
forks; the others read prompts and answers (KL divergence, perplexity) and answer the prompts themselves.
"""
WIDTH = 110


def add_options(parser: Parser) -> None:
    """Options of this measurement."""
    parser.add_argument("engine", metavar="ENGINE", nargs="?", default="tiny", help="an engine directory, or `tiny`")
    parser.add_argument(
        "--prompts", metavar="FILE", help="as for `apar generate --file` (default: tiny's heldout.json)"
    )
    parser.add_argument("--limit", type=whole(1), metavar="N", help="only the first N prompts")
    parser.add_argument("--max-tokens", type=whole(1), default=512, metavar="N", help="tokens of a reply at most")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The result, as `--json` prints it."""
    from pathlib import Path

    try:
        from apar.runtime.bench.gpu.rounded import compare_formats
    except ModuleNotFoundError as error:
        raise ExecutorError(
            f"the GPU's weight formats need the package {error.name}; install it with: pip install 'apar[gpu]'"
        ) from error
    from apar.runtime.cli.engine_options import find_engine
    from apar.runtime.cli.prompts import read_prompts
    from apar.runtime.engine_source import tiny_checkpoint

    path = Path(options.prompts) if options.prompts else tiny_checkpoint() / "heldout.json"
    try:
        prompts: list[Any] = [entry.prompt for entry in read_prompts(path)][: options.limit]
    except RequestError as error:
        options.parser.error(str(error))
    progress = None if options.quiet else show_progress
    return compare_formats(find_engine(options.engine, options.quiet), prompts, options.max_tokens, progress)


def show(result: dict[str, Any]) -> None:
    """Print the result as a table."""
    from rich.console import Console

    from apar.runtime.bench.tables import machine_line, new_table

    console = Console(highlight=False)
    console.width = max(console.width, WIDTH)  # more columns than a pipe is given
    tokens = result["tokens"]
    table = new_table(
        f"{result['engine']}: {result['prompts']} prompts ({tokens['prompts']:,d} tokens), bf16's answers of "
        f"{tokens['answers']:,d} tokens"
    )
    table.add_column("weights")
    for name in ("MB", "KL prompts", "KL answers", "PPL prompts", "PPL answers", "same trees", "same answers"):
        table.add_column(name, justify="right")
    for row in result["formats"]:
        table.add_row(
            row["weights"],
            f"{row['matrix_bytes'] / 1e6:.2f}",
            f"{row['prompts']['kl_millinats']:.3f}",
            f"{row['answers']['kl_millinats']:.4f}",
            f"{row['prompts']['perplexity']:.3f}",
            f"{row['answers']['perplexity']:.5f}",
            str(row["same_trees"]),
            str(row["same_answers"]),
        )
    console.print(table)
    console.print(
        "KL in thousandths of a nat a token, against bf16; PPL: perplexity of the prompts and of bf16's answers"
    )
    console.print(machine_line(result["machine"]))
