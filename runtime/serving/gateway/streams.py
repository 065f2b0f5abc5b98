"""The model's responses to all choices of a job, as they come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any
from uuid import uuid4

import aiohttp

from apar.runtime.serving.gateway.requests import Job
from apar.runtime.serving.model_responses import ModelResponse, TritonError
from apar.runtime.serving.triton_stream import IdleWatch, stream_model

Item = tuple[int, ModelResponse]


async def run_job(session: aiohttp.ClientSession, url: str, job: Job, watch: IdleWatch) -> AsyncGenerator[Item, None]:
    """Pairs of a choice's index and a response of it, until every choice has its last. Raises TritonError.

    Closing the generator, or an error in one choice, ends all of them.
    """
    if len(job.inputs) == 1:
        async for response in stream_model(session, url, _with_id(job.inputs[0]), deadline=_deadline(job), watch=watch):
            yield 0, response
        return
    queue: asyncio.Queue[Item | TritonError | None] = asyncio.Queue(maxsize=2 * len(job.inputs))
    tasks = [
        asyncio.create_task(_feed(queue, index, session, url, inputs, job, watch))
        for index, inputs in enumerate(job.inputs)
    ]
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
    inputs: dict[str, Any],
    job: Job,
    watch: IdleWatch,
) -> None:
    try:
        async for response in stream_model(session, url, _with_id(inputs), deadline=_deadline(job), watch=watch):
            await queue.put((index, response))
        await queue.put(None)
    except TritonError as error:
        await queue.put(error)


def _with_id(inputs: dict[str, Any]) -> dict[str, Any]:
    # An id of our own, never the client's: whoever knows an id can stop its request.
    return inputs | {"id": uuid4().hex}


def _deadline(job: Job) -> float:
    # The engine ends a request at its deadline by itself, and says so; this is for an engine that does not.
    return job.common.deadline + 2.0
