"""What the gateway sends back: OpenAI's objects, whole or in chunks. Branches are an extension: `apar` of a choice."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from apar.runtime.reading_order import EventAssembler
from apar.runtime.serving.gateway.reading_logprobs import Entry, ReadingLogprobs
from apar.runtime.serving.gateway.requests import Job
from apar.runtime.serving.model_responses import BranchStep, Final, ModelResponse

FINISH_REASONS = {"stop": "stop", "stop_string": "stop", "length": "length", "cancelled": "stop"}
DONE = b"data: [DONE]\n\n"

_to_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


@dataclass(slots=True)
class Choice:
    """One answer while it comes."""

    index: int
    texts: list[str] = field(default_factory=list)
    logprobs: list[Entry] = field(default_factory=list)
    final: Final | None = None
    order: ReadingLogprobs = field(default_factory=ReadingLogprobs)
    tree: EventAssembler = field(default_factory=EventAssembler)
    length: int = 0
    """Characters of tokens with log-probabilities that were sent: completions count offsets."""


class Reply:
    """Turns the model's responses to a job into what its client asked for."""

    def __init__(self, job: Job, reply_id: str, model_name: str, fingerprint: str) -> None:
        self._job = job
        kind = "chat.completion" if job.chat else "text_completion"
        self._head: dict[str, Any] = {
            "id": f"{'chatcmpl' if job.chat else 'cmpl'}-{reply_id}",
            "object": f"{kind}.chunk" if job.chat and job.common.stream else kind,
            "created": int(time.time()),
            "model": model_name,
            "system_fingerprint": fingerprint,
        }
        self._choices = [Choice(index) for index in range(len(job.inputs))]

    def opening(self) -> bytes:
        """The first chunks of a stream: whose words they will be."""
        if not self._job.chat:
            return b""
        delta = {"role": "assistant", "content": "", "refusal": None}
        return b"".join(
            self._chunk({"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": None}, {})
            for choice in self._choices
        )

    def chunk(self, index: int, response: ModelResponse) -> bytes:
        """Server-sent events for one response; b"" where it brought nothing that the client wants to know."""
        choice = self._choices[index]
        entries = self._take(choice, response)
        extension: dict[str, Any] = {}
        if self._job.common.branch_events and response.events:
            extension["events"] = [event_object(event) for event in response.events]
        written = b""
        if response.text or entries or extension:
            logprobs = self._logprobs(choice, entries) if self._job.logprobs is not None else None
            delta = self._text_field({"content": response.text}, response.text)
            written = self._chunk({"index": index, **delta, "logprobs": logprobs, "finish_reason": None}, extension)
        if response.final is not None:
            delta = self._text_field({}, "")
            reason = FINISH_REASONS.get(response.final.finish_reason, "stop")
            written += self._chunk(
                {"index": index, **delta, "logprobs": None, "finish_reason": reason}, _figures(response.final)
            )
        return written

    def closing(self) -> bytes:
        """The last chunks of a stream."""
        if not self._job.common.include_usage:
            return DONE
        return _sse(self._head | {"choices": [], "usage": self._usage()}) + DONE

    def take(self, index: int, response: ModelResponse) -> None:
        """Keep one response for `whole`."""
        choice = self._choices[index]
        choice.texts.append(response.text)
        choice.logprobs += self._take(choice, response)
        if self._job.common.branch_events:
            for event in response.events:
                choice.tree.feed(event.event())

    def whole(self) -> dict[str, Any]:
        """The answer as one object, once every response has been taken."""
        return self._head | {"choices": [self._finished(choice) for choice in self._choices], "usage": self._usage()}

    def _take(self, choice: Choice, response: ModelResponse) -> list[Entry]:
        if response.final is not None:
            choice.final = response.final
        if self._job.logprobs is None:
            return []
        return choice.order.feed(response.events, response.logprobs)

    def _text_field(self, delta: dict[str, Any], text: str) -> dict[str, Any]:
        return {"delta": delta} if self._job.chat else {"text": text}

    def _chunk(self, choice: dict[str, Any], extension: dict[str, Any]) -> bytes:
        chunk = self._head | {"choices": [choice | {"apar": extension} if extension else choice]}
        if self._job.common.include_usage:
            chunk["usage"] = None
        return _sse(chunk)

    def _finished(self, choice: Choice) -> dict[str, Any]:
        assert choice.final is not None
        text = "".join(choice.texts)
        logprobs = None if self._job.logprobs is None else self._logprobs(choice, choice.logprobs)
        said = (
            {"message": {"role": "assistant", "content": text, "refusal": None}} if self._job.chat else {"text": text}
        )
        extension = _figures(choice.final)
        if self._job.common.branch_events:
            extension["branch_tree"] = [
                {
                    "branch_id": branch.branch_id,
                    "parent_id": branch.parent_id,
                    "depth": branch.depth,
                    "segments": branch.segments,
                    "children": branch.children,
                    "finish_reason": branch.finish_reason,
                }
                for branch in choice.tree.branches.values()
            ]
        return {
            "index": choice.index,
            **said,
            "logprobs": logprobs,
            "finish_reason": FINISH_REASONS.get(choice.final.finish_reason, "stop"),
            "apar": extension,
        }

    def _logprobs(self, choice: Choice, entries: Sequence[Entry]) -> dict[str, Any]:
        if self._job.chat:
            return {"content": [_with_top(entry) for entry in entries], "refusal": None}
        offsets = []
        for entry in entries:
            offsets.append(choice.length)
            choice.length += len(entry["token"])
        return {
            "tokens": [entry["token"] for entry in entries],
            "token_logprobs": [entry["logprob"] for entry in entries],
            "top_logprobs": [{top["token"]: top["logprob"] for top in entry["top"]} for entry in entries]
            if self._job.logprobs
            else None,
            "text_offset": offsets,
        }

    def _usage(self) -> dict[str, Any]:
        finals = [choice.final for choice in self._choices if choice.final is not None]
        # Each prompt once, however many answers it was given.
        prompts = finals[:: self._job.common.choices]
        prompt, completion = sum(f.prompt_tokens for f in prompts), sum(f.completion_tokens for f in finals)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": sum(f.cached_tokens for f in prompts)},
        }


def event_object(event: BranchStep) -> dict[str, Any]:
    """A branch event as clients see it."""
    found: dict[str, Any] = {
        "event": event.kind,
        "branch_id": event.branch_id,
        "depth": event.depth,
        "step": event.step,
    }
    if event.kind == "fork":
        found["parent_id"] = event.parent_id
    elif event.kind == "delta":
        found |= {"text": event.text, "tokens": event.tokens}
    else:
        found["finish_reason"] = event.text
    return found


def _figures(final: Final) -> dict[str, Any]:
    return {
        "finish_reason": final.finish_reason,
        "branches": final.branches,
        "steps": final.steps,
        "seed": final.seed,
    }


def _with_top(entry: Entry) -> dict[str, Any]:
    return _token(entry) | {"top_logprobs": [_token(top) for top in entry["top"]]}


def _token(entry: Entry) -> dict[str, Any]:
    return {"token": entry["token"], "logprob": entry["logprob"], "bytes": entry["bytes"]}


def _sse(value: dict[str, Any]) -> bytes:
    return b"data: " + _to_json(value).encode() + b"\n\n"
