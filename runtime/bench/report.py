"""Results of measurements as one self-contained page, HTML or Markdown, with charts."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apar.export.errors import RequestError
from apar.runtime.bench import charts
from apar.runtime.bench.tables import machine_line

Result = Mapping[str, Any]
FORMATS = (".html", ".md")


@dataclass(frozen=True, slots=True)
class Section:
    """One measurement on the page."""

    title: str
    lead: str
    """What was measured, in a sentence or two."""
    table: Sequence[Sequence[str]]
    """The first row is the header."""
    charts: Sequence[str]
    """SVG."""
    notes: Sequence[str]


def write_report(path: Path, results: Sequence[Result]) -> None:
    """Write one page. Raises RequestError for another ending than .html or .md, or a file that cannot be written."""
    if path.suffix not in FORMATS:
        raise RequestError(f"{path}: a report is {' or '.join(FORMATS)}, by the file's ending")
    sections = [section(result) for result in results]
    text = to_html(sections) if path.suffix == ".html" else to_markdown(sections)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RequestError(f"the report cannot be written to {path}: {error}") from error


def read_result(path: Path) -> Result:
    """A result that some `apar bench ... --json` printed. Raises RequestError where the file holds none."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RequestError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(result, dict) or not (isinstance(result.get("bench"), str) or "rows" in result):
        raise RequestError(f"{path} holds no result of `apar bench ... --json`")
    return result


def section(result: Result) -> Section:
    """A result as a section. Raises RequestError where it lacks what its kind has."""
    kind = str(result.get("bench", "rows"))
    try:
        return _SECTIONS.get(kind, _other)(result)
    except (KeyError, TypeError, IndexError, ValueError, AttributeError) as error:
        raise RequestError(f"a result of `apar bench {kind}` lacks something ({error!r}); measure again") from error


def _live(result: Result) -> Section:
    gain, books = result["gain"], result["books"]
    forks = len(result["branches"]) - 1
    return Section(
        "One answer, live",
        f"“{result['question']}”: {result['tokens']} tokens in {result['steps']} steps and {forks} forks. "
        "Each bar is a branch, from the step of its first token to that of its last.",
        [
            ["", "details inline", "branches", "gain"],
            ["steps", *(str(gain[mode]["steps"]) for mode in ("plain", "forked")), f"{gain['step_gain']:.2f}x"],
            ["seconds", *(f"{gain[m]['seconds']:.2f}" for m in ("plain", "forked")), f"{gain['wall_gain']:.2f}x"],
        ],
        [charts.gantt(result["branches"], "steps by branch"), _blocks(books)],
        [result["engine"]["detail"], machine_line(result["machine"])],
    )


def _trees(result: Result) -> Section:
    header = ["", "steps, plain", "steps, forked", "gain", "seconds, plain", "seconds, forked", "gain", "time / steps"]
    table, gains = [header], {}
    for key, title in (("all", "all answers"), ("forked", "answers that fork")):
        part = result[key]
        if part is None:
            continue
        plain, forked = part["plain"], part["forked"]
        table.append(
            [
                f"{title} ({part['answers']})",
                f"{plain['steps']:,d}",
                f"{forked['steps']:,d}",
                f"{part['step_gain']:.2f}x",
                f"{plain['seconds']:.1f}",
                f"{forked['seconds']:.1f}",
                f"{part['wall_gain']:.2f}x",
                f"{part['wall_gain_per_step_gain']:.2f}",
            ]
        )
        gains[title] = {"fewer steps": part["step_gain"], "less time": part["wall_gain"]}
    example, name = result["example"], _engine_name(result)
    return Section(
        f"Recorded answers on {name}",
        f"{result['settings']['answers']} answers of {result['settings']['workload']}, each decoded twice with the "
        "same text: details inline, and as branches.",
        table,
        [
            charts.bars(gains, "gain of branches over details inline", "times"),
            charts.gantt(example["branches"], f"answer {example['tree']}: steps by branch"),
            _blocks(example),
            _rows_chart({name: result["step"]}),
        ],
        [result["engine"]["detail"], machine_line(result["machine"])],
    )


