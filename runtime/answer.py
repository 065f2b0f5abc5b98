"""The answer to one request while it grows: text per branch, events, and the result at the end."""

from __future__ import annotations

from time import perf_counter

from apar.runtime.branch import Branch, Request, RequestState
from apar.runtime.branch_text import BranchText
from apar.runtime.detokenizer import StopStrings
from apar.runtime.outputs import (
    BranchEvent,
    BranchOutput,
    DeltaEvent,
    FinishEvent,
    FinishReason,
    ForkEvent,
    RequestOutput,
    Timing,
    Usage,
)
from apar.runtime.text import assemble
from apar.runtime.tokenizer import Tokenizer


class Answer:
    """Collects what a request's branches say.

    Where nobody listens and no stop string is given, tokens become text only once, at the end.

    Args:
        request: as submitted to the engine.
        tokenizer: of the engine.
        listens: whether events are wanted.
    """

    def __init__(self, request: Request, tokenizer: Tokenizer, listens: bool) -> None:
        params = request.params
        self.request = request
        self.events: list[BranchEvent] = []
        """Events that nobody has taken yet, in order."""
        self.listens = listens
        self.follows = listens or bool(params.stop)
        """Whether every token has to be looked at when it comes."""
        self.first_token = 0.0
        """When the first token came, by the engine's clock, as are `last_token` and `ended`; 0 before."""
        self.last_token = 0.0
        self.ended = 0.0
        self._tokenizer = tokenizer
        self._stops = StopStrings(params.stop, params.include_stop_in_output) if params.stop else None
        self._texts: dict[Branch, BranchText] = {}

    def grow(self, branch: Branch, token: int, step: int) -> bool:
        """A branch sampled a token that belongs to its text; returns whether a stop string ends it."""
        text = self._text(branch)
        delta = text.feed((token,))
        if self.listens:
            request_id = self.request.request_id
            self.events.append(DeltaEvent(request_id, branch.branch_id, branch.depth, delta, [token], step))
        return text.stopped

    def fork(self, child: Branch, step: int) -> None:
        """A branch forked."""
        parent = child.parent
        assert parent is not None
        held = self._text(parent).fork()
        if self.listens:
            self._say(parent, held, step)
            request_id = self.request.request_id
            self.events.append(ForkEvent(request_id, child.branch_id, parent.branch_id, child.depth, step))

    def end(self, branch: Branch, step: int) -> None:
        """A branch ended for the reason it carries."""
        held = self._text(branch).finish()
        if self.listens:
            self._say(branch, held, step)
            reason: FinishReason = branch.finish_reason or "error"
            self.events.append(FinishEvent(self.request.request_id, branch.branch_id, branch.depth, reason, step))

    @property
    def finished(self) -> bool:
        """Whether the request has ended."""
        return self.request.state is RequestState.FINISHED

    def output(self) -> RequestOutput:
        """The result of a finished request."""
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

    def _text(self, branch: Branch) -> BranchText:
        text = self._texts.get(branch)
        if text is None:
            unchecked = self.request.params.min_tokens if branch.parent is None else 0
            text = self._texts[branch] = BranchText(self._tokenizer, self._stops, unchecked)
        return text

    def _say(self, branch: Branch, text: str, step: int) -> None:
        if text:
            request_id = self.request.request_id
            self.events.append(DeltaEvent(request_id, branch.branch_id, branch.depth, text, [], step))

    def _branch_output(self, branch: Branch) -> BranchOutput:
        ends = [position - branch.start for position in branch.forks] + [len(branch.tokens)]
        starts = [0] + [end + 1 for end in ends[:-1]]
        return BranchOutput(
            branch_id=branch.branch_id,
            parent_id=None if branch.parent is None else branch.parent.branch_id,
            depth=branch.depth,
            token_ids=branch.tokens,
            segments=self._texts[branch].segments if self.follows and branch in self._texts else self._segments(branch),
            children=[child.branch_id for child in branch.children],
            finish_reason=branch.finish_reason or "error",
            first_step=branch.first_step,
            last_step=branch.last_step,
            logprobs=None if branch.logprobs is None else branch.logprobs[: len(branch.tokens)],
            segment_tokens=[max(0, end - start) for start, end in zip(starts, ends, strict=True)],
        )

    def _segments(self, branch: Branch) -> list[str]:
        text = BranchText(self._tokenizer)
        start = 0
        for position in branch.forks:
            text.feed(branch.tokens[start : position - branch.start])
            text.fork()
            start = position - branch.start + 1
        text.feed(branch.tokens[start:])
        text.finish()
        return text.segments
