"""`apar bench foresight`: how far fork policies are from what could be done."""

from __future__ import annotations

import argparse
from typing import Any

from apar.export.errors import RequestError
from apar.runtime.cli.bench.progress import show_progress
from apar.runtime.cli.bench.replay import add_load_options, add_server_options, planned
from apar.runtime.cli.engine_options import add_service_level_options, scheduler_limits
from apar.runtime.cli.parser import Parser

DESCRIPTION = """\
Replay a load as `apar bench replay` does, under the fork policies `always` and `adaptive`, and under two schedules that
are told at arrival what no server can know: `adaptive` told which requests have most work, so that it turns those
away, and one that knows how long every answer gets. Beside them stands a bound: requests a second that no schedule
with the same forks can go beyond, since steps hold only so many rows and blocks and nobody ends sooner than alone.

The schedules are found by trying some parts of the requests to turn away; they show what can be had, not the optimum.
Those turned away are served late, and the run lasts until they have ended.
"""


def add_options(parser: Parser) -> None:
    """Options of this measurement."""
    add_load_options(parser)
    add_service_level_options(add_server_options(parser))
    parser.set_defaults(fork_policy="adaptive")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The result, as `--json` prints it."""
    from apar.runtime.bench.cost_model import load_cost_model
    from apar.runtime.bench.foresight import bench_foresight

    try:
        result = bench_foresight(
            planned(options),
            load_cost_model(options.cost_model),
            scheduler_limits(options),
            kv_blocks=options.kv_blocks,
            block_size=options.block_size,
            progress=None if options.quiet else show_progress,
        )
    except RequestError as error:
        options.parser.error(str(error))
    return result


def show(result: dict[str, Any]) -> None:
    """Print the result as tables."""
    from apar.runtime.bench.tables import show_foresight

    show_foresight(result)
