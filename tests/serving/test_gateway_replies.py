"""Log-probabilities in reading order, and admission. No server is needed here."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest

from apar.runtime.serving.gateway.admission import Admission
from apar.runtime.serving.gateway.errors import ApiError, from_triton
from apar.runtime.serving.gateway.reading_logprobs import ReadingLogprobs
from apar.runtime.serving.model_responses import BranchStep, model_error


def entry(branch: int, token: str) -> dict[str, Any]:
    return {"branch_id": branch, "token": token, "bytes": list(token.encode()), "logprob": -1.0, "top": []}


class TestReadingOrder:
    def test_tokens_are_read_where_their_text_is(self) -> None:
        order = ReadingLogprobs()
        read = order.feed([BranchStep("delta", 0, -1, 1, "a", 2, 1)], [entry(0, "a"), entry(0, "")])
        read += order.feed([BranchStep("fork", 1, 0, 2, "", 0, 1)], [])
        # The root goes on while its child speaks: the child's words are read first, though they come later.
        both = [BranchStep("delta", 0, -1, 1, "z", 1, 2), BranchStep("delta", 1, 0, 2, "b", 1, 2)]
        read += order.feed(both, [entry(0, "z"), entry(1, "b")])
        assert [e["token"] for e in read] == ["a", "b"]
        read += order.feed([BranchStep("finish", 1, 0, 2, "stop", 0, 3)], [])
        assert [e["token"] for e in read] == ["a", "b", "z"]

    def test_any_interleaving_gives_the_same_order(self) -> None:
        random.seed(0)
        events = {
            0: [("delta", "0a"), ("fork", 1), ("delta", "0b"), ("fork", 2), ("delta", "0c"), ("finish", "")],
            1: [("delta", "1a"), ("fork", 3), ("delta", "1b"), ("finish", "")],
            2: [("finish", "")],
            3: [("delta", "3a"), ("finish", "")],
        }
        for _ in range(50):
            order, left, alive, read = ReadingLogprobs(), {b: list(e) for b, e in events.items()}, {0}, []
            while alive:
                branch = random.choice(sorted(alive))
                kind, what = left[branch].pop(0)
                step = BranchStep(kind, branch, -1, 1, "", 1 if kind == "delta" else 0, 0)
                if kind == "fork":
                    step = BranchStep("fork", int(what), branch, 2, "", 0, 0)
                    alive.add(int(what))
                elif kind == "finish":
                    alive.discard(branch)
                read += order.feed([step], [entry(branch, str(what))] if kind == "delta" else [])
            assert [e["token"] for e in read] == ["0a", "1a", "3a", "1b", "0b", "0c"]


class TestAdmission:
    def test_limit(self) -> None:
        async def run() -> None:
            admission = Admission(3)
            with admission.admit(2):
                admission.check(1)
                with pytest.raises(ApiError) as caught, admission.admit(2):
                    pytest.fail("admitted")
                assert caught.value.status == 429 and caught.value.retry_after == 1
                assert admission.in_flight == 2
            assert admission.in_flight == 0
            await asyncio.wait_for(admission.wait_idle(), 1)
            admission.draining = True
            with pytest.raises(ApiError) as caught:
                admission.check()
            assert caught.value.status == 503 and caught.value.retry_after

        asyncio.run(run())


class TestErrors:
    @pytest.mark.parametrize(
        ("text", "status", "code"),
        [
            ("invalid_request: the prompt is empty", 400, None),
            ("overloaded: later", 429, "overloaded"),
            ("deadline_exceeded: too late", 504, "deadline_exceeded"),
            # Triton's own, about itself: the client's request was well-formed.
            ("Stub process 'apar_0_0' is not healthy.", 503, "engine_unavailable"),
            ("Request for unknown model: 'apar' has no available versions", 503, "engine_unavailable"),
        ],
    )
    def test_of_the_server(self, text: str, status: int, code: str | None) -> None:
        error = from_triton(model_error(text))
        assert (error.status, error.code) == (status, code)
        assert (error.retry_after is not None) == (status in (429, 503))
