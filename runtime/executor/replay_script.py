"""The automaton behind the replay executor: recorded paragraph trees as states, tokens as edges.

A state is "the path so far is a prefix of this tree's script, up to here". Every state has a likeliest
next token (`first`), sometimes a second one, and after a [Fork] the forced [Child]:

    prompt ... main text of segment i --[Fork]--> after the fork --> main text of segment i + 1 ... --> EOS
                        |                              \\--[Child]--> detail text ... --> EOS
                        \\--(the fork was banned)--> detail text, inline --> main text of segment i + 1

States of a straight run of text have consecutive numbers, which is what makes long prompts cheap.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from apar.export.errors import ExecutorError
from apar.runtime.executor.recorded_trees import Tree

PAD, BOS, EOS, FORK, CHILD, TEXT = range(6)
"""Token ids of the replay vocabulary; TEXT and every id above it are text."""

EMPTY, OFF = 0, 1
"""State 0: nothing was ever written here. State 1: a path that no recorded tree follows."""

ANY = -2
NONE = -1

IntArray = npt.NDArray[np.int32]
IndexArray = npt.NDArray[np.int64]


class Script:
    """Edges of the automaton for a list of trees, as arrays indexed by state."""

    first_token: IntArray
    """[N] the token that a greedy decoder takes."""
    first_state: IntArray
    """[N] where it leads."""
    second_token: IntArray
    """[N] what to take where `first_token` is banned; NONE: nothing, ANY: any text token follows."""
    second_state: IntArray
    """[N] where it leads."""
    child_state: IntArray
    """[N] where a forced [Child] leads; OFF except right after a [Fork]."""

    def __init__(self, trees: Sequence[Tree], vocab_size: int) -> None:
        """Lay out the states of `trees` over a vocabulary of `vocab_size` >= 8 ids.

        Raises ExecutorError if a tree is malformed.
        """
        if vocab_size < TEXT + 3:
            raise ExecutorError(f"a replay vocabulary needs at least {TEXT + 3} ids, not {vocab_size}")
        if not trees:
            raise ExecutorError("replay needs at least one recorded tree")
        self._vocab_size = vocab_size
        self._width = max(1, (len(trees) - 1).bit_length())
        self._trees = [self._checked(index, tree) for index, tree in enumerate(trees)]
        self._edges: list[list[int]] = [[], [], [], [], []]
        self._build()
        arrays = [np.asarray(column, dtype=np.int32) for column in self._edges]
        self.first_token, self.first_state, self.second_token, self.second_state, self.child_state = arrays
        del self._edges

    def prompt(self, index: int, salt: int = 0) -> list[int]:
        """Prompt token ids of tree `index`: BOS, the index in binary, then filler that depends on `salt`.

        Two prompts of one tree with different salts share only their first `1 + ceil(log2(trees))` tokens, so
        a prefix cache finds nothing more in common.
        """
        if not 0 <= index < len(self._trees):
            raise ExecutorError(f"there is no recorded tree {index}; trees are 0..{len(self._trees) - 1}")
        bits = [TEXT + (index >> shift & 1) for shift in reversed(range(self._width))]
        fill = self._trees[index][0] - 1 - self._width
        return [BOS, *bits, *self._text(index, -1 - salt, fill)]

    def next(self, state: IntArray, token: IntArray) -> IntArray:
        """States after reading `token` in `state`, elementwise."""
        second = self.second_token[state]
        follows = (token == second) | ((second == ANY) & (token >= TEXT))
        after = np.where(follows, self.second_state[state], OFF)
        after = np.where(token == self.first_token[state], self.first_state[state], after)
        return np.where(token == CHILD, self.child_state[state], after).astype(np.int32, copy=False)

    def walk(
        self,
        token: IntArray,
        query_start: IntArray,
        rows: IndexArray,
        origin: IntArray,
        count: IntArray,
        state: IntArray,
    ) -> None:
        """Fill `state` for causal rows: one token a round, and with it the whole straight run that follows."""
        cursor, stop = query_start[rows].astype(np.int64), query_start[rows + 1].astype(np.int64)
        current = origin
        while rows.size:
            current = self.next(current, token[cursor])
            state[cursor] = current
            cursor = cursor + 1
            left = (cursor < stop) & (current != OFF)  # past OFF there is only OFF, and `state` says so already
            if not left.all():
                rows, cursor, stop, current = rows[left], cursor[left], stop[left], current[left]
            if not rows.size:
                return
            length = stop - cursor
            ends = np.cumsum(length)
            which = np.repeat(np.arange(rows.size), length)
            step = np.arange(which.size) - (ends - length)[which]
            at = cursor[which] + step
            target = current[which] + step + 1
            known = target < self.first_state.size
            holds = known & (self.next(np.where(known, target - 1, OFF), token[at]) == target)
            failed = np.flatnonzero(~holds)
            run = length.copy()
            np.minimum.at(run, which[failed], step[failed])
            inside = step < run[which]
            state[at[inside]] = target[inside]
            cursor = cursor + run
            current = (current + run).astype(np.int32, copy=False)
            left = cursor < stop
            rows, cursor, stop, current = rows[left], cursor[left], stop[left], current[left]

    def _checked(self, index: int, tree: Tree) -> tuple[int, list[tuple[int, int]]]:
        try:
            prompt = int(tree["prompt_tokens"])
            segments = [(int(main), int(detail)) for main, detail in tree["segments"]]
        except (KeyError, TypeError, ValueError) as error:
            raise ExecutorError(f"recorded tree {index} lacks prompt_tokens or segments: {error!r}") from error
        least = 2 + self._width
        if prompt < least:
            raise ExecutorError(f"recorded tree {index}: the prompt takes at least {least} tokens, not {prompt}")
        if not segments or any(main < 1 or detail < 0 for main, detail in segments):
            raise ExecutorError(f"recorded tree {index}: every segment needs main_tokens >= 1 and detail_tokens >= 0")
        return prompt, segments

    def _text(self, tree: int, part: int, count: int) -> list[int]:
        """`count` text ids that look random and depend on tree and part only."""
        seed = (tree * 0x9E3779B1 + (part + 0x10000) * 0x85EBCA77) & 0xFFFFFFFF
        spread = (np.arange(count, dtype=np.uint64) + np.uint64(seed)) * np.uint64(0x9E3779B97F4A7C15)
        spread = (spread ^ (spread >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
        ids = TEXT + (spread >> np.uint64(33)) % np.uint64(self._vocab_size - TEXT)
        return [int(token) for token in ids]

    def _state(self) -> int:
        """Number of a new state, without edges so far (a decoder that gets there stops)."""
        for column, value in zip(self._edges, (EOS, OFF, NONE, OFF, OFF), strict=True):
            column.append(value)
        return len(self._edges[0]) - 1

    def _follow(self, state: int, token: int, target: int) -> None:
        self._edges[0][state], self._edges[1][state] = token, target

    def _otherwise(self, state: int, token: int, target: int) -> None:
        self._edges[2][state], self._edges[3][state] = token, target

    def _run(self, tokens: Sequence[int]) -> tuple[int, int]:
        """States of a straight run of text: those after its first and after its last token."""
        begin = end = self._state()
        for token in tokens[1:]:
            state = self._state()
            self._follow(end, token, state)
            end = state
        return begin, end

    def _build(self) -> None:
        self._state()  # EMPTY
        self._state()  # OFF
        self.start = self._state()  # before BOS: the state "before" index 0 of every path
        root = self._state()
        self._follow(self.start, BOS, root)
        leaves = [root]
        for _ in range(self._width):
            parents, leaves = leaves, []
            for parent in parents:
                for digit, connect in ((0, self._follow), (1, self._otherwise)):
                    leaves.append(self._state())
                    connect(parent, TEXT + digit, leaves[-1])
        for index, (prompt, segments) in enumerate(self._trees):
            self._build_tree(index, leaves[index], prompt - 1 - self._width, segments)

    def _build_tree(self, index: int, leaf: int, fill: int, segments: list[tuple[int, int]]) -> None:
        end = leaf
        for _ in range(fill):
            state = self._state()
            self._follow(end, NONE, state)
            self._otherwise(end, ANY, state)
            end = state
        pending = [end]  # states from which the next segment's text follows
        for number, (main, detail) in enumerate(segments):
            text = self._text(index, 2 * number, main)
            begin, end = self._run(text)
            for state in pending:
                self._follow(state, text[0], begin)
            if not detail:
                pending = [end]
                continue
            text = self._text(index, 2 * number + 1, detail)
            inline_begin, inline_end = self._run(text)
            forked, child = self._state(), self._state()
            detail_begin, _ = self._run(text)
            self._follow(end, FORK, forked)
            self._otherwise(end, text[0], inline_begin)
            self._edges[4][forked] = child
            self._follow(child, text[0], detail_begin)
            pending = [forked, inline_end]
