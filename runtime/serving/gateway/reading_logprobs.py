"""Log-probabilities of tokens, which come in order of sampling, in the order in which the answer is read."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from apar.runtime.serving.model_responses import BranchStep

Entry = dict[str, Any]
"""Log-probability of one token as the model gives it: branch_id, token, bytes, logprob, top."""


@dataclass(slots=True)
class _Branch:
    segments: list[list[Entry]] = field(default_factory=lambda: [[]])
    children: list[int] = field(default_factory=list)
    finished: bool = False


class ReadingLogprobs:
    """Sorts the entries of one answer: `feed` returns those that can be read by now.

    The rule is that of `reading_order`: a segment, the detail forked at its end with everything below it, the next
    segment. Tokens without text (control tokens) are left out.
    """

    def __init__(self) -> None:
        self._branches: dict[int, _Branch] = {0: _Branch()}
        self._waiting: dict[int, deque[Entry]] = defaultdict(deque)
        self._cursors: list[list[int]] = [[0, 0]]
        """Branch and segment in which the reader is, the innermost last."""

    def feed(self, events: Iterable[BranchStep], entries: Sequence[Entry]) -> list[Entry]:
        """Take in what one response brought."""
        for entry in entries:
            self._waiting[entry["branch_id"]].append(entry)
        for event in events:
            if event.kind == "fork":
                parent = self._branches[event.parent_id]
                parent.children.append(event.branch_id)
                parent.segments.append([])
                self._branches[event.branch_id] = _Branch()
            elif event.kind == "delta":
                waiting = self._waiting[event.branch_id]
                taken = [waiting.popleft() for _ in range(min(event.tokens, len(waiting)))]
                self._branches[event.branch_id].segments[-1] += [entry for entry in taken if entry["bytes"]]
            else:
                self._branches[event.branch_id].finished = True
        return self._readable()

    def _readable(self) -> list[Entry]:
        found: list[Entry] = []
        while self._cursors:
            branch_id, index = self._cursors[-1]
            branch = self._branches[branch_id]
            found += branch.segments[index]
            branch.segments[index] = []
            if index < len(branch.children):
                self._cursors[-1][1] += 1
                self._cursors.append([branch.children[index], 0])
            elif branch.finished:
                self._cursors.pop()
            else:
                break
        return found
