"""`apar bench drafts`: the draft budget's rule against drafts of fixed size."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from apar.export.errors import RequestError
from apar.runtime.cli.bench.generate import prompts_file
from apar.runtime.cli.bench.progress import show_progress
from apar.runtime.cli.draft_options import add_draft_sizes, draft_options
from apar.runtime.cli.engine_options import add_engine_options, executor_options, find_engine, scheduler_limits
from apar.runtime.cli.parser import Parser, whole

DESCRIPTION = """\
Answer prompts greedily with drafts (docs/speculation.md) whose sizes follow the budget's rule, and with drafts of fixed
size, at several numbers of requests in flight. Printed are tokens a step, tokens a pass over the weights on a machine
whose steps are bound by memory up to --bound tokens, the share of draft tokens accepted, and seconds here.
"""


def add_options(parser: Parser) -> None:
    """Options of this measurement."""
    add_engine_options(parser)
    group = parser.add_argument_group("what is measured")
    group.add_argument("--draft", choices=("medusa", "ngram"), default="medusa", help="what guesses (default: medusa)")
    add_draft_sizes(group)
    group.add_argument(
        "--bound", type=whole(1), metavar="N", help="tokens that a step may have at no cost (default: the executor's)"
    )
    group.add_argument(
        "--in-flight", type=whole(1), nargs="+", default=[1, 4, 16], metavar="N", help="requests at a time"
    )
    group.add_argument("--prompts", type=Path, metavar="FILE", help="as for `apar bench generate`")
    group.add_argument("--limit", type=whole(1), metavar="N", help="only the first N prompts")
    group.add_argument("--max-tokens", type=whole(1), default=400, metavar="N", help="tokens of a reply at most")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The result, as `--json` prints it."""
    from apar.runtime.cli.prompts import read_prompts

    try:
        limits = scheduler_limits(options, prefix_caching=False)
        draft = draft_options(options)
        prompts = read_prompts(prompts_file(options))[: options.limit]
    except RequestError as error:
        options.parser.error(str(error))
    directory = find_engine(options.engine, quiet=options.quiet)

    from apar.runtime.bench.drafts import measure_drafts
    from apar.runtime.executor import load_executor
    from apar.runtime.tokenizer import Tokenizer

    executor = load_executor(directory, options.executor, **executor_options(options))
    given: list[Any] = [entry.prompt for entry in prompts]
    try:
        return measure_drafts(
            executor,
            Tokenizer.load(directory),
            given,
            draft,
            bound=options.bound,
            concurrencies=options.in_flight,
            max_tokens=options.max_tokens,
            limits=limits,
            progress=None if options.quiet else show_progress,
        )
    finally:
        executor.close()


def show(result: dict[str, Any]) -> None:
    """Print the result as a table."""
    from apar.runtime.bench.tables import show_drafts

    show_drafts(result)
