"""Options of speculative decoding; shared by `generate` and whatever else runs an engine."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from apar.runtime.cli.parser import Parser, whole

if TYPE_CHECKING:
    from apar.runtime.speculative.options import DraftOptions


def add_draft_options(parser: Parser) -> None:
    """How to draft."""
    group = parser.add_argument_group("speculative decoding")
    group.add_argument(
        "--draft",
        choices=("none", "medusa", "ngram"),
        default="none",
        help="guess several tokens a step and verify them together, which keeps the answer: medusa asks the engine's "
        "Medusa heads, ngram looks in the prompt and in what the branches said (default: none)",
    )
    add_draft_sizes(group)
    group.add_argument(
        "--acceptance",
        choices=("exact", "typical"),
        default="exact",
        help="typical: branches that sample take drafts that the model finds typical, which changes the distribution",
    )


def add_draft_sizes(group: argparse._ArgumentGroup) -> None:
    """How large drafts are."""
    group.add_argument(
        "--num-speculative-tokens",
        type=whole(1),
        metavar="N",
        help="most draft tokens of a branch in a step (default: the whole tree; 8 with ngram)",
    )
    group.add_argument(
        "--medusa-widths",
        metavar="1,W,...",
        help="medusa: guesses of each head that follow every node of the draft tree (default: 1,7,6 and a chain of "
        "further heads)",
    )
    group.add_argument(
        "--draft-budget",
        type=whole(1),
        metavar="N",
        help="draft tokens of a whole step (default: what gives most tokens a second, by measured steps; none "
        "where drafts do not pay)",
    )


def draft_options(options: argparse.Namespace, method: str | None = None) -> DraftOptions:
    """What the user asked for, or the same with another method. Raises RequestError where it means nothing."""
    from apar.export.errors import RequestError
    from apar.runtime.speculative.options import DraftOptions

    widths: tuple[int, ...] | None = None
    if options.medusa_widths is not None:
        parts = options.medusa_widths.split(",")
        if not all(part.isascii() and part.isdigit() and len(part) < 6 for part in parts):
            raise RequestError(f"--medusa-widths is {options.medusa_widths!r}, it must be numbers such as 1,7,6")
        widths = tuple(int(part) for part in parts)
    return DraftOptions(
        method=method or options.draft,
        num_speculative_tokens=options.num_speculative_tokens,
        medusa_widths=widths,
        draft_budget=options.draft_budget,
        acceptance=getattr(options, "acceptance", "exact"),
    )
