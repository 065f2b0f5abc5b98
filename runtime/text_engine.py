"""Text in, events and results out, over the token engine: what the sync and async APIs and servers share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import count
from typing import Any

from apar.export.errors import RequestError
from apar.runtime.answer import Answer
from apar.runtime.booking import StepReport
from apar.runtime.branch import Request
from apar.runtime.chat import ChatMessage, render_chat, render_prompt
from apar.runtime.engine import Engine
from apar.runtime.metrics import Metrics
from apar.runtime.sampling_params import SamplingParams
from apar.runtime.tokenizer import Tokenizer

Prompt = str | Sequence[int] | Sequence[ChatMessage]
"""A question (asked through the chat template), token ids (taken as they are), or a conversation."""


class TextEngine:
    """An engine with its tokenizer, and the answers that are growing. Not thread-safe: one loop drives it."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.metrics = Metrics()
        self._answers: dict[Request, Answer] = {}
        self._by_id: dict[str, Answer] = {}
        self._numbers = count()

    def encode(self, prompt: Prompt, chat: bool = True) -> list[int]:
        """Token ids of a prompt. `chat` False: a text is continued as it stands, without a template.

        Raises RequestError if the prompt has another type, is empty or holds unusable text.
        """
        if isinstance(prompt, str):
            if not prompt.strip():
                raise RequestError("the prompt is empty; give a question or a text")
            if chat:
                return render_chat([{"role": "user", "content": prompt}], self.tokenizer)
            return render_prompt(prompt, self.tokenizer)
        given: object = prompt  # callers without a type checker pass anything
        if isinstance(given, bytes | bytearray) or not isinstance(given, Sequence):
            raise RequestError(f"a prompt is a text, token ids or chat messages, not {type(prompt).__name__}")
        if not prompt:
            raise RequestError("the prompt is empty; give at least one token or message")
        if any(isinstance(item, Mapping) for item in prompt):
            return render_chat(prompt, self.tokenizer)  # type: ignore[arg-type]
        vocab_size = self.engine.executor.manifest.decoder.vocab_size
        for i, item in enumerate(prompt):
            if isinstance(item, bool) or not isinstance(item, int):
                raise RequestError(f"item {i} of the prompt is {type(item).__name__}; token ids are whole numbers")
            if not 0 <= item < vocab_size:
                raise RequestError(
                    f"token id {item} (item {i} of the prompt) is outside the vocabulary of {vocab_size}"
                )
        return list(prompt)  # type: ignore[arg-type]

    def submit(
        self,
        token_ids: Sequence[int],
        params: SamplingParams,
        *,
        request_id: str | None = None,
        listens: bool = False,
        priority: int = 0,
        arrived: float | None = None,
        timeout: float | None = None,
    ) -> Answer:
        """Queue a tokenised prompt; arguments as for `Engine.submit`. `listens`: whether events are wanted.

        Raises RequestError if it is not acceptable or its id is in use.
        """
        given: object = params  # callers without a type checker pass anything
        if not isinstance(given, SamplingParams):
            raise RequestError(f"params must be SamplingParams, not {type(given).__name__}")
        if request_id is None:
            request_id = next(name for n in self._numbers if (name := f"request-{n}") not in self._by_id)
        given = request_id
        if not isinstance(given, str):
            raise RequestError(f"request_id must be a string, not {type(given).__name__}")
        if request_id in self._by_id:
            raise RequestError(f"a request with id {request_id!r} is still running; give each request its own id")
        if params.bad_words:
            params = params.with_bad_words(self.tokenizer.encode_text)
        request = self.engine.submit(request_id, token_ids, params, priority, arrived=arrived, timeout=timeout)
        answer = Answer(request, self.tokenizer, listens)
        self._answers[request] = answer
        self._by_id[request_id] = answer
        return answer

    @property
    def idle(self) -> bool:
        """Whether nothing is left to do."""
        return self.engine.scheduler.idle

    def cancel(self, request_id: str) -> Answer | None:
        """End a request now; its blocks are free when this returns. None if it is unknown or already finished."""
        answer = self._by_id.get(request_id)
        if answer is None:
            return None
        live = list(answer.request.live)
        self.engine.scheduler.cancel(answer.request)
        for branch in live:
            answer.end(branch, self.engine.scheduler.step_index)
        self._retire(answer)
        return answer

    def step(self) -> list[Answer]:
        """Run one step; returns the answers that have new events or are finished, each once."""
        touched: dict[Request, Answer] = {}
        came: list[float] = []

        def read(booked: StepReport) -> None:
            # All tokens of a step come at one time, however many rounds its drafts had.
            if booked.tokens and not came:
                came.append(self.engine.clock())
            touched.update(self._read(booked, came[0] if came else 0.0))

        report = self.engine.step(read)
        if report is None:
            return []
        for request in report.finished:
            answer = self._answers[request]
            touched[request] = answer
            self._retire(answer)
        return list(touched.values())

    def stats(self) -> dict[str, Any]:
        """Gauges and counters of the scheduler and the KV pool."""
        speculation = self.engine.scheduler.speculation
        return {
            **self.engine.scheduler.load(),
            "host_seconds": self.engine.host_seconds,
            "model_seconds": self.engine.model_seconds,
            "sample_seconds": self.engine.sample_seconds,
            **({} if speculation is None else {"accepted_lengths": speculation.lengths.tolist()}),
        }

    def close(self) -> None:
        """Free the engine. Idempotent."""
        self.engine.close()

    def _read(self, report: StepReport, now: float) -> dict[Request, Answer]:
        """Turn tokens that came at `now` into text where somebody follows; ends branches that met a stop string."""
        touched: dict[Request, Answer] = {}
        answers, metrics, step = self._answers, self.metrics, report.step
        metrics.generation_tokens += len(report.tokens)
        stopped = []
        for branch, token in zip(report.branches, report.tokens, strict=True):
            answer = answers[branch.request]
            if answer.last_token != now:
                metrics.token(answer, now)
            if not answer.follows:
                continue
            touched[branch.request] = answer
            if not branch.end_dropped and answer.grow(branch, token, step):
                stopped.append(branch)
        for child in report.forked:
            answer = answers[child.request]
            if answer.follows:
                answer.fork(child, step)
        for branch in report.ended:
            answer = answers[branch.request]
            if answer.follows:
                touched[branch.request] = answer
                answer.end(branch, step)
        for branch in stopped:
            if branch.slot >= 0:
                if self.engine.scheduler.finish_branch(branch, "stop_string"):
                    report.finished.append(branch.request)
                answers[branch.request].end(branch, step)
        return touched

    def _retire(self, answer: Answer) -> None:
        answer.ended = self.engine.clock()
        self.metrics.finish(answer)
        del self._answers[answer.request]
        del self._by_id[answer.request.request_id]
