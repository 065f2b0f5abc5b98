"""`apar bench peers`: the same shape on other engines."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from apar.export.errors import RequestError
from apar.runtime.bench.peers import MODULES
from apar.runtime.cli.bench.progress import show_progress
from apar.runtime.cli.bench.shape_options import add_shape_choice
from apar.runtime.cli.parser import Parser, whole

DESCRIPTION = """\
Run a shape with random weights on APAR and on other engines, at the same bits and the same number of threads, and
compare milliseconds a step at several numbers of rows. Rows are separate sequences; peers take turns within one run,
so that what disturbs the machine disturbs all of them.

Peers: apar; onnxruntime (the same graph with ONNX Runtime's own matrix kernels: MatMulNBits, or Gemm); llama.cpp
(llama-cpp-python: Q4_0, Q8_0, BF16, F32); openvino; transformers (float formats only). Those that are not installed are
named; they may live in another environment (--peer-python). All models are in memory at once.
"""


def add_options(parser: Parser) -> None:
    """Options of this measurement."""
    add_shape_choice(parser)
    parser.add_argument("--rows", default="1,2,4,8", metavar="N,N", help="sequences in a step")
    parser.add_argument(
        "--context", type=whole(1, 1024), default=128, metavar="N", help="tokens behind each row's first step"
    )
    parser.add_argument("--steps", type=whole(1, 256), default=8, metavar="N", help="steps of a peer's turn")
    parser.add_argument("--rounds", type=whole(1), default=5, metavar="N", help="turns of each peer")
    parser.add_argument("--threads", type=whole(1), metavar="N", help="of each peer (default: physical cores)")
    parser.add_argument("--peers", default=",".join(MODULES), metavar="NAME,NAME", help="which of them")
    parser.add_argument(
        "--peer-python",
        default=sys.executable,
        metavar="PYTHON",
        help="the Python that has the other engines' packages (default: the one that runs apar)",
    )


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The result, as `--json` prints it."""
    from apar.runtime.bench.compare_peers import compare_peers

    try:
        rows, names = _rows(options.rows), _names(options.peers)
    except RequestError as error:
        options.parser.error(str(error))
    return compare_peers(
        options.shape,
        options.format,
        names=names,
        rows=rows,
        context=options.context,
        steps=options.steps,
        rounds=options.rounds,
        layers=options.layers,
        threads=options.threads,
        python=options.peer_python,
        progress=None if options.quiet else show_progress,
    )


def show(result: dict[str, Any]) -> None:
    """Print the result as a table."""
    from rich.console import Console
    from rich.markup import escape

    from apar.runtime.bench.tables import machine_line, new_table

    console = Console(highlight=False)
    chosen = result["settings"]
    table = new_table(f"{chosen['shape']} {chosen['format']}, context {chosen['context']}: ms a step (and over apar's)")
    table.add_column("rows", justify="right")
    for peer in result["peers"]:
        table.add_column(peer["peer"], justify="right")
    counts = [row["rows"] for row in result["peers"][0]["rows"]] if result["peers"] else []
    for i, count in enumerate(counts):
        cells = []
        for peer in result["peers"]:
            over = result["against_apar"].get(peer["peer"], {}).get(str(count))
            cells.append(f"{peer['rows'][i]['ms_per_step']:.2f}" + (f" ({over:.2f}x)" if over is not None else ""))
        table.add_row(str(count), *cells)
    growth = [f"{peer['rows'][-1]['ratio_to_fewest_rows']:.2f}x" for peer in result["peers"]]
    table.add_row("growth", *growth)
    console.print(table)
    for peer in result["peers"]:
        console.print(escape(f"{peer['peer']}: {peer['detail']}"))
    for reason in result["missing"].values():
        console.print(escape(f"not measured: {reason}"))
    console.print(machine_line(result["machine"]))


def _rows(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.isascii() and part.isdigit() and 1 <= int(part) <= 64 for part in parts):
        raise RequestError(f"--rows {text}: give numbers from 1 to 64, with commas")
    return sorted({int(part) for part in parts})


def _names(text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in MODULES]
    if unknown:
        raise RequestError(f"--peers {text}: there is no {', '.join(unknown)}; peers are {', '.join(MODULES)}")
    return list(dict.fromkeys(names))
