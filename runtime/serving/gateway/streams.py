"""The model's responses to all choices of a job, as they come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from uuid import uuid4

import aiohttp

from apar.runtime.serving.gateway.requests import Job
from apar.runtime.serving.model_responses import ModelResponse, TritonError
from apar.runtime.serving.triton_stream import IdleWatch, stream_model

DEADLINE_MARGIN = 2.0

Item = tuple[int, ModelResponse]


async def run_job(session: aiohttp.ClientSession, url: str, job: Job, watch: IdleWatch) -> AsyncGenerator[Item, None]:
    """Pairs of a choice's index and a response of it, until every choice has its last. Raises TritonError.

    Closing the generator, or an error in one choice, ends all of them.
    """
    if len(job.inputs) == 1:
        async with aclosing(_answer(session, url, job, 0, watch)) as responses:
            async for response in responses:
                yield 0, response
        return
    queue: asyncio.Queue[Item | TritonError | None] = asyncio.Queue(maxsize=2 * len(job.inputs))
    tasks = [asyncio.create_task(_feed(queue, index, session, url, job, watch)) for index in range(len(job.inputs))]
    try:
        running = len(tasks)
        while running:
            item = await queue.get()
            if item is None:
                running -= 1
            elif isinstance(item, TritonError):
                raise item
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _feed(
    queue: asyncio.Queue[Item | TritonError | None],
    index: int,
    session: aiohttp.ClientSession,
    url: str,
    job: Job,
    watch: IdleWatch,
) -> None:
    try:
        async with aclosing(_answer(session, url, job, index, watch)) as responses:
            async for response in responses:
                await queue.put((index, response))
        await queue.put(None)
    except TritonError as error:
        await queue.put(error)


async def _answer(
    session: aiohttp.ClientSession, url: str, job: Job, index: int, watch: IdleWatch
) -> AsyncGenerator[ModelResponse, None]:
    """Responses to one choice; its prompt in front of the first, where it is to be echoed."""
    # An id of our own, never the client's: whoever knows an id can stop its request.
    inputs = job.inputs[index] | {"id": uuid4().hex}
    echo = inputs["text_input"] if job.echo else ""
    # The engine ends a request at its deadline by itself, and says so; ours is for an engine that does not.
    seconds = job.common.deadline + DEADLINE_MARGIN
    async with aclosing(stream_model(session, url, inputs, deadline=seconds, watch=watch)) as responses:
        async for response in responses:
            if echo:
                response.text, echo = echo + response.text, ""
            yield response
