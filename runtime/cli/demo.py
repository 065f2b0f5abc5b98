"""`apar demo`: the whole service in one command: build the tiny engine, serve it, ask it over gRPC, shut it down."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from apar.export.errors import RequestError, ServingError
from apar.runtime.cli.engine_options import find_engine
from apar.runtime.cli.parser import Parser, seconds
from apar.runtime.cli.sampling_options import add_sampling_options, sampling_params
from apar.runtime.cli.serve import server_for

QUESTION = "Give me four facts about owls."
START_SECONDS, STOP_SECONDS = 180.0, 60.0
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
        signal.signal(number, _leave)

    from apar.runtime.serving.grpc_view import show_answers
    from apar.runtime.serving.model_inputs import model_inputs

    names = [field.name for field in dataclasses.fields(params) if hasattr(options, field.name)]
    inputs = {**model_inputs(params, names), "branch_events": True}
    server_for(options)
    find_engine("tiny", quiet=options.quiet)
    live = options.view == "live" or (options.view == "auto" and sys.stdout.isatty() and sys.stderr.isatty())
    form = "events" if options.events else "live" if live else "text"
    pace = options.pace if options.pace is not None else 0.08 if form == "live" else 0.0
    with _service(options) as urls:
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


@contextmanager
def _service(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """`apar serve tiny` as a process of its own, on free ports; its URLs. Ended in order, or else ServingError."""
    from apar.runtime.serving import launch

    with tempfile.TemporaryDirectory(prefix="apar-demo-") as folder:
        file, log = Path(folder) / "urls.json", Path(folder) / "log"
        command = [sys.executable, "-m", "apar.runtime.cli", "serve", "tiny", "-q", "--port", "0", "--urls", str(file)]
        command += ["--triton-address", "127.0.0.1"]
        for name in ("grpc", "http", "metrics"):
            command += [f"--triton-{name}-port", "0"]
        if options.tritonserver:
            command += ["--tritonserver", options.tritonserver]
        if options.debug:
            command += ["--debug"]
        # It ends with this process, however that ends, and does not hear the terminal's Ctrl-C by itself.
        launcher = [sys.executable, "-I", "-S", launch.__file__, str(os.getpid()), str(int(signal.SIGTERM))]
        with log.open("wb") as said:
            errors = None if options.debug else said
            process = subprocess.Popen(
                [*launcher, *command], stdin=subprocess.DEVNULL, stdout=said, stderr=errors, start_new_session=True
            )
        try:
            yield _wait(process, file, log, quiet=options.quiet)
        except BaseException:
            _end(process)
            raise
        if _end(process) != 0:
            raise ServingError(f"the service did not end in order (exit code {process.returncode}):\n{_read(log)}")


def _wait(process: subprocess.Popen[bytes], file: Path, log: Path, quiet: bool) -> dict[str, Any]:
    """The service's URLs, once it answers."""
    if not quiet:
        print("apar: starting the service ...", file=sys.stderr)
    end = time.monotonic() + START_SECONDS
    while not file.exists():
        if process.poll() is not None:
            raise ServingError(f"the service did not start: {_read(log)}")
        if time.monotonic() > end:
            raise ServingError(f"the service did not answer within {START_SECONDS:g} s:\n{_read(log)}")
        time.sleep(0.05)
    urls: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return urls


def _end(process: subprocess.Popen[bytes]) -> int:
    process.terminate()
    try:
        return process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def _read(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return "\n".join(line.removeprefix("apar: error: ") for line in lines[-15:])
