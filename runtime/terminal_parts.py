"""Pieces of the terminal view: safe text, wrapped tails, panels and lines of one branch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

from rich import box
from rich.cells import cell_len, chop_cells
from rich.panel import Panel
from rich.text import Text

from apar.runtime.reading_order import BranchView

COLOURS = ("cyan", "magenta", "yellow", "green", "blue", "red", "bright_cyan", "bright_magenta", "bright_yellow")
ROOT_COLOUR = "white"
FORK_SIGN = "⑂"
RUNNING, SETTLED = "●", "✓"
_TAIL_CHARS = 6000
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_MARK = re.compile(FORK_SIGN + r"(\d+)")
_WORD = re.compile(r"\s*\S+")


def printable(text: str) -> str:
    """Text without characters that would steer a terminal (escape sequences, direction overrides)."""
    return _CONTROL.sub("\ufffd", text.replace("\r\n", "\n").replace("\t", "    "))


def colour(branch_id: int) -> str:
    """The branch's colour, the same wherever it is named."""
    return COLOURS[(branch_id - 1) % len(COLOURS)] if branch_id else ROOT_COLOUR


def fit(text: Text, width: int) -> Text:
    """The text as one line of at most `width` columns."""
    text.no_wrap = True
    text.truncate(width, overflow="ellipsis")
    return text


def marked_text(branch: BranchView) -> str:
    """What a branch has said, with a numbered sign where it forked; of a long one, the end."""
    segments = branch.segments
    pieces: list[str] = []
    length = 0
    for i in range(len(segments) - 1, -1, -1):
        sign = f" {FORK_SIGN}{branch.children[i]} " if i < len(branch.children) else ""
        pieces.append(segments[i] + sign)
        length += len(pieces[-1])
        if length > _TAIL_CHARS:
            break
    text = printable("".join(reversed(pieces)))
    if len(text) > _TAIL_CHARS:  # cut at a multiple, so that lines above the end stay where they are
        text = text[(len(text) - _TAIL_CHARS) // _TAIL_CHARS * _TAIL_CHARS :]
    return text.lstrip()


def tail(text: str, width: int, height: int) -> list[str]:
    """The last `height` lines of `text`, wrapped to `width` columns; blank lines are left out."""
    lines: list[str] = []
    for paragraph in reversed(text.split("\n")):
        if paragraph.strip():
            lines[:0] = wrap(paragraph.rstrip(), width)
        if len(lines) >= height:
            break
    return lines[-height:]


@lru_cache(maxsize=512)
def wrap(paragraph: str, width: int) -> tuple[str, ...]:
    """Greedy word wrap by columns; a word longer than a line is broken."""
    lines, line, used = [], "", 0
    for match in _WORD.finditer(paragraph):
        word = match.group()
        size = cell_len(word)
        if used and used + size > width:
            lines.append(line)
            word = word.lstrip()
            size, line, used = cell_len(word), "", 0
        if size > width:
            *full, word = chop_cells(word, width)
            lines += full
            size = cell_len(word)
        line += word
        used += size
    return (*lines, line)


def panel(title: Text, text: str, width: int, height: int, border: str, dim: bool = False) -> Panel:
    """A box of exactly `width` columns and `height` lines that shows the end of `text`."""
    lines = Text("\n".join(tail(text, max(1, width - 4), max(1, height - 2))), no_wrap=True, style="dim" if dim else "")
    for match in _MARK.finditer(lines.plain):
        lines.stylize(f"bold {colour(int(match[1]))}", *match.span())
    title.truncate(max(1, width - 6), overflow="ellipsis")
    return Panel(
        lines, title=title, title_align="left", width=width, height=height, border_style=border, box=box.ROUNDED
    )


def branch_panel(branch: BranchView, width: int, height: int) -> Panel:
    """A branch: its number, depth and tokens in the frame, the end of its text inside."""
    live = branch.finish_reason is None
    name = "root" if branch.parent_id is None else f"{FORK_SIGN}{branch.branch_id}"
    title = Text(f"{RUNNING if live else SETTLED} {name}", style=f"bold {colour(branch.branch_id)}")
    title.append(f" depth {branch.depth} · {len(branch.token_ids)}", style="dim")
    border = colour(branch.branch_id) if live else f"dim {colour(branch.branch_id)}"
    return panel(title, marked_text(branch), width, height, border, dim=not live)


def branch_line(branch: BranchView, width: int) -> Text:
    """A branch on one line: its sign, number and depth, and the end of its text."""
    live = branch.finish_reason is None
    head = f"{RUNNING if live else SETTLED} {'root' if branch.parent_id is None else f'{FORK_SIGN}{branch.branch_id}'}"
    return _line(head, f" d{branch.depth} ", marked_text(branch), width, colour(branch.branch_id), dim=not live)


def answer_panel(index: int, title: str, branches: Sequence[BranchView], text: str, width: int, height: int) -> Panel:
    """One of several answers: its question and live branches in the frame, the end of its text inside."""
    live, tokens = _counts(branches)
    sign = RUNNING if live and tokens else SETTLED if tokens else "…"
    heading = Text(f"{sign} {index + 1} ", style=f"bold {colour(index + 1)}")
    heading.append("▮" * min(live if tokens else 0, 8) + f" {live if tokens else 0} live · {tokens} · ", style="dim")
    heading.append(title)
    border = colour(index + 1) if live else f"dim {colour(index + 1)}"
    return panel(heading, printable(text[-_TAIL_CHARS:]), width, height, border, dim=not live)


def answer_line(index: int, branches: Sequence[BranchView], text: str, width: int) -> Text:
    """One of several answers on one line."""
    live, tokens = _counts(branches)
    sign = RUNNING if live and tokens else SETTLED if tokens else "…"
    head = f"{sign} {index + 1}"
    return _line(
        head, f" {live if tokens else 0} live ", printable(text[-_TAIL_CHARS:]), width, colour(index + 1), not live
    )


def shares(width: int, columns: int) -> list[int]:
    """`width` divided among columns as evenly as it goes."""
    return [width // columns + (i < width % columns) for i in range(columns)]


def _counts(branches: Sequence[BranchView]) -> tuple[int, int]:
    live = sum(1 for branch in branches if branch.finish_reason is None)
    return live, sum(len(branch.token_ids) for branch in branches)


def _line(head: str, note: str, text: str, width: int, style: str, dim: bool) -> Text:
    line = Text(head, style=f"bold {style}")
    line.append(note, style="dim")
    room = width - cell_len(line.plain)
    if room > 0:
        last = " ".join(text[-4 * width :].split())
        cut = len(last)
        used = 0
        while cut and used + cell_len(last[cut - 1]) <= room:
            used += cell_len(last[cut - 1])
            cut -= 1
        line.append(last[cut:], style="not bold dim" if dim else "not bold default")
    return fit(line, width)
