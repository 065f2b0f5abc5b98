"""One branch's text as its tokens come: segments between forks, stop strings, incomplete characters held back."""

from __future__ import annotations

from collections.abc import Iterable

from apar.runtime.detokenizer import IncrementalDetokenizer, StopChecker, StopStrings
from apar.runtime.tokenizer import Tokenizer


class BranchText:
    """Turns the tokens of one branch into segments.

    Args:
        tokenizer: of the engine.
        stops: compiled stop strings of the request, shared by its branches; None for none.
        unchecked: how many first tokens no stop string is looked for in (`min_tokens` in the root).
    """

    __slots__ = ("_checker", "_detokenizer", "_unchecked", "segments")

    def __init__(self, tokenizer: Tokenizer, stops: StopStrings | None = None, unchecked: int = 0) -> None:
        self.segments = [""]
        self._detokenizer = IncrementalDetokenizer(tokenizer)
        self._checker = StopChecker(stops) if stops is not None else None
        self._unchecked = unchecked

    @property
    def stopped(self) -> bool:
        """Whether a stop string was met: the text ends before it (or with it, if it is to be included)."""
        return self._checker is not None and self._checker.hit is not None

    def feed(self, token_ids: Iterable[int]) -> str:
        """Add tokens; returns the text that became certain."""
        text = self._detokenizer.feed(token_ids)
        if self._checker is not None:
            if self._unchecked > 0:
                self._unchecked -= 1
            else:
                text = self._checker.feed(text)
        if text:
            self.segments[-1] += text
        return text

    def fork(self) -> str:
        """Close the segment at a [Fork]; returns text that was held back."""
        text = self._flush()
        self.segments.append("")
        return text

    def finish(self) -> str:
        """End the branch; returns text that was held back."""
        return self._flush()

    def _flush(self) -> str:
        text = self._detokenizer.flush()
        if self._checker is not None:
            text = self._checker.feed(text) + self._checker.flush()
        if text:
            self.segments[-1] += text
        return text
