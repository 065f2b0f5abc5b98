"""`apar bench host`: the runtime's own cost a step."""

from __future__ import annotations

import argparse
from typing import Any

from apar.runtime.cli.parser import Parser, whole

DESCRIPTION = """\
Replay recorded trees of branches in place of a model, so that only the runtime works: `schedule` (choose rows, take
blocks, build the step's inputs), `sample`, and `commit` (book tokens, forks and ends). Host cost is schedule + commit.
"""


def add_options(parser: Parser) -> None:
    """Options of this measurement."""
    parser.add_argument("--rows", type=whole(1, 4096), default=64, metavar="N", help="live branches in every step")
    parser.add_argument("--steps", type=whole(1, 100_000), default=200, metavar="N", help="steps that are measured")
    parser.add_argument(
        "--vocab-size",
        type=whole(8, 1 << 20),
        default=64,
        metavar="N",
        help="logits of a row: what the sampler goes through; 32002 is APAR's own",
    )
    parser.add_argument(
        "--fork-policy", choices=("always", "adaptive"), default="always", help="whose cost is measured"
    )


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The result, as `--json` prints it."""
    from apar.runtime.bench.host import bench_host

    return bench_host(options.rows, options.steps, options.vocab_size, options.fork_policy)


def show(result: dict[str, Any]) -> None:
    """Print the result as tables."""
    from apar.runtime.bench.tables import show_host

    show_host(result)
