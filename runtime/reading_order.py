"""Branches that grow in any interleaving, as one text in reading order, and as a tree that a client draws.

Events of one request come in this order per branch: `fork` (except for the root), `delta`s and `fork`s of its
children as they happen, `finish`. A delta before a fork belongs to the segment that the fork ends.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from apar.runtime.outputs import BranchEvent, DeltaEvent, FinishEvent, FinishReason, ForkEvent
from apar.runtime.text import PieceKind, assemble, place


@dataclass(slots=True)
class _Segment:
    """Text between two forks of a branch, as far as it is known."""

    parts: list[str] = field(default_factory=list)
    read: int = 0
    """How many of `parts` are in the answer, or known to be whitespace that waits in front of it."""
    settled: bool = False
    """The separator is decided: every further part goes out as it is."""
    child: int | None = None
    """The branch forked at its end; None while the segment is open, or where it is the branch's last."""


@dataclass(slots=True)
class _Branch:
    segments: list[_Segment] = field(default_factory=lambda: [_Segment()])
    finished: bool = False


@dataclass(slots=True)
class _Cursor:
    """Where the reader is inside a branch."""

    branch_id: int
    kind: PieceKind
    node: str
    index: int = 0


class ReadingOrderStream:
    """Text that can no longer move or change, as soon as that is certain; the rest waits in its branch.

    Every method returns the text it sets free ("" mostly). Once every branch is finished, all of it concatenated
    equals `text.assemble` of the tree. Amortised O(1) per event and character: text is joined once, and only
    events of the branch that is being read do any work.
    """

    def __init__(self, root_id: int = 0, raw: bool = False) -> None:
        self._raw = raw
        self._branches: dict[int, _Branch] = {root_id: _Branch()}
        self._stack = [_Cursor(root_id, "first", "")]
        self._opens = True

    @property
    def done(self) -> bool:
        """Whether the whole answer has been written."""
        return not self._stack

    def fork(self, branch_id: int, parent_id: int) -> str:
        """`branch_id` was forked off `parent_id`, at the end of what the parent has said so far."""
        parent = self._running(parent_id)
        if branch_id in self._branches:
            raise ValueError(f"branch {branch_id} was forked twice")
        self._branches[branch_id] = _Branch()
        parent.segments[-1].child = branch_id
        parent.segments.append(_Segment())
        return self._advance(parent_id)

    def delta(self, branch_id: int, text: str) -> str:
        """`branch_id` said `text`."""
        branch = self._branches.get(branch_id)
        if branch is None or branch.finished:
            branch = self._running(branch_id)  # which says what is wrong
        if not text:
            return ""
        segment = branch.segments[-1]
        segment.parts.append(text)
        cursor = self._stack[-1]
        if cursor.branch_id != branch_id:
            return ""
        if segment.settled and segment.read == len(segment.parts) - 1:  # all but the first of a piece's deltas
            segment.read += 1
            return text
        return self._advance(branch_id)

    def finish(self, branch_id: int) -> str:
        """`branch_id` says no more."""
        self._running(branch_id).finished = True
        return self._advance(branch_id)

    def feed(self, event: BranchEvent) -> str:
        """The same from an event of `outputs`."""
        if isinstance(event, ForkEvent):
            return self.fork(event.branch_id, event.parent_id)
        if isinstance(event, DeltaEvent):
            return self.delta(event.branch_id, event.text)
        return self.finish(event.branch_id)

    def _running(self, branch_id: int) -> _Branch:
        branch = self._branches.get(branch_id)
        if branch is None or branch.finished:
            raise ValueError(f"event for branch {branch_id}, which {'has finished' if branch else 'was never forked'}")
        return branch

    def _advance(self, branch_id: int) -> str:
        if not self._stack or self._stack[-1].branch_id != branch_id:
            return ""
        written: list[str] = []
        while self._stack:
            cursor = self._stack[-1]
            branch = self._branches[cursor.branch_id]
            segment = branch.segments[cursor.index]
            closed = segment.child is not None or branch.finished
            self._write(segment, cursor, closed, written)
            if segment.child is not None:
                node = "".join(segment.parts)
                segment.parts.clear()
                cursor.index += 1
                cursor.kind = "next"
                self._stack.append(_Cursor(segment.child, "detail", node))
            elif branch.finished:
                segment.parts.clear()
                self._stack.pop()
            else:
                break
        return "".join(written)

    def _write(self, segment: _Segment, cursor: _Cursor, closed: bool, written: list[str]) -> None:
        """Append what of `segment` can go out. A piece's leading whitespace waits for what follows it."""
        parts = segment.parts
        if not (segment.settled or self._raw or cursor.kind == "first"):
            while segment.read < len(parts) and parts[segment.read].isspace():
                segment.read += 1
            if segment.read == len(parts) and not closed:
                return
            text = place("".join(parts), cursor.kind, cursor.node, self._opens)
            segment.settled = True
        else:
            text = "".join(parts[segment.read :])
            segment.settled = segment.settled or bool(text)
        segment.read = len(parts)
        if text:
            self._opens = False
            written.append(text)


@dataclass(slots=True)
class BranchView:
    """A branch as a client knows it from events; has what `text.assemble` needs."""

    branch_id: int
    parent_id: int | None
    depth: int
    children: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    """None while the branch is running."""
    parts: list[list[str]] = field(default_factory=lambda: [[]])
    """Deltas of each segment."""

    @property
    def segments(self) -> list[str]:
        """Text between the branch's forks: one more than `children`."""
        return ["".join(parts) for parts in self.parts]


class EventAssembler:
    """Rebuilds the branches of one request from its events."""

    def __init__(self, root_id: int = 0) -> None:
        self.branches: dict[int, BranchView] = {root_id: BranchView(root_id, None, 1)}

    def feed(self, event: BranchEvent) -> BranchView:
        """Apply one event; returns the branch it is about. Raises ValueError for a branch that was never forked."""
        if isinstance(event, ForkEvent):
            parent = self._branch(event.parent_id)
            parent.children.append(event.branch_id)
            parent.parts.append([])
            view = BranchView(event.branch_id, event.parent_id, event.depth)
            self.branches[event.branch_id] = view
            return view
        view = self._branch(event.branch_id)
        if isinstance(event, DeltaEvent):
            if event.text:
                view.parts[-1].append(event.text)
            view.token_ids.extend(event.token_ids)
        elif isinstance(event, FinishEvent):
            view.finish_reason = event.reason
        return view

    @property
    def finished(self) -> bool:
        """Whether every branch known so far has finished."""
        return all(branch.finish_reason is not None for branch in self.branches.values())

    def text(self, raw: bool = False) -> str:
        """The tree as it stands, in reading order."""
        return assemble(list(self.branches.values()), raw)

    def _branch(self, branch_id: int) -> BranchView:
        try:
            return self.branches[branch_id]
        except KeyError:
            raise ValueError(f"event for branch {branch_id}, which was never forked") from None
