"""Many clients that behave badly and an engine that dies: afterwards everything is as it was before.

64 streams send requests, more than the engine takes at once; some are bad, left, stopped or late, and the engine is
killed twice. Every request gets what it is due, at the end every block is free, and memory has not grown.
"""

from __future__ import annotations

import contextlib
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from faulty_executor import NAME, Control
from triton_service import TritonService, in_threads, process_tree

from apar.runtime.llm import LLM
from apar.runtime.sampling_params import SamplingParams
from apar.runtime.serving.triton_server import TritonServer

STREAMS = 64
MAX_REQUESTS = 40
"""Fewer than there are streams, so that some are refused."""
MAX_TOKENS = 120
LIMIT = 32 << 20
"""Bytes by which all processes together may grow: what the pool (10 MiB), tables and allocators may still touch."""
RETRY = ("overloaded", "engine_unavailable")
BAD: list[tuple[dict[str, Any], str]] = [
    ({"text_input": ""}, "invalid_request"),
    ({"max_tokens": 4}, "invalid_request"),
    ({"text_input": "Hello?", "temperature": -1.0}, "invalid_request"),
    ({"text_input": "Hello?", "stop_words": ["a"] * 5000}, "invalid_request"),
    ({"messages": "[" * 5000}, "invalid_request"),
    ({"text_input": "word " * 2000}, "context_exceeded"),
]


@pytest.fixture(scope="module")
def control(tmp_path_factory: pytest.TempPathFactory) -> Control:
    return Control(tmp_path_factory.mktemp("control"))


@pytest.fixture(scope="module")
def service(
    installed_server: TritonServer, tiny_engine: Path, tmp_path_factory: pytest.TempPathFactory, control: Control
) -> Iterator[TritonService]:
    parameters = {
        "executor": NAME,
        "executor_options": json.dumps({"control": str(control.folder)}),
        "max_requests": str(MAX_REQUESTS),
        "num_blocks": "160",
    }
    folder = tmp_path_factory.mktemp("faults")
    with TritonService(installed_server, folder, tiny_engine, parameters=parameters) as running:
        yield running


