"""Branches while they decode, drawn in a terminal.

`TerminalView` is the state, fed with events, and draws itself into any width and height; `LiveTerminal` puts it on
a terminal in place, some ten times a second, and takes it away at the end.

One answer is drawn as its root on top and its children side by side below; several answers get a panel each. A
branch keeps its place when it ends (it settles, dimmed) until a new branch needs the room. Small terminals get a line
a branch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from time import monotonic
from types import TracebackType

from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from apar.runtime.outputs import BranchEvent, DeltaEvent, FinishEvent
from apar.runtime.reading_order import BranchView, EventAssembler
from apar.runtime.terminal_parts import (
    SETTLED,
    answer_line,
    answer_panel,
    branch_line,
    branch_panel,
    colour,
    fit,
    printable,
    shares,
)

SMALL_WIDTH, SMALL_HEIGHT = 44, 12
"""Below either, branches get a line each instead of a panel."""
PANEL_WIDTH, ANSWER_WIDTH = 26, 36
"""Columns that the panel of a branch, or of one of several answers, takes at least."""
PANEL_HEIGHT, TALLEST_PANEL = 5, 9
FRAMES_A_SECOND = 10
DRAWING_SHARE = 0.08

Part = tuple[RenderableType, int]
"""Something to draw, and its height in lines."""


@dataclass(slots=True)
class _Answer:
    """One request as its events tell it."""

    title: str
    tree: EventAssembler = field(default_factory=EventAssembler)
    tokens: int = 0
    seats: list[int] = field(default_factory=list)
    """Branches that have a panel, in the order of the panels."""

    @property
    def branches(self) -> list[BranchView]:
        return list(self.tree.branches.values())

    @property
    def running(self) -> bool:
        return self.tokens > 0 and not self.tree.finished

    def take_seats(self, count: int) -> None:
        """Give `count` panels to live branches first; a settled branch keeps its panel while nobody needs it."""
        tree = self.tree.branches
        self.seats = [b for b in self.seats if tree[b].finish_reason is None or len(self.seats) <= count][:count]
        for branch in self.branches[1:]:
            if branch.branch_id in self.seats:
                continue
            if len(self.seats) < count:
                self.seats.append(branch.branch_id)
            elif branch.finish_reason is None:
                settled = [i for i, b in enumerate(self.seats) if tree[b].finish_reason is not None]
                if settled:
                    self.seats[min(settled, key=lambda i: self.seats[i])] = branch.branch_id


class TerminalView:
    """State of the drawing. `titles`: id and question of every request, in order."""

    def __init__(self, titles: Sequence[tuple[str, str]]) -> None:
        self._answers = {request_id: _Answer(printable(title)) for request_id, title in titles}
        self._first_step: int | None = None
        self._steps = 0
        self._began = monotonic()
        self._tallest = 0
        self.kv_used = 0
        self.kv_total = 0

    def feed(self, event: BranchEvent) -> None:
        """Take in one event of one of the answers."""
        answer = self._answers[event.request_id]
        if self._first_step is None:
            self._first_step = event.step
        self._steps = max(self._steps, event.step - self._first_step + 1)
        answer.tree.feed(event)
        if isinstance(event, DeltaEvent):
            answer.tokens += len(event.token_ids)
        elif isinstance(event, FinishEvent) and event.reason == "stop":
            answer.tokens += 1  # the end of sequence, which no delta carries

    def render(self, width: int, height: int) -> RenderableType:
        """The picture: at most `width` columns and `height` lines."""
        room = max(1, height - 1)
        answers = list(self._answers.values())
        parts = self._one(answers[0], width, room) if len(answers) == 1 else self._many(answers, width, room)
        drawn = sum(lines for _, lines in parts)
        # A picture that shrinks makes the terminal jump: what was tall stays tall.
        self._tallest = max(self._tallest, drawn)
        blank = [Text("")] * (min(self._tallest, room) - drawn)
        return Group(*[part for part, _ in parts], *blank, self.status(width))

    def status(self, width: int) -> Text:
        """One line of figures; those that do not fit are left out."""
        if not self._steps:
            return fit(Text("reading the prompt ...", style="dim"), width)
        answers = list(self._answers.values())
        tokens = sum(answer.tokens for answer in answers)
        live = sum(1 for answer in answers if answer.running for b in answer.branches if b.finish_reason is None)
        rate = tokens / max(monotonic() - self._began, 1e-6)
        parts = [
            f"step {self._steps}",
            f"{live} live",
            f"{tokens} tokens",
            f"{tokens / self._steps:.2f} a step",
            f"plain decoding: {tokens} steps",
            f"{rate:.0f} tokens/s",
            f"KV {self.kv_used}/{self.kv_total} blocks",
        ]
        if len(answers) > 1:
            parts[1] = f"{sum(1 for a in answers if a.tree.finished)}/{len(answers)} done, {live} live"
            parts[4] = f"longest answer, plain: {max(answer.tokens for answer in answers)} steps"
        while len(parts) > 1 and cell_len(" · ".join(parts)) > width:
            parts.pop()
        return fit(Text(" · ".join(parts), style="bold"), width)

    def _one(self, answer: _Answer, width: int, room: int) -> list[Part]:
        """The root's panel, its children's in rows below, a line for those without a panel."""
        if width < SMALL_WIDTH or room + 1 < SMALL_HEIGHT:
            return _lines(answer, width, room)
        branches = answer.tree.branches
        children = len(branches) - 1
        root_height = max(4, min(TALLEST_PANEL, room // 3))
        if not children:
            return [(branch_panel(branches[0], width, root_height), root_height)]
        rest = room - root_height - 1
        columns = min(children, width // PANEL_WIDTH)
        rows = max(1, min(rest // PANEL_HEIGHT, -(-children // columns)))
        height = min(TALLEST_PANEL, rest // rows)
        answer.take_seats(columns * rows)
        parts: list[Part] = [(branch_panel(branches[0], width, root_height), root_height)]
        widths = shares(width, columns)
        for start in range(0, len(answer.seats), columns):
            seated = [branches[b] for b in answer.seats[start : start + columns]]
            cells = [branch_panel(branch, widths[i], height) for i, branch in enumerate(seated)]
            parts.append((_row(cells, widths), height))
        return [*parts, (_elsewhere(answer, width), 1)]

    def _many(self, answers: list[_Answer], width: int, room: int) -> list[Part]:
        """A panel an answer; where there are too many, those that run come first."""
        panels = width >= SMALL_WIDTH and room >= PANEL_HEIGHT
        columns = min(len(answers), width // ANSWER_WIDTH) if panels else 1
        columns = max(1, columns)
        rows = max(1, min(room // PANEL_HEIGHT, -(-len(answers) // columns))) if panels else room
        order = sorted(range(len(answers)), key=lambda i: (not answers[i].running, i))
        chosen = sorted(order[: columns * rows])
        if not panels:
            return [(answer_line(i, answers[i].branches, answers[i].tree.text(), width), 1) for i in chosen]
        height = min(TALLEST_PANEL, room // rows)
        widths = shares(width, columns)
        parts: list[Part] = []
        for start in range(0, len(chosen), columns):
            cells = [
                answer_panel(i, answers[i].title, answers[i].branches, answers[i].tree.text(), widths[place], height)
                for place, i in enumerate(chosen[start : start + columns])
            ]
            parts.append((_row(cells, widths), height))
        return parts


class LiveTerminal:
    """Draws a view in place while the block runs, and wipes it at its end."""

    def __init__(self, view: TerminalView, console: Console) -> None:
        self._view = view
        self._console = console
        self._live = Live(
            console=console,
            auto_refresh=False,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
            vertical_overflow="crop",
        )
        self._next = 0.0

    def refresh(self, force: bool = False) -> None:
        """Draw, if the last picture is old enough."""
        now = monotonic()
        if now < self._next and not force:
            return
        size = self._console.size
        # The last line of a terminal stays free, so that nothing ever scrolls.
        self._live.update(self._view.render(size.width, max(2, size.height - 1)), refresh=True)
        drawn = monotonic()
        # Drawing takes its time from decoding: at most a small share of it, on however slow a machine.
        self._next = drawn + max(1 / FRAMES_A_SECOND, (drawn - now) / DRAWING_SHARE)

    def __enter__(self) -> LiveTerminal:
        self._live.start()
        self.refresh(force=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()


def _row(cells: Sequence[RenderableType], widths: Sequence[int]) -> Table:
    grid = Table.grid(padding=0)
    for width, _ in zip(widths, cells, strict=False):
        grid.add_column(width=width)
    grid.add_row(*cells)
    return grid


def _elsewhere(answer: _Answer, width: int) -> Text:
    """Branches without a panel, on one line: how many run, and those that settled, latest first."""
    others = [branch for branch in answer.branches[1:] if branch.branch_id not in answer.seats]
    live = sum(1 for branch in others if branch.finish_reason is None)
    text = Text()
    if live:
        text.append(f"+ {live} more live  ", style="bold")
    for branch in reversed(others):
        if branch.finish_reason is not None:
            text.append(f"{SETTLED} {branch.branch_id}", style=colour(branch.branch_id))
            text.append(f" {len(branch.token_ids)} tokens  ", style="dim")
    return fit(text, width)


def _lines(answer: _Answer, width: int, room: int) -> list[Part]:
    """A line a branch: live ones first in need, settled ones while there is room."""
    live = [branch for branch in answer.branches if branch.finish_reason is None]
    settled = [branch for branch in answer.branches if branch.finish_reason is not None]
    if len(live) > room:
        lines = [branch_line(branch, width) for branch in live[: room - 1]]
        lines.append(fit(Text(f"+ {len(live) - room + 1} more live", style="bold"), width))
    else:
        kept = settled[max(0, len(settled) + len(live) - room) :]
        lines = [branch_line(branch, width) for branch in sorted(live + kept, key=lambda b: b.branch_id)]
    return [(line, 1) for line in lines]
