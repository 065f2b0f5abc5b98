"""`apar bench`: measurements, printed as tables or JSON. One module a measurement; this one finds them."""

from __future__ import annotations

import argparse
import importlib
import json
from typing import Any

from apar.runtime.cli.parser import Parser

KINDS = {
    "generate": "an engine on its prompts, without and with branches: steps, time, KV blocks, memory bandwidth",
    "drafts": "the draft budget's rule against drafts of fixed size: steps, and passes over the weights",
    "host": "the runtime's own cost a step, without any model",
    "rows": "how a step's time grows with its rows, beside what the memory's bandwidth allows",
    "trees": "recorded answers on an engine of any shape: what forks save in steps and in time",
    "peers": "a shape on other engines: llama.cpp, OpenVINO, transformers, ONNX Runtime's own kernels",
    "quality": "what quantisation costs: distributions, trees and answers against the float32 engine",
    "weights": "the GPU's weight formats: what bf16, fp16, int8 and fp8 cost, measured on the CPU",
    "serve": "a service under load: throughput, time to first token, its own cost beside the runtime's",
    "replay": "scheduling under load: recorded answers on a virtual clock, without any model",
    "foresight": "how far fork policies are from schedules that know every answer, and from a bound for all",
    "report": "one page with charts, made of what the others printed",
}
"""Name and summary. The module of the same name has `DESCRIPTION`, `add_options(parser)`, `measure(options)`, which
returns what `--json` prints, and `show(result)`."""

DESCRIPTION = """\
Measure an engine or the runtime. `apar bench WHAT --help` says what is measured and how.

{kinds}
"""
NOT_OF_THIS_MACHINE = ("replay", "foresight")


def make_parser() -> Parser:
    """Options of `apar bench`."""
    summaries = "\n".join(f"  {name:10} {summary}" for name, summary in KINDS.items())
    parser = Parser(prog="apar bench", description=DESCRIPTION.format(kinds=summaries))
    kinds = parser.add_subparsers(dest="bench", metavar="WHAT", required=True)
    for name, summary in KINDS.items():
        module: Any = importlib.import_module(f"apar.runtime.cli.bench.{name}")
        kind = kinds.add_parser(name, description=module.DESCRIPTION, help=summary.partition(":")[0].partition(",")[0])
        module.add_options(kind)
        described = "" if name in NOT_OF_THIS_MACHINE else ", with a description of the machine"
        kind.add_argument("--json", action="store_true", help=f"print one JSON object{described}")
        kind.add_argument("-q", "--quiet", action="store_true", help="no progress")
        kind.add_debug()
        kind.set_defaults(measure=module.measure, show=module.show, parser=kind)
    return parser


def run(options: argparse.Namespace) -> int:
    """Measure and print."""
    result: dict[str, Any] = options.measure(options)
    if options.json:
        print(json.dumps(result, indent=2, ensure_ascii=False))
    else:
        options.show(result)
    return 0
