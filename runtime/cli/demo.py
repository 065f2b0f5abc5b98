"""`apar demo`: the whole service in one command: build the tiny engine, serve it, ask it over gRPC, shut it down."""

from __future__ import annotations

import argparse
import dataclasses
import signal
import sys
from typing import NoReturn

from apar.export.errors import RequestError, ServingError
from apar.runtime.cli.engine_options import find_engine
from apar.runtime.cli.parser import Parser, seconds
from apar.runtime.cli.sampling_options import add_sampling_options, sampling_params
from apar.runtime.cli.serve import server_for

QUESTION = "Give me four facts about owls."
DESCRIPTION = """\
Build the tiny engine that ships with apar, serve it with NVIDIA's Triton server, ask it over gRPC with NVIDIA's client,
draw the branches as they are decoded, and shut everything down. What an installation can do, in one command.
"""
EPILOG = """\
examples:
  apar demo
  apar demo "Give me five tips for growing tomatoes." --no-fork
  apar demo "Tell me about the violin." --events | jq .
"""


def make_parser() -> Parser:
    """Options of `apar demo`."""
    parser = Parser(prog="apar demo", usage="apar demo [PROMPT ...] [options]", description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument("prompts", metavar="PROMPT", nargs="*", help=f"what to ask (default: {QUESTION})")
    add_sampling_options(parser)
    group = parser.add_argument_group("output")
    group.add_argument("--events", action="store_true", help="JSON lines: every branch event as it comes")
    group.add_argument(
        "--view",
        choices=("auto", "live", "plain"),
        default="auto",
        help="draw branches live, or print the text; auto draws where standard output and error are a terminal",
    )
    group.add_argument(
        "--pace",
        type=seconds,
        metavar="SECONDS",
        help="least time of a step on the screen (default: 0.08 where it is live)",
    )
    group.add_argument("-q", "--quiet", action="store_true", help="answers only")
    parser.add_argument("--tritonserver", metavar="PATH", help="as for `apar serve`")
    parser.add_argument("--install-server", action="store_true", help="as for `apar serve`")
    parser.add_debug()
    return parser


def run(options: argparse.Namespace) -> int:
    """Returns 0 where the answers came and the service ended in order."""
    prompts = options.prompts or [QUESTION]
    try:
        params = sampling_params(options)
    except RequestError as error:
        options.parser.error(str(error))
    if params.bad_words_ids:
        options.parser.error("--bad-words-ids is not for a served model; give the words: --bad-words TEXT")
    _require_packages()
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _leave)

    from apar.runtime.serving.grpc_view import show_answers
    from apar.runtime.serving.model_inputs import model_inputs
    from apar.runtime.serving.own_service import OPEN_TRITON, own_service

    names = [field.name for field in dataclasses.fields(params) if hasattr(options, field.name)]
    inputs = {**model_inputs(params, names), "branch_events": True}
    server_for(options)
    find_engine("tiny", quiet=options.quiet)
    live = options.view == "live" or (options.view == "auto" and sys.stdout.isatty() and sys.stderr.isatty())
    form = "events" if options.events else "live" if live else "text"
    pace = options.pace if options.pace is not None else 0.08 if form == "live" else 0.0
    more = ["--tritonserver", options.tritonserver] if options.tritonserver else []
    with own_service("tiny", *OPEN_TRITON, *more, debug=options.debug, quiet=options.quiet) as urls:
        if not options.quiet:
            for name in ("openai", "triton_grpc", "triton_http"):
                print(f"apar: {name.replace('_', ' ')}: {urls[name]}", file=sys.stderr)
        show_answers(
            urls["triton_grpc"], [(prompt, {**inputs, "text_input": prompt}) for prompt in prompts], form, pace
        )
    if not options.quiet:
        print("apar: the service has ended", file=sys.stderr)
    return 0


def _leave(number: int, frame: object) -> NoReturn:
    # As an exception, so that the service is ended on the way out.
    sys.exit(128 + number)


def _require_packages() -> None:
    try:
        import tritonclient.grpc  # noqa: F401
    except ModuleNotFoundError as error:
        raise ServingError(
            f"the demo needs the package {error.name}; install apar with its extra: pip install 'apar[serve]'"
        ) from None
