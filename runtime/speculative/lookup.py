"""Prompt lookup: where did the last tokens of a path stand before, anywhere in the request, and what followed?"""

from __future__ import annotations

from collections.abc import Sequence

MAX_ENTRIES = 1 << 16
"""Runs of tokens that an index remembers; the oldest are forgotten first."""

Run = tuple[int, ...]


class LookupIndex:
    """The text of one request, prompt and all branches, by its runs of `shortest` to `longest` tokens.

    Every branch adds what it says, and finds what any other said. Adding a token costs a few dictionary entries.

    Args:
        prompt: the request's prompt.
        shortest: length of the shortest run that is looked up.
        longest: of the longest.
        max_entries: bound of the memory.
    """

    def __init__(self, prompt: Sequence[int], shortest: int, longest: int, max_entries: int = MAX_ENTRIES) -> None:
        self.shortest = shortest
        self.longest = longest
        self.max_entries = max_entries
        self._texts: dict[int, list[int]] = {}
        self._next: dict[Run, tuple[list[int], int]] = {}
        """A run -> where what followed it the last time begins: a text, and a place in it."""
        self.begin(0, ())
        for token in prompt:
            self.append(0, token)

    def __len__(self) -> int:
        return len(self._next)

    def begin(self, branch: int, context: Sequence[int]) -> None:
        """A branch begins; `context` are the tokens of its path before its own."""
        self._texts[branch] = list(context[-self.longest :]) if context else []

    def append(self, branch: int, token: int) -> None:
        """A branch said a token."""
        text = self._texts[branch]
        size = len(text)
        for length in range(self.shortest, min(self.longest, size) + 1):
            run = tuple(text[size - length :])
            self._next.pop(run, None)  # so that the dictionary is in order of last use
            self._next[run] = (text, size)
        while len(self._next) > self.max_entries:
            del self._next[next(iter(self._next))]
        text.append(token)

    def follow(self, branch: int, count: int) -> list[int]:
        """Up to `count` tokens that followed the longest run that ends the branch's path, where it stood last."""
        text = self._texts.get(branch)
        if text is None:
            return []
        size = len(text)
        for length in range(min(self.longest, size), self.shortest - 1, -1):
            found = self._next.get(tuple(text[size - length :]))
            if found is not None:
                source, place = found
                return source[place : place + count]
        return []

    def end(self, branch: int) -> None:
        """A branch ended: what it said stays, it says no more."""
        self._texts.pop(branch, None)