def _generate(result: Result) -> Section:
    part, name = result["all"], result["engine"]["source"]
    table = [["", "no forks", "forks", "gain"]]
    for label, key, form in (("tokens", "tokens", ",d"), ("steps", "steps", ",d"), ("seconds", "seconds", ".2f")):
        table.append([label, format(part["plain"][key], form), format(part["forked"][key], form), ""])
    table.append(
        ["same reply at a token a step", "", f"{part['step_gain']:.2f}x steps", f"{part['wall_gain']:.2f}x time"]
    )
    return Section(
        f"{name} on its own prompts",
        f"{part['replies']} prompts, {result['settings']['concurrency']} at a time.",
        table,
        [_rows_chart({name: result["step"]})],
        [result["engine"]["detail"], machine_line(result["machine"])],
    )


def _rows(result: Result) -> Section:
    name = _engine_name(result)
    table = [["rows", "ms a step", "tokens a second"]]
    for row in result["rows"]:
        rate = 1e3 * row["rows"] / row["ms_per_step"]
        table += [[str(row["rows"]), f"{row['ms_per_step']:.2f}", f"{rate:.1f}"]]
    return Section(
        f"Steps of {name} by rows",
        "A step reads every weight once, however many rows it has.",
        table,
        [_rows_chart({name: result["rows"]})],
        [machine_line(result["machine"])] if "machine" in result else [],
    )


def _peers(result: Result) -> Section:
    chosen, peers = result["settings"], result["peers"]
    table = [["rows", *(peer["peer"] for peer in peers)]]
    for i, row in enumerate(peers[0]["rows"]):
        table.append([str(row["rows"]), *(f"{peer['rows'][i]['ms_per_step']:.2f}" for peer in peers)])
    table.append(["growth", *(f"{peer['rows'][-1]['ratio_to_fewest_rows']:.2f}x" for peer in peers)])
    details = [f"{peer['peer']}: {peer['detail']}" for peer in peers]
    return Section(
        f"{chosen['shape']} {chosen['format']} beside other engines",
        f"Milliseconds a step with {chosen['context']} tokens of context, taking turns in one run; medians.",
        table,
        [_rows_chart({peer["peer"]: peer["rows"] for peer in peers})],
        [*details, *result["missing"].values(), machine_line(result["machine"])],
    )


def _quality(result: Result) -> Section:
    if "layers" in result:
        table = [["projection", "weights", "group", "zero points", "bits", "error %", "on other inputs %"]]
        for row in result["layers"]:
            cells = [row["projection"], f"{row['quantize']} {row['method']}", str(row["group_size"])]
            cells += ["yes" if row["zero_points"] else "", f"{row['bits']:.2f}"]
            table.append([*cells, f"{row['error_percent']:.2f}", f"{row['error_percent_other_tokens']:.2f}"])
        lead = "Errors of outputs with random weights and made-up inputs: to compare methods, not models."
        return Section(f"Projections of {result['shape']}", lead, table, [], [machine_line(result["machine"])])
    table = [["weights", "group", "zero points", "bits", "KL prompts", "KL answers", "same trees", "same answers"]]
    series: dict[str, list[tuple[float, float]]] = {}
    for row in result["engines"]:
        plain = row["quantize"] == "none"
        name = "float32" if plain else f"{row['quantize']} {row['method']}"
        cells = [name, str(row["group_size"] or ""), "yes" if row["zero_points"] else ""]
        cells += [f"{row['bits']:.2f}", f"{row['prompts']['kl_millinats']:.2f}"]
        cells += [f"{row['answers']['kl_millinats']:.3f}", str(row["same_trees"]), str(row["same_answers"])]
        table.append(cells)
        if row["quantize"] == "int4":
            label = f"{row['method']}{', zero points' if row['zero_points'] else ''}"
            series.setdefault(label, []).append((row["bits"], row["prompts"]["kl_millinats"]))
    chart = [charts.lines(series, "int4: distance from float32", "bits a weight", "KL, mnat")] if series else []
    return Section(
        f"What quantisation costs: {result['checkpoint']}",
        f"{result['prompts']} prompts; KL divergence from the float32 engine in thousandths of a nat a token.",
        table,
        chart,
        [f"gptq calibrated with {result['calibration']}", machine_line(result["machine"])],
    )


def _other(result: Result) -> Section:
    """A kind without charts: its numbers and texts at the top level."""
    table = [["", ""]]
    for key, value in result.items():
        if isinstance(value, str | int | float) and key != "bench":
            table.append([key.replace("_", " "), f"{value:,.4g}" if isinstance(value, float) else str(value)])
    notes = [machine_line(result["machine"])] if "machine" in result else []
    return Section(f"apar bench {result['bench']}", "", table, [], notes)


