"""`apar bench serve`: a service under load."""

from __future__ import annotations

import argparse
import asyncio
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from apar.export.errors import RequestError
from apar.runtime.cli.bench.progress import show_progress
from apar.runtime.cli.engine_options import (
    add_engine_options,
    engine_arguments,
    executor_options,
    find_engine,
    scheduler_limits,
)
from apar.runtime.cli.parser import Parser, whole

DESCRIPTION = """\
Ask a service for streamed answers, greedily, with several numbers of requests in flight, with forks and without:
throughput, time to first token, time between two pieces of an answer. With ENGINE the service is started for the
measurement, on this machine, and the same requests go through the runtime alone (AsyncLLM in this process) in turn
with it: the difference is what serving costs for each token. With --url any running service is measured.
"""


def add_options(parser: Parser) -> None:
    """Options of this measurement."""
    add_engine_options(parser, required=False)
    group = parser.add_argument_group("what is measured")
    group.add_argument("--url", metavar="URL", help="a running service instead, such as http://127.0.0.1:8000/v1")
    group.add_argument("--model-name", metavar="NAME", help="its model (default: the first that it names)")
    group.add_argument("--api-key", metavar="KEY", help="its key (default: $APAR_API_KEY)")
    group.add_argument(
        "--prompts", type=Path, metavar="FILE", help="as for `apar generate --file` (default: those of `tiny`)"
    )
    group.add_argument("--limit", type=whole(1), metavar="N", help="only the first N prompts")
    group.add_argument(
        "--streams",
        type=whole(1),
        nargs="+",
        default=[1, 8, 32],
        metavar="N",
        help="requests in flight",
    )
    group.add_argument("--requests", type=whole(1), default=64, metavar="N", help="requests for each line of the table")
    group.add_argument("--max-tokens", type=whole(1), default=256, metavar="N", help="tokens of an answer at most")
    group.add_argument("--repeat", type=whole(1), default=1, metavar="N", help="times that each line is measured")
    group.add_argument("--tritonserver", metavar="PATH", help="as for `apar serve`")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The result, as `--json` prints it."""
    if (options.engine is None) == (options.url is None):
        options.parser.error("give an ENGINE, or the --url of a running service")

    from apar.runtime.bench.machine import describe_machine
    from apar.runtime.bench.serve import Load
    from apar.runtime.cli.prompts import read_prompts
    from apar.runtime.cli.serve import require_packages
    from apar.runtime.engine_source import tiny_checkpoint

    require_packages()
    try:
        limits = scheduler_limits(options)
        entries = read_prompts(options.prompts or tiny_checkpoint() / "heldout.json")[: options.limit]
    except RequestError as error:
        options.parser.error(str(error))
    prompts: list[Any] = [entry.prompt for entry in entries]
    load = Load(prompts, options.streams, options.requests, options.max_tokens, options.repeat)
    with ExitStack() as stack:
        records = asyncio.run(_measure(options, load, limits, stack))
    return {
        "bench": "serve",
        "target": options.engine or options.url,
        "settings": {name: getattr(load, name) for name in ("streams", "requests", "max_tokens", "repeat")},
        "records": records,
        "machine": describe_machine(),
    }


async def _measure(options: argparse.Namespace, load: Any, limits: Any, stack: ExitStack) -> list[dict[str, Any]]:
    from apar.runtime.async_llm import AsyncLLM
    from apar.runtime.bench.serve import measure
    from apar.runtime.serving.own_service import own_service

    progress = None if options.quiet else show_progress
    key = options.api_key or os.environ.get("APAR_API_KEY")
    if options.url is not None:
        url = options.url.rstrip("/")
        return await measure(load, url, options.model_name or await _first_model(url, key), key, None, progress)
    directory = find_engine(options.engine, quiet=options.quiet)
    more = ["--tritonserver", options.tritonserver] if options.tritonserver else []
    arguments = [*engine_arguments(options), "--max-requests", str(max(load.streams) + 1), *more]
    urls = stack.enter_context(own_service(str(directory), *arguments, debug=options.debug, quiet=options.quiet))
    async with AsyncLLM(directory, executor=options.executor, limits=limits, **executor_options(options)) as llm:
        return await measure(load, urls["openai"], urls["model"], key, llm, progress)


async def _first_model(url: str, key: str | None) -> str:
    import aiohttp

    from apar.export.errors import ServingError

    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        async with aiohttp.ClientSession(headers=headers) as session, session.get(f"{url}/models") as response:
            return str((await response.json())["data"][0]["id"])
    except (aiohttp.ClientError, OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise ServingError(f"{url}/models names no model ({error}); check the URL and the key") from error


def show(result: dict[str, Any]) -> None:
    """Print the result as a table."""
    from apar.runtime.bench.tables import show_serve

    show_serve(result)
