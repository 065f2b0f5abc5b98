"""One request on its way: its answer as the messages that go back to the client."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from apar.runtime.answer import Answer
from apar.runtime.outputs import BranchEvent, DeltaEvent, FinishEvent, ForkEvent, Logprob
from apar.runtime.reading_order import ReadingOrderStream
from apar.runtime.serving.engine.request import DEADLINE, FAILED, ServedRequest
from apar.runtime.serving.engine.wire import Message
from apar.runtime.tokenizer import Tokenizer

if TYPE_CHECKING:
    from apar.runtime.serving.engine.connection import Connection

Error = tuple[str, str]
"""Code and sentence."""


class Flight:
    """Puts what an answer says into messages, in the connection's thread.

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
        self._over = False
        self.error: Error | None = None
        """How the request ended, if it ended badly."""
        self._detailed = request.events or request.ids or request.params.logprobs is not None
        self._first = True
        self._complete = False

    @property
    def listens(self) -> bool:
        """Whether events of the answer are needed; without them only its result is."""
        return self.request.stream or self._detailed

    def end(self) -> None:
        """The answer is complete. In the engine's thread, as is `fail`."""
        assert self.answer is not None
        request = self.answer.request
        if request.finish_reason == "error":
            self.error = (FAILED, request.error or "the request failed in the engine")
        elif request.finish_reason == "deadline":
            self.error = (DEADLINE, "the request was not complete within its timeout_ms")
        else:
            self._over = True

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
        answer, request, over = self.answer, self.request, self._over
        assert answer is not None  # `over` was read before what has been said: with it, that is everything
        if not (over or request.stream):
            return None
        message: Message = {"id": self.number}
        if self._detailed:
            self._tell_details(answer, message)
        else:
            text = answer.take_text(self._order) if request.stream else request.echo + answer.output().text
            if text:
                message["text"] = text
        if over:
            self._complete = True
            message["final"] = self._final(answer)
        return message if len(message) > 1 else None

    def _tell_details(self, answer: Answer, message: Message) -> None:
        request, events = self.request, answer.take_events()
        whole = self._first and not request.stream
        self._first = False
        if request.ids:
            ids = self._new_ids(events)
            if whole and request.echo_ids:
                ids = request.token_ids + ids
            if ids:
                message["ids"] = ids
        else:
            text = "".join([self._order.feed(event) for event in events])
            if whole:
                text = request.echo + text
            if text:
                message["text"] = text
        if request.params.logprobs is not None:
            entries = self._new_logprobs(answer, events)
            if entries:
                message["logprobs"] = entries
            message["cumulative"] = self._cumulative
        if request.events and events:
            message["events"] = self._columns(events)

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

    def _new_logprobs(self, answer: Answer, events: list[BranchEvent]) -> list[dict[str, Any]]:
        entries = []
        for event in events:
            if not isinstance(event, DeltaEvent) or not event.token_ids:
                continue
            start = self._logprobs_read.get(event.branch_id, 0)
            end = self._logprobs_read[event.branch_id] = start + len(event.token_ids)
            for entry in (answer.request.branches[event.branch_id].logprobs or [])[start:end]:
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

    def _final(self, answer: Answer) -> dict[str, Any]:
        request = answer.request
        return {
            "finish_reason": request.finish_reason or "error",
            "prompt_tokens": len(request.prompt),
            "completion_tokens": request.sampled,
            "cached_tokens": request.cached_tokens,
            "branches": len(request.branches),
            "steps": request.steps,
            "seed": request.seed,
        }
