"""One option for each sampling parameter; names and defaults are those of `SamplingParams`."""

from __future__ import annotations

import argparse
import dataclasses
from typing import TYPE_CHECKING, Any

from apar.runtime.cli.parser import Parser

if TYPE_CHECKING:
    from apar.runtime.sampling_params import SamplingParams


def add_sampling_options(parser: Parser) -> None:
    """Every field of SamplingParams. An option that is not given keeps the field's default."""
    group = parser.add_argument_group("length and branches")

    def number(name: str, kind: type, help: str, metavar: str = "N") -> None:
        group.add_argument(f"--{name}", type=kind, default=argparse.SUPPRESS, metavar=metavar, help=help)

    number("max-tokens", int, "tokens sampled over the whole tree of branches (default: 512)")
    number("max-branch-tokens", int, "tokens sampled in any one branch (default: no limit of its own)")
    number("min-tokens", int, "the root branch does not end before this many tokens (default: 0)")
    group.add_argument(
        "--no-fork", dest="fork", action="store_false", default=argparse.SUPPRESS, help="plain decoding: no branches"
    )
    number("max-branches", int, "branches of one answer that may be live at once (default: 32)")
    number("max-depth", int, "deepest branch; the root has depth 1, so 2 lets only the root fork (default: 2)")

    group = parser.add_argument_group("sampling")
    number("temperature", float, "0 always takes the likeliest token (default: 0)", "T")
    number("top-k", int, "sample among the N likeliest tokens; 0: all (default: 0)")
    number("top-p", float, "sample among the fewest tokens whose probabilities reach P (default: 1)", "P")
    number("min-p", float, "drop tokens less likely than P times the likeliest (default: 0)", "P")
    number("seed", int, "makes sampling repeatable (default: drawn, and reported by --json)")
    number("repetition-penalty", float, "above 1: disfavour tokens of the path, prompt included (default: 1)", "X")
    number("presence-penalty", float, "subtracted once from tokens the answer already has (default: 0)", "X")
    number("frequency-penalty", float, "subtracted as often as the answer has the token (default: 0)", "X")
    group.add_argument(
        "--logit-bias",
        type=_bias,
        action="append",
        default=argparse.SUPPRESS,
        metavar="ID=X",
        help="add X (-100 to 100) to a token's logit; may be repeated",
    )
    group.add_argument(
        "--bad-words",
        action="append",
        default=argparse.SUPPRESS,
        metavar="TEXT",
        help="never say TEXT; may be repeated",
    )
    group.add_argument(
        "--bad-words-ids",
        type=_ids,
        action="append",
        default=argparse.SUPPRESS,
        metavar="ID,ID,...",
        help="never sample this sequence of tokens; may be repeated",
    )
    number("logprobs", int, "report log-probabilities of the N likeliest tokens at each position (with --json)")

    group = parser.add_argument_group("where a branch ends")
    group.add_argument(
        "--stop",
        action="append",
        default=argparse.SUPPRESS,
        metavar="TEXT",
        help="ends a branch that says it; may be repeated",
    )
    group.add_argument(
        "--stop-token-ids", type=_ids, default=argparse.SUPPRESS, metavar="ID,ID,...", help="tokens that end a branch"
    )
    group.add_argument(
        "--include-stop-in-output", action="store_true", default=argparse.SUPPRESS, help="keep the stop string or token"
    )
    group.add_argument(
        "--ignore-eos", action="store_true", default=argparse.SUPPRESS, help="never sample the end of sequence"
    )


def sampling_params(options: argparse.Namespace) -> SamplingParams:
    """The parameters that the options ask for. Raises RequestError where a value is out of bounds."""
    from apar.runtime.sampling_params import SamplingParams

    names = [field.name for field in dataclasses.fields(SamplingParams)]
    values: dict[str, Any] = {name: getattr(options, name) for name in names if hasattr(options, name)}
    if "logit_bias" in values:
        values["logit_bias"] = dict(values["logit_bias"])
    return SamplingParams(**values)


def _bias(text: str) -> tuple[int, float]:
    token, equals, value = text.partition("=")
    try:
        if not equals:
            raise ValueError
        return int(token), float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form ID=X, such as 1234=-5") from None


def _ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of token ids such as 12,345") from None
