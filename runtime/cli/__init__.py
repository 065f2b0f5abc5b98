"""The command line: `apar COMMAND ...`. One module a command; this one finds it and turns errors into exit codes."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any

from apar.export.errors import AparError
from apar.runtime.cli.parser import Parser

FAILED, USAGE, INTERRUPTED, BROKEN_PIPE = 1, 2, 130, 141

COMMANDS = {
    "build": "build an engine from a checkpoint",
    "generate": "answer prompts, with a live view of the branches",
    "serve": "serve an engine: OpenAI's API in front of NVIDIA's Triton server",
    "demo": "build, serve and ask the tiny model, all in one command",
    "inspect": "show what an engine or a checkpoint holds, and how it would run here",
    "doctor": "say what can run on this machine, and what to do about the rest",
    "bench": "measure an engine on its prompts, or the runtime's own cost",
}
"""Name and summary; the module of the same name has `make_parser()` and `run(options)`."""

DESCRIPTION = """\
Runtime for Llama models that decode their own answers in parallel branches (APAR).

commands:
{commands}
"""

EPILOG = """\
examples:
  apar generate tiny "How do I grow tomatoes?"
  apar build ./vicuna-apar -o ./engine --quantize int4
  apar generate ./engine "Plan a week in Rome." --max-tokens 600
  apar inspect ./engine

`apar COMMAND --help` says more about a command.

exit codes: 0 done, 1 it failed (one sentence on standard error says why and what to do), 2 wrong usage,
130 interrupted, 141 the reader of the output went away.
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command line with `argv` (without the program's name); returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    _open_streams()
    with _notices() as debug:
        try:
            return _run(arguments, debug)
        except SystemExit as end:  # argparse
            return end.code if isinstance(end.code, int) else USAGE
        except AparError as error:
            if debug:
                raise
            print(f"apar: error: {error}", file=sys.stderr)
            return FAILED
        except KeyboardInterrupt:
            print("apar: interrupted", file=sys.stderr)
            return INTERRUPTED
        except BrokenPipeError:
            _silence_stdout()
            return BROKEN_PIPE
        except OSError as error:  # such as a disk that is full
            if debug:
                raise
            print(f"apar: error: {error}", file=sys.stderr)
            _silence_stdout()
            return FAILED


def _run(arguments: list[str], debug: list[bool]) -> int:
    parser = _make_parser()
    first = arguments[0] if arguments else ""
    if first not in COMMANDS:
        if not arguments:
            parser.print_help(sys.stderr)
            return USAGE
        parser.parse_args(arguments[:1])
    module: Any = importlib.import_module(f"apar.runtime.cli.{first}")
    options = module.make_parser().parse_command(arguments[1:])
    if options.debug:
        debug.append(True)
        logging.getLogger("apar").setLevel(logging.DEBUG)
    _tolerate_any_text()
    if os.environ.get("COLUMNS") == "0":
        del os.environ["COLUMNS"]  # some terminals' word for "unknown", which tables would take for a width
    code: int = module.run(options)
    sys.stdout.flush()
    return code


def _make_parser() -> Parser:
    commands = "\n".join(f"  {name:10} {summary}" for name, summary in COMMANDS.items())
    parser = Parser(
        prog="apar", usage="apar COMMAND ...", description=DESCRIPTION.format(commands=commands), epilog=EPILOG
    )
    parser.add_argument("--version", action="version", version=f"apar {version()}")
    parser.add_argument("command", metavar="COMMAND", choices=list(COMMANDS), help="see above")
    return parser


def version() -> str:
    """Of the installed distribution."""
    from importlib import metadata

    try:
        return metadata.version("apar")
    except metadata.PackageNotFoundError:
        return "unknown"


@contextlib.contextmanager
def _notices() -> Iterator[list[bool]]:
    """Warnings and log records of the package as one line each on standard error.

    Yields a list that is filled where tracebacks are wanted (`--debug`).
    """
    debug: list[bool] = []

    def notice(message: Warning | str, *_: object, **__: object) -> None:
        print(f"apar: note: {message}", file=sys.stderr)

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            line = f"apar: {record.levelname.lower()}: {record.getMessage()}"
            if record.exc_info and record.exc_info[1]:
                line += f": {record.exc_info[1]}"
                if debug:
                    line += "\n" + logging.Formatter().formatException(record.exc_info)
            print(line, file=sys.stderr)

    logger, handler = logging.getLogger("apar"), Lines(logging.NOTSET)
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    try:
        with warnings.catch_warnings():
            warnings.showwarning = notice
            yield debug
    finally:
        logger.removeHandler(handler)
        logger.level, logger.propagate = before


def _open_streams() -> None:
    """Started with standard output or error closed, Python has None in their place: what they get goes nowhere."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 - open until the process ends


def _tolerate_any_text() -> None:
    """An answer with a character that the terminal's encoding lacks must not end the program."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")


def _silence_stdout() -> None:
    """Nobody reads standard output any more: the interpreter must not fail on flushing it at exit."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
