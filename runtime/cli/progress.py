"""Progress of an engine build on standard error: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

LINE_EVERY = 25
"""Percent between two plain lines."""


class BuildProgress:
    """What `onnx_engine.build` calls. Shows nothing before the first call, so that no build shows nothing.

    Args:
        stream: where to write.
        title: a line before the first stage.
        quiet: write nothing at all.
    """

    def __init__(self, stream: TextIO, title: str, quiet: bool = False) -> None:
        self._stream = stream
        self._title = title
        self._quiet = quiet
        self._bars: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._said: dict[str, int] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        if self._quiet:
            return
        if self._title:
            print(self._title, file=self._stream, flush=True)
            self._title = ""
        if self._stream.isatty():
            self._draw(stage, done, total)
        else:
            self._say(stage, done, total)

    def __enter__(self) -> BuildProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def _draw(self, stage: str, done: int, total: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        if self._bars is None:
            columns = (TextColumn("{task.description:8}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
            self._bars = Progress(*columns, console=Console(file=self._stream))
            self._bars.start()
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(stage, total=total)
        self._bars.update(self._tasks[stage], completed=done, total=total)

    def _say(self, stage: str, done: int, total: int) -> None:
        percent = 100 * done // max(total, 1)
        reached = percent - percent % LINE_EVERY
        if reached > self._said.get(stage, 0):
            self._said[stage] = reached
            print(f"{stage}: {reached} %", file=self._stream, flush=True)
