"""A service under load through its OpenAI API, and the same work through the runtime alone."""

from __future__ import annotations

import asyncio
import json
import statistics
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import aiohttp

from apar.export.errors import ServingError
from apar.runtime.async_llm import AsyncLLM
from apar.runtime.outputs import DeltaEvent, RequestOutput
from apar.runtime.sampling_params import SamplingParams

Prompt = str | list[Any]
"""A question, or chat messages."""
Progress = Callable[[int, int], None]
FORKED, PLAIN = "forked", "plain"
MODES = (PLAIN, FORKED)


@dataclass(slots=True)
class Load:
    """What is asked."""

    prompts: Sequence[Prompt]
    streams: Sequence[int] = (1, 8, 32)
    """Numbers of requests in flight, one after another."""
    requests: int = 64
    """Requests at each of them, at least one a stream; prompts are taken in turn."""
    max_tokens: int = 256
    repeat: int = 1


@dataclass(slots=True)
class _Answer:
    """Times of one answer, in seconds from its request."""

    tokens: int = 0
    first: float = 0.0
    last: float = 0.0
    gaps: list[float] = field(default_factory=list)
    """Between pieces of the answer that came after one another."""

    def came(self, at: float) -> None:
        if self.first:
            self.gaps.append(at - self.last)
        else:
            self.first = at
        self.last = at


Ask = Callable[[Prompt, bool], Awaitable[_Answer]]
"""Asks with or without forks."""


async def measure(
    load: Load, url: str, model: str, api_key: str | None, llm: AsyncLLM | None, progress: Progress | None = None
) -> list[dict[str, Any]]:
    """A record for each number of streams and mode.

    url: of the API, ending in /v1. llm: the runtime alone, to compare with; runs in turn with the service. Raises
    ServingError where a request fails: a measurement with failures means nothing.
    """
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    total = len(load.streams) * len(MODES) * load.repeat * (2 if llm else 1)
    done = 0
    async with aiohttp.ClientSession(
        headers=headers, connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=None)
    ) as session:

        async def over_http(prompt: Prompt, fork: bool) -> _Answer:
            return await _ask_service(session, url, model, prompt, fork, load.max_tokens)

        async def in_process(prompt: Prompt, fork: bool) -> _Answer:
            assert llm is not None
            return await _ask_runtime(llm, prompt, fork, load.max_tokens)

        ways: dict[str, Ask] = {"service": over_http}
        if llm:
            ways["runtime"] = in_process
        for ask in ways.values():  # first use of memory and caches
            await ask(load.prompts[0], True)
        records = []
        for streams in load.streams:
            for mode in MODES:
                runs: dict[str, list[tuple[float, list[_Answer]]]] = {way: [] for way in ways}
                for turn in range(load.repeat):
                    for way in list(ways) if turn % 2 == 0 else reversed(list(ways)):
                        runs[way].append(await _run(load, ways[way], streams, mode == FORKED))
                        done += 1
                        if progress:
                            progress(done, total)
                record: dict[str, Any] = {"streams": streams, "mode": mode}
                record |= {way: _figures(results) for way, results in runs.items()}
                if llm:
                    service, runtime = record["service"], record["runtime"]
                    per_token = 1 / service["tokens_per_second"] - 1 / runtime["tokens_per_second"]
                    record["overhead_us_per_token"] = 1e6 * per_token
                records.append(record)
        return records


async def _run(load: Load, ask: Ask, streams: int, fork: bool) -> tuple[float, list[_Answer]]:
    """Ask all requests with so many in flight; seconds and answers."""
    count = max(load.requests, streams)
    waiting = [load.prompts[number % len(load.prompts)] for number in range(count)][::-1]
    answers: list[_Answer] = []

    async def stream() -> None:
        while waiting:
            answers.append(await ask(waiting.pop(), fork))

    began = perf_counter()
    await asyncio.gather(*(stream() for _ in range(streams)))
    return perf_counter() - began, answers


async def _ask_service(
    session: aiohttp.ClientSession, url: str, model: str, prompt: Prompt, fork: bool, max_tokens: int
) -> _Answer:
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    body: dict[str, Any] = {
        "model": model,
        "messages": messages,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    body |= {"max_tokens": max_tokens, "temperature": 0, "fork": fork}
    answer, began = _Answer(), perf_counter()
    try:
        async with session.post(f"{url}/chat/completions", json=body) as response:
            if response.status != 200:
                raise ServingError(f"{url} answered with status {response.status}: {(await response.text())[:300]}")
            async for chunk in _chunks(response.content):
                if "error" in chunk:
                    raise ServingError(f"{url} ended an answer: {chunk['error']['message']}")
                if chunk["choices"] and chunk["choices"][0]["delta"].get("content"):
                    answer.came(perf_counter() - began)
                if chunk.get("usage"):
                    answer.tokens = chunk["usage"]["completion_tokens"]
    except aiohttp.ClientError as error:
        raise ServingError(f"{url} cannot be reached: {error}") from error
    if not answer.tokens:
        raise ServingError(f"{url} ended an answer without its usage")
    return answer


async def _chunks(content: aiohttp.StreamReader) -> AsyncIterator[dict[str, Any]]:
    held = b""
    async for part in content.iter_any():
        *events, held = (held + part).split(b"\n\n")
        for event in events:
            if event.startswith(b"data: {"):
                yield json.loads(event[6:])


async def _ask_runtime(llm: AsyncLLM, prompt: Prompt, fork: bool, max_tokens: int) -> _Answer:
    answer, began = _Answer(), perf_counter()
    async for item in llm.stream(prompt, SamplingParams(max_tokens=max_tokens, fork=fork)):
        if isinstance(item, RequestOutput):
            answer.tokens = item.usage.completion_tokens
        elif isinstance(item, DeltaEvent) and item.text:
            answer.came(perf_counter() - began)
    return answer


def _figures(runs: Sequence[tuple[float, list[_Answer]]]) -> dict[str, Any]:
    """Medians over repeats of the throughput; percentiles over all answers of the times."""
    answers = [answer for _, found in runs for answer in found]
    rates = [sum(answer.tokens for answer in found) / seconds for seconds, found in runs]
    return {
        "requests": len(answers),
        "tokens": sum(answer.tokens for answer in answers),
        "tokens_per_second": statistics.median(rates),
        "requests_per_second": statistics.median(len(found) / seconds for seconds, found in runs),
        "first_token_ms": _percentiles([answer.first for answer in answers]),
        "between_pieces_ms": _percentiles([gap for answer in answers for gap in answer.gaps]),
        "answer_ms": _percentiles([answer.last for answer in answers]),
    }


def _percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """In milliseconds, by nearest rank."""
    ordered = sorted(seconds)
    if not ordered:
        return {"p50": 0.0, "p90": 0.0, "p99": 0.0}
    return {f"p{p}": 1e3 * ordered[min(len(ordered) - 1, len(ordered) * p // 100)] for p in (50, 90, 99)}
