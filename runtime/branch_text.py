"""One branch's text as its tokens come, where stop strings are looked for: segments between forks."""

from __future__ import annotations

from apar.runtime.detokenizer import IncrementalDetokenizer, StopChecker, StopStrings
from apar.runtime.tokenizer import Tokenizer


class BranchText:
    """Turns the tokens of one branch into segments. Incomplete characters and what may begin a stop string are held
    back.

    Args:
        tokenizer: of the engine.
        stops: compiled stop strings of the request, shared by its branches.
        unchecked: how many first tokens no stop string is looked for in (`min_tokens` in the root).
    """

    __slots__ = ("_checker", "_detokenizer", "_parts", "_unchecked", "segments")

    def __init__(self, tokenizer: Tokenizer, stops: StopStrings, unchecked: int = 0) -> None:
        self.segments: list[str] = []
        """Those that are complete."""
        self._parts: list[str] = []
        self._detokenizer = IncrementalDetokenizer(tokenizer)
        self._checker = StopChecker(stops)
        self._unchecked = unchecked

    @property
    def stopped(self) -> bool:
        """Whether a stop string was met: the text ends before it (or with it, if it is to be included)."""
        return self._checker.hit is not None

    def feed_one(self, token_id: int) -> str:
        """Add a token; returns the text that became certain."""
        text = self._detokenizer.feed_one(token_id)
        if self._unchecked > 0:
            self._unchecked -= 1
        else:
            text = self._checker.feed(text)
        self._parts.append(text)
        return text

    def flush(self) -> str:
        """Close the segment, at a [Fork] or at the branch's end; returns text that was held back."""
        text = self._checker.feed(self._detokenizer.flush()) + self._checker.flush()
        self.segments.append("".join(self._parts) + text)
        self._parts.clear()
        return text
