"""The Python API: `LLM` for scripts.

    from apar.runtime.llm import LLM
    from apar.runtime.sampling_params import SamplingParams

    with LLM("tiny") as llm:
        answer = llm.generate("How do I grow tomatoes?", SamplingParams(max_tokens=300))[0]
        print(answer.text, answer.timing.steps, answer.usage.completion_tokens)

`async_llm.AsyncLLM` is its streaming twin for servers.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from apar.export.errors import EngineStoppedError, RequestError
from apar.export.manifest import Manifest
from apar.runtime.answer import Answer
from apar.runtime.engine import Engine
from apar.runtime.engine_loop import CLOSED
from apar.runtime.engine_source import resolve_engine
from apar.runtime.executor import Executor, load_executor
from apar.runtime.limits import SchedulerLimits
from apar.runtime.outputs import BranchEvent, RequestOutput
from apar.runtime.sampling_params import SamplingParams
from apar.runtime.speculative.options import DraftOptions
from apar.runtime.text_engine import Prompt, TextEngine
from apar.runtime.tokenizer import Tokenizer


class LLM:
    """An engine on this machine, driven by the calling thread. Calls of several threads decode side by side.

    Args:
        engine: an engine directory, a Hugging Face checkpoint directory (built once into the cache
            directory), or `tiny`, the model that ships with the package.
        executor: `auto`, `onnx`, `torch`, `tensorrt`, or `package.module:Class`.
        limits: sizes of the scheduler.
        draft: speculative decoding: `none` (default), `medusa`, `ngram`, or DraftOptions (docs/speculation.md).
        options: of the executor, such as `num_blocks`, `kv_memory_bytes`, `host_blocks`, `threads`, `graph`.

    Raises EngineError, ExecutorError, TokenizerError or PluginError if the engine cannot be loaded.
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
        self.engine_directory = resolve_engine(engine)
        self._text = load_text_engine(self.engine_directory, executor, limits, draft=draft, **options)
        self._lock = threading.RLock()
        self._inside = False
        """Whether the thread that holds the lock is at work on the engine."""
        self._left: deque[Answer] = deque()
        """Answers that nobody waits for any more, to be cancelled as soon as the engine is at rest."""
        self._closed = False

    @property
    def manifest(self) -> Manifest:
        """Of the engine."""
        return self.executor.manifest

    @property
    def executor(self) -> Executor:
        """The executor that runs the engine."""
        return self._text.engine.executor

    @property
    def tokenizer(self) -> Tokenizer:
        """Of the engine."""
        return self._text.tokenizer

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        chat: bool = True,
        timeout: float | None = None,
        on_event: Callable[[BranchEvent], None] | None = None,
    ) -> list[RequestOutput]:
        """Answer one prompt or many; all of them decode together.

        Args:
            prompts: one prompt or a list of prompts. A prompt is a text, token ids, or chat messages.
            params: for all prompts, or one for each.
            chat: put a text prompt into the chat template; False continues it as it stands.
            timeout: seconds after which answers that still run end as they are, with `finish_reason` "deadline".
            on_event: called with every branch event while decoding.

        Returns one result for each prompt, in order; one whose steps failed has `finish_reason` "error".
        Raises RequestError if a prompt or its parameters are not acceptable; nothing has run then. Raises
        EngineStoppedError after `close`.
        """
        answers = self._submit_all(prompts, params, chat, timeout, listens=on_event is not None)
        try:
            for event in self._events(answers):
                if on_event is not None:
                    on_event(event)
        finally:
            self._abandon(answers)
        return [answer.output() for answer in answers]

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        chat: bool = True,
        timeout: float | None = None,
    ) -> Iterator[BranchEvent | RequestOutput]:
        """Answer one prompt, event by event; the last item is the result. Closing the iterator cancels.
        Arguments as for `generate`.

        Raises RequestError at the call, not at the first item.
        """
        answers = self._submit_all([prompt], params, chat, timeout, listens=True)
        stream = self._stream(answers)
        # A generator that was never begun runs no `finally` when it goes.
        weakref.finalize(stream, self._abandon, answers).atexit = False
        return stream

    def _stream(self, answers: list[Answer]) -> Generator[BranchEvent | RequestOutput, None, None]:
        try:
            yield from self._events(answers)
            yield answers[0].output()
        finally:
            self._abandon(answers)

    def _events(self, answers: list[Answer]) -> Generator[BranchEvent, None, None]:
        """Step until these answers are finished; whoever waits for others finds their events in them."""
        while True:
            with self._turn():
                self._check_open()
                over = self._text.idle or all(answer.finished for answer in answers)
                if not over:
                    self._text.step()
                events = [event for answer in answers for event in answer.take_events()]
            yield from events
            if over:
                return

    def stats(self) -> dict[str, Any]:
        """Gauges and counters of the scheduler, the KV pool and the loop. Raises EngineStoppedError after `close`."""
        with self._turn():
            self._check_open()
            return self._text.stats()

    def close(self) -> None:
        """Free the engine. Idempotent; calls that still run raise EngineStoppedError."""
        with self._turn():
            self._closed = True
            self._text.close()

    def _check_open(self) -> None:
        if self._closed:
            raise EngineStoppedError(CLOSED)

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _submit_all(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None,
        chat: bool,
        timeout: float | None,
        listens: bool,
    ) -> list[Answer]:
        batch = as_batch(prompts)
        given: object = params  # callers without a type checker pass anything
        if params is None or isinstance(params, SamplingParams):
            each = [params or SamplingParams()] * len(batch)
        elif not isinstance(given, Sequence):
            raise RequestError(f"params must be SamplingParams or a list of them, not {type(given).__name__}")
        else:
            each = list(params)
            if len(each) != len(batch):
                raise RequestError(
                    f"{len(batch)} prompts came with {len(each)} sets of parameters; give one or as many"
                )
        answers: list[Answer] = []
        arrived = self._text.engine.clock()
        try:
            for i, (prompt, own) in enumerate(zip(batch, each, strict=True)):
                with _naming_prompt(i, len(batch)), self._turn():
                    self._check_open()
                    ids = self._text.encode(prompt, chat)
                    answers.append(self._text.submit(ids, own, listens=listens, arrived=arrived, timeout=timeout))
        except BaseException:
            self._abandon(answers)
            raise
        return answers

    def _abandon(self, answers: list[Answer]) -> None:
        """Cancel what an exception or a closed iterator left unfinished."""
        self._left.extend(answers)
        with self._turn():
            pass

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Held for a step, and for whatever else touches the engine; not while a caller's own code runs.

        The garbage collector may drop an iterator anywhere, in the middle of a step too: what it leaves is cancelled
        at the end of the turn.
        """
        with self._lock:
            if self._inside:
                yield
                return
            self._inside = True
            try:
                yield
            finally:
                while self._left:
                    answer = self._left.popleft()
                    if not self._closed:
                        self._text.cancel(answer.request.request_id)
                self._inside = False


def load_text_engine(
    directory: Path,
    executor: str = "auto",
    limits: SchedulerLimits | None = None,
    *,
    draft: DraftOptions | str | None = None,
    served: bool = False,
    **options: Any,
) -> TextEngine:
    """Load an engine directory with its tokenizer; arguments as for `LLM`, `served` as for `load_executor`."""
    chosen = DraftOptions.of(draft)
    tokenizer = Tokenizer.load(directory)
    sizes = limits or SchedulerLimits()
    loaded = load_executor(directory, executor, room=(sizes.max_rows, sizes.max_step_tokens), served=served, **options)
    try:
        return TextEngine(Engine(loaded, limits, draft=chosen), tokenizer)
    except BaseException:
        loaded.close()
        raise


@contextmanager
def _naming_prompt(index: int, count: int) -> Iterator[None]:
    """Says which of several prompts an error is about."""
    try:
        yield
    except RequestError as error:
        if count == 1:
            raise
        raise type(error)(f"prompt {index}: {error}") from error


def as_batch(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or several, as a list: a text, a list of ids and a list of messages are one prompt."""
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):
        return [prompts]
    if not prompts:
        raise RequestError("no prompt was given")
    if isinstance(prompts, bytes) or isinstance(prompts[0], int | dict):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]