_SECTIONS: dict[str, Callable[[Result], Section]] = {
    "live": _live,
    "trees": _trees,
    "generate": _generate,
    "rows": _rows,
    "peers": _peers,
    "quality": _quality,
}


def _blocks(books: Result) -> str:
    """KV blocks over the steps of one answer, both ways."""
    plain, forked = books["plain"], books["forked"]
    series = {
        "details inline": list(enumerate(plain["blocks"])),
        "branches": list(enumerate(forked["blocks"])),
        "branches, if nothing were shared": list(enumerate(forked["blocks_without_sharing"])),
    }
    return charts.lines(series, "KV blocks over time", "step", "blocks", whole=True)


def _rows_chart(series: Mapping[str, Sequence[Result]]) -> str:
    points = {
        name: [(row["rows"], 1e3 * row["rows"] / row.get("ms_per_step", row.get("ms"))) for row in rows]
        for name, rows in series.items()
    }
    return charts.lines(points, "tokens a second by rows", "rows of a step", "tokens/s", log_across=True)


def _engine_name(result: Result) -> str:
    chosen = result.get("settings", result)
    shape, weights = chosen.get("shape"), chosen.get("format")
    name = Path(str(shape)).name if shape else str(result.get("engine", {}).get("source", "engine"))
    return f"{name} {weights}" if shape and weights else name


def to_markdown(sections: Sequence[Section]) -> str:
    """Markdown with the charts as data in it."""
    parts = ["# APAR measurements", ""]
    for part in sections:
        parts += [f"## {part.title}", "", part.lead, ""]
        header, *rows = part.table
        parts += ["| " + " | ".join(_cell(cell) for cell in header) + " |", "|" + "---|" * len(header)]
        parts += ["| " + " | ".join(_cell(cell) for cell in row) + " |" for row in rows]
        parts.append("")
        for number, chart in enumerate(part.charts, 1):
            data = base64.b64encode(chart.encode()).decode()
            parts += [f"![{part.title}, chart {number}](data:image/svg+xml;base64,{data})", ""]
        parts += [f"- {_cell(note)}" for note in part.notes]
        parts.append("")
    return "\n".join(parts)


def to_html(sections: Sequence[Section]) -> str:
    """One page that needs nothing else."""
    body: list[str] = []
    for part in sections:
        header, *rows = ([html.escape(cell) for cell in row] for row in part.table)
        table = "<tr>" + "".join(f"<th>{cell}</th>" for cell in header) + "</tr>"
        table += "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
        drawings = "".join(f'<div class="chart">{_apart(c, len(body), i)}</div>' for i, c in enumerate(part.charts))
        notes = "".join(f"<li>{html.escape(note)}</li>" for note in part.notes)
        body.append(
            f"<section><h2>{html.escape(part.title)}</h2><p>{html.escape(part.lead)}</p>"
            f'<div class="wide"><table>{table}</table></div><div class="charts">{drawings}</div><ul>{notes}</ul>'
            "</section>"
        )
    return _PAGE.replace("@BODY@", "\n".join(body))


def _apart(svg: str, section_number: int, number: int) -> str:
    """Ids are one page's: give each chart its own."""
    mark = f"c{section_number}-{number}-"
    return svg.replace('id="', f'id="{mark}').replace("url(#", f"url(#{mark}").replace('href="#', f'href="#{mark}')


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>APAR measurements</title>
<style>
body { margin: 0; background: #f1f5f9; color: #1e293b; font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 64rem; margin: 0 auto; padding: 1.5rem 1rem 3rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin: 0 0 .3rem; }
section { background: #fff; border: 1px solid #e2e8f0; border-radius: .6rem; padding: 1.1rem 1.3rem; margin: 1rem 0; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .4rem 0; }
th, td { padding: .2rem .8rem .2rem 0; text-align: right; border-bottom: 1px solid #e2e8f0; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } th { font-weight: 600; color: #475569; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(27rem, 100%), 1fr)); gap: .8rem; }
.chart svg { width: 100%; height: auto; } ul { color: #64748b; font-size: .82rem; padding-left: 1.1rem; }
</style></head><body><main><h1>APAR measurements</h1>
@BODY@
</main></body></html>
"""
