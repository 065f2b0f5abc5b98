"""`apar bench`: measurements, printed as tables or JSON."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from apar.export.errors import RequestError
from apar.runtime.cli.engine_options import add_engine_options, executor_options, find_engine, scheduler_limits
from apar.runtime.cli.parser import Parser, whole

DESCRIPTION = """\
Measure an engine or the runtime. `apar bench WHAT --help` says what is measured and how.

  generate   an engine on its prompts, without and with branches: steps, time, KV blocks, share of the memory bandwidth
  host       the runtime's own cost a step, without any model
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


def make_parser() -> Parser:
    """Options of `apar bench`."""
    parser = Parser(prog="apar bench", description=DESCRIPTION)
    kinds = parser.add_subparsers(dest="bench", metavar="WHAT", required=True)
    _add_generate(kinds.add_parser("generate", description=GENERATE, help="an engine on its prompts"))
    _add_host(kinds.add_parser("host", description=HOST, help="the runtime's own cost a step"))
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


def _add_common(parser: Parser, measure: Any, show: Any) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object, with a description of the machine")
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


def _show_generate(result: dict[str, Any]) -> None:
    from apar.runtime.bench.tables import show_generate

    show_generate(result)


def _show_host(result: dict[str, Any]) -> None:
    from apar.runtime.bench.tables import show_host

    show_host(result)
