"""`apar bench replay`: scheduling under load, on a virtual clock."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from apar.export.errors import RequestError
from apar.runtime.cli.bench.progress import show_progress
from apar.runtime.cli.engine_options import (
    DEFAULT_ROWS,
    DEFAULT_STEP_TOKENS,
    add_policy_options,
    scheduler_limits,
)
from apar.runtime.cli.parser import Parser, positive, whole

if TYPE_CHECKING:
    from apar.runtime.bench.workload import Workload

DESCRIPTION = """\
Replay recorded answers through the engine, the scheduler and the KV books, without and with branches, at any load. No
model runs and nothing is timed: a step lasts as long as a cost model says (the larger of bytes moved / memory bandwidth
and operations / compute rate, plus an overhead), requests arrive in that time, and the same options give the same
numbers on any machine. So this compares ways to schedule; it does not measure a GPU.

With --fork-policy never the details come inline, so the text is the same. Throughput and steps count text tokens,
without [Fork], [Child] and ends; step_reduction is text tokens / steps in which their request sampled. Goodput counts
requests that got their first token and their end within the service level.
"""


def add_options(parser: Parser) -> None:
    """Options of this measurement."""
    load, server = add_load_options(parser), add_server_options(parser)
    load.add_argument(
        "--same-prompts",
        action="store_true",
        help="an answer that is given again was asked for with the same prompt, as in conversations about one text; "
        "otherwise the prefix cache finds nothing of one prompt in another",
    )
    server.add_argument(
        "--host-blocks",
        type=whole(0),
        default=0,
        metavar="N",
        help="blocks of host memory that keep what is evicted from the pool, at the host_bytes_per_second of the cost "
        "model (default: 0, what is missing is computed again)",
    )
    add_policy_options(server)


def add_load_options(parser: Parser) -> argparse._ArgumentGroup:
    """What is replayed, and when; see `planned`."""
    load = parser.add_argument_group("load")
    load.add_argument(
        "--trees",
        default="vicuna-7b",
        metavar="FILE",
        help='recorded answers, [{"prompt_tokens": N, "segments": [[main_tokens, detail_tokens], ...]}, ...], or what '
        "`apar generate --json` printed, or the name of a shipped workload",
    )
    arrival = load.add_mutually_exclusive_group()
    arrival.add_argument(
        "--requests-per-second", type=positive, metavar="X", help="mean rate at which requests arrive (Poisson)"
    )
    arrival.add_argument(
        "--concurrency", type=whole(1), metavar="N", help="requests in flight; one comes when another ends (default: 1)"
    )
    load.add_argument(
        "--requests",
        type=whole(1),
        metavar="N",
        help="how many, over the answers again and again (default: each once, but four times --concurrency at least)",
    )
    load.add_argument("--seed", type=whole(0), default=0, metavar="S", help="of the order and the arrivals")
    return load


def add_server_options(parser: Parser) -> argparse._ArgumentGroup:
    """Sizes, and what a step costs."""
    server = parser.add_argument_group("server")
    server.add_argument(
        "--kv-blocks", type=whole(1), metavar="B", help="blocks in the KV pool (default: what the cost model says fits)"
    )
    server.add_argument("--block-size", type=whole(1, 1024), default=16, metavar="N", help="tokens in a block")
    server.add_argument(
        "--max-rows", type=whole(1), default=DEFAULT_ROWS, metavar="N", help="branches in one step, over all requests"
    )
    server.add_argument(
        "--max-step-tokens",
        type=whole(2),
        metavar="N",
        help=f"tokens in one step (default: {DEFAULT_STEP_TOKENS}, or twice --max-rows where that is more)",
    )
    server.add_argument(
        "--cost-model",
        default="7b-h200",
        metavar="NAME|FILE",
        help="what a step costs: 7b-h200 (Llama 7B in bfloat16 on one H200), or a JSON object with any of its fields, "
        "which are in the output of --json",
    )
    return server


def planned(options: argparse.Namespace) -> Workload:
    """The workload that the load options ask for. Raises what `plan_workload` does."""
    from apar.runtime.bench.workload import plan_workload

    names = ("requests", "requests_per_second", "concurrency", "seed")
    return plan_workload(options.trees, **{name: getattr(options, name) for name in names})


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The result, as `--json` prints it."""
    from apar.runtime.bench.cost_model import load_cost_model
    from apar.runtime.bench.replay import ReplayBench

    try:
        limits = scheduler_limits(options)
        model = load_cost_model(options.cost_model)
        bench = ReplayBench(
            planned(options),
            model,
            kv_blocks=options.kv_blocks,
            block_size=options.block_size,
            host_blocks=options.host_blocks,
            same_prompts=options.same_prompts,
            limits=limits,
        )
    except RequestError as error:
        options.parser.error(str(error))
    return bench.run(None if options.quiet else show_progress)


def show(result: dict[str, Any]) -> None:
    """Print the result as tables."""
    from apar.runtime.bench.tables import show_replay

    show_replay(result)
