"""Tokens to text while they come: bytes held back until they are a character, text until it is no stop string."""

from __future__ import annotations

import codecs
import re
from collections import deque
from collections.abc import Iterable

from apar.runtime.tokenizer import Tokenizer


class IncrementalDetokenizer:
    """Text of one branch, token by token; how tokens are split between calls never changes the text.

    Incomplete UTF-8 is held back. Bytes that cannot be UTF-8 become U+FFFD, as `bytes.decode(errors="replace")` has it.
    """

    __slots__ = ("_bytes_of", "_held", "_strip", "_strips_blank", "_text_of")

    def __init__(self, tokenizer: Tokenizer, starts_piece: bool = True) -> None:
        """`starts_piece`: the next token follows the prompt, a [Fork] or a [Child], so that the blank which
        SentencePiece puts in front of every text (and only that one) is dropped."""
        self._bytes_of = tokenizer.bytes_table.__getitem__
        self._text_of = tokenizer.text_table.__getitem__
        self._strips_blank = tokenizer.strips_blank
        self._strip = starts_piece and self._strips_blank
        self._held = b""

    def feed(self, token_ids: Iterable[int]) -> str:
        """Text that these tokens complete; "" while a character is unfinished. Ids must be in the vocabulary."""
        data = b"".join(map(self._bytes_of, token_ids))
        if not data:
            return ""
        if self._strip:
            self._strip = False
            data = data.removeprefix(b" ")
        if self._held:
            data = self._held + data
        text, used = codecs.utf_8_decode(data, "replace", False)
        self._held = data[used:] if used < len(data) else b""
        return text

    def feed_one(self, token_id: int) -> str:
        """The same of one token, faster."""
        if not (self._held or self._strip):
            text = self._text_of(token_id)
            if text is not None:
                return text
        return self.feed((token_id,))

    def flush(self) -> str:
        """End the piece: what is held back comes out as U+FFFD. The next token starts a new piece."""
        text = codecs.utf_8_decode(self._held, "replace", True)[0] if self._held else ""
        self._held = b""
        self._strip = self._strips_blank
        return text


class StopStrings:
    """Stop strings of a request, compiled once for all its branches.

    An Aho-Corasick automaton (Aho and Corasick, CACM 1975): a state is the longest suffix of the text that begins a
    stop string, so its depth is how much text must be held back. Time is linear in the text, whatever the strings.
    """

    __slots__ = ("depth", "fail", "first", "goto", "include_stop", "match")

    def __init__(self, strings: Iterable[str], include_stop: bool = False) -> None:
        """Empty strings are ignored. `include_stop`: the string that was hit stays in the text."""
        self.include_stop = include_stop
        self.goto: list[dict[str, int]] = [{}]
        self.depth = [0]
        self.fail = [0]
        self.match: list[str | None] = [None]
        for string in strings:
            self._add(string)
        self._link()
        self.first = re.compile("[" + "".join(re.escape(c) for c in self.goto[0]) + "]") if self.goto[0] else None

    def _add(self, string: str) -> None:
        state = 0
        for character in string:
            following = self.goto[state].get(character)
            if following is None:
                following = len(self.goto)
                self.goto[state][character] = following
                self.goto.append({})
                self.depth.append(self.depth[state] + 1)
                self.fail.append(0)
                self.match.append(None)
            state = following
        if state:
            self.match[state] = string

    def _link(self) -> None:
        queue = deque(self.goto[0].values())
        while queue:
            state = queue.popleft()
            for character, following in self.goto[state].items():
                self.fail[following] = self.step(self.fail[state], character)
                if self.match[following] is None:
                    self.match[following] = self.match[self.fail[following]]
                queue.append(following)

    def step(self, state: int, character: str) -> int:
        """The state after one more character."""
        goto, fail = self.goto, self.fail
        while state and character not in goto[state]:
            state = fail[state]
        return goto[state].get(character, 0)


class StopChecker:
    """Watches one branch's text for stop strings; a stop string never reaches over a fork (`flush` there).

    The string whose last character comes first wins; of several that end there, the longest.
    """

    __slots__ = ("_held", "_state", "_stops", "hit")

    def __init__(self, stops: StopStrings | Iterable[str], include_stop: bool = False) -> None:
        """`stops`: compiled, or the strings; `include_stop` counts only in the latter case."""
        self._stops = stops if isinstance(stops, StopStrings) else StopStrings(stops, include_stop)
        self._state = 0
        self._held = ""
        self.hit: str | None = None
        """The stop string that ended the text; None while there was none. Text after it is dropped."""

    def feed(self, text: str) -> str:
        """Text that is certain not to begin a stop string; ends before the stop string once `hit` is set."""
        stops = self._stops
        if self.hit is not None:
            return ""
        if stops.first is None:
            return text
        state, position, goto, match = self._state, 0, stops.goto, stops.match
        while position < len(text):
            if not state:
                found = stops.first.search(text, position)
                if found is None:
                    break
                position = found.start()
            character = text[position]
            state = goto[state].get(character) or stops.step(state, character)
            position += 1
            stop = match[state]
            if stop is not None:
                self.hit = stop
                whole = self._held + text[:position]
                self._held, self._state = "", 0
                return whole if stops.include_stop else whole[: len(whole) - len(stop)]
        depth = stops.depth[state]
        whole = self._held + text
        self._state = state
        self._held = whole[len(whole) - depth :]
        return whole[: len(whole) - depth]

    def flush(self) -> str:
        """End the piece (a fork, or the branch's end): text that was held back; watching starts anew."""
        text, self._held, self._state = self._held, "", 0
        return text
