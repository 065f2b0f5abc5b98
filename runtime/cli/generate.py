"""`apar generate`: answer prompts, with the branches live on a terminal."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from apar.export.errors import RequestError
from apar.runtime.cli.draft_options import add_draft_options, draft_options
from apar.runtime.cli.engine_options import add_engine_options, executor_options, find_engine, scheduler_limits
from apar.runtime.cli.parser import Parser, seconds
from apar.runtime.cli.prompts import PromptEntry, gather_prompts
from apar.runtime.cli.sampling_options import add_sampling_options, sampling_params

if TYPE_CHECKING:
    from apar.runtime.answer import Answer
    from apar.runtime.cli.answer_output import AnswerOutput
    from apar.runtime.cli.interrupt import Interrupt
    from apar.runtime.sampling_params import SamplingParams
    from apar.runtime.text_engine import TextEngine

DESCRIPTION = """\
Answer prompts. On a terminal the branches are drawn live while they decode, then the answer is printed with one line
of figures. Elsewhere standard output gets the answer's text alone, in reading order, as soon as it is certain; notices
go to standard error. Several prompts decode together.
"""
EPILOG = """\
examples:
  apar generate tiny "How do I grow tomatoes?"
  apar generate ./engine "Plan a week in Rome." --max-tokens 800 --temperature 0.7 --seed 1
  apar generate ./engine "Plan a week in Rome." --draft medusa      # the same answer in fewer steps
  apar generate ./engine "Plan a week in Rome." --no-fork          # the same model without branches, to compare
  apar generate ./engine "first question" "second question"        # decoded together
  cat question.txt | apar generate ./engine
  apar generate ./engine --file prompts.jsonl --json > answers.jsonl
  apar generate ./engine "Name three rivers." --events | jq .

--json prints one object a prompt, in order: `text`, `branches` (with their parents, segments and tokens), `usage`,
`timing`, `seed` and more. --events prints one object a line as decoding goes on: `fork`, `delta` and `finish` with the
branch's id, parent and depth, and a `result` at the end of each answer.
"""


def make_parser() -> Parser:
    """Options of `apar generate`."""
    parser = Parser(
        prog="apar generate",
        usage="apar generate ENGINE [PROMPT ...] [options]",
        description=DESCRIPTION,
        epilog=EPILOG,
    )
    add_engine_options(parser)
    parser.add_argument(
        "prompts", metavar="PROMPT", nargs="*", help="what to answer; `-` or nothing reads standard input as one prompt"
    )
    given = parser.add_argument_group("prompts")
    given.add_argument(
        "--file",
        type=Path,
        metavar="FILE",
        help='more prompts: one a line, or JSON lines (or a JSON list) of objects with "prompt" or "messages"',
    )
    given.add_argument("--system", metavar="TEXT", help="system message (default: the chat template's own)")
    given.add_argument(
        "--raw-prompt", action="store_true", help="continue the text as it stands, without the chat template"
    )
    add_sampling_options(parser)
    add_draft_options(parser)
    shown = parser.add_argument_group("output")
    form = shown.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="one JSON object a prompt")
    form.add_argument("--events", action="store_true", help="JSON lines: every branch event as it comes")
    shown.add_argument(
        "--view",
        choices=("auto", "live", "plain"),
        default="auto",
        help="draw branches live, or print text as it becomes certain; auto draws where standard output and error are "
        "a terminal",
    )
    shown.add_argument(
        "--pace",
        type=seconds,
        default=0.0,
        metavar="SECONDS",
        help="pause after every step, so that eyes can follow a small model (default: 0)",
    )
    shown.add_argument("-q", "--quiet", action="store_true", help="answers only: no live view, no figures, no progress")
    parser.add_debug()
    return parser


def run(options: argparse.Namespace) -> int:
    """Answer every prompt. Returns 1 where an answer failed, 130 where Ctrl-C ended it."""
    parser: Parser = options.parser
    if options.raw_prompt and options.system is not None:
        parser.error("--system has no meaning with --raw-prompt; put the text into the prompt itself")
    try:
        params = sampling_params(options)
        limits = scheduler_limits(options)
        draft = draft_options(options)
        prompts = gather_prompts(options.prompts, options.file, sys.stdin)
    except RequestError as error:
        parser.error(str(error))
    prompts = [entry.with_system(options.system) for entry in prompts]
    directory = find_engine(options.engine, quiet=options.quiet)

    from apar.runtime.cli.answer_output import make_output
    from apar.runtime.cli.interrupt import Interrupt
    from apar.runtime.llm import load_text_engine

    engine = load_text_engine(directory, options.executor, limits, draft=draft, **executor_options(options))
    try:
        answers = [_submit(engine, i, prompts, params, options) for i in range(len(prompts))]
        with Interrupt() as interrupt, make_output(options, prompts, answers) as output:
            failed = _decode(engine, answers, interrupt, output, options.pace)
        if interrupt.pressed:
            raise KeyboardInterrupt
        return 1 if failed else 0
    finally:
        engine.close()


def _decode(engine: TextEngine, answers: list[Answer], interrupt: Interrupt, output: AnswerOutput, pace: float) -> bool:
    """Step until all is said or the user interrupts; returns whether an answer failed."""
    while not engine.idle and not interrupt.pressed:
        for answer in engine.step():
            output.take(answer, engine)
        if pace:
            time.sleep(pace)
    for answer in answers:
        if engine.cancel(answer.request.request_id) is not None:
            output.take(answer, engine)
    return any(answer.request.finish_reason == "error" for answer in answers)


def _submit(
    engine: TextEngine, index: int, prompts: list[PromptEntry], params: SamplingParams, options: argparse.Namespace
) -> Answer:
    entry = prompts[index]
    try:
        ids = engine.encode(entry.prompt, chat=not options.raw_prompt)  # type: ignore[arg-type]
        return engine.submit(ids, params, request_id=f"prompt-{index}", listens=not options.json)
    except RequestError as error:
        if len(prompts) == 1:
            raise
        name = f" ({entry.name})" if entry.name else ""
        raise type(error)(f"prompt {index + 1}{name}: {error}") from error
