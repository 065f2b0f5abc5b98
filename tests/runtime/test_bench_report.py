"""The report: one page that needs nothing else, made of real results; whatever they hold stays text."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from apar.export.errors import RequestError
from apar.runtime.bench import charts
from apar.runtime.bench.live_example import live_example, recorded_tree
from apar.runtime.bench.report import read_result, section, to_html, to_markdown, write_report
from apar.runtime.cli import main
from apar.runtime.executor.recorded_trees import text_tokens
from apar.runtime.llm import LLM
from apar.runtime.outputs import BranchOutput, RequestOutput, Timing, Usage
from apar.runtime.sampling_params import SamplingParams

HOSTILE = 'a <script>alert("x")</script> | b $x_1$ & `c`'


@pytest.fixture(scope="module")
def live(tiny_engine: Path) -> dict[str, Any]:
    return live_example(tiny_engine, threads=1, spinning=False)


@pytest.fixture(scope="module")
def results(live: dict[str, Any]) -> list[dict[str, Any]]:
    machine = live["machine"]
    rows = [{"rows": n, "ms_per_step": 2.0 + n, "ms": 2.0 + n, "ratio_to_fewest_rows": 1.0} for n in (1, 2, 8)]
    peers = [{"peer": "apar", "detail": HOSTILE, "rows": rows}, {"peer": "other", "detail": "", "rows": rows}]
    settings = {"shape": "10m", "format": "int4", "context": 8, "answers": 1, "workload": "w"}
    trees = {"bench": "trees", "settings": settings, "engine": live["engine"], "machine": machine, "step": rows}
    trees |= {"all": live["gain"], "forked": None, "example": live["books"] | {"tree": 0}}
    kinds = {"kl_millinats": 1.5}
    engine = {"quantize": "int4", "method": "gptq", "group_size": 32, "zero_points": True, "bits": 5.1}
    engine |= {"prompts": kinds, "answers": kinds, "same_trees": 1, "same_answers": 1}
    layer = {"projection": "down", "columns": 4, "error_percent": 1.0, "error_percent_other_tokens": 2.0} | engine
    quality = {"bench": "quality", "checkpoint": HOSTILE, "prompts": 1, "calibration": "c", "machine": machine}
    return [
        live,
        trees,
        {"bench": "peers", "settings": settings, "peers": peers, "missing": {"x": HOSTILE}, "machine": machine},
        quality | {"engines": [engine, engine | {"quantize": "none"}]},
        {"bench": "quality", "shape": "7b", "layers": [layer], "machine": machine},
        {"rows": rows, "shape": "1b", "format": "int4"},
        {"bench": "host", "host_us_per_step": 12.5, "machine": machine},
    ]


def test_every_kind_on_one_page(results: list[dict[str, Any]]) -> None:
    page = to_html([section(result) for result in results])
    assert page.count("<section>") == len(results)
    drawings = re.findall(r"<svg.*?</svg>", page, flags=re.S)
    assert len(drawings) == 2 + 4 + 1 + 1 + 0 + 1 + 0
    for drawing in drawings:
        ElementTree.fromstring(drawing)
    ids = re.findall(r'id="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"url\(#([^)]+)\)", page)) <= set(ids)
    assert "<script>" not in page and "&lt;script&gt;" in page
    outside = re.findall(r'(?:src|href)="(?!#)[^"]*"|@import|url\((?!#)[^)]*\)', page)
    assert not outside


def test_markdown_is_self_contained(results: list[dict[str, Any]]) -> None:
    page = to_markdown([section(result) for result in results])
    images = re.findall(r"!\[[^\]]*\]\(data:image/svg\+xml;base64,([A-Za-z0-9+/=]+)\)", page)
    assert len(images) == 9
    assert base64.b64decode(images[0]).startswith(b"<svg")
    assert page.count("## ") == len(results)
    for line in page.splitlines():
        if line.startswith("|") and "script" in line:
            assert "\\|" in line


def test_live_answer(live: dict[str, Any]) -> None:
    assert len(live["branches"]) > 2
    root, child = live["branches"][0], live["branches"][1]
    assert root["parent"] is None and child["parent"] == 0
    assert live["books"]["plain"]["rows"] and max(live["books"]["forked"]["rows"]) > 1
    assert live["gain"]["step_gain"] > 1.5
    drawing = charts.gantt(live["branches"], "x")
    assert "branch 1" in drawing and child["label"][:20] in drawing


def test_charts_repeat_themselves(live: dict[str, Any]) -> None:
    assert charts.gantt(live["branches"], "x") == charts.gantt(live["branches"], "x")
    hostile = [live["branches"][0] | {"label": HOSTILE}]
    ElementTree.fromstring(charts.gantt(hostile, HOSTILE))


def branch(number: int, parent: int | None, tokens: int, segments: list[str], children: list[int]) -> BranchOutput:
    return BranchOutput(number, parent, 1, list(range(tokens)), segments, children, "stop", 0, 1)


def test_recorded_trees_keep_the_number_of_tokens(tiny_engine: Path) -> None:
    with LLM(tiny_engine, threads=1, spinning=False) as llm:
        real = llm.generate(["Give me four facts about owls.", "Hi", "Tell me about the violin."], SamplingParams())
    nested = [
        branch(0, None, 12, ["abcde", "fg", ""], [1, 2]),
        branch(1, 0, 7, ["x"], []),
        branch(2, 0, 5, ["y", "z"], [3]),
        branch(3, 2, 4, ["q"], []),
    ]
    made = RequestOutput("x", "", nested, "stop", Usage(5, 28), Timing(0, 0, 0, 1), 1, 0, [1, 2, 3])
    for answer in [*real, made]:
        tree = recorded_tree(answer)
        written = sum(len(b.token_ids) - len(b.children) for b in answer.branches)
        assert abs(text_tokens(tree) - written) <= len(tree["segments"])
        assert sum(detail > 0 for _, detail in tree["segments"]) == len(answer.branches[0].children)


def test_bad_results(tmp_path: Path, results: list[dict[str, Any]]) -> None:
    bad = tmp_path / "bad.json"
    for content, message in (("{", "cannot be read as JSON"), ("[]", "holds no result"), ('{"a": 1}', "no result")):
        bad.write_text(content)
        with pytest.raises(RequestError, match=message):
            read_result(bad)
    with pytest.raises(RequestError, match="cannot be read"):
        read_result(tmp_path / "none.json")
    with pytest.raises(RequestError, match=r"a report is \.html or \.md"):
        write_report(tmp_path / "x.pdf", [])
    with pytest.raises(RequestError, match="cannot be written"):
        write_report(tmp_path / "no" / "x.html", [])


LOOSE = {"bench", "machine", "missing", "text", "tokens", "settings", "shape", "format"}


@pytest.mark.parametrize("number", range(6))
def test_results_that_lack_something(number: int, results: list[dict[str, Any]]) -> None:
    whole = results[number]
    for key in set(whole) - LOOSE:
        with pytest.raises(RequestError, match="lacks something"):
            section({k: v for k, v in whole.items() if k != key})


def test_command(
    tmp_path: Path, tiny_engine: Path, results: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "trees.json"
    source.write_text(json.dumps(results[1]))
    page = tmp_path / "page.html"
    assert main(["bench", "report", str(source), "-o", str(page), "--engine", str(tiny_engine), "-q"]) == 0
    assert "2 sections" in capsys.readouterr().out
    assert "One answer, live" in page.read_text(encoding="utf-8")
    only = ["bench", "report", str(source), "-o", str(tmp_path / "page.md"), "--engine", "none"]
    assert main([*only, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sections"] == ["trees"]
    for wrong in (["-o", "x.pdf"], ["-o", "x.md", str(tmp_path / "none.json")], ["-o", "x.md"]):
        assert main(["bench", "report", "--engine", "none", *wrong]) == 2
        assert "apar bench report: error:" in capsys.readouterr().err


def test_without_matplotlib_it_says_what_to_install() -> None:
    program = "import sys; sys.modules['matplotlib'] = None; from apar.runtime.bench import charts"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "pip install 'apar[report]'" in done.stderr
