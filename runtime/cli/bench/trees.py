"""`apar bench trees`: recorded answers on a real engine, with and without forks."""

from __future__ import annotations

import argparse
from typing import Any

from apar.export.errors import RequestError
from apar.runtime.cli.bench.progress import show_progress
from apar.runtime.cli.bench.shape_options import add_shape_options, chosen_shape, find_shape
from apar.runtime.cli.engine_options import executor_options
from apar.runtime.cli.parser import Parser, whole

DESCRIPTION = """\
Decode recorded answers on a real engine, once with every detail inline and once with branches. The engine computes each
step in full, but the tokens are those of the recorded answer, so that random weights of any shape serve, and both
ways write the same text. The question is how much of the saved steps is saved time: wall_gain / step_gain.

One request at a time, greedy, prefix caching off; both ways alternate. Times include prompts, scheduling and sampling.
"""


def add_options(parser: Parser) -> None:
    """Options of this measurement."""
    add_shape_options(parser)
    group = parser.add_argument_group("what is measured")
    group.add_argument(
        "--trees",
        default="vicuna-7b",
        metavar="FILE",
        help="recorded answers, as for `apar bench replay` (default: Vicuna-7B's 80 answers to Vicuna Bench)",
    )
    group.add_argument("--limit", type=whole(1), metavar="N", help="only N answers, spread evenly over the file")
    group.add_argument("--repeat", type=whole(1), default=1, metavar="N", help="times that each is decoded each way")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The result, as `--json` prints it."""
    from apar.runtime.bench.trees import TreesBench
    from apar.runtime.bench.workload import plan_workload
    from apar.runtime.executor import load_executor

    workload = plan_workload(options.trees)
    executor = load_executor(find_shape(options), "onnx", **executor_options(options))
    try:
        bench = TreesBench(executor, workload, options.limit, options.threads)
    except RequestError as error:
        executor.close()
        options.parser.error(str(error))
    try:
        result = bench.run(options.repeat, None if options.quiet else show_progress)
    finally:
        bench.close()
    result["settings"] = chosen_shape(options) | result["settings"]
    return result


def show(result: dict[str, Any]) -> None:
    """Print the result as tables."""
    from rich.console import Console
    from rich.markup import escape

    from apar.runtime.bench.tables import machine_line, new_table, show_steps

    console = Console(highlight=False)
    console.print(escape(result["engine"]["detail"]))
    for key, title in (("all", "all answers"), ("forked", "answers that fork")):
        part = result[key]
        if part is None:
            console.print(f"{title}: none")
            continue
        table = new_table(f"{title} ({part['answers']}, {part['text_tokens']:,d} text tokens)")
        for name in ("", "plain", "forked", "gain"):
            table.add_column(name, justify="right" if name else "left")
        plain, forked = part["plain"], part["forked"]
        for name, field, form, gain in (
            ("steps", "steps", ",d", f"{part['step_gain']:.2f}x"),
            ("seconds", "seconds", ".2f", f"{part['wall_gain']:.2f}x"),
            ("ms a step", "ms_per_step", ".2f", ""),
            ("text tokens a second", "tokens_per_second", ".1f", ""),
            ("peak KV blocks, mean", "mean_peak_kv_blocks", ".1f", ""),
        ):
            table.add_row(name, format(plain[field], form), format(forked[field], form), gain)
        table.add_row("gain in time / in steps", "", "", f"{part['wall_gain_per_step_gain']:.2f}")
        console.print(table)
    show_steps(result, console)
    console.print(machine_line(result["machine"]))