class Crowd:
    """Clients that share a list of requests and note how each ended."""

    def __init__(self, service: TritonService, expected: dict[str, str], seed: int) -> None:
        self.ends: Counter[str] = Counter()
        """Requests by what was asked and how it ended, such as `plain: stop`."""
        self.retries: Counter[str] = Counter()
        self.done = 0
        self._service = service
        self._restarts = service.metrics()["apar:engine_restarts_total"]
        self._kills = 0
        self._expected = expected
        self._seed = seed
        self._lock = threading.Lock()

    def run(self, count: int, kills: int = 0) -> None:
        """Send `count` requests over the streams, and kill the engine at as many moments, evenly spread."""
        numbers = iter(range(count))
        begin = self.done
        moments = [begin + count * (i + 1) // (kills + 1) for i in range(kills)]

        def work(stream: int) -> None:
            while True:
                with self._lock:
                    number = next(numbers, None)
                if number is None:
                    return
                self._one(f"{self._seed}-{begin}-{number}")
                with self._lock:
                    self.done += 1
                    kill = bool(moments) and self.done >= moments[0]
                    if kill:
                        del moments[0]
                if kill:
                    self._kill()

        in_threads(STREAMS, work)
        assert self.done == begin + count

    def _kill(self) -> None:
        """Kill the engine that serves now: not one that is dead already, nor one that is only starting."""
        self._service.await_metrics(engine_ready=1, engine_restarts_total=self._restarts + self._kills)
        self._kills += 1
        self._service.kill_engine()

    def _one(self, name: str) -> None:
        choose = random.Random(name)
        kind = choose.choices(["plain", "left", "stopped", "bad", "late"], [50, 18, 12, 14, 6])[0]
        question = choose.choice(list(self._expected))
        inputs: dict[str, Any] = {"text_input": question, "max_tokens": MAX_TOKENS, "id": name}
        model = choose.choice(["apar", "apar", "ensemble", "tensorrt_llm_bls"])
        wanted = ""
        if kind == "bad":
            inputs, wanted = choose.choice(BAD)
        elif kind == "late":
            inputs["timeout_ms"] = choose.randint(1, 300)
        # A client that is told to come back later does so.
        for attempt in range(2000):
            end, text = self._ask(kind, choose.randint(1, 12), inputs, model)
            if end not in RETRY:
                break
            with self._lock:
                self.retries[end] += 1
            time.sleep(min(0.02 * 2**attempt, 0.5))
        with self._lock:
            self.ends[f"{kind}: {end}"] += 1
        if kind == "bad":
            assert end in (wanted, "engine_failed")  # the latter where the engine was killed before it had read it
        elif end == "stop" or (end == "length" and kind == "plain"):
            assert text == self._expected[question]

    def _ask(self, kind: str, patience: int, inputs: dict[str, Any], model: str) -> tuple[str, str]:
        """One request; how it ended and its text. A stream that just ends without a last response fails the test."""
        text, finals = "", 0
        end = ""
        with contextlib.closing(self._service.stream(inputs, model)) as responses:  # type: ignore[type-var]
            for count, response in enumerate(responses):
                assert not finals, "something came after the last response"
                if "error" in response:
                    end = response["error"].split(":")[0]
                    finals += 1
                    continue
                text += response["text_output"]
                if "finish_reason" in response:
                    end = response["finish_reason"]
                    finals += 1
                elif kind == "left" and count >= patience:
                    return "left", text
                elif kind == "stopped" and count == patience:
                    self._service.generate({"stop": True, "id": inputs["id"]}, "tensorrt_llm")
        assert finals == 1, f"a {kind} request ended without a last response"
        return end, text


@pytest.fixture(scope="module")
def expected(reference: LLM, questions: list[str]) -> dict[str, str]:
    asked = questions[:24]
    outputs = reference.generate(asked, SamplingParams(max_tokens=MAX_TOKENS))
    return {question: output.text for question, output in zip(asked, outputs, strict=True)}


def memory(service: TritonService) -> int:
    """Private bytes of the server and everything that it started, once nothing runs."""
    service.await_idle()
    total = 0
    for pid in [service.pid, *process_tree(service.pid)]:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith(("Private_Clean:", "Private_Dirty:")):
                    total += int(line.split()[1]) << 10
    return total


@pytest.mark.parametrize(
    "count", [pytest.param(240, marks=pytest.mark.slow), pytest.param(2000, marks=[pytest.mark.slow, pytest.mark.soak])]
)
def test_faults(service: TritonService, control: Control, expected: dict[str, str], count: int) -> None:
    restarts = service.await_idle()["apar:engine_restarts_total"]
    crowd = Crowd(service, expected, seed=count)
    crowd.run(count // 2, kills=2)
    service.await_engine()
    service.await_metrics(engine_restarts_total=restarts + 2)
    settled = memory(service)
    crowd.run(count - count // 2)
    grown = memory(service) - settled
    assert grown < LIMIT, f"memory grew by {grown >> 20} MiB"

    found = crowd.ends
    assert found["plain: stop"] + found["plain: length"] > count // 4
    for end in ("plain: engine_failed", "left: left", "stopped: cancelled", "late: deadline_exceeded"):
        assert found[end], f"no request ended as {end!r}: {found}"
    known = {"stop", "length", "cancelled", "engine_failed", "deadline_exceeded", "left", "invalid_request"}
    assert {end.split(": ")[1] for end in found} <= known | {"context_exceeded"}
    assert crowd.retries["overloaded"] and crowd.retries["engine_unavailable"]
    for model in ("apar", "ensemble", "tensorrt_llm_bls"):
        for question, text in list(expected.items())[:3]:
            assert service.generate({"text_input": question, "max_tokens": MAX_TOKENS}, model)["text_output"] == text
    service.await_idle()

    # The negative control: an engine that does leak is found out by the same measurement.
    settled = memory(service)
    control.order(leak=1 << 20)
    crowd.run(count // 20)
    control.release()
    assert memory(service) - settled > LIMIT
    service.await_engine(other_than=service.kill_engine())
