"""`apar doctor`: what can run here, and what to do about the rest."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from apar.runtime.cli.parser import Parser
from apar.runtime.doctor import NEEDS, Finding, examine, healthy

DESCRIPTION = """\
Look at everything that engines need on this machine: driver, GPU, TensorRT, its plugins, Triton. One line each: what is
there, or what to do. With an engine, its manifest is held against all of it.
"""
EPILOG = """\
examples:
  apar doctor                        # is the CPU's side in order, and what is here for GPUs?
  apar doctor --need tensorrt        # fails where TensorRT engines could not run
  apar doctor ./engine               # can this engine run here?

exit codes: 0 all that is needed is there, 1 something needed is missing (marked ✗), 2 wrong usage.
"""


def make_parser() -> Parser:
    """Options of `apar doctor`."""
    parser = Parser(prog="apar doctor", description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument("engine", metavar="ENGINE", nargs="?", type=Path, help="an engine directory to hold against it")
    parser.add_argument(
        "--need",
        choices=NEEDS,
        action="append",
        default=[],
        help="a use that has to work; may be given again (default: onnx, or what ENGINE was built for)",
    )
    parser.add_argument("--json", action="store_true", help="the findings as JSON")
    parser.add_debug()
    return parser


def run(options: argparse.Namespace) -> int:
    """Look, print, and return 0 or 1."""
    findings = examine(options.engine, tuple(options.need))
    if options.json:
        print(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2))
    else:
        _print(findings)
    return 0 if healthy(findings) else 1


def _print(findings: list[Finding]) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        mark, style = ("✓", "green") if finding.ok else ("✗", "red") if finding.needed else ("–", "dim")
        line = Text.assemble((mark, style), f" {finding.name:{width}}  ", (finding.text, "" if finding.ok else style))
        console.print(line)
