"""From a finished paragraph tree to its text in reading order.

`place` is the one function that holds the assembly rule; `reading_order` uses it while streaming.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal, Protocol

PieceKind = Literal["first", "detail", "next"]
"""What a piece of text is: the root's text before any fork; a child's text before its own forks; a branch's text
after one of its forks."""

_LIST_ITEM = re.compile(r"\d\. ")


class TextBranch(Protocol):
    """What assembly needs of a branch: `outputs.BranchOutput` and `reading_order.BranchView` have it."""

    @property
    def branch_id(self) -> int: ...
    @property
    def parent_id(self) -> int | None: ...
    @property
    def segments(self) -> Sequence[str]: ...
    @property
    def children(self) -> Sequence[int]: ...


def place(piece: str, kind: PieceKind, node: str = "", opens: bool = False) -> str:
    r"""`piece` as it appears in the answer: its separator in front, its own leading blanks and newlines settled.

    `node` is the text of the segment at whose end a detail was forked (its own text alone), `opens` says that
    nothing of the answer has been written yet. docs/decoding.md, "Text assembly", has the reasons:

    - first: as it is.
    - A detail or next piece of nothing but whitespace: nothing at all, and no separator.
    - One that opens the answer: no separator, and no blanks or newlines in front.
    - detail: leading blanks go; if it begins with a newline, no separator; otherwise "\n" where `node` holds a list
      item (`\d+\. `), else one blank. A newline (or, for the blank, any whitespace) that ends `node` serves instead.
    - next: as it is if it begins with "\n\n"; otherwise "\n\n" and the piece without its leading newlines.

    Holds for streaming: once `piece` has a character that is no whitespace, `place(piece + more, ...)` is
    `place(piece, ...) + more`.
    """
    if kind == "first":
        return piece
    if not piece or piece.isspace():
        return ""
    if opens:
        return piece.lstrip(" \n")
    if kind == "next":
        return piece if piece.startswith("\n\n") else "\n\n" + piece.lstrip("\n")
    piece = piece.lstrip(" ")
    if piece.startswith("\n"):
        return piece
    if is_list_item(node):
        return piece if node.endswith("\n") else "\n" + piece
    return piece if node[-1:].isspace() else " " + piece


def is_list_item(node: str) -> bool:
    r"""Whether a node's text matches the reference's `\d+\. `, in linear time: one digit before the dot will do."""
    return _LIST_ITEM.search(node) is not None


def assemble(branches: Sequence[TextBranch], raw: bool = False) -> str:
    """The tree in reading order: a segment, the detail forked at its end with all below it, the next segment.

    `branches` in any order, one of them the root (no parent). `raw`: segments as they are, no rule applied.
    Raises ValueError where they are no tree. Iterative: depth is bounded by memory alone.
    """
    if not branches:
        return ""
    by_id = {branch.branch_id: branch for branch in branches}
    roots = [branch for branch in branches if branch.parent_id is None]
    if len(roots) != 1 or len(by_id) != len(branches):
        raise ValueError(f"{len(branches)} branches with {len(by_id)} ids and {len(roots)} roots are no paragraph tree")
    written: list[str] = []
    opens = True
    stack: list[tuple[TextBranch, int, str]] = [(roots[0], 0, "")]
    visited = 0
    while stack:
        branch, index, node = stack.pop()
        if index == 0:
            visited += 1
            if len(branch.segments) != len(branch.children) + 1 or visited > len(branches):
                raise ValueError(f"branch {branch.branch_id} is no tree: one segment more than children is due")
        segment = branch.segments[index]
        kind: PieceKind = "next" if index else "detail" if branch.parent_id is not None else "first"
        text = segment if raw else place(segment, kind, node, opens)
        if text:
            written.append(text)
            opens = False
        if index < len(branch.children):
            child = by_id.get(branch.children[index])
            if child is None:
                raise ValueError(f"the child {branch.children[index]} of branch {branch.branch_id} is missing")
            stack.append((branch, index + 1, ""))
            stack.append((child, 0, segment))
    return "".join(written)
