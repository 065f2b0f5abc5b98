"""Progress of a measurement on a terminal."""

from __future__ import annotations

import sys


def show_progress(done: int, total: int) -> None:
    """`done` of `total`, on one line of standard error that is written over; silent where that is no terminal."""
    if sys.stderr.isatty():
        print(f"\r{done}/{total}" + ("\n" if done == total else ""), end="", file=sys.stderr, flush=True)
