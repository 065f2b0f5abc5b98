"""The live view: what it shows, and that it never exceeds the terminal."""

from __future__ import annotations

import io
import random

import pytest
from rich.cells import cell_len
from rich.console import Console

from apar.runtime.outputs import BranchEvent, DeltaEvent, FinishEvent, ForkEvent
from apar.runtime.terminal import LiveTerminal, TerminalView
from apar.runtime.terminal_parts import printable, tail, wrap

SIZES = [(80, 24), (40, 24), (100, 40), (80, 8), (20, 5), (200, 60), (44, 12), (1, 2), (9, 3)]


def delta(branch: int, text: str, step: int = 1, request: str = "a") -> DeltaEvent:
    return DeltaEvent(request, branch, 1 if branch == 0 else 2, text, [7], step)


def fork(branch: int, step: int = 1, request: str = "a") -> ForkEvent:
    return ForkEvent(request, branch, 0, 2, step)


def finish(branch: int, step: int = 1, request: str = "a") -> FinishEvent:
    return FinishEvent(request, branch, 1 if branch == 0 else 2, "stop", step)


def view_of(*events: BranchEvent, requests: tuple[str, ...] = ("a",)) -> TerminalView:
    view = TerminalView([(request, f"question {request}") for request in requests])
    for event in events:
        view.feed(event)
    return view


def draw(view: TerminalView, width: int, height: int) -> list[str]:
    console = Console(
        width=width, height=height, record=True, file=io.StringIO(), force_terminal=True, legacy_windows=False
    )
    console.print(view.render(width, height))
    return console.export_text().rstrip("\n").split("\n")


def random_events(seed: int, request: str = "a", count: int = 200) -> list[BranchEvent]:
    """A tree that grows in any interleaving, with texts that are hard to draw."""
    rng = random.Random(seed)
    words = [
        "word ",
        "\n",
        "a-very-long-word-without-any-blank ",
        "日本語の文章",
        "1. ",
        "👩‍👩‍👧 ",
        "\t",
        "\x1b[31mred",
        "é",
        "",
    ]
    live, born, events = [0], 1, []
    for step in range(1, count):
        branch = rng.choice(live)
        events.append(delta(branch, rng.choice(words), step, request))
        if branch == 0 and rng.random() < 0.15:
            events.append(fork(born, step, request))
            live.append(born)
            born += 1
        elif branch and rng.random() < 0.1:
            events.append(finish(branch, step, request))
            live.remove(branch)
    return events


@pytest.mark.parametrize(("width", "height"), SIZES)
@pytest.mark.parametrize("seed", range(2))
def test_it_fits_the_terminal_at_every_moment(width: int, height: int, seed: int) -> None:
    view = view_of()
    for i, event in enumerate(random_events(seed)):
        view.feed(event)
        if i % 50 == 10:
            lines = draw(view, width, height)
            assert len(lines) <= height
            assert max(cell_len(line) for line in lines) <= width


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_many_answers_fit_too(width: int, height: int) -> None:
    requests = tuple(f"r{i}" for i in range(9))
    view = view_of(requests=requests)
    streams = [random_events(i, request, 60) for i, request in enumerate(requests[:7])]
    for i, events in enumerate(zip(*streams, strict=False)):
        for event in events:
            view.feed(event)
        if i % 30 == 5:
            lines = draw(view, width, height)
            assert len(lines) <= height
            assert max(cell_len(line) for line in lines) <= width


def test_before_the_first_token_it_says_what_it_waits_for() -> None:
    assert "reading the prompt" in draw(view_of(), 80, 24)[-1]


def test_branches_stand_side_by_side_with_depth_and_text() -> None:
    view = view_of(
        delta(0, "1. Sleep: "),
        fork(1, 2),
        delta(0, "2. Eat: ", 2),
        fork(2, 3),
        delta(1, "eight hours", 3),
        delta(2, "fruit", 4),
    )
    picture = draw(view, 80, 24)
    titles = next(line for line in picture if "⑂1" in line and "⑂2" in line and "depth 2" in line)
    assert titles.count("●") == 2
    assert any("eight hours" in line and "fruit" in line for line in picture)
    assert any("1. Sleep:" in line and "⑂1" in line for line in picture), "the root shows where it forked"
    assert "root depth 1" in picture[0]


