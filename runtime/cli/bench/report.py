"""`apar bench report`: measurements as one page with charts."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from apar.export.errors import RequestError
from apar.runtime.cli.parser import Parser

DESCRIPTION = """\
Write one self-contained page with tables and charts: steps by branch, tokens a second by rows, KV blocks over time with
forks and without. It is made of what other measurements printed with --json, and of one live answer of an engine,
which stands in front. Charts need matplotlib: pip install 'apar[report]'.
"""


def add_options(parser: Parser) -> None:
    """Options of this measurement."""
    parser.add_argument(
        "results", metavar="RESULT.json", nargs="*", type=Path, help="what `apar bench ... --json` printed, in order"
    )
    parser.add_argument(
        "-o", "--output", metavar="FILE", type=Path, required=True, help="the page: FILE.html or FILE.md"
    )
    parser.add_argument(
        "--engine",
        default="tiny",
        metavar="ENGINE",
        help="an engine or checkpoint that gives the live answer, or `none`",
    )
    parser.add_argument("--question", metavar="TEXT", help="what it is asked (default: a question for `tiny`)")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """What was written, as `--json` prints it."""
    from apar.runtime.bench.report import FORMATS, read_result, write_report

    try:
        if options.output.suffix not in FORMATS:
            raise RequestError(f"{options.output}: a report is {' or '.join(FORMATS)}, by the file's ending")
        results = [read_result(path) for path in options.results]
        if options.engine == "none" and not results:
            raise RequestError("there is nothing to report; give results, or an engine")
    except RequestError as error:
        options.parser.error(str(error))
    if options.engine != "none":
        from apar.runtime.bench.live_example import QUESTION, live_example
        from apar.runtime.cli.engine_options import find_engine

        engine = find_engine(options.engine, quiet=options.quiet)
        results.insert(0, live_example(engine, options.question or QUESTION))
    write_report(options.output, results)
    kinds = [str(result.get("bench", "rows")) for result in results]
    return {"bench": "report", "output": str(options.output), "sections": kinds, "bytes": options.output.stat().st_size}


def show(result: dict[str, Any]) -> None:
    """Say what was written."""
    print(f"{result['output']}: {len(result['sections'])} sections, {result['bytes'] / 1e3:.0f} kB")
