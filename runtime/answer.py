"""The answer to one request while it grows: text per branch, events, and the result at the end."""

from __future__ import annotations

from time import perf_counter
from typing import TypeVar

from apar.runtime.branch import Branch, Request, RequestState
from apar.runtime.branch_text import BranchText
from apar.runtime.detokenizer import IncrementalDetokenizer, StopStrings
from apar.runtime.outputs import (
    BranchEvent,
    BranchOutput,
    DeltaEvent,
    FinishEvent,
    ForkEvent,
    RequestOutput,
    Timing,
    Usage,
)
from apar.runtime.reading_order import ReadingOrderStream
from apar.runtime.text import assemble
from apar.runtime.tokenizer import Tokenizer

Item = TypeVar("Item")

BORN, ENDED, HELD = -1, -2, -3
"""In the place of a token: the branch was born of its parent; it has ended; text that was held back came out."""
Said = tuple[Branch, int, str, int]
"""Branch, token or what else became of it, text that came of that, step."""


class Answer:
    """Collects what a request's branches say.

    The engine's thread only notes tokens (`grow`, `fork`, `end`); they become text and events when somebody takes
    them, in his thread, so that decoding does not wait for it. Only stop strings have to be looked for at once. Where
    nobody listens and no stop string is given, tokens become text only once, at the end.

    Args:
        request: as submitted to the engine.
        tokenizer: of the engine.
        listens: whether events are wanted.
    """

    def __init__(self, request: Request, tokenizer: Tokenizer, listens: bool) -> None:
        params = request.params
        self.request = request
        self.listens = listens
        self.follows = listens or bool(params.stop)
        """Whether every token has to be looked at when it comes."""
        self.first_token = 0.0
        """When the first token came, by the engine's clock, as are `last_token` and `ended`; 0 before."""
        self.last_token = 0.0
        self.ended = 0.0
        self._tokenizer = tokenizer
        self._stops = StopStrings(params.stop, params.include_stop_in_output) if params.stop else None
        self._texts: dict[Branch, IncrementalDetokenizer | BranchText] = {}
        self._noted: list[tuple[Branch, int, int]] = []
        """(branch, token or what else became of it, step), not yet text."""
        self._said: list[Said] = []
        """What nobody has taken yet, where stop strings are looked for."""

    def grow(self, branch: Branch, token: int, step: int) -> bool:
        """A branch sampled a token that belongs to its text; returns whether a stop string ends it."""
        self._noted.append((branch, token, step))
        if self._stops is None:
            return False
        self._hear()
        text = self._texts[branch]
        return isinstance(text, BranchText) and text.stopped

    def fork(self, child: Branch, step: int) -> None:
        """A branch was born."""
        self._noted.append((child, BORN, step))
        if self._stops is not None:
            self._hear()

    def end(self, branch: Branch, step: int) -> None:
        """A branch ended for the reason it carries."""
        self._noted.append((branch, ENDED, step))
        if self._stops is not None:
            self._hear()

    @property
    def finished(self) -> bool:
        """Whether the request has ended. In the engine's thread alone, after a step, that means that all is noted."""
        return self.request.state is RequestState.FINISHED

    def take_events(self) -> list[BranchEvent]:
        """Events that nobody has taken yet, in order. One thread takes them; it need not be the engine's."""
        request_id = self.request.request_id
        events: list[BranchEvent] = []
        for branch, token, text, step in self._take_said():
            number, depth = branch.branch_id, branch.depth
            if token >= 0:
                events.append(DeltaEvent(request_id, number, depth, text, [token], step))
            elif token == HELD:
                events.append(DeltaEvent(request_id, number, depth, text, [], step))
            elif token == ENDED:
                events.append(FinishEvent(request_id, number, depth, branch.finish_reason or "error", step))
            else:
                events.append(ForkEvent(request_id, number, _parent(branch).branch_id, depth, step))
        return events

    def take_text(self, order: ReadingOrderStream) -> str:
        """What these events would set free in `order`."""
        text = ""
        for branch, token, said, _ in self._take_said():
            if said:
                text += order.delta(branch.branch_id, said)
            elif token == ENDED:
                text += order.finish(branch.branch_id)
            elif token == BORN:
                text += order.fork(branch.branch_id, _parent(branch).branch_id)
        return text

    def output(self) -> RequestOutput:
        """The result of a finished request, whose last step the engine's thread has noted. In the thread that takes
        events."""
        request = self.request
        arrived, now = request.arrived, self.ended or perf_counter()
        branches = [self._branch_output(branch) for branch in request.branches]
        started = request.started_at or now
        return RequestOutput(
            request_id=request.request_id,
            text=assemble(branches),
            branches=branches,
            finish_reason=request.finish_reason or "error",
            usage=Usage(len(request.prompt), request.sampled, request.cached_tokens),
            timing=Timing(
                queued=started - arrived,
                time_to_first_token=(self.first_token or now) - arrived,
                total=now - arrived,
                steps=request.steps,
                preemptions=request.preemptions,
            ),
            peak_kv_blocks=request.peak_blocks,
            seed=request.seed,
            prompt_token_ids=list(request.prompt),
            error=request.error,
        )

    def _hear(self) -> None:
        """Look for stop strings in what was noted."""
        said = self._read_notes()
        if self.listens:
            self._said += said

    def _take_said(self) -> list[Said]:
        return self._read_notes() if self._stops is None else _take(self._said)

    def _read_notes(self) -> list[Said]:
        """Turn what was noted into text."""
        texts, said = self._texts, []
        for branch, token, step in _take(self._noted):
            text = ""
            if token >= 0:
                text = (texts.get(branch) or self._text(branch)).feed_one(token)
            else:
                speaker = branch if token == ENDED else _parent(branch)
                held = (texts.get(speaker) or self._text(speaker)).flush()
                if held:
                    said.append((speaker, HELD, held, step))
            said.append((branch, token, text, step))
        return said

    def _text(self, branch: Branch) -> IncrementalDetokenizer | BranchText:
        """What turns a new branch's tokens into text."""
        text: IncrementalDetokenizer | BranchText
        if self._stops is None:
            text = IncrementalDetokenizer(self._tokenizer)
        else:
            unchecked = self.request.params.min_tokens if branch.parent is None else 0
            text = BranchText(self._tokenizer, self._stops, unchecked)
        self._texts[branch] = text
        return text

    def _branch_output(self, branch: Branch) -> BranchOutput:
        ends = [position - branch.start for position in branch.forks] + [len(branch.tokens)]
        starts = [0] + [end + 1 for end in ends[:-1]]
        return BranchOutput(
            branch_id=branch.branch_id,
            parent_id=None if branch.parent is None else branch.parent.branch_id,
            depth=branch.depth,
            token_ids=branch.tokens,
            segments=self._segments(branch),
            children=[child.branch_id for child in branch.children],
            finish_reason=branch.finish_reason or "error",
            first_step=branch.first_step,
            last_step=branch.last_step,
            logprobs=None if branch.logprobs is None else branch.logprobs[: len(branch.tokens)],
            segment_tokens=[max(0, end - start) for start, end in zip(starts, ends, strict=True)],
        )

    def _segments(self, branch: Branch) -> list[str]:
        heard = self._texts.get(branch)
        if isinstance(heard, BranchText):
            return heard.segments
        text, segments = IncrementalDetokenizer(self._tokenizer), []
        start = 0
        for position in branch.forks:
            segments.append(text.feed(branch.tokens[start : position - branch.start]) + text.flush())
            start = position - branch.start + 1
        return [*segments, text.feed(branch.tokens[start:]) + text.flush()]


def _parent(branch: Branch) -> Branch:
    assert branch.parent is not None
    return branch.parent


def _take(items: list[Item]) -> list[Item]:
    """Take out what is there; another thread may append meanwhile."""
    taken = items[:]
    del items[: len(taken)]
    return taken