def test_a_settled_branch_keeps_its_place_and_loses_its_light() -> None:
    events = [delta(0, "x"), fork(1), fork(2), delta(1, "first"), delta(2, "second"), finish(1, 2)]
    picture = "\n".join(draw(view_of(*events), 80, 24))
    assert "✓ ⑂1" in picture and "● ⑂2" in picture
    assert "first" in picture and "second" in picture


def test_live_branches_take_the_panels_of_settled_ones() -> None:
    events: list[BranchEvent] = [fork(i) for i in range(1, 31)]
    view = view_of(*events)
    draw(view, 80, 24)
    shown = [line for line in draw(view, 80, 24) if "more live" in line]
    assert shown, "branches without a panel are counted"
    for i in range(1, 26):
        view.feed(finish(i, 5))
    picture = "\n".join(draw(view, 80, 24))
    assert all(f"● ⑂{i} " in picture for i in range(26, 31))
    assert "more live" not in picture


def test_small_terminals_get_a_line_a_branch() -> None:
    view = view_of(delta(0, "the plan"), fork(1), delta(1, "the detail " * 20 + "END"), finish(1, 3))
    lines = draw(view, 40, 24)
    assert lines[0].startswith("● root") and "the plan" in lines[0]
    assert lines[1].startswith("✓ ⑂1") and lines[1].rstrip().endswith("END")


def test_figures_and_what_plain_decoding_takes() -> None:
    view = view_of(delta(0, "a", 5), fork(1, 5), delta(0, "b", 6), delta(1, "c", 6), finish(1, 7), delta(0, "d", 7))
    view.kv_used, view.kv_total = 3, 64
    status = view.status(200).plain
    for part in (
        "step 3",
        "1 live",
        "5 tokens",
        "1.67 a step",
        "plain decoding: 5 steps",
        "tokens/s",
        "KV 3/64 blocks",
    ):
        assert part in status
    assert view.status(30).plain.startswith("step 3 · 1 live")


def test_several_answers_get_a_panel_each() -> None:
    view = view_of(delta(0, "uno", 1, "a"), delta(0, "due", 1, "b"), finish(0, 2, "b"), requests=("a", "b", "c"))
    picture = "\n".join(draw(view, 120, 24))
    assert all(f"question {name}" in picture for name in "abc")
    assert "uno" in picture and "due" in picture
    assert "1/3 done, 1 live" in picture


def test_the_picture_does_not_shrink() -> None:
    view = view_of(delta(0, "x"), *[fork(i) for i in range(1, 9)])
    tall = len(draw(view, 80, 30))
    for i in range(1, 9):
        view.feed(finish(i, 3))
    assert len(draw(view, 80, 30)) == tall


def test_text_cannot_steer_the_terminal() -> None:
    assert printable("a\x1b[2Jb\x07\u202ec\r\nd\te") == "a\ufffd[2Jb\ufffd\ufffdc\nd    e"
    picture = "\n".join(draw(view_of(delta(0, "\x1b]0;title\x07\x1b[2J")), 80, 24))
    assert "\x1b" not in picture and "\x07" not in picture


def test_wrapping_by_columns() -> None:
    assert wrap("one two three", 7) == ("one two", "three")
    assert wrap("日本語日本語", 4) == ("日本", "語日", "本語")
    assert wrap("abcdefgh", 3) == ("abc", "def", "gh")
    assert tail("first\n\nsecond third", 8, 2) == ["second", "third"]


def test_the_live_terminal_takes_its_picture_away() -> None:
    out = io.StringIO()
    console = Console(file=out, width=80, height=24, force_terminal=True, legacy_windows=False)
    view = view_of(delta(0, "hello"))
    with LiveTerminal(view, console) as live:
        view.feed(delta(0, " there", 2))
        live.refresh(force=True)
    drawn = out.getvalue()
    assert "hello there" in drawn
    assert drawn.endswith("\x1b[2K") and "\x1b[?25h" in drawn, "lines are erased, the cursor is shown again"
