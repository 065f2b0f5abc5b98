"""Charts of measurements as SVG text, drawn by matplotlib without a display."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

from apar.export.errors import AparError

try:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
except ModuleNotFoundError as error:
    raise AparError(
        f"charts need the package {error.name}, which is not installed: pip install 'apar[report]'"
    ) from error

COLOURS = ("#2563eb", "#d97706", "#059669", "#dc2626", "#7c3aed", "#0891b2", "#be185d", "#4d7c0f")
GREY, INK = "#94a3b8", "#334155"
_STYLE = {
    "font.size": 9,
    "font.family": "sans-serif",
    "svg.fonttype": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": "#e2e8f0",
    "legend.frameon": False,
    "svg.hashsalt": "apar",
    "text.parse_math": False,
}
Branch = Mapping[str, Any]
Series = Mapping[str, Sequence[tuple[float, float]]]


def gantt(branches: Sequence[Branch], title: str) -> str:
    """Steps by branch: a bar from each branch's first step to its last, a line from the parent where it forked."""
    ordered = sorted(branches, key=lambda b: (b["first_step"], b["branch"]))
    start = min(branch["first_step"] for branch in ordered)
    rows = {branch["branch"]: i for i, branch in enumerate(ordered)}
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(0.9 + 0.34 * len(ordered))
        for branch in ordered:
            row, first = rows[branch["branch"]], branch["first_step"] - start
            width = branch["last_step"] - branch["first_step"] + 1
            colour = COLOURS[(branch["depth"] - 1) % len(COLOURS)]
            axes.barh(row, width, left=first, height=0.62, color=colour, alpha=0.85, linewidth=0)
            label = branch.get("label") or f"{branch['tokens']} tokens"
            axes.text(first + width + 0.6, row, _short(label), va="center", fontsize=8, color=INK)
            if branch["parent"] is not None:
                axes.plot([first, first], [rows[branch["parent"]], row], color=GREY, linewidth=0.8, zorder=0)
        names = ["root" if branch["parent"] is None else f"branch {branch['branch']}" for branch in ordered]
        axes.set_yticks(range(len(ordered)), names)
        axes.invert_yaxis()
        last = max(branch["last_step"] for branch in ordered) - start + 1
        axes.set_xlim(0, last * 1.45)  # room for labels
        axes.set_xticks([tick for tick in axes.get_xticks() if 0 <= tick <= last * 1.05])
        axes.set_xlabel("step")
        axes.set_title(title)
        return _svg(figure)


def lines(series: Series, title: str, across: str, up: str, *, log_across: bool = False, whole: bool = False) -> str:
    """One line a series, with a legend."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(3.0)
        for i, (name, points) in enumerate(series.items()):
            marker = "o" if len(points) <= 16 else ""
            style: dict[str, Any] = {
                "color": COLOURS[i % len(COLOURS)],
                "linewidth": 1.8,
                "marker": marker,
                "markersize": 4,
            }
            axes.plot([x for x, _ in points], [y for _, y in points], label=name, **style)
        if log_across:
            axes.set_xscale("log", base=2)
            ticks = sorted({x for points in series.values() for x, _ in points})
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axes.minorticks_off()
        elif whole:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylim(bottom=0)
        axes.grid(axis="y")
        axes.set(xlabel=across, ylabel=up, title=title)
        if len(series) > 1:
            axes.legend(loc="best", fontsize=8)
        return _svg(figure)


def bars(groups: Mapping[str, Mapping[str, float]], title: str, up: str) -> str:
    """Groups of bars: group name -> bar name -> value."""
    names = list(dict.fromkeys(name for bar in groups.values() for name in bar))
    width = 0.8 / max(len(names), 1)
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(3.0)
        for i, name in enumerate(names):
            places = [g + (i - (len(names) - 1) / 2) * width for g, bar in enumerate(groups.values()) if name in bar]
            heights = [bar[name] for bar in groups.values() if name in bar]
            drawn = axes.bar(places, heights, width * 0.92, label=name, color=COLOURS[i % len(COLOURS)])
            axes.bar_label(drawn, fmt="%.3g", fontsize=7, color=INK, padding=1)
        axes.set_xticks(range(len(groups)), list(groups))
        axes.grid(axis="y")
        axes.set_axisbelow(True)
        axes.set(ylabel=up, title=title)
        if len(names) > 1:
            axes.legend(loc="best", fontsize=8)
        return _svg(figure)


def _figure(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7.6, height), layout="constrained")
    return figure, figure.add_subplot()


def _svg(figure: Figure) -> str:
    """The drawing alone: no XML declaration, no date."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    return re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', "", text, count=1).strip()


def _short(text: str, most: int = 44) -> str:
    """On one line."""
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 1] + "…"
