"""Sections that fail alone, a time limit over all, one JSON and a table that people can read."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Section = Callable[[], dict[str, Any]]


@dataclass(slots=True)
class Report:
    """Runs sections and keeps what they return.

    A section returns a dictionary; its "rows", if any, are printed as a table, and `"ok": False` is a failure.
    """

    machine: dict[str, Any]
    deadline: float
    """`time.perf_counter()` after which no section is begun."""
    path: Path
    """The JSON document, written anew after every section."""
    sections: dict[str, dict[str, Any]] = field(default_factory=dict)
    _running: str = ""

    def run(self, name: str, section: Section, needs: float = 0.0) -> None:
        """Run a section, unless fewer than `needs` seconds are left; what it raises is written down."""
        began = time.perf_counter()
        self._running = name
        print(f"\n== {name}", flush=True)
        if began + needs > self.deadline:
            found: dict[str, Any] = {"skipped": "no time left"}
        else:
            try:
                found = section()
            except Exception as error:
                found = {"ok": False, "error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
        found["seconds"] = round(time.perf_counter() - began, 2)
        self.sections[name] = found
        print(section_text(found), flush=True)
        self.write()

    def read(self) -> None:
        """Take over the sections of a document that is there."""
        self.sections = dict(json.loads(self.path.read_text(encoding="utf-8"))["sections"])

    @contextmanager
    def watched(self, grace: float) -> Iterator[None]:
        """Ends the process, the report written, where a section has not come back `grace` seconds after the deadline:
        a kernel that hangs cannot be stopped from within."""

        def give_up() -> None:
            print(f"\n{self.path}: a section hangs; the process is ended", file=sys.stderr, flush=True)
            self.sections[self._running or "?"] = {"ok": False, "error": "did not come back in time", "seconds": None}
            self.write()
            os._exit(3)

        timer = threading.Timer(max(0.0, self.deadline - time.perf_counter()) + grace, give_up)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    @property
    def failed(self) -> list[str]:
        """Sections that ran and failed."""
        return [name for name, found in self.sections.items() if found.get("ok") is False]

    def write(self) -> None:
        """Write everything as one JSON document, atomically."""
        path = self.path
        partial = path.with_suffix(path.suffix + ".partial")
        document = {"gpu_check": 1, "machine": self.machine, "failed": self.failed, "sections": self.sections}
        partial.write_text(json.dumps(document, indent=2, default=str) + "\n", encoding="utf-8")
        partial.replace(path)


def section_text(found: dict[str, Any]) -> str:
    """One section for people."""
    lines = []
    if "skipped" in found:
        lines.append(f"skipped: {found['skipped']}")
    if "error" in found:
        lines.append(f"FAILED: {found['error']}")
    if found.get("rows"):
        lines.append(table(found["rows"]))
    lines += [
        f"{name}: {_cell(value)}"
        for name, value in found.items()
        if name not in ("rows", "error", "trace", "skipped", "seconds") and not isinstance(value, (dict, list))
    ]
    lines.append(f"({found['seconds']} s)")
    return "\n".join(lines)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Columns by the keys of all rows, in order of appearance."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns, *([_cell(row.get(column, "")) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join("  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)) for line in cells)


def _cell(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, float):
        return str(value)
    return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"
