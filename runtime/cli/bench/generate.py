"""`apar bench generate`: an engine on its prompts."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from apar.export.errors import RequestError
from apar.runtime.cli.bench.progress import show_progress
from apar.runtime.cli.draft_options import add_draft_sizes, draft_options
from apar.runtime.cli.engine_options import add_engine_options, executor_options, find_engine, scheduler_limits
from apar.runtime.cli.parser import Parser, whole

DESCRIPTION = """\
Answer prompts greedily without and with branches, and both with drafts (docs/speculation.md), alternating, and compare
steps, tokens, time and KV blocks: over all replies and over those that forked. Drafts fill their budget in every step,
which gives the same steps on every machine; "measured" are those that go by measured time, as in service (not with
--draft-budget). Medians over repeats; prefix caching is off. A model that may not fork says less, so gains compare the
reply with branches to the same reply decoded plainly: a step a token, at the pace of a plain step measured in the same
run. The time of a step is given for each number of live rows, with the percentage of the memory bandwidth bound: the
bytes of weights that every step reads, divided by the read bandwidth measured in the same run, on as many threads
(each takes the maximum of its part of an array several times larger than the caches; the best pass counts). A model
that fits the caches may exceed 100 %.
"""


def add_options(parser: Parser) -> None:
    """Options of this measurement."""
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
    group.add_argument(
        "--drafts",
        choices=("auto", "none", "ngram", "medusa"),
        default="auto",
        help="also run with drafts: Medusa heads where the engine has some and prompt lookup (auto), one, or none",
    )
    add_draft_sizes(group)
    group.add_argument("--max-depth", type=whole(1), default=2, metavar="N", help="deepest branch")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The result, as `--json` prints it."""
    from apar.runtime.cli.prompts import read_prompts

    try:
        limits = scheduler_limits(options, prefix_caching=False)
        prompts = read_prompts(prompts_file(options))[: options.limit]
    except RequestError as error:
        options.parser.error(str(error))
    directory = find_engine(options.engine, quiet=options.quiet)

    from apar.runtime.bench.generate import GenerateBench
    from apar.runtime.executor import load_executor
    from apar.runtime.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(directory)
    executor = load_executor(directory, options.executor, **executor_options(options))
    methods = {"auto": ("medusa", "ngram"), "none": ()}.get(options.drafts, (options.drafts,))
    if options.drafts == "auto" and executor.manifest.draft_heads is None:
        methods = ("ngram",)
    drafts = {method: draft_options(options, method) for method in methods}
    params = {name: getattr(options, name) for name in ("max_tokens", "max_branches", "max_depth")}
    bench = GenerateBench(executor, tokenizer, params, options.threads, limits, drafts)
    try:
        named: list[Any] = [(entry.name or str(i), entry.prompt) for i, entry in enumerate(prompts)]
        return bench.run(named, options.repeat, options.concurrency, None if options.quiet else show_progress)
    finally:
        bench.close()


def show(result: dict[str, Any]) -> None:
    """Print the result as tables."""
    from apar.runtime.bench.tables import show_generate

    show_generate(result)


def prompts_file(options: argparse.Namespace) -> Path:
    """The file of prompts: the one given, or the engine's own. Raises RequestError where there is none."""
    if options.prompts is not None:
        return Path(options.prompts)
    from apar.runtime.engine_source import named_directory

    path = named_directory(options.engine) / "heldout.json"
    if not path.is_file():
        raise RequestError(f"{options.engine} has no prompts of its own (heldout.json); give some with --prompts FILE")
    return path
