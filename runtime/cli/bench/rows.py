"""`apar bench rows`: how a step's time grows with its rows."""

from __future__ import annotations

import argparse
from typing import Any

from apar.export.errors import RequestError
from apar.runtime.cli.bench.progress import show_progress
from apar.runtime.cli.bench.shape_options import add_shape_options, chosen_shape, find_shape
from apar.runtime.cli.engine_options import executor_options
from apar.runtime.cli.parser import Parser, whole

DESCRIPTION = """\
Time decode steps of 1 to 64 rows on one engine: milliseconds a step, the ratio to the fewest rows, weights read a
second and their share of the memory bandwidth, which is measured in the same process, in turn with the steps.

A step reads every weight once, so branches are nearly free as long as the ratio stays near 1.
"""
MOST_ROWS = 64


def add_options(parser: Parser) -> None:
    """Options of this measurement."""
    add_shape_options(parser)
    group = parser.add_argument_group("what is measured")
    group.add_argument("--rows", default="1,2,4,8", metavar="N,N", help=f"rows of a step, up to {MOST_ROWS}")
    group.add_argument(
        "--context", type=whole(1, 1024), default=128, metavar="N", help="tokens behind each row; rows share none"
    )
    group.add_argument("--steps", type=whole(1), default=10, metavar="N", help="steps of each number in a round")
    group.add_argument("--rounds", type=whole(1), default=7, metavar="N", help="rounds; the median round counts")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The result, as `--json` prints it."""
    from apar.export.manifest import Manifest
    from apar.runtime.bench.rows import bench_rows, blocks_needed
    from apar.runtime.executor import load_executor

    try:
        rows = row_counts(options.rows)
    except RequestError as error:
        options.parser.error(str(error))
    engine = find_shape(options)
    options.num_blocks = blocks_needed(max(rows), options.context, Manifest.load(engine).block_size)
    executor = load_executor(engine, "onnx", **executor_options(options))
    try:
        result = bench_rows(
            executor,
            rows,
            context=options.context,
            steps=options.steps,
            rounds=options.rounds,
            threads=options.threads,
            progress=None if options.quiet else show_progress,
        )
    finally:
        executor.close()
    result["settings"] = chosen_shape(options) | result["settings"]
    return result


def row_counts(text: str) -> list[int]:
    """Numbers of rows, each once and ascending. Raises RequestError."""
    try:
        rows = sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise RequestError(f"--rows {text!r} is not a list of whole numbers such as 1,2,4,8") from None
    if rows[0] < 1 or rows[-1] > MOST_ROWS:
        raise RequestError(f"--rows {text!r} has numbers that are not between 1 and {MOST_ROWS}")
    return rows


def show(result: dict[str, Any]) -> None:
    """Print the result as a table."""
    from rich.console import Console
    from rich.markup import escape

    from apar.runtime.bench.tables import machine_line, new_table

    console = Console(highlight=False)
    console.print(escape(result["engine"]["detail"]))
    table = new_table(f"decode steps, {result['settings']['context']} tokens behind each row")
    for name in ("rows", "ms a step", "ratio", "tokens/s", "GB/s", "% of bandwidth"):
        table.add_column(name, justify="right")
    for row in result["rows"]:
        table.add_row(
            str(row["rows"]),
            f"{row['ms_per_step']:.2f}",
            f"{row['ratio_to_fewest_rows']:.2f}",
            f"{row['tokens_per_second']:.1f}",
            f"{row['gb_per_second']:.1f}",
            f"{row['percent_of_bandwidth']:.0f}",
        )
    console.print(table)
    bandwidth = result["bandwidth"]
    console.print(
        f"A step reads {bandwidth['weight_bytes_per_step'] / 1e6:,.0f} MB of weights; {result['settings']['threads']} "
        f"threads read {bandwidth['read_bytes_per_second'] / 1e9:.1f} GB/s at best in this run, "
        f"{bandwidth['slowest_read_bytes_per_second'] / 1e9:.1f} at worst."
    )
    console.print(machine_line(result["machine"]))
