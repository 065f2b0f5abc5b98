"""`apar bench`: measurements, printed as tables or JSON."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from apar.export.errors import RequestError
from apar.runtime.cli.engine_options import (
    DEFAULT_ROWS,
    DEFAULT_STEP_TOKENS,
    add_engine_options,
    executor_options,
    find_engine,
    scheduler_limits,
)
from apar.runtime.cli.parser import Parser, positive, whole

DESCRIPTION = """\
Measure an engine or the runtime. `apar bench WHAT --help` says what is measured and how.

  generate   an engine on its prompts, without and with branches: steps, time, KV blocks, share of the memory bandwidth
  host       the runtime's own cost a step, without any model
  replay     scheduling under load: recorded answers on a virtual clock, without any model
"""
GENERATE = """\
Answer prompts greedily without and with branches, alternating, and compare steps, tokens, time and KV blocks: over all
replies and over those that forked. Medians over repeats; prefix caching is off. A model that may not fork says less, so
gains compare the reply with branches to the same reply decoded plainly: a step a token, at the pace of a plain step
measured in the same run. The time of a step is given for each
number of live rows, with the percentage of the memory bandwidth bound: the bytes of weights that every step reads,
divided by the read bandwidth measured in the same run, on as many threads (each takes the maximum of its part of an
array several times larger than the caches; the best pass counts). A model that fits the caches may exceed 100 %.
"""
HOST = """\
Replay recorded trees of branches in place of a model, so that only the runtime works: `schedule` (choose rows, take
blocks, build the step's inputs), `sample`, and `commit` (book tokens, forks and ends). Host cost is schedule + commit.
"""
REPLAY = """\
Replay recorded answers through the engine, the scheduler and the KV books, without and with branches, at any load. No
model runs and nothing is timed: a step lasts as long as a cost model says (the larger of bytes moved / memory bandwidth
and operations / compute rate, plus an overhead), requests arrive in that time, and the same options give the same
numbers on any machine. So this compares ways to schedule; it does not measure a GPU.

With --fork never the details come inline, so the text is the same. Throughput and steps count text tokens, without
[Fork], [Child] and ends; step_reduction is text tokens / steps in which their request sampled. Goodput counts requests
that got their first token and their end within the limits below.
"""


def make_parser() -> Parser:
    """Options of `apar bench`."""
    parser = Parser(prog="apar bench", description=DESCRIPTION)
    kinds = parser.add_subparsers(dest="bench", metavar="WHAT", required=True)
    _add_generate(kinds.add_parser("generate", description=GENERATE, help="an engine on its prompts"))
    _add_host(kinds.add_parser("host", description=HOST, help="the runtime's own cost a step"))
    _add_replay(kinds.add_parser("replay", description=REPLAY, help="scheduling under load, on a virtual clock"))
    return parser


def run(options: argparse.Namespace) -> int:
    """Measure and print."""
    result: dict[str, Any] = options.measure(options)
    if options.json:
        print(json.dumps(result, indent=2, ensure_ascii=False))
    else:
        options.show(result)
    return 0


def _add_generate(parser: Parser) -> None:
    add_engine_options(parser)
    group = parser.add_argument_group("what is measured")
    group.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="prompts, as for `apar generate --file` (default: heldout.json beside the checkpoint, as `tiny` has it)",
    )
    group.add_argument("--limit", type=whole(1), metavar="N", help="only the first N prompts")
    group.add_argument("--repeat", type=whole(1), default=3, metavar="N", help="times that each prompt is run each way")
    group.add_argument("--concurrency", type=whole(1), default=1, metavar="N", help="requests in flight")
    group.add_argument("--max-tokens", type=whole(1), default=512, metavar="N", help="tokens of a reply at most")
    group.add_argument(
        "--max-branches", type=whole(1), default=32, metavar="N", help="live branches of a reply at most"
    )
    group.add_argument("--max-depth", type=whole(1), default=2, metavar="N", help="deepest branch")
    _add_common(parser, _measure_generate, _show_generate)


def _add_host(parser: Parser) -> None:
    parser.add_argument("--rows", type=whole(1, 4096), default=64, metavar="N", help="live branches in every step")
    parser.add_argument("--steps", type=whole(1, 100_000), default=200, metavar="N", help="steps that are measured")
    parser.add_argument(
        "--vocab-size",
        type=whole(8, 1 << 20),
        default=64,
        metavar="N",
        help="logits of a row: what the sampler goes through; 32002 is APAR's own",
    )
    _add_common(parser, _measure_host, _show_host)


def _add_replay(parser: Parser) -> None:
    load = parser.add_argument_group("load")
    load.add_argument(
        "--trees",
        default="vicuna-7b",
        metavar="FILE",
        help='recorded answers, [{"prompt_tokens": N, "segments": [[main_tokens, detail_tokens], ...]}, ...], or the '
        "name of a shipped workload",
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
    load.add_argument(
        "--fork", choices=["always", "never"], default="always", help="whether details become branches or come inline"
    )
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
    level = parser.add_argument_group("what counts as goodput")
    level.add_argument(
        "--slo-first-token", type=positive, default=0.5, metavar="SECONDS", help="from arrival to the first token"
    )
    level.add_argument(
        "--slo-latency",
        type=positive,
        default=2.5,
        metavar="FACTOR",
        help="from arrival to the end, as a multiple of what the request takes alone and without forks",
    )
    _add_common(parser, _measure_replay, _show_replay, machine=False)


def _add_common(parser: Parser, measure: Any, show: Any, machine: bool = True) -> None:
    described = ", with a description of the machine" if machine else ""
    parser.add_argument("--json", action="store_true", help=f"print one JSON object{described}")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress")
    parser.add_debug()
    parser.set_defaults(measure=measure, show=show, parser=parser)


def _measure_generate(options: argparse.Namespace) -> dict[str, Any]:
    from apar.runtime.cli.prompts import read_prompts

    try:
        limits = scheduler_limits(options, prefix_caching=False)
        prompts = read_prompts(_prompts_file(options))[: options.limit]
    except RequestError as error:
        options.parser.error(str(error))
    directory = find_engine(options.engine, quiet=options.quiet)

    from apar.runtime.bench.generate import GenerateBench
    from apar.runtime.executor import load_executor
    from apar.runtime.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(directory)
    executor = load_executor(directory, options.executor, **executor_options(options))
    params = {name: getattr(options, name) for name in ("max_tokens", "max_branches", "max_depth")}
    bench = GenerateBench(executor, tokenizer, params, options.threads, limits)
    try:
        named: list[Any] = [(entry.name or str(i), entry.prompt) for i, entry in enumerate(prompts)]
        return bench.run(named, options.repeat, options.concurrency, None if options.quiet else _progress)
    finally:
        bench.close()


def _prompts_file(options: argparse.Namespace) -> Path:
    if options.prompts is not None:
        return Path(options.prompts)
    from apar.runtime.engine_source import TINY, tiny_checkpoint

    source = Path(options.engine)
    folder = tiny_checkpoint() if options.engine == TINY and not source.exists() else source
    path = folder / "heldout.json"
    if not path.is_file():
        raise RequestError(f"{options.engine} has no prompts of its own (heldout.json); give some with --prompts FILE")
    return path


def _progress(done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{done}/{total}" + ("\n" if done == total else ""), end="", file=sys.stderr, flush=True)


def _measure_host(options: argparse.Namespace) -> dict[str, Any]:
    from apar.runtime.bench.host import bench_host

    return bench_host(options.rows, options.steps, options.vocab_size)


def _measure_replay(options: argparse.Namespace) -> dict[str, Any]:
    from apar.runtime.bench.cost_model import load_cost_model
    from apar.runtime.bench.replay import ReplayBench, ServiceLevel
    from apar.runtime.bench.workload import plan_workload

    names = ("requests", "requests_per_second", "concurrency", "seed")
    try:
        limits = scheduler_limits(options)
        model = load_cost_model(options.cost_model)
        workload = plan_workload(options.trees, **{name: getattr(options, name) for name in names})
        bench = ReplayBench(
            workload,
            model,
            fork=options.fork,
            kv_blocks=options.kv_blocks,
            block_size=options.block_size,
            limits=limits,
            service_level=ServiceLevel(options.slo_first_token, options.slo_latency),
        )
    except RequestError as error:
        options.parser.error(str(error))
    return bench.run(None if options.quiet else _progress)


def _show_generate(result: dict[str, Any]) -> None:
    from apar.runtime.bench.tables import show_generate

    show_generate(result)


def _show_host(result: dict[str, Any]) -> None:
    from apar.runtime.bench.tables import show_host

    show_host(result)


def _show_replay(result: dict[str, Any]) -> None:
    from apar.runtime.bench.tables import show_replay

    show_replay(result)
