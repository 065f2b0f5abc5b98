"""The asynchronous API: many callers on one event loop, one engine loop in a thread of its own."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

from apar.export.errors import EngineStoppedError
from apar.runtime.answer import Answer
from apar.runtime.engine_loop import EngineLoop
from apar.runtime.engine_source import resolve_engine
from apar.runtime.limits import SchedulerLimits
from apar.runtime.llm import load_text_engine
from apar.runtime.outputs import BranchEvent, RequestOutput
from apar.runtime.sampling_params import SamplingParams
from apar.runtime.speculative.options import DraftOptions
from apar.runtime.text_engine import Prompt

logger = logging.getLogger(__name__)

T = TypeVar("T")
Item = BranchEvent | RequestOutput | EngineStoppedError


class AsyncLLM:
    """Streams answers to many concurrent callers.

        async with AsyncLLM("tiny") as llm:
            async for item in llm.stream("How do I grow tomatoes?"):
                ...  # ForkEvent, DeltaEvent, FinishEvent; a RequestOutput comes last

    Requests may be made from any event loop. Leaving the loop over a stream, or cancelling the task,
    cancels the request: its blocks are free before the next step. Arguments as for `LLM`.
    """

    def __init__(
        self,
        engine: str | Path,
        *,
        executor: str = "auto",
        limits: SchedulerLimits | None = None,
        draft: DraftOptions | str | None = None,
        **options: Any,
    ) -> None:
        self._text = load_text_engine(resolve_engine(engine), executor, limits, draft=draft, **options)
        self._listeners: dict[str, _Listener] = {}
        self._loop = EngineLoop(self._text, self._deliver, self._stopped)
        self._loop.start()

    async def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        timeout: float | None = None,
        chat: bool = True,
    ) -> AsyncIterator[BranchEvent | RequestOutput]:
        """Events of one answer as they come; the last item is the result.

        Args:
            prompt: a text, token ids, or chat messages.
            params: how to sample, and the request's own limits.
            request_id: one that no running request has.
            priority: a lower one goes first.
            timeout: seconds from this call after which the answer ends as it is, with `finish_reason` "deadline".
            chat: put a text prompt into the chat template; False continues it as it stands.

        Raises RequestError if the request is not acceptable, EngineStoppedError if the engine has stopped.
        """
        arrived = self._text.engine.clock()
        listener = _Listener(asyncio.get_running_loop())
        token_ids = self._text.encode(prompt, chat)

        def submit() -> str:
            answer = self._text.submit(
                token_ids,
                params or SamplingParams(),
                request_id=request_id,
                listens=True,
                priority=priority,
                arrived=arrived,
                timeout=timeout,
            )
            self._listeners[answer.request.request_id] = listener
            return answer.request.request_id

        submitted = self._loop.call(submit)
        try:
            own_id = await asyncio.wrap_future(submitted)
        except asyncio.CancelledError:
            self._loop.post(lambda: self._withdraw(submitted))
            raise
        try:
            while True:
                for item in await listener.take():
                    if isinstance(item, EngineStoppedError):
                        raise item
                    yield item
                    if isinstance(item, RequestOutput):
                        return
        finally:
            self._loop.post(lambda: self._drop(own_id))

    async def generate(self, prompt: Prompt, params: SamplingParams | None = None, **options: Any) -> RequestOutput:
        """The whole answer to one prompt; arguments as for `stream`."""
        async for item in self.stream(prompt, params, **options):
            if isinstance(item, RequestOutput):
                return item
        raise EngineStoppedError("the stream ended without a result")

    async def cancel(self, request_id: str) -> bool:
        """End a request; its stream still gets its result, with `finish_reason` "cancelled".

        Returns False if no such request is running.
        """

        def cancel() -> bool:
            answer = self._text.cancel(request_id)
            if answer is None:
                return False
            self._deliver([answer])
            return True

        return await asyncio.wrap_future(self._loop.call(cancel))

    async def stats(self) -> dict[str, Any]:
        """Gauges and counters of the scheduler, the KV pool and the loop."""
        return await asyncio.wrap_future(self._loop.call(self._text.stats))

    async def close(self) -> None:
        """Stop the loop and free the engine. Requests still running end with EngineStoppedError."""
        await asyncio.to_thread(self._loop.close)

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    def _withdraw(self, submitted: Future[str]) -> None:
        """The same of a request whose caller went away while it was being queued: the engine may have it already."""
        if not submitted.cancelled() and submitted.exception() is None:
            self._drop(submitted.result())

    def _drop(self, request_id: str) -> None:
        """Forget a listener that went away, and cancel its request if it still runs."""
        if self._listeners.pop(request_id, None) is not None:
            self._text.cancel(request_id)

    def _deliver(self, answers: Sequence[Answer]) -> None:
        """Wake the listeners, each event loop once: there, and not in the engine's thread, tokens become text."""
        due: dict[asyncio.AbstractEventLoop, list[_News]] = {}
        for answer in answers:
            listener = self._listeners.get(answer.request.request_id)
            if listener is None:
                continue
            if answer.finished:
                del self._listeners[answer.request.request_id]
            due.setdefault(listener.loop, []).append((listener, answer, answer.finished))
        for loop, news in due.items():
            _call(loop, _tell, news)

    def _stopped(self, reason: str) -> None:
        """End every stream."""
        for listener in self._listeners.values():
            stopped: list[Item] = [EngineStoppedError(reason)]
            _call(listener.loop, listener.put, stopped)
        self._listeners.clear()


class _Listener:
    """One caller's items. Belongs to his event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._queue: asyncio.Queue[list[Item]] = asyncio.Queue()

    def hear(self, answer: Answer, over: bool) -> None:
        """The answer has something to say; `over`: for the last time."""
        items: list[Item] = list(answer.take_events())
        if over:
            items.append(answer.output())
        if items:
            self.put(items)

    def put(self, items: list[Item]) -> None:
        self._queue.put_nowait(items)

    async def take(self) -> list[Item]:
        return await self._queue.get()


_News = tuple[_Listener, Answer, bool]
"""Whose answer has something to say, and whether for the last time."""


def _tell(news: Sequence[_News]) -> None:
    for listener, answer, over in news:
        listener.hear(answer, over)


def _call(loop: asyncio.AbstractEventLoop, function: Callable[[T], None], argument: T) -> None:
    """Have an event loop call a function."""
    try:
        loop.call_soon_threadsafe(function, argument)
    except RuntimeError:
        logger.debug("a caller's event loop closed before its answer came")
