"""Thousands of requests, most of them rude: afterwards the gateway serves, holds nothing, and has not grown."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from pathlib import Path

import aiohttp
import pytest
from served_process import ServedProcess, wait_for

REQUESTS, STREAMS, SLACK_MB = 3000, 64, 24
QUESTION = [{"role": "user", "content": "Tell me about the violin."}]


def memory_mb(pid: int) -> float:
    """Memory that a process holds."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * 4096 / 2**20


async def one(session: aiohttp.ClientSession, url: str, chance: random.Random) -> str:
    """A request of a random kind; returns what became of it."""
    kind = chance.choice(("whole", "stream", "leave", "leave early", "bad", "deep", "many"))
    body = {"model": "tiny", "messages": QUESTION, "max_tokens": chance.randrange(1, 60), "stream": kind != "whole"}
    data = json.dumps(body).encode()
    if kind == "bad":
        data = json.dumps(body | {"temperature": "hot"}).encode()
    elif kind == "deep":
        data = b"[" * 5000
    elif kind == "many":
        data = json.dumps(body | {"n": 3, "logprobs": True, "branch_events": True}).encode()
    elif kind.startswith("leave"):
        data = json.dumps(body | {"max_tokens": 900, "ignore_eos": True}).encode()
    try:
        if kind == "leave early":
            await asyncio.wait_for(session.post(url, data=data), chance.random() / 5)
            return kind
        async with session.post(url, data=data) as response:
            if kind == "leave":
                await response.content.read(chance.randrange(1, 2000))
                response.close()
                return kind
            text = await response.text()
            done = response.status != 200 or kind == "whole" or text.endswith("data: [DONE]\n\n")
            return f"{kind} {response.status}" if done else f"{kind} cut: {text[-300:]}"
    except asyncio.TimeoutError:
        return kind


@pytest.mark.soak
def test_rude_clients(tiny_engine: Path, tmp_path: Path) -> None:
    with ServedProcess(tiny_engine, tmp_path, "--max-requests", "48") as service:

        async def run(count: int, seed: int) -> Counter[str]:
            chance = random.Random(seed)
            left = iter(range(count))
            outcomes: Counter[str] = Counter()
            timeout = aiohttp.ClientTimeout(total=120)
            async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:

                async def worker() -> None:
                    for _ in left:
                        outcomes[await one(session, f"{service.urls['openai']}/chat/completions", chance)] += 1

                await asyncio.gather(*(worker() for _ in range(STREAMS)))
            return outcomes

        outcomes = asyncio.run(run(REQUESTS // 2, 0))
        before = memory_mb(service.process.pid), memory_mb(service.server_pid())
        outcomes += asyncio.run(run(REQUESTS // 2, 1))
        after = memory_mb(service.process.pid), memory_mb(service.server_pid())
        assert set(outcomes) <= {
            "whole 200", "whole 429", "stream 200", "stream 429", "many 200", "many 429", "bad 400", "bad 429",
            "deep 400", "deep 429", "leave", "leave early",
        }, outcomes  # fmt: skip
        assert outcomes["stream 200"] > 50 and outcomes["whole 200"] > 50 and outcomes["stream 429"]
        assert wait_for(
            lambda: service.metric("apar:num_requests_running") + service.metric("apar:kv_blocks_used") == 0
        )
        assert service.metric("apar:gateway_answers_in_flight") == 0
        assert service.metric("apar:gateway_server_restarts") == 0
        assert all(a - b < SLACK_MB for a, b in zip(after, before, strict=True)), (before, after, outcomes)
        with service.client() as client:
            assert client.completions.create(model="tiny", prompt="a", max_tokens=1).choices
        print(dict(outcomes), before, after)
