"""The assembly rule against recorded trees, and streaming against assembly for every interleaving."""

from __future__ import annotations

import json
import random
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apar.runtime.outputs import BranchEvent, BranchOutput, DeltaEvent, FinishEvent, ForkEvent
from apar.runtime.reading_order import EventAssembler, ReadingOrderStream
from apar.runtime.text import assemble, is_list_item, place

RECORDED = json.loads((Path(__file__).parent / "data" / "recorded_trees.json").read_text(encoding="utf-8"))


def branch(branch_id: int, parent_id: int | None, depth: int, segments: list[str], children: list[int]) -> BranchOutput:
    return BranchOutput(branch_id, parent_id, depth, [], segments, children, "stop", 0, 0)


@pytest.mark.parametrize("tree", RECORDED, ids=lambda tree: tree["name"])
def test_recorded_trees(tree: dict) -> None:
    branches = [branch(**b) for b in tree["branches"]]
    assert assemble(branches) == tree["text"]
    assert assemble(branches[::-1]) == tree["text"]
    if "raw" in tree:
        assert assemble(branches, raw=True) == tree["raw"]


@pytest.mark.parametrize(
    ("node", "listed"),
    [("1. a", True), ("see 12. b", True), ("1.a", False), ("a. ", False), ("1 . a", False), ("١. ب", True)],
)
def test_list_items(node: str, listed: bool) -> None:
    assert is_list_item(node) is listed


def test_list_items_in_linear_time() -> None:
    start = time.thread_time()
    assert not is_list_item("1" * 1_000_000)
    assert time.thread_time() - start < 1.0


@given(
    st.text(" \n\ta1.", max_size=8),
    st.text(" \na1.", max_size=8),
    st.text(" \n\ta1. ", max_size=6),
    st.sampled_from(["first", "detail", "next"]),
    st.booleans(),
)
@settings(max_examples=500, deadline=None)
def test_a_piece_with_visible_text_only_grows(piece, more, node, kind, opens) -> None:
    if piece.strip():
        assert place(piece + more, kind, node, opens) == place(piece, kind, node, opens) + more


def test_what_is_no_tree() -> None:
    assert assemble([]) == ""
    with pytest.raises(ValueError, match="roots"):
        assemble([branch(1, 0, 2, ["a"], [])])
    with pytest.raises(ValueError, match="missing"):
        assemble([branch(0, None, 1, ["a", "b"], [1])])
    with pytest.raises(ValueError, match="segment"):
        assemble([branch(0, None, 1, ["a"], [1]), branch(1, 0, 2, ["b"], [])])
    with pytest.raises(ValueError, match="tree"):
        assemble([branch(0, None, 1, ["a", "b"], [1]), branch(1, 0, 2, ["b", ""], [1])])


def test_depth_is_not_bounded_by_recursion() -> None:
    deep = 5000
    branches = [branch(i, i - 1 if i else None, i + 1, ["a", "b"], [i + 1]) for i in range(deep)]
    branches.append(branch(deep, deep - 1, deep + 1, ["end"], []))
    assert assemble(branches, raw=True) == "a" * deep + "end" + "b" * deep
    stream = ReadingOrderStream(raw=True)
    text = "".join(stream.delta(i, "a") + stream.fork(i + 1, i) for i in range(deep))
    text += "".join(stream.delta(i, "b") for i in range(deep)) + stream.delta(deep, "end")
    text += "".join(stream.finish(i) for i in range(deep + 1))
    assert text == assemble(branches, raw=True)


@dataclass
class Growing:
    """A branch of a random tree and the actions it has yet to take."""

    branch_id: int
    parent_id: int | None
    depth: int
    actions: list[str | None]
    """Text to say; None: fork."""
    segments: list[str] = field(default_factory=lambda: [""])
    children: list[int] = field(default_factory=list)


ACTIONS = st.lists(
    st.one_of(st.none(), st.sampled_from(["", " ", "\n", "\n\n", "a", "b ", "1. ", "2", ".", " c\n"])), max_size=8
)


