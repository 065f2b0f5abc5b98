"""One request on its way: its answer as the messages that go back to the client."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from apar.runtime.answer import Answer
from apar.runtime.outputs import BranchEvent, DeltaEvent, FinishEvent, ForkEvent, Logprob, RequestOutput
from apar.runtime.reading_order import ReadingOrderStream
from apar.runtime.serving.engine.request import DEADLINE, FAILED, ServedRequest
from apar.runtime.serving.engine.wire import Message
from apar.runtime.tokenizer import Tokenizer

if TYPE_CHECKING:
    from apar.runtime.serving.engine.connection import Connection

Error = tuple[str, str]
"""Code and sentence."""


class Flight:
    """Collects what an answer says (in the engine's thread) and puts it into messages (in the connection's).

    Whatever was said since the last message goes into the next one, so a connection that is slower than the
    engine gets fewer, longer messages.

    Args:
        number: of the request on its connection.
        connection: that the answer goes to.
        request: as the client asked.
        tokenizer: of the engine.
    """

    def __init__(self, number: int, connection: Connection, request: ServedRequest, tokenizer: Tokenizer) -> None:
        self.number = number
        self.connection = connection
        self.request = request
        self.answer: Answer | None = None
        self._tokenizer = tokenizer
        self._order = ReadingOrderStream(raw=request.ids)
        self._parents = {0: -1}
        self._logprobs_read: dict[int, int] = {}
        self._cumulative = 0.0
        self._events: list[BranchEvent] = []
        self._output: RequestOutput | None = None
        self.error: Error | None = None
        """How the request ended, if it ended badly."""
        self._first = True
        self._complete = False

    @property
    def listens(self) -> bool:
        """Whether events of the answer are needed; without them only its result is."""
        request = self.request
        return request.stream or request.events or request.ids or request.params.logprobs is not None

    @property
    def due(self) -> bool:
        """Whether there is something to send."""
        return bool(self.error or self._output or (self._events and self.request.stream))

    def add(self, events: Iterable[BranchEvent], output: RequestOutput | None) -> None:
        """The answer said something, or is complete."""
        if output is not None and output.finish_reason == "error":
            self.error = (FAILED, output.error or "the request failed in the engine")
        elif output is not None and output.finish_reason == "deadline":
            self.error = (DEADLINE, "the request was not complete within its timeout_ms")
        else:
            self._events += events
            self._output = output

    def fail(self, error: Error) -> None:
        """The request ends with an error."""
        self.error = error

    def message(self) -> Message | None:
        """What is to be sent now; None if it says nothing yet, or has said its last."""
        if self._complete:  # it was put together while the answer's end was being announced
            return None
        if self.error is not None:
            self._complete = True
            return {"id": self.number, "error": self.error}
        output = self._output  # read first: with it, every event is there
        count = len(self._events)
        events = self._events[:count]
        del self._events[:count]
        message = self._content(events, output)
        if output is not None:
            self._complete = True
            message["final"] = self._final(output)
        elif not message:
            return None
        message["id"] = self.number
        return message

    def _content(self, events: list[BranchEvent], output: RequestOutput | None) -> Message:
        message: Message = {}
        request = self.request
        if request.ids:
            ids = self._new_ids(events)
            if self._first and request.echo_ids and not request.stream:
                ids = request.token_ids + ids
            if ids:
                message["ids"] = ids
        else:
            if output is not None and not self.listens:
                text = output.text
            else:
                text = "".join(self._order.feed(event) for event in events)
            if self._first and not request.stream:
                text = request.echo + text
            if text:
                message["text"] = text
        self._first = False
        if request.params.logprobs is not None:
            entries = self._new_logprobs(events)
            if entries:
                message["logprobs"] = entries
            message["cumulative"] = self._cumulative
        if request.events and events:
            message["events"] = self._columns(events)
        return message

    def _new_ids(self, events: list[BranchEvent]) -> list[int]:
        """Token ids in reading order, control tokens left out. They pass through the order of texts as characters."""
        silent, order = self._tokenizer.silent_ids, self._order
        text = ""
        for event in events:
            if isinstance(event, DeltaEvent):
                text += order.delta(event.branch_id, "".join(chr(i) for i in event.token_ids if i not in silent))
            else:
                text += order.feed(event)
        return [ord(character) for character in text]

    def _new_logprobs(self, events: list[BranchEvent]) -> list[dict[str, Any]]:
        assert self.answer is not None
        entries = []
        for event in events:
            if not isinstance(event, DeltaEvent) or not event.token_ids:
                continue
            start = self._logprobs_read.get(event.branch_id, 0)
            end = self._logprobs_read[event.branch_id] = start + len(event.token_ids)
            for entry in (self.answer.request.branches[event.branch_id].logprobs or [])[start:end]:
                self._cumulative += entry.logprob
                entries.append({"branch_id": event.branch_id, **self._logprob(entry)})
        return entries

    def _logprob(self, entry: Logprob) -> dict[str, Any]:
        top = [self._token(token_id, logprob) for token_id, logprob in entry.top]
        return {**self._token(entry.token_id, entry.logprob), "top": top}

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        data = self._tokenizer.token_bytes(token_id)
        text = data.decode("utf-8", errors="replace")
        return {"token_id": token_id, "token": text, "bytes": list(data), "logprob": logprob}

    def _columns(self, events: list[BranchEvent]) -> dict[str, list[Any]]:
        """Events as columns of a table; deltas of a branch are joined where nothing of that branch came between."""
        rows: list[list[Any]] = []
        open_deltas: dict[int, list[Any]] = {}
        for event in events:
            if isinstance(event, ForkEvent):
                open_deltas.pop(event.parent_id, None)
                self._parents[event.branch_id] = event.parent_id
                rows.append(["fork", event.branch_id, event.depth, "", [], event.step])
                continue
            branch = event.branch_id
            if isinstance(event, FinishEvent):
                rows.append(["finish", branch, event.depth, event.reason, [], event.step])
                continue
            row = open_deltas.get(branch)
            if row is None:
                row = open_deltas[branch] = ["delta", branch, event.depth, "", [], event.step]
                rows.append(row)
            row[3] += event.text
            row[4] += event.token_ids
            row[5] = event.step
        names = ("event", "branch_id", "depth", "text", "ids", "step")
        columns = {name: list(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}
        columns["parent_id"] = [self._parents[branch] for branch in columns["branch_id"]]
        return columns

    def _final(self, output: RequestOutput) -> dict[str, Any]:
        return {
            "finish_reason": output.finish_reason,
            "prompt_tokens": output.usage.prompt_tokens,
            "completion_tokens": output.usage.completion_tokens,
            "cached_tokens": output.usage.cached_tokens,
            "branches": len(output.branches),
            "steps": output.timing.steps,
            "seed": output.seed,
        }