@st.composite
def histories(draw: st.DrawFn) -> tuple[list[BranchOutput], list[BranchEvent]]:
    """A tree and its events in one of the orders in which they can happen."""
    events: list[BranchEvent] = []
    born = [Growing(0, None, 1, draw(ACTIONS))]
    running = list(born)
    while running:
        one = running[draw(st.integers(0, len(running) - 1))]
        if not one.actions:
            events.append(FinishEvent("r", one.branch_id, one.depth, "stop", 0))
            running.remove(one)
            continue
        action = one.actions.pop(0)
        if action is not None:
            one.segments[-1] += action
            events.append(DeltaEvent("r", one.branch_id, one.depth, action, [7], 0))
        elif len(born) < 12:
            child = Growing(len(born), one.branch_id, one.depth + 1, draw(ACTIONS))
            one.children.append(child.branch_id)
            one.segments.append("")
            born.append(child)
            running.append(child)
            events.append(ForkEvent("r", child.branch_id, one.branch_id, child.depth, 0))
    return [branch(b.branch_id, b.parent_id, b.depth, b.segments, b.children) for b in born], events


@given(histories(), st.booleans())
@settings(max_examples=250, deadline=None)
def test_streams_equal_assembly(history: tuple[list[BranchOutput], list[BranchEvent]], raw: bool) -> None:
    branches, events = history
    stream, view = ReadingOrderStream(raw=raw), EventAssembler()
    text = ""
    for event in events:
        text += stream.feed(event)
        view.feed(event)
        assert view.text(raw).startswith(text), "what was sent is part of what is known"
    assert text == assemble(branches, raw)
    assert stream.done and view.finished
    assert view.text(raw) == text
    assert [b.segments for b in view.branches.values()] == [b.segments for b in branches]
    assert len(view.branches[0].token_ids) == sum(isinstance(e, DeltaEvent) and e.branch_id == 0 for e in events)


@given(histories(), st.booleans())
@settings(max_examples=150, deadline=None)
def test_streams_hold_back_nothing_that_is_certain(history, raw: bool) -> None:
    """After each event, the text sent is the answer up to the first place where something may still come in."""
    _, events = history
    stream, view = ReadingOrderStream(raw=raw), EventAssembler()
    text = ""
    for event in events:
        text += stream.feed(event)
        view.feed(event)
        assert text == certain(view, raw)


def certain(view: EventAssembler, raw: bool) -> str:
    """The assembled answer, cut at the first open end; whitespace that a later character decides about is cut off."""
    pieces: list[str] = []
    stack = [(0, 0, "")]
    while stack:
        branch_id, index, node = stack.pop()
        one = view.branches[branch_id]
        kind = "next" if index else "detail" if branch_id else "first"
        segment = one.segments[index]
        pieces.append(segment if raw else place(segment, kind, node, not "".join(pieces)))
        if index < len(one.children):
            stack += [(branch_id, index + 1, ""), (one.children[index], 0, segment)]
        elif one.finish_reason is None:
            break
    return "".join(pieces)


def test_text_that_cannot_move_is_sent_at_once() -> None:
    stream = ReadingOrderStream()
    assert stream.delta(0, "1. Eat:") == "1. Eat:"
    assert stream.fork(1, 0) == ""
    assert stream.delta(0, "2. Sleep:") == "", "waits for the detail of 1"
    assert stream.delta(1, "\n") == "", "a newline alone decides nothing"
    assert stream.delta(1, "Fruit") == "\nFruit"
    assert stream.fork(2, 0) == ""
    assert stream.delta(2, " Much") == ""
    assert stream.finish(2) == ""
    assert stream.finish(0) == ""
    assert stream.delta(1, ".") == "."
    assert stream.finish(1) == "\n\n2. Sleep:\nMuch"
    assert stream.done


def test_events_that_cannot_be() -> None:
    stream = ReadingOrderStream()
    with pytest.raises(ValueError, match="never forked"):
        stream.delta(1, "a")
    stream.fork(1, 0)
    with pytest.raises(ValueError, match="twice"):
        stream.fork(1, 0)
    stream.finish(1)
    with pytest.raises(ValueError, match="has finished"):
        stream.delta(1, "a")
    with pytest.raises(ValueError, match="never forked"):
        EventAssembler().feed(DeltaEvent("r", 3, 1, "a", [], 0))


def test_time_grows_with_the_number_of_events() -> None:
    def seconds(tokens: int) -> float:
        best = float("inf")
        for _ in range(3):
            stream = ReadingOrderStream()
            start = time.thread_time()
            for child in range(1, 9):
                stream.delta(0, "1. a")
                stream.fork(child, 0)
            order = random.Random(0)
            for _ in range(tokens):
                stream.delta(order.randrange(9), order.choice([" ", "ab"]))
            for branch_id in range(9):
                stream.finish(branch_id)
            assert stream.done
            best = min(best, time.thread_time() - start)
        return best

    small, large = seconds(2_000), seconds(20_000)
    assert large < 40 * small + 0.1
